// The official JavaScript SDK against a live server. See ../README.md.
import assert from 'node:assert/strict'
import { execFile } from 'node:child_process'
import { createServer } from 'node:net'
import { networkInterfaces } from 'node:os'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'

import {
  CommandExitError,
  FileNotFoundError,
  InvalidArgumentError,
  Sandbox,
  SandboxNotFoundError,
  TimeoutError,
} from 'e2b'

import { Skip, Suite, failure, setting, taggedIds, until } from './checks.mjs'

const suite = new Suite('js')
const COMMAND = { timeoutMs: 120_000 } // for one command on a busy emulated CPU
const AWKWARD = 'a b&c=d/é+%20' // must survive being encoded twice
const CLOCK_TOLERANCE_S = 2
const ALL_BYTES = Uint8Array.from({ length: 4096 }, (_, index) => index % 256)

function create({ metadata, ...options } = {}) {
  return Sandbox.create('base', {
    timeoutMs: 900_000,
    requestTimeoutMs: 120_000,
    metadata: { ...suite.metadata, ...metadata },
    ...options,
  })
}

// --- commands ------------------------------------------------------------------------------------

async function commandsStream(sandbox) {
  // The command goes on only when the client, told by its output, makes the file.
  const command =
    'echo first; echo warning >&2; until [ -e /tmp/go ]; do sleep 0.2; done; echo last; exit 3'
  let out = ''
  let err = ''
  let released = false
  const release = async () => {
    if (!out || !err || released) return
    released = true
    await sandbox.files.write('/tmp/go', '')
  }
  const error = await failure(
    CommandExitError,
    sandbox.commands.run(command, {
      ...COMMAND,
      onStdout: (text) => ((out += text), release()),
      onStderr: (text) => ((err += text), release()),
    })
  )
  assert.equal(error.exitCode, 3)
  assert.deepEqual([error.stdout, error.stderr], ['first\nlast\n', 'warning\n'])
  assert.deepEqual([out, err], ['first\nlast\n', 'warning\n'])
}

async function commandsLongOutput(sandbox) {
  const { stdout } = await sandbox.commands.run('seq 100000; echo é', COMMAND)
  const wanted = Array.from({ length: 100_000 }, (_, index) => `${index + 1}\n`).join('') + 'é\n'
  assert.ok(stdout === wanted, `${stdout.length} characters came, not ${wanted.length}`)
}

async function commandsEnvironment(sandbox) {
  const command = 'echo "$GLOBAL|$LOCAL|$HOME|$USER|$E2B_SANDBOX|$(pwd)|$(id -un)"'
  const envs = { LOCAL: 'local' }
  const asUser = await sandbox.commands.run(command, { ...COMMAND, envs, cwd: '/tmp' })
  assert.equal(asUser.stdout, 'global|local|/home/user|user|true|/tmp|user\n')
  const asRoot = await sandbox.commands.run(command, { ...COMMAND, envs, cwd: '/', user: 'root' })
  assert.equal(asRoot.stdout, 'global|local|/root|root|true|/|root\n')
  await failure(InvalidArgumentError, sandbox.commands.run('true', { cwd: '/no/such/place' }))
}

async function commandsStdin(sandbox) {
  let said = () => {}
  const heard = new Promise((resolve) => (said = resolve))
  const cat = await sandbox.commands.run('cat', {
    ...COMMAND,
    background: true,
    stdin: true,
    onStdout: said,
  })
  const listed = (await sandbox.commands.list()).filter(({ pid }) => pid === cat.pid)
  assert.deepEqual(
    listed.map(({ cmd, args }) => [cmd, ...args]),
    [['/bin/bash', '-l', '-c', 'cat']]
  )
  await sandbox.commands.sendStdin(cat.pid, 'hello\n')
  assert.equal(await heard, 'hello\n')
  await cat.sendStdin('again\n')
  await cat.closeStdin()
  assert.equal((await cat.wait()).stdout, 'hello\nagain\n')
}

async function commandsReconnect(sandbox) {
  const first = await sandbox.commands.run('cat', { ...COMMAND, background: true, stdin: true })
  await first.disconnect()
  const second = await sandbox.commands.connect(first.pid, COMMAND)
  await second.sendStdin('still here\n')
  await second.closeStdin()
  assert.equal((await second.wait()).stdout, 'still here\n')
}

