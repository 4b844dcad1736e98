// The control plane by the official JavaScript SDK. See ../README.md.
import assert from 'node:assert/strict'

import {
  AuthenticationError,
  E2B,
  NotFoundError,
  Sandbox,
  SandboxError,
  SandboxNotFoundError,
} from 'e2b'

import { Suite, failure, setting, until } from './checks.mjs'
import {
  MISSING,
  NOT_YET,
  World,
  call,
  everyMethodCalled,
  gone,
  members,
  near,
  same,
} from './control_world.mjs'

const suite = new Suite('control.js')
const AWKWARD = 'a b&c=d/é+%20' // must survive being encoded twice
const MANY = 105 // more than the largest page

// --- create and look -----------------------------------------------------------------------------

async function createDefaults(world) {
  const sandbox = await call(Sandbox, 'create', { metadata: world.metadata })
  const info = await call(sandbox, 'getInfo')
  assert.equal(info.sandboxId, sandbox.sandboxId)
  assert.deepEqual([info.name, info.state], ['base', 'running'])
  near((info.endAt - info.startedAt) / 1000, 300, 'seconds to live', 0.5)
  assert.ok(info.cpuCount >= 1 && info.memoryMB >= 128, 'size')
  assert.match(info.envdVersion, /^\d+\.\d+\.\d+$/)
  assert.deepEqual(info.metadata, world.metadata)
  assert.deepEqual(info.lifecycle, { onTimeout: 'kill', autoResume: false })
  assert.deepEqual(await call(Sandbox, 'getFullInfo', sandbox.sandboxId), info)
  assert.equal(await call(sandbox, 'isRunning'), true)
  await world.kill(sandbox)
}

async function createOptions(world) {
  const odd = { odd: AWKWARD, empty: '', ключ: '值' }
  const sandbox = await world.create({
    timeoutMs: 123_000,
    metadata: odd,
    envs: { NAME: 'value' },
    secure: true,
    allowInternetAccess: false,
    lifecycle: { onTimeout: 'kill', autoResume: false },
    requestTimeoutMs: 60_000,
    apiHeaders: { 'X-Of-The-Caller': 'ignored' },
  })
  const info = await call(sandbox, 'getInfo')
  assert.deepEqual(info.metadata, { ...world.metadata, ...odd })
  near(await world.secondsLeft(sandbox), 123, 'seconds left')
  assert.equal(info.allowInternetAccess, false)
  const byId = await world.create({ template: info.templateId })
  assert.equal((await call(byId, 'getInfo')).templateId, info.templateId)
  await world.kill(sandbox, byId)
}

async function addresses(world) {
  const sandbox = await world.create()
  assert.equal(call(sandbox, 'getHost', 8080), `8080-${sandbox.sandboxId}.${sandbox.sandboxDomain}`)
  assert.ok(call(sandbox, 'getMcpUrl').includes(`50005-${sandbox.sandboxId}.`))
  for (const name of ['downloadUrl', 'uploadUrl']) {
    const url = await call(sandbox, name, 'a b', { useSignatureExpiration: 60_000 })
    assert.match(url, /signature=v1_.*signature_expiration=/)
  }
  assert.ok(!sandbox.trafficAccessToken, 'token of a public sandbox')
  await world.kill(sandbox)
}

async function createRefused(world) {
  const refused = async (wanted, statusCode, options) => {
    const error = await failure(Error, world.create(options))
    assert.ok(error.message.includes(wanted), `no "${wanted}" in "${error.message}"`)
    if (error.statusCode !== undefined) assert.equal(error.statusCode, statusCode)
  }
  await refused("template 'no-such-template' not found", 404, { template: 'no-such-template' })
  await refused("tag 'none' does not exist for template 'base'", 404, { template: 'base:none' })
  await refused('Invalid template reference', 400, { template: 'No Template/at all' })
  await refused('Timeout must be greater than 0', 400, { timeoutMs: 0 })
  await refused('Timeout cannot be greater than', 400, { timeoutMs: 10_000_000_000 })
  await refused('metadata', 400, { metadata: { number: 5 } })
  await refused('network', 400, { network: { allowOut: ['1.1.1.1'], denyOut: ['0.0.0.0/0'] } })
  await refused('volumeMounts', 400, { volumeMounts: { '/data': 'a-volume' } })
  assert.deepEqual(await world.listed(), [], 'created nevertheless')
}

// --- prolong and end -----------------------------------------------------------------------------

