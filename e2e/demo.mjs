// What an agent's program does with the official JavaScript SDK, here against your own machine.
// Nothing in it knows Belljar: E2B_API_KEY, E2B_API_URL and E2B_SANDBOX_URL in the environment say
// where sandboxes come from.
import assert from 'node:assert/strict'

import { Sandbox } from 'e2b'

async function step(title, body) {
  const started = performance.now()
  const value = await body()
  const seconds = ((performance.now() - started) / 1000).toFixed(2).padStart(6)
  console.log(`  ${seconds} s  ${title}`)
  return value
}

function show(text) {
  for (const line of text.trim().split('\n')) console.log(`            > ${line}`)
}

const COUNT = `
import time
for number in range(1, 4):
    print("line", number, flush=True)
    time.sleep(0.3)
`

const sandbox = await step('create a sandbox', () =>
  Sandbox.create('base', { timeoutMs: 300_000, metadata: { purpose: 'demo' } })
)
try {
  const { stdout } = await step('run a command', () =>
    sandbox.commands.run('echo hello from $(hostname), kernel $(uname -r)')
  )
  show(stdout)

  console.log('            a program that takes its time; every line as it comes:')
  await step('write a file, run it, stream its output', async () => {
    await sandbox.files.write('count.py', COUNT)
    await sandbox.commands.run('python3 count.py', { onStdout: show })
  })

  await step('write bytes, read them back, list the folder', async () => {
    const bytes = Uint8Array.from({ length: 256 }, (_, index) => index)
    await sandbox.files.write('data.bin', bytes.buffer)
    assert.deepEqual(await sandbox.files.read('data.bin', { format: 'bytes' }), bytes)
    const names = (await sandbox.files.list('/home/user')).map(({ name }) => name)
    assert.ok(names.includes('count.py') && names.includes('data.bin'))
  })

  const info = await step('ask what it is', () => sandbox.getInfo())
  show(`${info.cpuCount} CPU, ${info.memoryMB} MB, until ${info.endAt.toISOString()}`)

  await step('find it in the list', async () => {
    const page = await Sandbox.list({ query: { metadata: { purpose: 'demo' } } }).nextItems()
    assert.ok(page.some(({ sandboxId }) => sandboxId === sandbox.sandboxId))
  })
} finally {
  await step('kill it', () => sandbox.kill())
}
assert.equal(await sandbox.isRunning(), false)
process.exit(0)
