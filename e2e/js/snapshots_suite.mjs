// Pause, resume, snapshots and forks by the official JavaScript SDK, against a live server. The
// checks of ../python/snapshots_*.py as far as this SDK spells them. See ../README.md.
//
// snapshots_suite.mjs [CHECK ...]
import assert from 'node:assert/strict'
import { setTimeout as pause } from 'node:timers/promises'

import {
  CommandExitError,
  InvalidArgumentError,
  Sandbox,
  SandboxError,
  SandboxNotFoundError,
} from 'e2b'

import { Suite, api, failure, taggedIds, until } from './checks.mjs'
import { MISSING, SNAPSHOTS, call, everyMethodCalled, near, same } from './control_world.mjs'
import { Keeping, LONG, SnapshotWorld, toPort } from './snapshots_world.mjs'

const suite = new Suite('snapshots.js')
const TICKER = 'n=0; while :; do n=$((n + 1)); echo tick-$n; sleep 0.2; done'
const SAME = 'sandboxId templateId name metadata cpuCount memoryMB lifecycle'.split(' ')
const HALF_MIB = 100 // in memory, and the same on the disk
const ASLEEP_MS = 6_000 // longer than a clock may be off
const CUT_MS = 45_000
const FALLS_ASLEEP_MS = 65_000
const DEADLINE_MS = 360_000

const bytes = (text) => new TextEncoder().encode(text)
const ticks = (text) => [...text.matchAll(/^tick-(\d+)$/gm)].map(([, number]) => Number(number))
const idOf = ({ id }) => id

// --- pause and resume ----------------------------------------------------------------------------

/** A counter in memory, an open file, a listening server, a tmpfs: all as they were left. */
async function goesOn(world) {
  const one = await world.keeping()
  const [pid] = await one.next()
  await one.expectNext(pid, 2)
  for (const text of ['first', 'second']) await one.ask(`/hold/${text}`)
  await one.box.files.write('/dev/shm/note', 'in memory only')
  const boot = await one.bootId()
  await one.pause()
  const two = await one.connect()
  assert.equal(two.id, one.id)
  await two.expectNext(pid, 3)
  assert.equal(await two.held(), '', 'before it is flushed')
  await two.ask('/hold/third')
  await two.ask('/flush')
  assert.equal(await two.held(), 'first\nsecond\nthird\n')
  assert.equal(await two.box.files.read('/dev/shm/note'), 'in memory only')
  assert.equal(await two.bootId(), boot)
  await world.end(two)
}

/** 200 MB, half of it in memory and half on the disk, and that half read from the disk. */
async function randomBytes(world) {
  const one = await world.plain()
  const size = HALF_MIB * 1024 * 1024
  const there = '/dev/shm/random /home/user/random'
  await one.output(`for f in ${there}; do head -c ${size} /dev/urandom > $f; done`, LONG)
  const before = await one.output(`b2sum ${there}`, LONG)
  await one.pause()
  const two = await one.connect()
  await two.output('sync; echo 1 > /proc/sys/vm/drop_caches', { user: 'root', ...LONG })
  assert.equal(await two.output(`b2sum ${there}`, LONG), before)
  await world.end(two)
}

async function tenTimes(world) {
  let one = await world.keeping()
  const [pid] = await one.next()
  const numbers = Array.from({ length: 10 }, (_, number) => number)
  for (const number of numbers) {
    await one.ask(`/hold/line-${number}`)
    await one.box.files.write(`round-${number}.txt`, `written ${number}\n`)
    await one.pause()
    one = await one.connect()
    await one.expectNext(pid, number + 2)
  }
  await one.ask('/flush')
  assert.equal(await one.held(), numbers.map((number) => `line-${number}\n`).join(''))
  const contents = await one.output('cat round-*.txt')
  assert.equal(contents, numbers.map((number) => `written ${number}\n`).join(''))
  await world.end(one)
}