async function connect(world) {
  const sandbox = await world.create()
  for (const [timeoutMs, left] of [
    [30_000, 600],
    [undefined, 600],
    [900_000, 900],
  ]) {
    const again = await call(Sandbox, 'connect', sandbox.sandboxId, { timeoutMs })
    assert.equal(again.sandboxId, sandbox.sandboxId)
    near(await world.secondsLeft(again), left, `left after ${timeoutMs} ms`)
    assert.equal(await call(again, 'isRunning'), true)
  }
  await call(sandbox, 'connect', { timeoutMs: 1_200_000 })
  near(await world.secondsLeft(sandbox), 1200, 'left by the instance')
  const error = await failure(SandboxNotFoundError, call(Sandbox, 'connect', MISSING))
  assert.ok(error.message.includes(MISSING), error.message)
  await world.kill(sandbox)
}

async function setTimeouts(world) {
  const sandbox = await world.create()
  for (const seconds of [1800, 60]) {
    await call(sandbox, 'setTimeout', seconds * 1000)
    near(await world.secondsLeft(sandbox), seconds, 'left by the instance')
  }
  await call(Sandbox, 'setTimeout', sandbox.sandboxId, 900_000)
  near(await world.secondsLeft(sandbox), 900, 'left by the class')
  const error = await failure(SandboxError, call(sandbox, 'setTimeout', 10_000_000_000))
  assert.ok(error.message.includes('Timeout cannot be greater than'), error.message)
  await failure(SandboxNotFoundError, call(Sandbox, 'setTimeout', MISSING, 60_000))
  await world.kill(sandbox)
}

async function kill(world) {
  const [sandbox, other] = await Promise.all([world.create(), world.create()])
  assert.equal(await call(sandbox, 'kill'), true)
  assert.equal(await call(sandbox, 'kill'), false)
  const killed = await Promise.all(
    [1, 2, 3, 4].map(() => call(Sandbox, 'kill', other.sandboxId))
  )
  assert.ok(killed.includes(true), 'four kills at once')
  assert.equal(await call(Sandbox, 'kill', MISSING), false)
  for (const asked of [
    () => call(sandbox, 'getInfo'),
    () => call(sandbox, 'setTimeout', 60_000),
    () => call(sandbox, 'connect'),
    () => call(Sandbox, 'getInfo', MISSING),
  ]) {
    await failure(NotFoundError, asked())
  }
  assert.equal(await call(sandbox, 'isRunning'), false)
  assert.deepEqual(await world.listed(), [], 'still listed')
}

async function expiry(world) {
  const [kept, prolonged] = await Promise.all([1, 2].map(() => world.create({ timeoutMs: 2000 })))
  await call(prolonged, 'setTimeout', 600_000)
  const { endAt } = await call(kept, 'getInfo')
  await gone(kept.sandboxId)
  const late = (Date.now() - endAt.getTime()) / 1000
  assert.ok(late > -0.3 && late < 3, `gone ${late.toFixed(2)} s after its end`)
  assert.equal(await call(kept, 'kill'), false)
  await failure(NotFoundError, call(kept, 'setTimeout', 60_000))
  assert.deepEqual(await world.listed(), [prolonged.sandboxId], 'who is left')
  await world.kill(prolonged)
}

// --- find ----------------------------------------------------------------------------------------

async function many(world) {
  const ids = []
  while (ids.length < MANY) {
    const colour = ['red', 'green', 'blue'][(ids.length / 10) % 3 | 0]
    const wanted = Math.min(10, MANY - ids.length)
    const made = Array.from({ length: wanted }, () => world.create({ metadata: { colour } }))
    ids.push(...(await Promise.all(made)).map((sandbox) => sandbox.sandboxId))
  }
  assert.equal(new Set(ids).size, MANY, 'distinct ids')
  return ids
}

async function listing(world, ids) {
  const red = { ...world.metadata, colour: 'red' }
  const found = await world.listed({ metadata: red })
  assert.ok(found.length > 0 && found.length < MANY, `${found.length} red ones`)
  assert.deepEqual(await world.listed({ metadata: { ...red, colour: 'none' } }), [])
  same(await world.listed({ state: ['running'] }), ids, 'running ones')
  assert.deepEqual(await world.listed({ state: ['paused'] }), [], 'paused ones')
  same(await world.listed({ state: ['running', 'paused'] }), ids, 'of both states')
  const { templateId } = await call(Sandbox, 'getInfo', found[0])
  for (const template of ['base', templateId]) {
    same(await world.listed({ template }), ids, `of template ${template}`)
  }
  const odd = await world.create({ metadata: { odd: AWKWARD } })
  const byOdd = { metadata: { ...world.metadata, odd: AWKWARD } }
  assert.deepEqual(await world.listed(byOdd), [odd.sandboxId])
  await world.kill(odd)
}

