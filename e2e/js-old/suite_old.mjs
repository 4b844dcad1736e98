// The oldest JavaScript SDK of the second generation: v1 routes, and sandboxes addressed
// by host name alone. Needs the packages of the package.json beside it. See ../README.md.
import assert from 'node:assert/strict'

import {
  CommandExitError,
  InvalidArgumentError,
  NotFoundError,
  Sandbox,
  SandboxError,
  TimeoutError,
} from 'e2b'

import { Suite, failure, until } from '../js/checks.mjs'
import { Recorder } from '../js/recorder.mjs'
import { canMakeCertificates, startFront } from './tls_front.mjs'

const COMMAND = { timeoutMs: 120_000 }
const encode = (text) => new TextEncoder().encode(text)

async function commands({ sandbox }) {
  const heard = []
  const error = await failure(
    CommandExitError,
    sandbox.commands.run('echo $GLOBAL $LOCAL; pwd; echo wärning >&2; exit 3', {
      ...COMMAND,
      envs: { LOCAL: 'a b' },
      cwd: '/tmp',
      onStdout: (text) => void heard.push(text),
    })
  )
  assert.deepEqual(
    [error.exitCode, error.stdout, error.stderr],
    [3, 'global a b\n/tmp\n', 'wärning\n']
  )
  assert.equal(heard.join(''), error.stdout)
  const root = await sandbox.commands.run('id -un; seq 20000 | tail -1', {
    ...COMMAND,
    user: 'root',
  })
  assert.equal(root.stdout, 'root\n20000\n')
  await failure(TimeoutError, sandbox.commands.run('sleep 601', { timeoutMs: 3000 }))
}

/** Input, other subscribers, lists and kills: by the handle and by the process id. */
async function background({ sandbox, recorder }) {
  let said = () => {}
  const next = () => new Promise((resolve) => (said = resolve))
  const options = { timeoutMs: 0, background: true, stdin: true }
  const first = await sandbox.commands.run('cat; exit 4', {
    ...options,
    onStdout: (text) => said(text),
  })
  recorder.watch(first, 'CommandHandle')
  let spoken = next()
  await sandbox.commands.sendStdin(first.pid, 'first é\n')
  assert.equal(await spoken, 'first é\n')
  await first.disconnect()
  spoken = next()
  const second = await sandbox.commands.connect(first.pid, {
    timeoutMs: 0,
    onStdout: (text) => said(text),
  })
  const listed = (await sandbox.commands.list()).filter(({ pid }) => pid === first.pid)
  assert.deepEqual(
    listed.map(({ args }) => args),
    [['-l', '-c', 'cat; exit 4']]
  )
  await sandbox.commands.sendStdin(first.pid, 'second\n')
  assert.equal(await spoken, 'second\n')
  const ended = failure(CommandExitError, second.wait())
  assert.equal(await sandbox.commands.kill(first.pid), true)
  await ended
  assert.deepEqual([second.stdout, second.stderr, second.exitCode], ['second\n', '', -1])
  assert.equal(second.error, 'signal: killed')
  assert.equal(await sandbox.commands.kill(first.pid), false)
  const third = await sandbox.commands.run('sleep 600', { background: true, timeoutMs: 0 })
  const over = failure(CommandExitError, third.wait())
  assert.equal(await third.kill(), true)
  await over
}

async function pty({ sandbox }) {
  let seen = ''
  let grown = () => {}
  const readUntil = async (wanted) => {
    while (!seen.includes(wanted)) await new Promise((resolve) => (grown = resolve))
  }
  const onData = (data) => {
    seen += new TextDecoder().decode(data)
    grown()
  }
  const terminal = await sandbox.pty.create({ cols: 80, rows: 24, onData, ...COMMAND })
  const ended = failure(CommandExitError, terminal.wait())
  await sandbox.pty.sendInput(terminal.pid, encode('stty size; echo sum-$((40 + 2))\n'))
  await readUntil('24 80')
  await readUntil('sum-42')
  await sandbox.pty.resize(terminal.pid, { cols: 100, rows: 30 })
  await sandbox.pty.sendInput(terminal.pid, encode('stty size\n'))
  await readUntil('30 100')
  assert.equal(await sandbox.pty.kill(terminal.pid), true)
  await ended
}

async function files({ sandbox: { files } }) {
  const every = Uint8Array.from({ length: 1_000_000 }, (_, index) => index % 256)
  await files.write('folder/ä b', every.buffer)
  assert.ok(Buffer.from(every).equals(await files.read('folder/ä b', { format: 'bytes' })))
  assert.equal((await files.read('folder/ä b', { format: 'blob' })).size, every.length)
  const parts = []
  for await (const part of await files.read('folder/ä b', { format: 'stream' })) parts.push(part)
  assert.ok(Buffer.from(every).equals(Buffer.concat(parts)))
  const written = await files.write([
    { path: 'folder/empty', data: '' },
    { path: 'folder/below/c', data: 'grüße' },
  ])
  assert.deepEqual(
    written.map(({ name }) => name),
    ['empty', 'c']
  )
  assert.equal(await files.read('folder/empty'), '')
  assert.equal(await files.read('~/folder/below/c'), 'grüße')
  const names = (await files.list('folder')).map(({ name }) => name).sort()
  assert.deepEqual(names, ['below', 'empty', 'ä b'])
  assert.equal((await files.list('folder', { depth: 2 })).length, 4)
  const info = await files.getInfo('folder/ä b')
  assert.deepEqual(
    [info.size, info.type, info.owner, info.permissions, info.mode & 0o777],
    [every.length, 'file', 'user', '-rw-r--r--', 0o644]
  )
  assert.equal(await files.makeDir('folder/new'), true)
  assert.equal(await files.makeDir('folder/new'), false)
  assert.equal((await files.rename('folder/empty', 'folder/new/m')).path, '/home/user/folder/new/m')
  assert.equal(await files.exists('folder/empty'), false)
  await files.write('/root/secret', "root's", { user: 'root' })
  assert.equal(await files.read('/root/secret', { user: 'root' }), "root's")
  await failure(NotFoundError, files.read('folder/missing'))
  await failure(NotFoundError, files.list('folder/missing'))
  await failure(InvalidArgumentError, files.read('folder'))
  await files.remove('folder')
  assert.equal(await files.exists('folder'), false)
}

