// Which of the SDK's public methods a run has called.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'

/** Wraps the public methods of the SDK's classes in place and notes which ones a run has used.
 * Which are public is in the SDK's own type declarations: at run time nothing is private. */
export class Recorder {
  used = new Map()
  #declarations
  #classes = new Set()

  /** `importer` is the URL of a module that imports the SDK to be watched. */
  constructor(importer) {
    const program = createRequire(importer).resolve('e2b')
    this.#declarations = readFileSync(join(dirname(program), 'index.d.ts'), 'utf8')
  }

  watch(value, name, only) {
    const prototype = Object.getPrototypeOf(value)
    if (this.#classes.has(prototype)) return value
    this.#classes.add(prototype)
    for (const member of only ?? this.#publicMembers(name)) {
      const found = Object.getOwnPropertyDescriptor(prototype, member)
      assert.ok(found, `${name}.${member} is declared, but the class has no such member`)
      const key = found.get ? 'get' : 'value'
      const body = found[key]
      const noting = this.#noting(`${name}.${member}`)
      found[key] = function (...args) {
        noting()
        return body.apply(this, args)
      }
      Object.defineProperty(prototype, member, found)
    }
    return value
  }

  unused() {
    return [...this.used].filter(([, count]) => count === 0).map(([key]) => key)
  }

  #noting(key) {
    this.used.set(key, 0)
    return () => {
      const limit = Error.stackTraceLimit
      Error.stackTraceLimit = 3
      const caller = new Error().stack.split('\n')[3] ?? ''
      Error.stackTraceLimit = limit
      // The SDK's own calls do not count.
      if (!caller.includes('node_modules/e2b/')) this.used.set(key, this.used.get(key) + 1)
    }
  }

  #publicMembers(name) {
    const [, body] = new RegExp(`^declare class ${name} [^]*?{\n([^]*?)^}`, 'm').exec(
      this.#declarations
    )
    const members = [...body.matchAll(/^ {2,4}(?:get )?(\w+)[(<]/gm)].map(([, member]) => member)
    const methods = new Set(members.filter((member) => member !== 'constructor'))
    assert.ok(methods.size > 0, `no public member of ${name} found in the SDK's declarations`)
    return methods
  }
}