async function ordering(world, ids) {
  const newest = await world.listed({ limit: 20 })
  same(newest, ids, 'in pages of 20')
  assert.deepEqual(await world.listed({ limit: 7, order: 'desc' }), newest)
  assert.deepEqual(await world.listed({ limit: 7, order: 'asc' }), [...newest].reverse())
  const { startedAt } = await call(Sandbox, 'getInfo', newest[MANY >> 1])
  const after = await world.listed({ startedAfter: startedAt })
  assert.deepEqual(after, newest.slice(0, after.length), 'not the newest ones')
  assert.ok(after.includes(newest[MANY >> 1]), 'started at that time counts too')
  const tomorrow = new Date(Date.now() + 86_400_000)
  assert.deepEqual(await world.listed({ startedAfter: tomorrow }), [], 'of the future')
}

async function pages(world, ids) {
  for (const limit of [1, 33, 100, undefined]) {
    same(await world.listed({ limit }), ids, `pages of ${limit}`)
  }
  const query = { metadata: world.metadata }
  for (const [options, wanted] of [
    [{ limit: 101 }, 'limit'],
    [{ nextToken: 'no token' }, 'nextToken'],
  ]) {
    const error = await failure(SandboxError, Sandbox.list({ query, ...options }).nextItems())
    assert.ok(error.message.includes(wanted), error.message)
  }
  const first = Sandbox.list({ query, limit: 40 })
  const head = await first.nextItems()
  const rest = Sandbox.list({ query, nextToken: first.nextToken })
  const found = [...head, ...(await rest.nextItems())].map((entry) => entry.sandboxId)
  same(found, ids, 'one page, and the rest from its token')
  assert.equal(rest.hasNext, false)
  await failure(Error, rest.nextItems())
}

async function pagesUnderChange(world, ids) {
  const killed = new Set()
  const fresh = new Set()
  const between = async (page) => {
    for (const id of page.slice(0, 3)) {
      killed.add(id)
      await call(Sandbox, 'kill', id)
    }
    fresh.add((await world.create()).sandboxId)
  }
  same(await world.listed({ limit: 10, between }), ids, 'what was there from the start')
  const left = [...ids.filter((id) => !killed.has(id)), ...fresh]
  same(await world.listed(), left, 'what is left')
  while (left.length) {
    await Promise.all(left.splice(0, 10).map((id) => call(Sandbox, 'kill', id)))
  }
  assert.deepEqual(await world.listed(), [], 'after the last kill')
}

// --- metrics -------------------------------------------------------------------------------------

async function metrics(world) {
  const sandbox = await world.create()
  const samples = await until(30_000, 'two samples', async () => {
    const found = await call(sandbox, 'getMetrics')
    return found.length >= 2 && found
  })
  const [last] = samples.slice(-1)
  const info = await call(sandbox, 'getInfo')
  assert.equal(last.cpuCount, info.cpuCount)
  assert.ok(last.cpuUsedPct >= 0 && last.cpuUsedPct <= 100 * last.cpuCount, 'processor time')
  assert.ok(last.memUsed <= last.memTotal && last.memCache <= last.memTotal, 'memory')
  assert.ok(last.diskUsed <= last.diskTotal, 'disk')
  const times = samples.map((sample) => sample.timestamp.getTime())
  assert.deepEqual(times, [...times].sort(), 'order of the samples')
  const between = (start, end) =>
    call(Sandbox, 'getMetrics', sandbox.sandboxId, {
      start: start && new Date(start),
      end: end && new Date(end),
    })
  const later = (await between(times[0] + 2000)).map((sample) => sample.timestamp.getTime())
  assert.ok(!later.includes(times[0]) && later.includes(times[1]), 'from the second on')
  const day = 86_400_000
  assert.deepEqual(await between(times[0] - 2 * day, times[0] - day), [], 'of the day before')
  await failure(NotFoundError, call(Sandbox, 'getMetrics', MISSING))
  await world.kill(sandbox)
}

// --- who asks ------------------------------------------------------------------------------------