async function commandsKill(sandbox) {
  const sleeper = await sandbox.commands.run('sleep 600', { background: true, timeoutMs: 0 })
  const ended = failure(CommandExitError, sleeper.wait())
  assert.equal(await sandbox.commands.kill(sleeper.pid), true)
  assert.equal((await ended).exitCode, -1)
  assert.ok(
    (await sandbox.commands.list()).every(({ pid }) => pid !== sleeper.pid),
    'still listed'
  )
  assert.equal(await sandbox.commands.kill(4_000_000), false)
}

async function commandsTimeout(sandbox) {
  await failure(TimeoutError, sandbox.commands.run('sleep 601', { timeoutMs: 5_000 }))
  await until(15_000, 'the command that ran out of time is killed', async () =>
    (await sandbox.commands.list()).every(({ args }) => !args.includes('sleep 601'))
  )
}

async function pty(sandbox) {
  let seen = ''
  let grown = () => {}
  const readUntil = async (wanted) => {
    while (!seen.includes(wanted)) await new Promise((resolve) => (grown = resolve))
  }
  const onData = (data) => {
    seen += new TextDecoder().decode(data)
    grown()
  }
  const type = (text) => sandbox.pty.sendInput(terminal.pid, new TextEncoder().encode(text))
  const terminal = await sandbox.pty.create({ cols: 80, rows: 24, onData, ...COMMAND })
  const ended = failure(CommandExitError, terminal.wait())
  await type('stty size; echo sum-$((40 + 2))\n')
  await readUntil('24 80')
  await readUntil('sum-42')
  await sandbox.pty.resize(terminal.pid, { cols: 100, rows: 30 })
  await type('stty size\n')
  await readUntil('30 100')
  assert.equal(await sandbox.pty.kill(terminal.pid), true)
  await ended
}

// --- files ---------------------------------------------------------------------------------------

async function filesContent(sandbox) {
  const written = await sandbox.files.write('notes/héllo.txt', 'grüße\n')
  assert.equal(written.path, '/home/user/notes/héllo.txt')
  assert.equal(await sandbox.files.read('notes/héllo.txt'), 'grüße\n')
  await sandbox.files.write('notes/empty', '')
  assert.equal(await sandbox.files.read('notes/empty'), '')
  await failure(FileNotFoundError, sandbox.files.read('notes/missing'))
  await sandbox.files.write('all-bytes', ALL_BYTES.buffer)
  assert.deepEqual(await sandbox.files.read('all-bytes', { format: 'bytes' }), ALL_BYTES)
  const blob = await sandbox.files.read('all-bytes', { format: 'blob' })
  assert.equal(blob.size, ALL_BYTES.length)
  const parts = []
  for await (const part of await sandbox.files.read('all-bytes', { format: 'stream' })) {
    parts.push(part)
  }
  assert.deepEqual(new Uint8Array(Buffer.concat(parts)), ALL_BYTES)
  await sandbox.files.write('streamed', new Blob([ALL_BYTES]).stream())
  assert.equal((await sandbox.files.getInfo('streamed')).size, ALL_BYTES.length)
}

async function filesTree(sandbox) {
  const { files } = sandbox
  assert.equal(await files.makeDir('tree/deep'), true)
  assert.equal(await files.makeDir('tree/deep'), false)
  const written = await files.write([
    { path: 'tree/a.txt', data: 'a' },
    { path: 'tree/deep/b.bin', data: Uint8Array.of(0, 1).buffer },
  ])
  assert.deepEqual(
    written.map(({ name }) => name),
    ['a.txt', 'b.bin']
  )
  const listed = (await files.list('tree')).map(({ name, type }) => `${name} ${type}`)
  assert.deepEqual(listed.sort(), ['a.txt file', 'deep dir'])
  const entry = await files.getInfo('tree/a.txt')
  assert.deepEqual(
    [entry.path, entry.size, entry.owner, entry.permissions, entry.mode & 0o777],
    ['/home/user/tree/a.txt', 1, 'user', '-rw-r--r--', 0o644]
  )
  assert.equal((await files.rename('tree/a.txt', 'tree/c.txt')).path, '/home/user/tree/c.txt')
  assert.equal(await files.exists('tree/a.txt'), false)
  assert.equal(await files.exists('tree/c.txt'), true)
  await files.remove('tree')
  assert.equal(await files.exists('tree'), false)
  await failure(FileNotFoundError, files.list('tree'))
}

