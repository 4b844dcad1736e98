// Where the guest suite runs: in a sandbox of a live server, or, with BELLJAR_ENVD, against that
// program in host mode on this machine. See ../python/guest_target.py, which this mirrors.
import { spawn } from 'node:child_process'
import { randomUUID } from 'node:crypto'
import { copyFileSync, mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { createServer } from 'node:net'
import { userInfo } from 'node:os'
import { basename, join } from 'node:path'

import { until } from './checks.mjs'

const START_MS = 20_000
const STOP_MS = 20_000
const SEARCH_PATH = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin'
export const MIB = 1024 * 1024

// This SDK spends most of a transfer on its own side: the full sizes of what goes through its RPC
// client are left to the Python suites.
const NATIVE = {
  bigFile: 1024 * MIB,
  longOutput: 16 * MIB,
  stdin: 16 * MIB,
  entries: 10_000,
  atOnce: 100,
  burst: 2000,
}
const LIVE = {
  bigFile: 16 * MIB,
  longOutput: 4 * MIB,
  stdin: 2 * MIB,
  entries: 500,
  atOnce: 8,
  burst: 100,
}

/** `full` names sizes of a live run that this suite takes in full. */
export async function target(full) {
  const folder = `guest suite ${randomUUID().slice(0, 8)}`
  const program = process.env.BELLJAR_ENVD
  if (program) return startDaemon(program, folder)
  return {
    native: false,
    user: 'user',
    otherUser: 'root',
    home: '/home/user',
    folder,
    base: `/home/user/${folder}`,
    scale: { ...LIVE, ...full },
    remarks: () => [],
    stop: async () => {},
  }
}

async function startDaemon(program, folder) {
  const { username, homedir, uid } = userInfo()
  const scratch = mkdtempSync(join(homedir, '.guest-suite-'))
  const base = join(homedir, folder)
  const address = `127.0.0.1:${await freePort()}`
  const [file, ...args] = command(program, scratch, homedir, uid, address)
  const env = { PATH: SEARCH_PATH, HOME: homedir }
  const daemon = spawn(file, args, { env, stdio: ['ignore', 'ignore', 'pipe'] })
  let log = ''
  daemon.stderr.on('data', (data) => (log = (log + data).slice(-500)))
  const ended = new Promise((resolve) => daemon.once('exit', resolve))
  const remove = () => {
    for (const path of [base, scratch]) rmSync(path, { recursive: true, force: true })
  }
  const stop = async () => {
    daemon.kill('SIGTERM')
    const late = setTimeout(() => daemon.kill('SIGKILL'), STOP_MS)
    const code = await ended
    clearTimeout(late)
    remove()
    if (code === null) throw new Error(`the daemon ignored SIGTERM for ${STOP_MS} ms`)
  }
  Object.assign(process.env, { E2B_DEBUG: 'true', E2B_SANDBOX_URL: `http://${address}` })
  try {
    await until(START_MS, 'the daemon answers', async () => {
      if (daemon.exitCode !== null) throw new Error(`the daemon ended: ${log}`)
      const answer = await fetch(`http://${address}/health`).catch(() => undefined)
      return answer?.status === 204
    })
  } catch (error) {
    daemon.kill('SIGKILL')
    remove()
    throw error
  }
  return {
    native: true,
    user: username,
    otherUser: 'nobody',
    home: homedir,
    folder,
    base,
    scale: NATIVE,
    remarks: () => [memory(daemon.pid)],
    stop,
  }
}

/** For root, in a mount namespace where the home is an empty folder: see the Python file. */
function command(program, scratch, home, uid, address) {
  const listen = ['--host-mode', '--listen', address]
  if (uid !== 0) return [program, ...listen]
  copyFileSync(program, join(scratch, basename(program)))
  const script = 'mount --bind "$1" "$HOME" && cd "$HOME" && shift && exec "$@"'
  const inside = join(home, basename(program))
  return ['unshare', '--mount', 'sh', '-c', script, 'sh', scratch, inside, ...listen]
}

function memory(pid) {
  const status = readFileSync(`/proc/${pid}/status`, 'utf8')
  const field = (name) => new RegExp(`${name}:\\s*(.*)`).exec(status)[1]
  return (
    `daemon: ${field('VmRSS')} resident at the end, ${field('VmHWM')} at most, ` +
    `${field('Threads')} threads`
  )
}

function freePort() {
  return new Promise((resolve) => {
    const server = createServer().listen(0, '127.0.0.1', () => {
      const { port } = server.address()
      server.close(() => resolve(port))
    })
  })
}