async function clock(world) {
  const one = await world.plain()
  const before = await one.identify()
  await one.pause()
  await pause(ASLEEP_MS) // that time passes is what this is about
  assert.notEqual(await (await one.connect()).identify(), before, 'random bytes came twice')
  await world.end(one)
}

/** A stream of a run that is over ends, with an error that does not invent an exit. */
async function cut(ended, what) {
  const late = pause(CUT_MS).then(() => assert.fail(`${what} still waits after the pause`))
  const error = await failure(SandboxError, Promise.race([ended, late]))
  assert.ok(!(error instanceof CommandExitError), `${what} ended with ${error}`)
}

/** Streams of before the pause end; the processes behind them go on and can be connected to. */
async function oldStreams(world) {
  const one = await world.plain()
  const ticker = await one.box.start(TICKER, { timeoutMs: 0 })
  const terminal = await one.box.terminal({ cols: 80, rows: 24 }, { timeoutMs: 0 })
  await one.box.files.makeDir('watched')
  const watch = await one.box.watchDir('watched')
  await one.box.pty.sendInput(terminal.pid, bytes('MARK=kept; echo set-$((1 + 1))\n'))
  await terminal.heard.heard('set-2')
  await ticker.heard.heard('tick-3\n')
  const ends = [ticker, terminal].map(({ handle }) => handle.wait())
  for (const end of ends) end.catch(() => {}) // looked at below, when the pause is over
  await one.pause()
  await cut(ends[0], 'a command')
  await cut(ends[1], 'a terminal')
  await until(CUT_MS, 'the watch of before ends', () => watch.exits.length)
  assert.ok(watch.exits[0] instanceof SandboxError, `the watch ended with ${watch.exits[0]}`)
  const two = await one.connect()
  const again = await two.box.attach(ticker.pid, { timeoutMs: 0 })
  await again.heard.until('the ticker goes on', () => ticks(again.heard.out).length > 2)
  const [first, last] = [ticks(again.heard.out)[0], Math.max(...ticks(ticker.heard.out))]
  assert.ok(first > last, `tick ${first} after the resume, ${last} before the pause`)
  const shown = await two.box.attachTerminal(terminal.pid)
  await two.box.pty.sendInput(terminal.pid, bytes('echo $MARK-$((40 + 2))\n'))
  await shown.heard.heard('kept-42')
  const anew = await two.box.watchDir('watched')
  await two.box.files.write('watched/after', 'x')
  await anew.saw('create', 'after')
  await world.end(two)
}

/** Id, metadata, variables and size are the same; the time to live is the resume's. */
async function terms(world) {
  const one = await world.plain({ metadata: { odd: 'a b&c=d/é+%20' }, envs: { NAME: 'a value' } })
  const before = await call(one.sandbox, 'getInfo')
  const began = Date.now()
  await one.pause({ keepMemory: true })
  const paused = await call(one.sandbox, 'getInfo')
  assert.equal(paused.state, 'paused')
  const inside = began - 2000 <= paused.endAt && paused.endAt <= Date.now() + 2000
  assert.ok(inside, `a paused sandbox ends at ${paused.endAt.toISOString()}`)
  assert.equal((await world.detail(one.id)).pauseMode, 'full')
  const two = await one.connect({ timeoutMs: 700_000 })
  const after = await call(two.sandbox, 'getInfo')
  near(await world.secondsLeft(two.sandbox), 700, 'left after the resume', 5)
  for (const name of SAME) {
    assert.deepEqual([paused[name], after[name]], [before[name], before[name]], name)
  }
  assert.equal(after.state, 'running')
  assert.equal(await two.output('echo "$NAME"'), 'a value\n')
  await call(two.sandbox, 'connect', { timeoutMs: 30_000 })
  near(await world.secondsLeft(two.sandbox), 700, 'left after a shorter connect', 10)
  await world.end(two)
}