// --- the sandbox itself --------------------------------------------------------------------------

async function info(sandbox) {
  const found = await sandbox.getInfo()
  assert.equal(found.sandboxId, sandbox.sandboxId)
  assert.equal(found.state, 'running')
  assert.ok(found.cpuCount >= 1 && found.memoryMB >= 128, `size of ${JSON.stringify(found)}`)
  assert.equal(found.metadata.run, suite.tag)
  assert.ok(found.startedAt <= new Date() && new Date() < found.endAt, 'now is not in its life')
  assert.equal(await sandbox.isRunning(), true)
}

async function setTimeouts(sandbox) {
  for (const seconds of [1800, 600]) {
    await sandbox.setTimeout(seconds * 1000)
    const left = ((await sandbox.getInfo()).endAt - Date.now()) / 1000
    assert.ok(Math.abs(left - seconds) < 10, `ends in ${left} s, not ${seconds}`)
  }
}

async function list(sandbox, other) {
  const ids = async (metadata) => {
    const pages = Sandbox.list({ query: { metadata }, limit: 1 })
    const found = []
    while (pages.hasNext) found.push(...(await pages.nextItems()))
    return found.map(({ sandboxId }) => sandboxId).sort()
  }
  assert.deepEqual(await ids(suite.metadata), [sandbox.sandboxId, other.sandboxId].sort())
  assert.deepEqual(await ids({ ...suite.metadata, odd: AWKWARD }), [other.sandboxId])
}

async function secondProcess(sandbox) {
  await sandbox.files.write('note.txt', 'from the first')
  const program = fileURLToPath(new URL('second_process.mjs', import.meta.url))
  const { stdout } = await promisify(execFile)(process.execPath, [program, sandbox.sandboxId], {
    timeout: 110_000,
  })
  const wanted = { note: 'from the first', id: sandbox.sandboxId, running: true }
  assert.deepEqual(JSON.parse(stdout), wanted)
  assert.equal(await sandbox.files.read('answer.txt'), 'got from the first')
}

/** Which sandbox answers, what its random pool gives, what time it thinks it is. */
async function identify(sandbox) {
  const asked = Date.now() / 1000
  const { stdout } = await sandbox.commands.run(
    'echo "$E2B_SANDBOX_ID $(od -An -v -tx1 -N16 /dev/urandom | tr -d " ") $(date +%s.%N)"',
    COMMAND
  )
  const [id, random, clock] = stdout.trim().split(' ')
  const off = Math.max(asked - Number(clock), Number(clock) - Date.now() / 1000)
  assert.ok(off < CLOCK_TOLERANCE_S, `the guest's clock is off by ${off} s`)
  assert.equal(random.length, 32)
  return { id, random }
}

async function serverOnPort(sandbox) {
  const headers = { 'E2b-Sandbox-Id': sandbox.sandboxId, 'E2b-Sandbox-Port': '8080' }
  const ask = () => fetch(`${setting('E2B_SANDBOX_URL')}/page`, { headers })
  assert.equal((await ask()).status, 502)
  const program = `require('http').createServer((q, s) => s.end('served ' + q.url)).listen(8080)`
  await sandbox.files.write('server.js', program)
  const server = await sandbox.commands.run('exec node server.js', {
    background: true,
    timeoutMs: 0,
  })
  server.wait().catch(() => {}) // it ends by the kill below
  const answer = await until(100_000, 'the web server answers', async () => {
    const found = await ask()
    return found.status !== 502 && found
  })
  assert.deepEqual([answer.status, await answer.text()], [200, 'served /page'])
  assert.equal(await server.kill(), true)
}

