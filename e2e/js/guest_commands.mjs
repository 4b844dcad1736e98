// What commands and terminals do, with the JavaScript SDK.
import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'

import {
  AuthenticationError,
  CommandExitError,
  InvalidArgumentError,
  NotFoundError,
  SandboxError,
  TimeoutError,
} from 'e2b'

import { Skip, failure, until } from './checks.mjs'
import { NOBODY, rate } from './guest_box.mjs'
import { MIB } from './guest_target.mjs'

const STRING_MAX = 128 * 1024 // one argument or variable, with its end: Linux's MAX_ARG_STRLEN

async function isRunning(box) {
  assert.equal(await box.sandbox.isRunning(), true)
}

async function ends(box) {
  const result = await box.run('echo out; echo err >&2')
  assert.deepEqual(
    [result.stdout, result.stderr, result.exitCode, result.error],
    ['out\n', 'err\n', 0, undefined]
  )
  for (const code of [1, 7, 126, 255]) {
    const error = await failure(CommandExitError, box.run(`echo some; exit ${code}`))
    assert.deepEqual(
      [error.exitCode, error.stdout, error.error],
      [code, 'some\n', `exit status ${code}`]
    )
  }
  const missing = await failure(CommandExitError, box.run('no-such-program'))
  assert.equal(missing.exitCode, 127)
  const signalled = await failure(CommandExitError, box.run('kill -TERM $$'))
  assert.equal(signalled.exitCode, -1)
}

async function oddTexts(box) {
  const odd = `spaces  and\ttabs, "double" $HOME \\ ünïcödé 漢字 🦀 e\u0301`
  assert.equal((await box.run(`printf %s '${odd}'`)).stdout, odd)
  const given = await box.run('printf %s "$ODD"', { envs: { ODD: `${odd}\nsecond` } })
  assert.equal(given.stdout, `${odd}\nsecond`)
  const split = await box.run(String.raw`printf '\303'; sleep 0.3; printf '\251\377\0end'`)
  assert.equal(split.stdout, 'é\ufffd\0end')
}

async function folders(box) {
  const odd = box.path("a folder/ünder 'quotes' 漢")
  await box.files.makeDir(odd)
  assert.equal((await box.run('pwd', { cwd: odd })).stdout, `${odd}\n`)
  assert.equal((await box.run('pwd')).stdout, `${box.target.home}\n`)
  const missing = box.path('missing')
  const error = await failure(InvalidArgumentError, box.run('true', { cwd: missing }))
  assert.ok(error.message.includes(missing), error.message)
}

async function users(box) {
  const { native, user, otherUser } = box.target
  if (native && user !== 'root') throw new Skip('only root can run commands as somebody else')
  const { stdout } = await box.run('id -un', { user: otherUser, cwd: '/' })
  assert.equal(stdout, `${otherUser}\n`)
  await failure(AuthenticationError, box.run('true', { user: 'no-such-user' }))
}

async function listed(box) {
  const envs = { MARK: 'ä b' }
  const running = await box.start('exec cat', { stdin: true, envs, cwd: box.target.base })
  const entries = (await box.commands.list()).filter(({ pid }) => pid === running.pid)
  assert.deepEqual(
    entries.map(({ cmd, args, envs, cwd, tag }) => [cmd, args, envs, cwd, tag]),
    [['/bin/bash', ['-l', '-c', 'exec cat'], envs, box.target.base, undefined]]
  )
  await running.handle.closeStdin()
  await running.handle.wait()
  assert.ok(
    (await box.commands.list()).every(({ pid }) => pid !== running.pid),
    'still listed'
  )
}

async function stdinEveryWay(box) {
  assert.equal(box.commands.supportsStdinClose, true)
  const { handle, heard, pid } = await box.start('cat; echo over; echo err >&2', { stdin: true })
  await handle.sendStdin('by the handle é\n')
  await heard.heard('by the handle é\n')
  await handle.sendStdin(new TextEncoder().encode('bytes é\n'))
  await box.commands.sendStdin(pid, 'by pid\n')
  await box.commands.sendStdin(pid, '')
  await heard.heard('by pid\n')
  await box.commands.closeStdin(pid)
  const wanted = 'by the handle é\nbytes é\nby pid\nover\n'
  assert.equal((await handle.wait()).stdout, wanted)
  assert.deepEqual(
    [handle.stdout, handle.stderr, handle.exitCode, handle.error],
    [wanted, 'err\n', 0, undefined]
  )
}

async function stdinRefused(box) {
  await failure(NotFoundError, box.commands.sendStdin(NOBODY, 'x'))
  await failure(NotFoundError, box.commands.closeStdin(NOBODY))
  await failure(NotFoundError, box.commands.connect(NOBODY))
  assert.equal(await box.commands.kill(NOBODY), false)
  const { handle } = await box.start('sleep 600', { timeoutMs: 0 }) // without stdin
  const ended = failure(CommandExitError, handle.wait())
  await failure(SandboxError, handle.sendStdin('x'))
  assert.equal(await handle.kill(), true)
  await ended
}