/** What a paused sandbox answers, and that none of it wakes it. */
async function whilePaused(world) {
  const [one, other] = await Promise.all([world.keeping(), world.create()])
  await one.next()
  assert.equal(await call(Sandbox, 'pause', one.id), true)
  for (const name of ['pause', 'betaPause']) {
    assert.equal(await call(Sandbox, name, one.id), false)
    assert.equal(await call(one.sandbox, name), false)
  }
  await failure(SandboxNotFoundError, call(one.sandbox, 'setTimeout', 600_000))
  assert.equal(await call(one.sandbox, 'isRunning'), false)
  await failure(SandboxError, one.box.run('true'))
  assert.equal((await toPort(one.id, '/next')).status, 502)
  assert.deepEqual(await world.listed({ state: ['paused'] }), [one.id])
  assert.deepEqual(await world.listed({ state: ['running'] }), [other.sandboxId])
  same(await world.listed({ limit: 1 }), [one.id, other.sandboxId], 'without a state')
  assert.equal(await one.state(), 'paused', 'after all that')
  const handles = await Promise.all(Array.from({ length: 8 }, () => one.connect()))
  const counts = await Promise.all(handles.map((handle) => handle.next()))
  same(
    counts.map(([, count]) => String(count)),
    ['2', '3', '4', '5', '6', '7', '8', '9'],
    'counts after many connects at once'
  )
  await world.kill(one.sandbox, other)
}

async function killPaused(world) {
  const one = await world.plain()
  await one.pause()
  assert.equal(await call(one.sandbox, 'kill'), true)
  assert.equal(await call(one.sandbox, 'kill'), false)
  for (const name of ['getInfo', 'pause', 'createSnapshot', 'fork', 'connect']) {
    await failure(SandboxNotFoundError, call(one.sandbox, name))
  }
  for (const name of ['pause', 'fork', 'createSnapshot']) {
    await failure(SandboxNotFoundError, call(Sandbox, name, MISSING))
  }
  assert.deepEqual(await world.listed(), [])
}

// --- lifecycle, and without memory ---------------------------------------------------------------

/** At its end it is paused with all it was doing; traffic wakes it only where that was asked for. */
async function fallsAsleep(world) {
  const one = await world.keeping({ lifecycle: { onTimeout: 'pause' } })
  const [pid] = await one.next()
  await call(one.sandbox, 'setTimeout', 5_000)
  await world.untilState(one.id, 'paused', FALLS_ASLEEP_MS)
  assert.equal((await toPort(one.id, '/next')).status, 502)
  assert.equal(await one.state(), 'paused', 'after traffic')
  const two = await one.connect()
  await two.expectNext(pid, 2)
  const { lifecycle } = await call(two.sandbox, 'getInfo')
  assert.deepEqual(lifecycle, { onTimeout: 'pause', autoResume: false })
  await world.end(two)
}

async function woken(world) {
  const one = await world.keeping({ lifecycle: { onTimeout: 'pause', autoResume: true } })
  const [pid] = await one.next()
  await one.pause()
  await one.expectNext(pid, 2)
  assert.equal(await one.state(), 'running')
  await one.pause()
  assert.equal(await one.output('echo woken'), 'woken\n')
  await one.expectNext(pid, 3)
  const impossible = [
    { onTimeout: 'kill', autoResume: true },
    { onTimeout: { action: 'pause', keepMemory: false }, autoResume: true },
    { onTimeout: 'sleep' },
  ]
  for (const lifecycle of impossible) {
    await failure(InvalidArgumentError, world.create({ lifecycle }))
  }
  assert.deepEqual(await world.listed(), [one.id], 'created nevertheless')
  await world.end(one)
}

/** The disk is as it was; nothing that was in memory is. */
async function judgeBooted(one, before) {
  assert.notEqual(await one.bootId(), before, 'the same boot id: it did not boot')
  assert.equal(await one.box.files.read('kept.txt'), 'on the disk')
  assert.equal(await one.box.files.exists('/dev/shm/note'), false)
  assert.doesNotMatch(await one.output('ps -e -o comm='), /^python/m)
  await one.identify()
}