async function keys(world) {
  const wrong = 'e2b_' + '0'.repeat(40)
  const sandbox = await world.create()
  const id = sandbox.sandboxId
  for (const asked of [
    () => world.create({ apiKey: wrong }),
    () => call(Sandbox, 'getInfo', id, { apiKey: wrong }),
    () => call(Sandbox, 'kill', id, { apiKey: wrong }),
    () => call(Sandbox, 'setTimeout', id, 60_000, { apiKey: wrong }),
    () => call(Sandbox, 'connect', id, { apiKey: wrong }),
    () => Sandbox.list({ apiKey: wrong }).nextItems(),
    () => world.create({ apiKey: 'not a key' }),
  ]) {
    const error = await failure(AuthenticationError, asked())
    assert.ok(error.message.includes('security requirements failed'), error.message)
    assert.ok(!error.message.includes(wrong), 'the key is in the text')
  }
  const right = setting('E2B_API_KEY')
  process.env.E2B_API_KEY = wrong // what is passed wins
  try {
    const info = await call(Sandbox, 'getInfo', id, { apiKey: right })
    assert.deepEqual(info.metadata, world.metadata)
    delete process.env.E2B_API_KEY
    const error = await failure(AuthenticationError, world.create())
    assert.ok(error.message.includes('E2B_API_KEY'), error.message)
  } finally {
    process.env.E2B_API_KEY = right
  }
  await world.kill(sandbox)
}

async function clientObject(world) {
  const kept = {}
  for (const name of ['E2B_API_KEY', 'E2B_API_URL', 'E2B_SANDBOX_URL']) {
    kept[name] = setting(name)
    delete process.env[name]
  }
  try {
    const options = {
      apiKey: kept.E2B_API_KEY,
      apiUrl: kept.E2B_API_URL,
      sandboxUrl: kept.E2B_SANDBOX_URL,
    }
    const bound = new E2B(options)
    const stranger = new E2B({ ...options, apiKey: 'e2b_' + '1'.repeat(40) })
    const sandbox = await bound.Sandbox.create('base', { metadata: world.metadata })
    const again = await bound.Sandbox.connect(sandbox.sandboxId)
    assert.equal(await again.isRunning(), true)
    const found = await bound.Sandbox.list().nextItems()
    assert.ok(found.some((entry) => entry.sandboxId === sandbox.sandboxId), 'not listed')
    await failure(AuthenticationError, stranger.Sandbox.getInfo(sandbox.sandboxId))
    assert.equal(await bound.Sandbox.kill(sandbox.sandboxId), true)
  } finally {
    Object.assign(process.env, kept)
  }
}

/** Thirty creates, all different; all killed, all gone. */
async function atOnce(world) {
  const created = await Promise.all(Array.from({ length: 30 }, () => world.create()))
  const ids = created.map((sandbox) => sandbox.sandboxId)
  assert.equal(new Set(ids).size, 30)
  same(await world.listed(), ids, 'listed')
  assert.deepEqual(await world.kill(...created), Array(30).fill(true))
  assert.deepEqual(await world.listed(), [])
}

/** Methods of later parts fail with an error, and leave the sandbox as it was. */
async function notYet(world) {
  const sandbox = await world.create()
  const special = { updateNetwork: [{}] }
  for (const member of members()) {
    const [form, name] = member.split(' ')
    if (!NOT_YET.has(name)) continue
    const target = form === 'class' ? Sandbox : sandbox
    const args = [...(special[name] ?? [])]
    if (form === 'class') args.unshift(sandbox.sandboxId)
    let value
    try {
      value = await call(target, name, ...args)
    } catch {
      continue
    }
    assert.fail(`${member} gave ${JSON.stringify(value)}`)
  }
  const info = await call(sandbox, 'getInfo')
  assert.deepEqual([info.state, info.metadata], ['running', world.metadata])
  await world.kill(sandbox)
}

const SINGLE = [createDefaults, createOptions, addresses, createRefused, connect, setTimeouts, kill]
SINGLE.push(expiry, metrics, keys, clientObject, atOnce, notYet)
const only = process.argv.slice(2)
const chosen = (body) => !only.length || only.some((one) => body.name.startsWith(one))

for (const body of SINGLE.filter(chosen)) {
  await suite.check(body.name, body, [new World(suite, body.name)])
}
const lists = [listing, ordering, pages, pagesUnderChange].filter(chosen)
if (lists.length) {
  const world = new World(suite, 'many')
  const ids = await suite.check('many', many, [world])
  for (const body of lists) await suite.check(body.name, body, [world, ids])
}
if (!only.length) await suite.check('every_method_called', () => everyMethodCalled())
process.exit((await suite.finish()) ? 0 : 1)
