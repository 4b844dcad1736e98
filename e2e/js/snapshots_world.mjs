// What the pause, snapshot and fork checks of the JavaScript SDK share: sandboxes with a program
// whose state there is no other copy of. See ../python/snapshots_world.py, which this mirrors.
import assert from 'node:assert/strict'
import { readFileSync } from 'node:fs'

import { Sandbox } from 'e2b'

import { api, setting, until } from './checks.mjs'
import { World, call } from './control_world.mjs'
import { Box } from './guest_box.mjs'

const KEEPER = readFileSync(new URL('../guest/keeper.py', import.meta.url), 'utf8')
const PORT = 8090
export const HELD = '/home/user/held.txt'
export const LONG = { timeoutMs: 300_000 }
const PLAIN = { base: '/home/user', scale: undefined }
const CLOCK_TOLERANCE_S = 2
// Which methods of a guest are called, the guest suite counts.
const unrecorded = { watch: (value) => value }

/** A request to a port of a sandbox. */
export function toPort(sandboxId, path, port = PORT) {
  const headers = { 'E2b-Sandbox-Id': sandboxId, 'E2b-Sandbox-Port': String(port) }
  return fetch(setting('E2B_SANDBOX_URL') + path, { headers })
}

/** A sandbox whose keeper runs: `sandbox` is the SDK's handle, `box` has the guest's verbs. */
export class Keeping {
  constructor(sandbox) {
    this.sandbox = sandbox
    this.id = sandbox.sandboxId
    this.box = new Box(PLAIN, sandbox, unrecorded)
  }

  async ask(path) {
    const answer = await toPort(this.id, path)
    const text = await answer.text()
    assert.equal(answer.status, 200, `the server in ${this.id}, asked for ${path}: ${text}`)
    return text
  }

  /** [pid, count] after adding one. */
  async next() {
    return (await this.ask('/next')).split(' ').map(Number)
  }

  async expectNext(pid, count) {
    assert.deepEqual(await this.next(), [pid, count], `pid and counter in ${this.id}`)
  }

  async output(command, options) {
    return (await this.box.run(command, options)).stdout
  }

  held() {
    return this.box.files.read(HELD)
  }

  async bootId() {
    return (await this.output('cat /proc/sys/kernel/random/boot_id')).trim()
  }

  /** What its random pool gives; its id and its clock must be right. */
  async identify() {
    const asked = Date.now() / 1000
    const command =
      'echo "$E2B_SANDBOX_ID $(od -An -v -tx1 -N16 /dev/urandom | tr -d " ") $(date +%s.%N)"'
    const [id, random, clock] = (await this.output(command)).trim().split(' ')
    assert.equal(id, this.id, 'the id the guest knows')
    const off = Math.max(asked - Number(clock), Number(clock) - Date.now() / 1000)
    assert.ok(off < CLOCK_TOLERANCE_S, `the guest's clock is off by ${off} s`)
    return random
  }

  async pause(options) {
    assert.equal(await call(this.sandbox, 'pause', options), true, 'pause')
  }

  async connect(options) {
    const given = { timeoutMs: 600_000, ...options }
    return new Keeping(await call(Sandbox, 'connect', this.id, given))
  }

  async state() {
    return (await call(this.sandbox, 'getInfo')).state
  }
}

export class SnapshotWorld extends World {
  /** `snapshots` is what was created by all checks of the run and not deleted yet. */
  constructor(suite, part, snapshots) {
    super(suite, part)
    this.snapshots = snapshots
  }

  create(options) {
    return super.create({ requestTimeoutMs: 120_000, ...options })
  }

  async plain(options) {
    return new Keeping(await this.create(options))
  }

  /** A new sandbox with its keeper, which has counted nothing yet. */
  async keeping(options) {
    const keeping = await this.plain(options)
    await keeping.box.files.write('keeper.py', KEEPER)
    const command = `exec python3 keeper.py ${PORT} ${HELD}`
    const { handle } = await keeping.box.start(command, { cwd: '/home/user', timeoutMs: 0 })
    await handle.disconnect()
    await until(120_000, 'the keeper answers', async () => {
      const answer = await toPort(keeping.id, '/count')
      await answer.text()
      return answer.status === 200
    })
    return keeping
  }

  async fork(source, options) {
    const given = { timeoutMs: 600_000, requestTimeoutMs: 120_000, ...options }
    const made = await call(source.sandbox, 'fork', given)
    assert.equal(made.length, given.count ?? 1, 'results')
    const failed = made.filter((one) => one instanceof Error)
    assert.deepEqual(failed, [], 'forks that did not start')
    return made.map((one) => new Keeping(one))
  }

  async snapshot(source, options) {
    const made = await call(source.sandbox, 'createSnapshot', {
      requestTimeoutMs: 120_000,
      ...options,
    })
    assert.ok(made.snapshotId, `no id: ${JSON.stringify(made)}`)
    this.snapshots.add(made.snapshotId)
    return made
  }

  async deleteSnapshot(snapshotId) {
    assert.equal(await call(Sandbox, 'deleteSnapshot', snapshotId), true, `of ${snapshotId}`)
    this.snapshots.delete(snapshotId)
  }

  /** The ids on all pages, of the class or of a sandbox's handle. */
  async listedSnapshots(target, { limit, ...query } = {}) {
    const pages = call(target, 'listSnapshots', { limit, ...query })
    const found = []
    while (pages.hasNext) {
      const page = await pages.nextItems()
      assert.ok(page.length <= (limit ?? 100), `a page of ${page.length}, limit ${limit}`)
      found.push(...page.map(({ snapshotId }) => snapshotId))
    }
    return found
  }

  /** What the API says of a sandbox, with what the SDK does not show. */
  async detail(sandboxId) {
    const answer = await api('GET', `/sandboxes/${sandboxId}`)
    assert.equal(answer.status, 200, 'status')
    return answer.json()
  }

  untilState(sandboxId, wanted, deadlineMs) {
    return until(
      deadlineMs,
      `${sandboxId} is ${wanted}`,
      async () => (await this.detail(sandboxId)).state === wanted
    )
  }

  end(...keepings) {
    return this.kill(...keepings.map(({ sandbox }) => sandbox))
  }
}
