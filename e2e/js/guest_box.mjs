// A sandbox for the guest scenarios: the SDK's own objects, and what its callbacks have told.
import assert from 'node:assert/strict'

import { Sandbox } from 'e2b'

export const COMMAND = { timeoutMs: 120_000 }
export const NOBODY = 4_000_000

/** What came so far, and a way to wait for more. */
export class Heard {
  out = ''
  err = ''
  #waiting = new Set()

  note(part) {
    this.out += part.out ?? ''
    this.err += part.err ?? ''
    for (const wake of [...this.#waiting]) wake()
  }

  async until(what, probe, deadlineMs = 120_000) {
    const late = Date.now() + deadlineMs
    while (!probe()) {
      await new Promise((resolve, reject) => {
        const wake = () => {
          clearTimeout(timer)
          this.#waiting.delete(wake)
          resolve()
        }
        const timer = setTimeout(() => {
          this.#waiting.delete(wake)
          reject(new Error(`not within ${deadlineMs} ms: ${what}; came ${this.out.slice(-200)}`))
        }, late - Date.now())
        this.#waiting.add(wake)
      })
    }
  }

  heard(text) {
    return this.until(JSON.stringify(text), () => this.out.includes(text))
  }
}

export class Box {
  constructor(target, sandbox, recorder) {
    Object.assign(this, { target, sandbox, recorder, scale: target.scale })
    recorder.watch(sandbox, 'Sandbox', ['isRunning'])
    this.commands = recorder.watch(sandbox.commands, 'Commands')
    this.pty = recorder.watch(sandbox.pty, 'Pty')
    this.files = recorder.watch(sandbox.files, 'Filesystem')
    this.git = recorder.watch(sandbox.git, 'Git')
  }

  static async create(target, recorder, options) {
    return new Box(target, await Sandbox.create('base', options), recorder)
  }

  path(name) {
    return `${this.target.base}/${name}`
  }

  run(command, options) {
    return this.commands.run(command, { ...COMMAND, ...options })
  }

  /** The output of a command that only sets a scene: as root, in the suite's folder. */
  async shell(command, options) {
    const given = { user: 'root', cwd: this.target.base, ...options }
    return (await this.run(command, given)).stdout
  }

  /** A command in the background: `{ handle, heard }`. */
  async start(command, options) {
    const heard = new Heard()
    const handle = await this.commands.run(command, {
      ...COMMAND,
      ...this.#hearing(heard),
      ...options,
      background: true,
    })
    return this.#took(handle, heard)
  }

  async attach(pid, options) {
    const heard = new Heard()
    const given = { ...COMMAND, ...this.#hearing(heard), ...options }
    return this.#took(await this.commands.connect(pid, given), heard)
  }

  async terminal(size, options) {
    const heard = new Heard()
    const given = { ...COMMAND, ...size, onData: this.#decoding(heard), ...options }
    return this.#took(await this.pty.create(given), heard)
  }

  async attachTerminal(pid) {
    const heard = new Heard()
    const given = { ...COMMAND, onData: this.#decoding(heard) }
    return this.#took(await this.pty.connect(pid, given), heard)
  }

  async watchDir(path, options) {
    const watch = { events: [], exits: [], grown: new Heard() }
    watch.handle = await this.files.watchDir(
      path,
      (event) => {
        watch.events.push(event)
        watch.grown.note({})
      },
      { timeoutMs: 0, onExit: (error) => watch.exits.push(error), ...options }
    )
    this.recorder.watch(watch.handle, 'WatchHandle')
    watch.until = (what, probe) => watch.grown.until(what, () => probe(watch.events), 60_000)
    watch.saw = (type, name) =>
      watch.until(`${type} of ${name}`, (events) =>
        events.some((event) => event.type === type && event.name === name)
      )
    return watch
  }

  #took(handle, heard) {
    this.recorder.watch(handle, 'CommandHandle')
    return { handle, heard, pid: handle.pid }
  }

  #hearing(heard) {
    return { onStdout: (out) => heard.note({ out }), onStderr: (err) => heard.note({ err }) }
  }

  #decoding(heard) {
    const decoder = new TextDecoder()
    return (data) => heard.note({ out: decoder.decode(data, { stream: true }) })
  }
}

/** "what: N MiB in S s, R MiB/s" */
export function rate(what, bytes, started) {
  const seconds = (performance.now() - started) / 1000
  const size = bytes / 1024 / 1024
  return `${what}: ${size} MiB in ${seconds.toFixed(1)} s, ${(size / seconds).toFixed(0)} MiB/s`
}