async function stdinLarge(box) {
  const size = box.scale.stdin
  const { handle } = await box.start('sha256sum; echo over', { stdin: true, timeoutMs: 0 })
  const wanted = createHash('sha256')
  const piece = Buffer.alloc(MIB, '0123456789abcde\n')
  const started = performance.now()
  for (let number = 0; number < size / MIB; number += 1) {
    piece.write(String(number).padStart(8, '0'))
    wanted.update(piece)
    await handle.sendStdin(piece)
  }
  await handle.closeStdin()
  assert.equal((await handle.wait()).stdout, `${wanted.digest('hex')}  -\nover\n`)
  return rate('stdin', size, started)
}

async function longOutput(box) {
  const size = box.scale.longOutput
  const heard = createHash('sha256')
  let length = 0
  const onStdout = (text) => {
    length += text.length
    heard.update(text)
  }
  const started = performance.now()
  const command = `yes 0123456789abcde | head -c ${size}`
  const { stdout } = await box.run(command, { onStdout, timeoutMs: 0 })
  assert.deepEqual([length, stdout.length], [size, size])
  const wanted = createHash('sha256')
  const block = Buffer.alloc(MIB, '0123456789abcde\n')
  for (let sent = 0; sent < size; sent += MIB) wanted.update(block)
  assert.equal(heard.digest('hex'), wanted.digest('hex'))
  return rate('output', size, started)
}

async function manyAtOnce(box) {
  const count = box.scale.atOnce
  const started = performance.now()
  const numbers = Array.from({ length: count }, (_, number) => number)
  const running = await Promise.all(
    numbers.map((number) => box.start(`echo ${number}; exec cat`, { stdin: true, timeoutMs: 0 }))
  )
  await Promise.all(running.map(({ heard }, number) => heard.heard(`${number}\n`)))
  const alive = new Set((await box.commands.list()).map(({ pid }) => pid))
  assert.ok(
    running.every(({ pid }) => alive.has(pid)),
    'not all of them run at once'
  )
  assert.equal(await box.sandbox.isRunning(), true)
  await Promise.all(running.map(({ handle }, number) => handle.sendStdin(`to ${number}`)))
  await Promise.all(running.map(({ handle }) => handle.closeStdin()))
  const results = await Promise.all(running.map(({ handle }) => handle.wait()))
  assert.deepEqual(
    results.map(({ stdout }) => stdout),
    numbers.map((number) => `${number}\nto ${number}`)
  )
  return `${count} commands at once: ${((performance.now() - started) / 1000).toFixed(1)} s`
}

async function kills(box) {
  const stubborn = "trap '' TERM INT HUP; echo ready; while :; do sleep 0.1; done"
  const { handle, heard, pid } = await box.start(stubborn, { timeoutMs: 0 })
  const ended = failure(CommandExitError, handle.wait())
  await heard.heard('ready')
  await box.shell(`kill -TERM ${pid}`, { cwd: '/' })
  assert.equal(await box.commands.kill(pid), true)
  const error = await ended
  assert.deepEqual([error.exitCode, error.error], [-1, 'signal: killed'])
  assert.equal(await handle.kill(), false)
}

async function deadline(box) {
  const mark = 'deadline-of-the-guest-suite'
  const stubborn = `trap '' TERM INT HUP; : ${mark}; while :; do sleep 0.1; done`
  await failure(TimeoutError, box.run(stubborn, { timeoutMs: 3000 }))
  await until(20_000, 'the overdue command is gone', async () =>
    (await box.commands.list()).every(({ args }) => !args.join(' ').includes(mark))
  )
}

async function outlives(box) {
  const name = box.path('child')
  const command = `(while [ ! -e '${name}.go' ]; do sleep 0.1; done; touch '${name}.done')`
  const { stdout } = await box.run(`${command} </dev/null >/dev/null 2>&1 & echo started`)
  assert.equal(stdout, 'started\n')
  await box.files.write(`${name}.go`, '')
  await until(60_000, 'the child that was left behind does its work', () =>
    box.files.exists(`${name}.done`)
  )
}

/** A child that keeps the output open must not keep its command's end from being told. */
async function outlivesWithPipe(box) {
  const started = performance.now()
  const { stdout } = await box.run('sleep 90 & echo $!', { timeoutMs: 0 })
  await box.run(`kill ${Number(stdout)}`).catch(() => {}) // by now it may have ended
  const took = performance.now() - started
  assert.ok(took < 80_000, `the command's end was told after ${took} ms, as its child's end was`)
}

async function environment(box) {
  const length = 64 * 1024 - 20
  const names = Array.from({ length: 16 }, (_, number) => `BIG_${number}`)
  const envs = Object.fromEntries(names.map((name) => [name, 'x'.repeat(length)]))
  const lengths = names.map((name) => `\${#${name}}`).join(' ')
  assert.equal(
    (await box.run(`echo ${lengths}`, { envs })).stdout,
    `${names.map(() => length).join(' ')}\n`
  )
  const almost = 'x'.repeat(STRING_MAX - 'BIG='.length - 1)
  const kept = await box.run('echo "${#BIG}"', { envs: { BIG: almost } })
  assert.equal(kept.stdout, `${almost.length}\n`)
  const error = await failure(SandboxError, box.run('true', { envs: { BIG: `${almost}x` } }))
  assert.match(error.message, /128 KiB/)
  assert.equal((await box.run('echo well')).stdout, 'well\n')
}