async function isolation(sandbox) {
  const host = Object.values(networkInterfaces())
    .flat()
    .filter(({ family, internal }) => family === 'IPv4' && !internal)
    .map(({ address }) => address)
    .slice(0, 8)
  const local = ['localhost', '127.0.0.1'].includes(new URL(setting('E2B_API_URL')).hostname)
  if (!local) throw new Skip('the server runs on another machine; its addresses are not known here')
  let visitors = 0
  const bait = createServer((socket) => ((visitors += 1), socket.destroy()))
  await new Promise((resolve) => bait.listen(0, '0.0.0.0', resolve))
  try {
    // curl says 000 when it could not connect; the guest's own daemon shows that it can.
    const urls = host.map((address) => `http://${address}:${bait.address().port}/`)
    const tries = ['http://127.0.0.1:49983/health', ...urls]
      .map((url) => `curl -s -o /dev/null -m 8 --noproxy '*' -w '%{http_code}\\n' ${url}`)
      .join('; ')
    const { stdout } = await sandbox.commands.run(`${tries}; true`, COMMAND)
    assert.deepEqual(stdout.trim().split('\n'), ['204', ...urls.map(() => '000')])
    assert.equal(visitors, 0, 'the bait on the host was reached')
  } finally {
    bait.close()
  }
}

async function tenAtOnce() {
  const started = performance.now()
  const sandboxes = await Promise.all(Array.from({ length: 10 }, () => create()))
  const created = performance.now()
  const answers = await Promise.all(sandboxes.map(identify))
  const answered = performance.now()
  assert.deepEqual(
    answers.map(({ id }) => id),
    sandboxes.map(({ sandboxId }) => sandboxId)
  )
  assert.equal(new Set(answers.map(({ random }) => random)).size, 10, 'distinct random bytes')
  const kills = await Promise.all(sandboxes.map((sandbox) => sandbox.kill()))
  assert.deepEqual(kills, Array(10).fill(true))
  const seconds = (from, to) => `${((to - from) / 1000).toFixed(2)} s`
  suite.remark(
    `tenAtOnce: created in ${seconds(started, created)}, answered ${seconds(created, answered)} later`
  )
}

async function expiry() {
  const sandbox = await create({ timeoutMs: 5_000 })
  const started = performance.now()
  await until(12_000, 'the API forgets a sandbox past its end', async () => {
    try {
      await sandbox.getInfo()
    } catch (error) {
      if (error instanceof SandboxNotFoundError) return true
      throw error
    }
  })
  assert.ok(performance.now() - started > 3_000, 'gone before its end')
  await until(5_000, 'isRunning is false', async () => !(await sandbox.isRunning()))
}

async function kill(sandbox) {
  assert.equal(await sandbox.kill(), true)
  assert.equal(await sandbox.kill(), false)
  assert.equal(await sandbox.isRunning(), false)
  await failure(SandboxNotFoundError, sandbox.getInfo())
  await failure(SandboxNotFoundError, sandbox.commands.run('true'))
  assert.ok(!(await taggedIds(suite.tag)).includes(sandbox.sandboxId), 'still listed')
}

async function main() {
  const sandbox = await suite.check('create', () => create({ envs: { GLOBAL: 'global' } }))
  const other = await suite.check('createAnother', () => create({ metadata: { odd: AWKWARD } }))
  const own = [commandsStream, commandsEnvironment, commandsStdin, commandsReconnect, commandsKill]
  own.push(
    commandsLongOutput,
    commandsTimeout,
    pty,
    filesContent,
    filesTree,
    info,
    setTimeouts,
    secondProcess
  )
  for (const body of own) await suite.check(body.name, body, [sandbox])
  await suite.check('clock', identify, [sandbox])
  await suite.check('serverOnPort', serverOnPort, [sandbox])
  await suite.check('list', list, [sandbox, other])
  await suite.check('isolation', isolation, [sandbox])
  await suite.check('tenAtOnce', tenAtOnce, [], 300_000)
  await suite.check('expiry', expiry)
  await suite.check('kill', kill, [sandbox])
}

let passed = false
for (const signal of ['SIGINT', 'SIGTERM']) {
  process.once(signal, () => suite.finish().finally(() => process.exit(143)))
}
try {
  await main()
} finally {
  passed = await suite.finish()
}
// Connections the SDK keeps open, and what overran its deadline, must not hold the program.
process.exit(passed ? 0 : 1)