async function withoutMemory(world) {
  const lifecycle = { onTimeout: { action: 'pause', keepMemory: false } }
  const one = await world.keeping({ lifecycle })
  await one.box.files.write('kept.txt', 'on the disk')
  await one.box.files.write('/dev/shm/note', 'in memory')
  let boot = await one.bootId()
  await call(one.sandbox, 'setTimeout', 5_000)
  await world.untilState(one.id, 'paused', FALLS_ASLEEP_MS)
  const mode = async () => (await world.detail(one.id)).pauseMode
  assert.equal(await until(30_000, 'pauseMode is told', mode), 'filesystem')
  let next = await one.connect()
  await judgeBooted(next, boot)
  boot = await next.bootId()
  await next.pause({ keepMemory: false })
  next = await next.connect()
  await judgeBooted(next, boot)
  boot = await next.bootId()
  await next.output('sync', { user: 'root' })
  await next.pause() // with its memory, which the reboot leaves aside
  next = await next.connect({ onResume: 'reboot' })
  await judgeBooted(next, boot)
  await world.end(next)
}

// --- copies --------------------------------------------------------------------------------------

async function readyToCopy(world, options) {
  const source = await world.keeping(options)
  const [pid] = await source.next()
  await source.expectNext(pid, 2)
  await source.ask('/hold/common')
  return [source, pid]
}

/** Runs `body` while a stream of the source is open, which must go on afterwards. */
async function streaming(source, body) {
  const { heard, handle } = await source.box.start(TICKER, { timeoutMs: 0 })
  await heard.heard('tick-2\n')
  const value = await body()
  await heard.heard(`tick-${Math.max(...ticks(heard.out)) + 3}\n`)
  const found = ticks(heard.out)
  assert.deepEqual(found, found.map((_, index) => index + 1), 'ticks of the source')
  handle.wait().catch(() => {}) // killed is how it ends
  await handle.kill()
  return value
}

/** Each has the source's state, from there on its own, and random numbers nobody else has. */
async function judgeDiverged(source, copies, pid) {
  for (const [index, copy] of copies.entries()) {
    for (let step = 0; step <= index; step += 1) await copy.expectNext(pid, 3 + step)
    await copy.ask(`/hold/of-copy-${index}`)
    await copy.ask('/flush')
    await copy.box.files.write('own.txt', `copy ${index}`)
  }
  await source.expectNext(pid, 3)
  for (const [index, copy] of copies.entries()) {
    assert.equal(await copy.held(), `common\nof-copy-${index}\n`)
    assert.equal(await copy.box.files.read('own.txt'), `copy ${index}`)
  }
  assert.equal(await source.held(), '')
  const all = [source, ...copies]
  const drawn = await Promise.all(all.map(async (one) => (await one.ask('/chance')).split(' ')))
  for (const column of [0, 1, 2]) {
    assert.equal(new Set(drawn.map((row) => row[column])).size, all.length, `random ${column}`)
  }
  assert.equal(new Set(await Promise.all(all.map((one) => one.identify()))).size, all.length)
}

async function snapshots(world) {
  const [source, pid] = await readyToCopy(world)
  const name = `suite-${suite.tag.slice(-8)}`.toLowerCase()
  const made = await streaming(source, () => world.snapshot(source))
  const template = made.snapshotId
  const created = await Promise.all([1, 2, 3].map(() => world.create({ template })))
  const copies = created.map((one) => new Keeping(one))
  await judgeDiverged(source, copies, pid)
  await world.end(...copies)
  const named = await world.snapshot(source, { name })
  assert.ok(named.names.some((one) => one.includes(name)), `${name}: ${named.names}`)
  const mine = [template, named.snapshotId]
  same(await world.listedSnapshots(Sandbox, { sandboxId: source.id }), mine, 'of the source')
  same(await world.listedSnapshots(source.sandbox, { limit: 1 }), mine, 'in pages of one')
  assert.deepEqual(await world.listedSnapshots(Sandbox, { name }), [named.snapshotId])
  assert.deepEqual(await world.listedSnapshots(Sandbox, { name: `${name}-nobody` }), [])
  await world.end(source)
  const late = new Keeping(await world.create({ template: name }))
  await late.expectNext(pid, 4)
  await world.end(late)
  for (const one of mine) await world.deleteSnapshot(one)
  assert.equal(await call(Sandbox, 'deleteSnapshot', template), false, 'the second time')
  const error = await failure(SandboxError, world.create({ template }))
  assert.match(error.message, /not found/)
}

