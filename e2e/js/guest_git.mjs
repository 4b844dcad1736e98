// What the git calls do, with the JavaScript SDK. The scenarios of ../python/guest_git.py in short.
import assert from 'node:assert/strict'

import { CommandExitError, GitAuthError, GitUpstreamError, InvalidArgumentError } from 'e2b'

import { failure, until } from './checks.mjs'

// Asks for a password and takes none, and writes its port beside it.
const SERVER = `
import http.server, os
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="x"')
        self.send_header("Content-Length", "0")
        self.end_headers()
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
open("port.new", "w").write(str(server.server_address[1]))
os.rename("port.new", "port")
server.serve_forever()
`

/** Paths, and the options every call takes: the suite's own home, so that no global setting of
 * whoever runs it is read or changed. */
function places(box) {
  const root = box.path('git')
  return {
    git: box.git,
    root,
    work: `${root}/wörk tree`,
    remote: `${root}/remote of all.git`,
    options: { envs: { HOME: root }, timeoutMs: 120_000 },
  }
}

async function settings(box) {
  const { git, root, work, options } = places(box)
  await box.files.makeDir(root)
  assert.equal(await git.getConfig('user.name', options), undefined)
  await git.configureUser('Ünï User', 'user@example.test', options)
  assert.equal(await git.getConfig('user.name', options), 'Ünï User')
  await git.setConfig('protocol.file.allow', 'always', options)
  await git.init(work, { initialBranch: 'main', ...options })
  await git.setConfig('pull.rebase', 'false', { scope: 'local', path: work, ...options })
  const local = { scope: 'local', path: work, ...options }
  assert.equal(await git.getConfig('pull.rebase', local), 'false')
  await failure(InvalidArgumentError, git.setConfig('', 'x', options))
  const account = { username: 'somebody', password: 'secret', host: 'nowhere.test' }
  await git.dangerouslyAuthenticate({ ...account, protocol: 'http', ...options })
  const { stdout } = await box.run('cat .git-credentials', { ...options, cwd: root })
  assert.equal(stdout, 'http://somebody:secret@nowhere.test\n')
  await box.run('git config --global --unset credential.helper', options)
}

async function commits(box) {
  const { git, work, options } = places(box)
  await box.files.write(`${work}/plain.txt`, 'one\n')
  await box.files.write(`${work}/with space/ünï 漢.txt`, 'two\n')
  assert.equal((await git.status(work, options)).hasUntracked, true)
  await git.add(work, { files: ['plain.txt'], ...options })
  const { stagedCount, untrackedCount } = await git.status(work, options)
  assert.deepEqual([stagedCount, untrackedCount], [1, 1])
  await git.add(work, options)
  await git.commit(work, `first: 'quoted' "message" ü`, options)
  const status = await git.status(work, options)
  assert.deepEqual([status.currentBranch, status.isClean], ['main', true])
  await box.files.write(`${work}/plain.txt`, 'changed\n')
  await git.add(work, options)
  await git.commit(work, 'second', { authorName: 'Other', authorEmail: 'o@x.test', ...options })
  await git.commit(work, 'third', { allowEmpty: true, ...options })
  await failure(CommandExitError, git.commit(work, 'nothing', options))
}

async function undoes(box) {
  const { git, work, options } = places(box)
  const plain = `${work}/plain.txt`
  await box.files.write(plain, 'dirty\n')
  await git.restore(work, { paths: ['plain.txt'], ...options })
  assert.equal(await box.files.read(plain), 'changed\n')
  await box.files.write(plain, 'dirty\n')
  await git.add(work, options)
  await git.reset(work, { paths: ['plain.txt'], ...options })
  assert.equal((await git.status(work, options)).stagedCount, 0)
  await git.reset(work, { mode: 'hard', target: 'HEAD~1', ...options })
  assert.equal(await box.files.read(plain), 'changed\n')
}

async function branches(box) {
  const { git, work, options } = places(box)
  await git.createBranch(work, 'feature/ü', options)
  const found = await git.branches(work, options)
  assert.deepEqual(
    [found.branches.sort(), found.currentBranch],
    [['feature/ü', 'main'], 'feature/ü']
  )
  await box.files.write(`${work}/feature.txt`, 'feature\n')
  await git.add(work, options)
  await git.commit(work, 'on the branch', options)
  await git.checkoutBranch(work, 'main', options)
  assert.equal(await box.files.exists(`${work}/feature.txt`), false)
  await failure(CommandExitError, git.deleteBranch(work, 'feature/ü', options))
  await git.deleteBranch(work, 'feature/ü', { force: true, ...options })
  assert.deepEqual((await git.branches(work, options)).branches, ['main'])
}

async function remotes(box) {
  const { git, root, work, remote, options } = places(box)
  const clone = `${root}/clone`
  await git.init(remote, { bare: true, initialBranch: 'main', ...options })
  assert.equal(await git.remoteGet(work, 'origin', options), undefined)
  await git.remoteAdd(work, 'origin', '/no/such/place', options)
  await git.remoteAdd(work, 'origin', remote, { overwrite: true, fetch: true, ...options })
  assert.equal(await git.remoteGet(work, 'origin', options), remote)
  await failure(GitUpstreamError, git.pull(work, options))
  await failure(GitUpstreamError, git.push(work, { setUpstream: false, ...options }))
  await git.push(work, { remote: 'origin', branch: 'main', ...options })
  const url = `file://${remote.replaceAll(' ', '%20')}`
  await git.clone(url, { path: clone, branch: 'main', depth: 1, ...options })
  assert.equal(await box.files.read(`${clone}/plain.txt`), 'changed\n')
  await box.files.write(`${work}/pushed.txt`, 'pushed\n')
  await git.add(work, options)
  await git.commit(work, 'pushed', options)
  assert.equal((await git.status(work, options)).ahead, 1)
  await git.push(work, options)
  await git.pull(clone, options)
  assert.equal(await box.files.read(`${clone}/pushed.txt`), 'pushed\n')
}

async function passwords(box) {
  const { git, root, options } = places(box)
  await box.files.write(`${root}/server.py`, SERVER)
  const server = await box.start('exec python3 server.py', { cwd: root, timeoutMs: 0 })
  const ended = failure(CommandExitError, server.handle.wait())
  try {
    await until(60_000, 'the git server listens', () => box.files.exists(`${root}/port`))
    const url = `http://127.0.0.1:${await box.files.read(`${root}/port`)}/any.git`
    const path = `${root}/by password`
    await failure(GitAuthError, git.clone(url, { path, ...options }))
    const account = { username: 'somebody', password: 'wrong' }
    await failure(GitAuthError, git.clone(url, { path, ...account, ...options }))
  } finally {
    await server.handle.kill()
  }
  await ended
}

export const gitScenarios = [settings, commits, undoes, branches, remotes, passwords]