async function watch({ sandbox: { files }, recorder }) {
  await files.makeDir('watched/below')
  const events = []
  const exits = []
  const handle = await files.watchDir('watched', (event) => events.push(event), {
    recursive: true,
    timeoutMs: 0,
    onExit: () => exits.push('over'),
  })
  recorder.watch(handle, 'WatchHandle')
  await files.write('watched/below/file', 'x')
  await files.remove('watched/below/file')
  await until(60_000, "the file's coming and going", async () =>
    ['create', 'remove'].every((type) =>
      events.some((event) => event.type === type && event.name === 'below/file')
    )
  )
  await handle.stop()
  await until(10_000, 'onExit is called', async () => exits.length === 1)
}

async function lifecycle({ sandbox, options }) {
  const info = await sandbox.getInfo()
  assert.deepEqual([info.sandboxId, info.metadata], [sandbox.sandboxId, suite.metadata])
  const pages = Sandbox.list({ query: { metadata: suite.metadata }, ...options })
  const listed = (await pages.nextItems()).map(({ sandboxId }) => sandboxId)
  assert.deepEqual(listed, [sandbox.sandboxId])
  await sandbox.setTimeout(900_000)
  assert.ok((await sandbox.getInfo()).endAt - info.endAt > 200_000, 'the end did not move')
  const again = await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 900_000, ...options })
  assert.equal((await again.commands.run('echo again', COMMAND)).stdout, 'again\n')
  assert.equal(await sandbox.isRunning(), true)
}

/** What this generation asks of the API beyond the life of one sandbox. */
async function control({ sandbox, options }) {
  const other = await Sandbox.create('base', { metadata: suite.metadata, ...options })
  const both = [sandbox.sandboxId, other.sandboxId].sort()
  for (const [state, wanted] of [
    [undefined, both],
    [['running'], both],
    [['paused'], []],
  ]) {
    const query = { metadata: suite.metadata, state }
    const pages = Sandbox.list({ query, limit: 1, ...options })
    const found = []
    while (pages.hasNext) found.push(...(await pages.nextItems()).map((entry) => entry.sandboxId))
    assert.deepEqual(found.sort(), wanted, `pages of one, state ${state}`)
  }
  await Sandbox.setTimeout(other.sandboxId, 60_000, options)
  const { startedAt, endAt } = await Sandbox.getInfo(other.sandboxId, options)
  assert.ok(endAt - startedAt > 55_000 && endAt - startedAt < 250_000, 'how long it lives')
  const samples = await until(60_000, 'a sample', async () => {
    const found = await Sandbox.getMetrics(other.sandboxId, options)
    return found.length > 0 && found
  })
  assert.ok(samples.at(-1).memUsed < samples.at(-1).memTotal, 'memory')
  assert.equal(await Sandbox.kill(other.sandboxId, options), true)
  assert.equal(await Sandbox.kill(other.sandboxId, options), false)
  // This generation then asks for a resume, which a server without pausing does not know.
  await failure(SandboxError, Sandbox.connect(other.sandboxId, options))
  await failure(SandboxError, Sandbox.create('no-such-template', options))
  const wrong = { ...options, apiKey: 'e2b_' + '0'.repeat(40) }
  // This release knows no kind of its own for it.
  const error = await failure(SandboxError, Sandbox.getInfo(sandbox.sandboxId, wrong))
  assert.match(error.message, /^401: .*security requirements failed/)
}

async function everyMethodCalled({ recorder }) {
  assert.ok(recorder.used.size >= 25, `only ${recorder.used.size} members found`)
  assert.deepEqual(recorder.unused(), [])
}

async function kill({ sandbox }) {
  await sandbox.kill()
  assert.equal(await sandbox.isRunning(), false)
  // This release knows no kind of its own for it.
  const error = await failure(SandboxError, sandbox.getInfo())
  assert.match(error.message, /doesn't exist/)
}

async function main(domain) {
  const recorder = new Recorder(import.meta.url)
  const options = { domain, requestTimeoutMs: 120_000 }
  const context = await suite.check('create', async () => {
    const fields = { timeoutMs: 600_000, metadata: suite.metadata, envs: { GLOBAL: 'global' } }
    const sandbox = await Sandbox.create('base', { ...fields, ...options })
    recorder.watch(sandbox.commands, 'Commands')
    recorder.watch(sandbox.pty, 'Pty')
    recorder.watch(sandbox.files, 'Filesystem')
    return { sandbox, recorder, options }
  })
  const bodies = [commands, background, pty, files, watch, everyMethodCalled, lifecycle]
  bodies.push(control, kill)
  for (const body of bodies) await suite.check(body.name, body, [context])
}

if (!canMakeCertificates()) {
  console.log('skip js-old.all: the program openssl is missing')
  process.exit(0)
}
const suite = new Suite('js-old')
const front = await startFront()
let passed = false
for (const signal of ['SIGINT', 'SIGTERM']) {
  process.once(signal, () => suite.finish().finally(() => process.exit(143)))
}
try {
  await main(front.domain)
} finally {
  passed = await suite.finish()
  front.stop()
}
process.exit(passed ? 0 : 1)