async function forks(world) {
  const options = { metadata: { odd: 'a value' }, envs: { NAME: 'given' } }
  const [source, pid] = await readyToCopy(world, options)
  const before = await call(source.sandbox, 'getInfo')
  const made = await streaming(source, () => world.fork(source, { count: 4, timeoutMs: 300_000 }))
  assert.deepEqual((await call(source.sandbox, 'getInfo')).endAt, before.endAt)
  for (const one of made) {
    const info = await call(one.sandbox, 'getInfo')
    assert.deepEqual([info.state, info.metadata], ['running', before.metadata])
    near(await world.secondsLeft(one.sandbox), 300, 'left of a fork', 20)
  }
  await judgeDiverged(source, made, pid)
  same(await world.listed(), [source, ...made].map(idOf), 'all of them')
  const [again] = await call(Sandbox, 'fork', made[0].id, { timeoutMs: 600_000 })
  assert.ok(again instanceof Sandbox, `a fork of a fork: ${again}`)
  const second = new Keeping(again)
  await second.expectNext(pid, 4)
  const ofSecond = await call(Sandbox, 'createSnapshot', second.id)
  world.snapshots.add(ofSecond.snapshotId)
  const last = new Keeping(await world.create({ template: ofSecond.snapshotId }))
  await last.expectNext(pid, 5)
  await source.pause()
  const error = await failure(SandboxError, call(source.sandbox, 'fork', { count: 2 }))
  const text = `Sandbox '${source.id}' is paused and cannot be forked; resume it first`
  assert.ok(error.message.includes(text), error.message)
  for (const count of [0, 101]) {
    const error = await failure(SandboxError, call(made[1].sandbox, 'fork', { count }))
    assert.ok(error.message.includes("'count' must be from 1 to 100"), error.message)
  }
  await world.end(source, second, last, ...made)
  await world.deleteSnapshot(ofSecond.snapshotId)
}

// --- all of it -----------------------------------------------------------------------------------

const CHECKS = [goesOn, randomBytes, tenTimes, clock, oldStreams, terms, whilePaused, killPaused]
CHECKS.push(fallsAsleep, woken, withoutMemory, snapshots, forks)
const left = new Set()

async function main(only) {
  for (const body of CHECKS) {
    if (only.length && !only.some((one) => body.name.startsWith(one))) continue
    const world = new SnapshotWorld(suite, body.name, left)
    await suite.check(body.name, body, [world], DEADLINE_MS)
    // What a check that failed left would cost the next ones a processor.
    for (const id of await taggedIds(suite.tag)) await api('DELETE', `/sandboxes/${id}`)
  }
  if (only.length) return
  await suite.check('every_method_called', () => everyMethodCalled((name) => SNAPSHOTS.has(name)))
}

/** Snapshots carry no metadata, so that the suite's own clean-up cannot find them. */
async function finish() {
  for (const id of left) await api('DELETE', `/templates/${encodeURIComponent(id)}`)
  return suite.finish()
}

let passed = false
for (const signal of ['SIGINT', 'SIGTERM']) {
  process.once(signal, () => finish().finally(() => process.exit(143)))
}
try {
  await main(process.argv.slice(2))
} finally {
  passed = await finish()
}
// Connections the SDK keeps open, and what overran its deadline, must not hold the program.
process.exit(passed ? 0 : 1)
