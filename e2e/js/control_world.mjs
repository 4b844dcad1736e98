// What the control-plane checks of the JavaScript SDK share: calls that are noted, and sandboxes.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'
import { createRequire } from 'node:module'
import { dirname, join } from 'node:path'

import { Sandbox } from 'e2b'

import { until } from './checks.mjs'

export const MISSING = 'i' + '0'.repeat(20)

// Comes with network rules: until then the server must refuse, not pretend.
export const NOT_YET = new Set(['updateNetwork'])
// They are about what is in a guest, which is a guest in name only here.
export const SNAPSHOTS = new Set(
  'pause betaPause fork createSnapshot listSnapshots deleteSnapshot'.split(' ')
)
const ELSEWHERE = new Set(['getMcpToken', ...SNAPSHOTS])

const called = new Set()

/** Calls a method of the class or of a sandbox and notes it. */
export function call(target, name, ...args) {
  called.add(`${typeof target === 'function' ? 'class' : 'instance'} ${name}`)
  return target[name](...args)
}

/** What is callable on the class and on a sandbox, by the SDK's own declarations: at run time nothing
 * is private. Only the names for which `wanted` holds. */
export function members(wanted = (name) => !ELSEWHERE.has(name)) {
  const program = createRequire(import.meta.url).resolve('e2b')
  const declarations = readFileSync(join(dirname(program), 'index.d.ts'), 'utf8')
  const found = new Set()
  for (const name of ['SandboxApi', 'Sandbox']) {
    const [, body] = new RegExp(`^declare class ${name} extends [^]*?{\n([^]*?)^}`, 'm').exec(
      declarations
    )
    for (const [, isStatic, member] of body.matchAll(/^ {2}(static )?(\w+)[(<]/gm)) {
      if (member !== 'constructor') found.add(`${isStatic ? 'class' : 'instance'} ${member}`)
    }
  }
  assert.ok(found.size >= 20, `only ${found.size} members found: the search is broken`)
  return new Set([...found].filter((member) => wanted(member.split(' ')[1])))
}

export function everyMethodCalled(wanted) {
  assert.deepEqual([...members(wanted)].filter((member) => !called.has(member)).sort(), [])
}

/** Sandboxes with a tag of their own beside the suite's. */
export class World {
  constructor(suite, part) {
    this.metadata = { ...suite.metadata, part }
  }

  create({ metadata, template = 'base', ...options } = {}) {
    return call(Sandbox, 'create', template, {
      timeoutMs: 600_000,
      ...options,
      metadata: { ...this.metadata, ...metadata },
    })
  }

  kill(...sandboxes) {
    return Promise.all(sandboxes.map((sandbox) => call(sandbox, 'kill')))
  }

  /** The ids on all pages; `between` is awaited after each page with its ids. */
  async listed({ limit, order, between, ...query } = {}) {
    const pages = call(Sandbox, 'list', {
      limit,
      order,
      query: { metadata: this.metadata, ...query },
    })
    const found = []
    while (pages.hasNext) {
      const page = (await pages.nextItems()).map((entry) => entry.sandboxId)
      assert.ok(page.length <= (limit ?? 100), `a page of ${page.length}, limit ${limit}`)
      found.push(...page)
      await between?.(page)
    }
    return found
  }

  async secondsLeft(sandbox) {
    return (await call(sandbox, 'getInfo')).endAt.getTime() / 1000 - Date.now() / 1000
  }
}

export function near(found, wanted, what, slack = 3) {
  assert.ok(Math.abs(found - wanted) <= slack, `${what}: ${found.toFixed(1)}, wanted ${wanted}`)
}

/** Equal as sets, without repetitions. */
export function same(found, wanted, what) {
  assert.deepEqual([...found].sort(), [...wanted].sort(), what)
}

export function gone(sandboxId) {
  return until(10_000, `${sandboxId} is gone`, async () => {
    try {
      await Sandbox.getInfo(sandboxId)
      return false
    } catch (error) {
      return error.name === 'SandboxNotFoundError'
    }
  })
}
