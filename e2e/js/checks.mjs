// A list of checks, run in order, one line each, every one with a deadline. The lines are those of
// ../python/checks.py: `ok NAME (MS ms)`, `FAIL NAME: reason`, `skip NAME: reason`, `# remark`.
import assert from 'node:assert/strict'
import { randomUUID } from 'node:crypto'
import { setTimeout as pause } from 'node:timers/promises'

const DEADLINE_MS = 120_000

export class Skip extends Error {}

export function setting(name) {
  const value = process.env[name]
  if (value) return value
  console.log(
    `failed to start: ${name} is not set; \`belljar up\` prints it, \`belljar env\` exports it`
  )
  process.exit(2)
}

export class Suite {
  failed = 0

  /** `onServer` is false for a suite that talks to a daemon of its own: no settings, no sandboxes. */
  constructor(prefix, onServer = true) {
    this.prefix = prefix
    this.onServer = onServer
    this.tag = `${prefix}-${randomUUID().slice(0, 12)}`
    if (!onServer) return
    for (const name of ['E2B_API_KEY', 'E2B_API_URL', 'E2B_SANDBOX_URL']) setting(name)
  }

  get metadata() {
    return { run: this.tag }
  }

  /** Runs `body(...inputs)`; gives what it gives, undefined if it did not pass. */
  async check(name, body, inputs = [], deadlineMs = DEADLINE_MS) {
    if (inputs.includes(undefined)) {
      console.log(`skip ${this.prefix}.${name}: needs an earlier check that did not pass`)
      return undefined
    }
    const started = performance.now()
    const cancel = new AbortController()
    try {
      const late = pause(deadlineMs, undefined, { signal: cancel.signal }).then(() => {
        throw new Error(`no result within ${deadlineMs} ms`)
      })
      late.catch(() => {}) // ended below, when the body was faster
      const value = await Promise.race([body(...inputs), late])
      console.log(`ok ${this.prefix}.${name} (${Math.round(performance.now() - started)} ms)`)
      return value
    } catch (error) {
      if (error instanceof Skip) console.log(`skip ${this.prefix}.${name}: ${error.message}`)
      else this.fail(name, error)
      return undefined
    } finally {
      cancel.abort()
    }
  }

  remark(text) {
    console.log(`# ${this.prefix}.${text}`)
  }

  fail(name, error) {
    this.failed += 1
    const text = String(error?.message ?? error)
      .replace(/\s+/g, ' ')
      .slice(0, 500)
    const where = /([\w.]+\.mjs:\d+)/.exec(error?.stack ?? '')?.[1] ?? 'somewhere'
    console.log(`FAIL ${this.prefix}.${name}: ${error?.name ?? 'Error'}: ${text} [${where}]`)
  }

  /** Kills what still carries the suite's tag; true if every check passed. */
  async finish() {
    if (!this.onServer) return this.failed === 0
    try {
      for (const id of await taggedIds(this.tag)) await api('DELETE', `/sandboxes/${id}`)
      assert.deepEqual(await taggedIds(this.tag), [], 'still listed after kill')
      console.log(`ok ${this.prefix}.nothing_left`)
    } catch (error) {
      this.fail('nothing_left', error)
    }
    return this.failed === 0
  }
}

/** A control-plane request without the SDK. */
export function api(method, path) {
  const headers = { 'X-API-Key': setting('E2B_API_KEY') }
  return fetch(setting('E2B_API_URL') + path, { method, headers })
}

/** Ids of the live sandboxes whose metadata has `run` = tag. */
export async function taggedIds(tag) {
  const filter = encodeURIComponent(`run=${encodeURIComponent(tag)}`)
  const answer = await api('GET', `/v2/sandboxes?metadata=${filter}`)
  assert.equal(answer.status, 200, 'status of the list')
  return (await answer.json()).map((entry) => entry.sandboxID)
}

/** Asks `probe` until it gives something true; for what only the server can announce. */
export async function until(deadlineMs, what, probe) {
  const end = performance.now() + deadlineMs
  for (;;) {
    const value = await probe()
    if (value) return value
    assert.ok(performance.now() < end, `not within ${deadlineMs} ms: ${what}`)
    await pause(200)
  }
}

/** The error a promise fails with, which must be of `kind`. */
export async function failure(kind, promise) {
  let value
  try {
    value = await promise
  } catch (error) {
    assert.ok(error instanceof kind, `wanted ${kind.name}, got ${error?.name}: ${error?.message}`)
    return error
  }
  assert.fail(`wanted ${kind.name}, got the value ${JSON.stringify(value)}`)
}
