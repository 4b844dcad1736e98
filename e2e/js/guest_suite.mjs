// Everything a guest does, through the JavaScript SDK. See ../README.md.
//
//   guest_suite.mjs [TOPIC[.SCENARIO] ...]
import assert from 'node:assert/strict'

import { Suite } from './checks.mjs'
import { Box } from './guest_box.mjs'
import { commandScenarios, ptyScenarios } from './guest_commands.mjs'
import { fileScenarios, watchScenarios } from './guest_files.mjs'
import { gitScenarios } from './guest_git.mjs'
import { MIB, target as chosenTarget } from './guest_target.mjs'
import { Recorder } from './recorder.mjs'

const TOPICS = {
  commands: commandScenarios,
  pty: ptyScenarios,
  files: fileScenarios,
  watch: watchScenarios,
  git: gitScenarios,
}
// One gigabyte through an emulated CPU takes minutes.
const DEADLINE_MS = 400_000

async function run(suite, target, only) {
  const recorder = new Recorder(import.meta.url)
  const box = await suite.check('create', async () => {
    const options = { timeoutMs: 3_000_000, requestTimeoutMs: 120_000, metadata: suite.metadata }
    const made = await Box.create(target, recorder, options)
    await made.files.makeDir(target.base)
    return made
  })
  for (const [topic, scenarios] of Object.entries(TOPICS)) {
    for (const scenario of scenarios) {
      const name = `${topic}.${scenario.name}`
      if (only.length > 0 && !only.some((one) => name.startsWith(one))) continue
      const said = await suite.check(name, scenario, [box], DEADLINE_MS)
      if (said) suite.remark(`${name}: ${said}`)
    }
  }
  if (only.length === 0) {
    await suite.check('everyMethodCalled', async () => {
      assert.ok(recorder.used.size >= 50, `only ${recorder.used.size} members found`)
      assert.deepEqual(recorder.unused(), [])
    })
  }
  await suite.check('nothingRunning', nothingRunning, [box])
  for (const line of target.remarks()) suite.remark(line)
}

async function nothingRunning(box) {
  const left = await box.commands.list()
  for (const { pid } of left) await box.commands.kill(pid)
  assert.deepEqual(
    left.map(({ args }) => args),
    []
  )
  assert.equal(await box.sandbox.isRunning(), true)
  await box.files.remove(box.target.base)
}

const target = await chosenTarget({ stdin: 4 * MIB })
const suite = new Suite(target.native ? 'guest.js.native' : 'guest.js', !target.native)
let passed = false
for (const signal of ['SIGINT', 'SIGTERM']) {
  process.once(signal, async () => {
    await Promise.allSettled([suite.finish(), target.stop()])
    process.exit(143)
  })
}
try {
  suite.remark(`sizes: ${JSON.stringify(target.scale)}`)
  await run(suite, target, process.argv.slice(2))
} finally {
  await target.stop()
  passed = await suite.finish()
}
process.exit(passed ? 0 : 1)