async function reconnects(box) {
  const first = await box.start('cat; exit 3', { stdin: true, timeoutMs: 0 })
  await first.handle.disconnect()
  const second = await box.attach(first.pid)
  const third = await box.attach(first.pid)
  const ended = [second, third].map(({ handle }) => failure(CommandExitError, handle.wait()))
  await second.handle.sendStdin('both hear this\n')
  await second.heard.heard('both hear this\n')
  await third.heard.heard('both hear this\n')
  await third.handle.closeStdin()
  for (const error of await Promise.all(ended)) assert.equal(error.exitCode, 3)
  const late = await box.attach(first.pid) // a finished command stays known for half a minute
  assert.equal((await failure(CommandExitError, late.handle.wait())).exitCode, 3)
}

export const commandScenarios = [
  isRunning,
  ends,
  oddTexts,
  folders,
  users,
  listed,
  stdinEveryWay,
  stdinRefused,
  stdinLarge,
  longOutput,
  manyAtOnce,
  kills,
  deadline,
  outlives,
  outlivesWithPipe,
  environment,
  reconnects,
]

// --- terminals -----------------------------------------------------------------------------------

const encode = (text) => new TextEncoder().encode(text)

async function typesAndSees(box) {
  const options = { cwd: box.target.base, envs: { MARK: 'ä b' } }
  const { handle, heard, pid } = await box.terminal({ rows: 24, cols: 80 }, options)
  const ended = failure(CommandExitError, handle.wait())
  await box.pty.sendInput(pid, encode('stty size; pwd; echo $TERM:$MARK:$((40 + 2)); echo 漢-🦀\n'))
  for (const text of ['24 80', 'xterm-256color:ä b:42', box.target.base, '\n漢-🦀']) {
    await heard.heard(text)
  }
  await box.pty.sendInput(
    pid,
    encode(`PS1='rea''dy> '; sh -c 'echo go-$((1 + 1)); exec sleep 600'\n`)
  )
  await heard.heard('go-2')
  await box.pty.sendInput(pid, encode('\x03'))
  // What is typed before the shell asks again may be lost to it.
  await heard.heard('ready> ')
  await box.pty.sendInput(pid, encode('echo after-$((1 + 1)); exit 5\n'))
  await heard.heard('after-2')
  assert.equal((await ended).exitCode, 5)
}

async function resizedWhilePrinting(box) {
  const { handle, heard, pid } = await box.terminal({ rows: 24, cols: 80 })
  const ended = failure(CommandExitError, handle.wait())
  const stop = box.path('stop printing')
  const loop = 'n=0; while [ ! -e "$STOP" ]; do n=$((n+1)); echo "<$n:$(stty size)>"; done'
  await box.pty.sendInput(pid, encode(`stty -echo; STOP='${stop}'; ${loop}; echo last-$n-\n`))
  const sizes = [
    [30, 100],
    [1, 1],
    [500, 500],
    [50, 132],
  ]
  for (const [rows, cols] of sizes) {
    await box.pty.resize(pid, { rows, cols })
    await heard.heard(`:${rows} ${cols}>`)
  }
  await box.files.write(stop, '')
  const last = () => /last-(\d+)-/.exec(heard.out)
  await heard.until('the last line', last)
  const numbers = [...heard.out.matchAll(/<(\d+):\d+ \d+>/g)].map(([, number]) => Number(number))
  assert.deepEqual(
    numbers,
    Array.from({ length: Number(last()[1]) }, (_, index) => index + 1)
  )
  assert.equal(await box.pty.kill(pid), true)
  assert.equal((await ended).exitCode, -1)
}

async function terminalReconnects(box) {
  const first = await box.terminal({ rows: 24, cols: 80 })
  const second = await box.attachTerminal(first.pid)
  const ended = [first, second].map(({ handle }) => failure(CommandExitError, handle.wait()))
  await box.pty.sendInput(first.pid, encode('echo both-$((1 + 1))\n'))
  await first.heard.heard('both-2')
  await second.heard.heard('both-2')
  assert.equal(await second.handle.kill(), true)
  for (const error of await Promise.all(ended)) assert.equal(error.exitCode, -1)
}

async function terminalRefused(box) {
  await failure(NotFoundError, box.attachTerminal(NOBODY))
  await failure(NotFoundError, box.pty.sendInput(NOBODY, encode('x')))
  await failure(NotFoundError, box.pty.resize(NOBODY, { rows: 1, cols: 1 }))
  assert.equal(await box.pty.kill(NOBODY), false)
}

export const ptyScenarios = [
  typesAndSees,
  resizedWhilePrinting,
  terminalReconnects,
  terminalRefused,
]
