// Ten minutes of silence through the JavaScript SDK, with its own settings for idle connections.
// See ../README.md.
//
//   guest_long.mjs [SECONDS OF SILENCE]
import assert from 'node:assert/strict'
import { setTimeout as pause } from 'node:timers/promises'

import { Suite } from './checks.mjs'
import { Box } from './guest_box.mjs'
import { target as chosenTarget } from './guest_target.mjs'
import { Recorder } from './recorder.mjs'

const silenceS = Number(process.argv[2] ?? 600)
const DEADLINE_MS = 1_500_000

/** Nothing on the stream but what the daemon itself sends to keep it open. */
async function silentCommand(box) {
  const started = performance.now()
  const { stdout } = await box.run(`sleep ${silenceS}; echo over`, { timeoutMs: 0 })
  assert.equal(stdout, 'over\n')
  return `told its end after ${((performance.now() - started) / 1000).toFixed(1)} s`
}

async function silentTerminal(box) {
  const { handle, heard, pid } = await box.terminal({ rows: 24, cols: 80 }, { timeoutMs: 0 })
  const line = `stty -echo; PS1=; sleep ${silenceS}; echo over-$((1 + 1)); exit\n`
  await box.pty.sendInput(pid, new TextEncoder().encode(line))
  await heard.until('the end of the silence', () => heard.out.includes('over-2'), DEADLINE_MS)
  assert.equal((await handle.wait()).exitCode, 0)
}

async function silentWatch(box) {
  const folder = box.path('silent')
  await box.files.makeDir(folder)
  const watch = await box.watchDir(folder)
  await pause(silenceS * 1000) // what is waited for is that nothing happens
  await box.files.write(`${folder}/at last`, 'x')
  await watch.saw('create', 'at last')
  assert.deepEqual(watch.exits, [])
  await watch.handle.stop()
}

/** A client that has not called for that long finds its connections, or makes new ones. */
async function idleClient(box) {
  await box.run('true')
  await pause(silenceS * 1000)
  assert.equal((await box.run('echo back')).stdout, 'back\n')
}

const target = await chosenTarget({})
const suite = new Suite(target.native ? 'long.js.native' : 'long.js', !target.native)
let passed = false
for (const signal of ['SIGINT', 'SIGTERM']) {
  process.once(signal, async () => {
    await Promise.allSettled([suite.finish(), target.stop()])
    process.exit(143)
  })
}
try {
  const box = await suite.check('create', () => {
    const options = { timeoutMs: 3_000_000, requestTimeoutMs: 120_000, metadata: suite.metadata }
    return Box.create(target, new Recorder(import.meta.url), options)
  })
  const bodies = [silentCommand, silentTerminal, silentWatch, idleClient]
  const checks = bodies.map(async (body) => {
    const said = await suite.check(body.name, body, [box], DEADLINE_MS)
    if (said) suite.remark(`${body.name}: ${said}`)
  })
  await Promise.all(checks)
} finally {
  await target.stop()
  passed = await suite.finish()
}
process.exit(passed ? 0 : 1)
