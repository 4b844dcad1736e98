// What file calls and watches do, with the JavaScript SDK.
import assert from 'node:assert/strict'
import { createHash } from 'node:crypto'

import {
  FileNotFoundError,
  FileType,
  FilesystemEventType,
  InvalidArgumentError,
  SandboxError,
} from 'e2b'

import { Skip, failure, until } from './checks.mjs'
import { rate } from './guest_box.mjs'
import { MIB } from './guest_target.mjs'

const { CHMOD, CREATE, REMOVE, RENAME, WRITE } = FilesystemEventType

const NAMES = [
  'with space',
  ' leading and trailing ',
  'ünïcödé 漢字 🦀',
  'e\u0301 decomposed',
  'é composed',
  '\'single\' "double"',
  'back\\slash',
  'a+b%20c%2Fd?e#f&g=h;i',
  '-rf',
  '~tilde',
  'new\nline\ttab\r',
  'semi;colon, comma',
  '..dots',
  'n'.repeat(255),
]
// In an upload of several files a name travels in a form field, where it is spelled otherwise.
const IN_FORMS = NAMES.filter((name) => !/["\\\r\n]/.test(name))

async function names(box) {
  const { files } = box
  const folder = box.path('näme s')
  const entries = IN_FORMS.map((name) => ({ path: `${folder}/${name}`, data: `<${name}>` }))
  const written = await files.writeFiles(entries)
  assert.deepEqual(
    written.map(({ name }) => name),
    IN_FORMS
  )
  for (const name of NAMES) await files.write(`${folder}/${name}`, `<${name}>`)
  const listed = (await files.list(folder)).map(({ name }) => name)
  assert.deepEqual(listed.sort(), [...NAMES].sort())
  for (const name of NAMES) {
    const path = `${folder}/${name}`
    assert.equal(await files.read(path), `<${name}>`)
    const info = await files.getInfo(path)
    assert.deepEqual([info.name, info.path], [name, path])
    const moved = await files.rename(path, `${folder}/x${name.slice(1)}`)
    assert.equal(moved.name, `x${name.slice(1)}`)
    assert.equal(await files.exists(path), false)
    await files.remove(moved.path)
  }
  assert.deepEqual(await files.list(folder), [])
  const error = await failure(SandboxError, files.write(`${folder}/${'n'.repeat(256)}`, 'x'))
  assert.match(error.message, /too long/i)
}

async function contents({ files, ...box }) {
  const every = Uint8Array.from({ length: 256_000 }, (_, index) => index % 256)
  const path = `${box.target.base}/contents`
  const ways = [
    [every.buffer],
    [new Blob([every])],
    [every.buffer, { useOctetStream: true }],
    [every.buffer, { gzip: true }],
    [new Blob([every]).stream()],
  ]
  for (const [data, options] of ways) {
    await files.remove(path)
    const written = await files.write(path, data, options)
    assert.deepEqual([written.name, written.type], ['contents', FileType.FILE])
    for (const reading of [{}, { gzip: true }]) {
      const found = await files.read(path, { format: 'bytes', ...reading })
      assert.ok(Buffer.from(every).equals(found), `${found.length} bytes came back`)
    }
  }
  assert.equal((await files.read(path, { format: 'blob' })).size, every.length)
  await files.write(path, 'short ünd text\r\n')
  assert.equal(await files.read(path), 'short ünd text\r\n')
}

async function empty({ files, ...box }) {
  const ways = [[''], [new ArrayBuffer(0)], ['', { gzip: true }], [new Blob([]).stream()]]
  for (const [data, options] of ways) {
    const path = `${box.target.base}/empty`
    await files.write(path, 'not empty')
    await files.write(path, data, options)
    assert.equal((await files.getInfo(path)).size, 0)
    assert.equal(await files.read(path), '')
    assert.equal((await files.read(path, { format: 'bytes' })).length, 0)
    assert.equal((await files.read(path, { format: 'blob' })).size, 0)
    for await (const part of await files.read(path, { format: 'stream' })) {
      assert.equal(part.length, 0)
    }
  }
  assert.deepEqual(await files.writeFiles([]), [])
}

async function big({ files, scale, ...box }) {
  const path = `${box.target.base}/big`
  const sent = createHash('sha256')
  const came = createHash('sha256')
  let number = 0
  const data = new ReadableStream({
    pull(controller) {
      if (number === scale.bigFile / MIB) return controller.close()
      const piece = Buffer.alloc(MIB, '0123456789abcde\n')
      piece.write(String(number).padStart(8, '0'))
      sent.update(piece)
      number += 1
      controller.enqueue(piece)
    },
  })
  try {
    let started = performance.now()
    await files.write(path, data)
    const up = rate('upload', scale.bigFile, started)
    assert.equal((await files.getInfo(path)).size, scale.bigFile)
    started = performance.now()
    for await (const part of await files.read(path, { format: 'stream' })) came.update(part)
    assert.equal(came.digest('hex'), sent.digest('hex'))
    return `${up}; ${rate('download', scale.bigFile, started)}`
  } finally {
    await files.remove(path)
  }
}

async function manyEntries({ files, scale, ...box }) {
  const folder = `${box.target.base}/many entries`
  await files.makeDir(folder)
  const script = `seq -f 'entry %.0f' ${scale.entries} | tr '\\n' '\\0' | xargs -0 touch`
  await box.shell(script, { cwd: folder })
  const started = performance.now()
  const listed = await files.list(folder)
  const took = performance.now() - started
  assert.equal(new Set(listed.map(({ name }) => name)).size, scale.entries)
  await files.remove(folder)
  assert.equal(await files.exists(folder), false)
  return `${scale.entries} entries: listed in ${took.toFixed(0)} ms`
}

async function trees({ files, ...box }) {
  const folder = `${box.target.base}/tree`
  assert.equal(await files.makeDir(`${folder}/a/b/c`), true)
  assert.equal(await files.makeDir(`${folder}/a/b`), false)
  await files.write(`${folder}/a/b/c/d/e/file`, 'deep')
  for (const [depth, count] of [
    [undefined, 1],
    [2, 2],
    [3, 3],
    [100, 6],
  ]) {
    assert.equal((await files.list(folder, { depth })).length, count, `depth ${depth}`)
  }
  await failure(InvalidArgumentError, files.list(folder, { depth: 0 }))
  const moved = await files.rename(`${folder}/a`, `${folder}/z`)
  assert.deepEqual([moved.type, moved.path], [FileType.DIR, `${folder}/z`])
  assert.equal(await files.read(`${folder}/z/b/c/d/e/file`), 'deep')
  await files.remove(folder)
  assert.equal(await files.exists(folder), false)
  await files.remove(folder)
}

async function links({ files, ...box }) {
  const folder = `${box.target.base}/links`
  await files.write(`${folder}/target`, 'pointed at')
  const script =
    'ln -s target plain; ln -s missing broken; ln -s loop loop; ln -s target 1; ' +
    'for n in $(seq 2 60); do ln -s $((n-1)) $n; done'
  await box.shell(script, { cwd: folder })
  for (const name of ['plain', '1', '30']) {
    const info = await files.getInfo(`${folder}/${name}`)
    assert.deepEqual(
      [info.name, info.symlinkTarget, info.type, info.permissions],
      [name, `${folder}/target`, FileType.FILE, 'Lrwxrwxrwx']
    )
    assert.equal(await files.read(`${folder}/${name}`), 'pointed at')
  }
  for (const name of ['broken', 'loop', '60']) {
    await failure(SandboxError, files.read(`${folder}/${name}`))
    const info = await files.getInfo(`${folder}/${name}`)
    assert.deepEqual([info.name, info.type, info.mode], [name, undefined, 0])
  }
  await files.remove(`${folder}/plain`)
  assert.equal(await files.read(`${folder}/target`), 'pointed at')
}

async function owners({ files, target, ...box }) {
  const { native, user, otherUser, folder: name } = target
  if (native && user !== 'root') throw new Skip('only root can make files for somebody else')
  const folder = `/tmp/${name}`
  try {
    await files.write(`${folder}/theirs`, 'theirs', { user: otherUser })
    const info = await files.getInfo(`${folder}/theirs`, { user: otherUser })
    assert.deepEqual([info.owner, info.permissions], [otherUser, '-rw-r--r--'])
    assert.equal((await files.getInfo(folder)).owner, otherUser)
    await box.run(`chmod 000 '${folder}/theirs'`, { user: 'root' })
    assert.equal(await files.read(`${folder}/theirs`, { user: 'root' }), 'theirs')
  } finally {
    await files.remove(folder, { user: 'root' })
  }
}

async function relative({ files, target }) {
  const { folder, home } = target
  await files.write(`${folder}/r`, 'relative')
  for (const path of [`./${folder}/r`, `~/${folder}/r`, `${folder}/x/../r`]) {
    assert.equal(await files.read(path), 'relative')
    assert.equal((await files.getInfo(path)).path, `${home}/${folder}/r`)
  }
  for (const path of ['~', '', '.']) {
    const found = (await files.list(path)).map(({ name }) => name)
    assert.ok(found.includes(folder), `the suite's folder is not below '${path}'`)
  }
  await failure(InvalidArgumentError, files.read('~nobody/x'))
  await failure(InvalidArgumentError, files.read('a\0b'))
}

async function metadata({ files, ...box }) {
  const path = `${box.target.base}/marked`
  const marks = { kind: 'note' }
  assert.deepEqual((await files.write(path, 'x', { metadata: marks })).metadata, marks)
  assert.deepEqual((await files.getInfo(path)).metadata, marks)
}

async function refused({ files, ...box }) {
  const folder = `${box.target.base}/refused`
  const missing = `${folder}/missing`
  await files.write(`${folder}/file`, 'x')
  for (const call of [
    () => files.read(missing),
    () => files.list(missing),
    () => files.getInfo(missing),
    () => files.rename(missing, `${folder}/other`),
    () => files.watchDir(missing, () => {}),
  ]) {
    const error = await failure(FileNotFoundError, call())
    assert.ok(error.message.includes(missing), error.message)
  }
  for (const call of [
    () => files.read(folder),
    () => files.write(folder, 'x'),
    () => files.list(`${folder}/file`),
    () => files.makeDir(`${folder}/file`),
    () => files.watchDir(`${folder}/file`, () => {}),
  ]) {
    await failure(InvalidArgumentError, call())
  }
  assert.equal(await files.read(`${folder}/file`), 'x')
}

/** The answer arrives, although the daemon need not see the content to refuse it. */
async function refusedUploads({ files, ...box }) {
  const folder = `${box.target.base}/refused`
  const large = 'x'.repeat(300_000)
  for (let turn = 0; turn < 30; turn += 1) {
    for (const data of ['x', large, new Blob([large]).stream()]) {
      await failure(InvalidArgumentError, files.write(folder, data))
    }
  }
}

/** Gives the scenarios a plain object that they can take apart: the methods of a box included. */
const unpacked = (body) => {
  const scenario = (box) =>
    body({
      ...box,
      path: (...args) => box.path(...args),
      run: (...args) => box.run(...args),
      shell: (...args) => box.shell(...args),
      watchDir: (...args) => box.watchDir(...args),
    })
  Object.defineProperty(scenario, 'name', { value: body.name })
  return scenario
}

export const fileScenarios = [
  names,
  contents,
  empty,
  big,
  manyEntries,
  trees,
  links,
  owners,
  relative,
  metadata,
  refused,
  refusedUploads,
].map(unpacked)

// --- watches -------------------------------------------------------------------------------------

async function eachKind({ files, ...box }) {
  const folder = box.path('watched ünïcode')
  await files.makeDir(folder)
  const watch = await box.watchDir(folder)
  await files.write(`${folder}/a b`, 'x')
  await watch.saw(CREATE, 'a b')
  await watch.saw(WRITE, 'a b')
  await box.shell("chmod 600 'a b'", { cwd: folder })
  await watch.saw(CHMOD, 'a b')
  await files.rename(`${folder}/a b`, `${folder}/漢`)
  await watch.saw(RENAME, 'a b')
  await watch.saw(CREATE, '漢')
  await files.remove(`${folder}/漢`)
  await watch.saw(REMOVE, '漢')
  await watch.handle.stop()
  const count = watch.events.length
  await files.write(`${folder}/after`, 'x')
  // It is called with the SDK's own cancellation.
  await until(10_000, 'onExit is called', async () => watch.exits.length === 1)
  assert.equal(watch.events.length, count)
}

async function recursive({ files, ...box }) {
  const folder = box.path('recursive')
  await files.makeDir(`${folder}/old`)
  const watch = await box.watchDir(folder, { recursive: true, includeEntry: true })
  await files.write(`${folder}/old/file`, '12345')
  await watch.saw(CREATE, 'old/file')
  await watch.until('an event with an entry', (events) =>
    events.some(({ name, entry }) => name === 'old/file' && entry?.size === 5)
  )
  await files.makeDir(`${folder}/new/deep`)
  let number = 0
  // A folder made a moment ago is watched too, if perhaps not at once.
  await until(60_000, 'an event in a new folder', async () => {
    number += 1
    await files.write(`${folder}/new/deep/f${number}`, 'x')
    return watch.events.some(({ name }) => name.startsWith('new/deep/f'))
  })
  await watch.handle.stop()
}

async function burst({ files, scale, ...box }) {
  const folder = box.path('burst')
  await files.makeDir(folder)
  const watch = await box.watchDir(folder)
  await box.shell(`for n in $(seq ${scale.burst}); do : > f$n; done`, { cwd: folder })
  await watch.until(`all ${scale.burst} files`, (events) => {
    const created = events.filter(({ type }) => type === CREATE).map(({ name }) => name)
    return new Set(created).size === scale.burst
  })
  await watch.handle.stop()
}

async function treeDeleted({ files, ...box }) {
  const folder = box.path('doomed')
  const width = box.target.native ? 200 : 30
  const script = `for n in $(seq ${width}); do mkdir -p d$n/e/f; : > d$n/e/f/g; done`
  await files.makeDir(folder)
  await box.shell(script, { cwd: folder })
  const watch = await box.watchDir(folder, { recursive: true, includeEntry: true })
  await box.shell('rm -rf d*', { cwd: folder })
  await watch.until(`the end of all ${width} folders`, (events) => {
    const gone = events.filter(({ type, name }) => type === REMOVE && /^d\d+$/.test(name))
    return new Set(gone.map(({ name }) => name)).size === width
  })
  await files.write(`${folder}/after`, 'x')
  await watch.saw(CREATE, 'after')
  await files.remove(folder) // the watched folder itself
  await watch.saw(REMOVE, 'after')
  await watch.handle.stop()
  assert.equal(await box.sandbox.isRunning(), true)
}

export const watchScenarios = [eachKind, recursive, burst, treeDeleted].map(unpacked)
