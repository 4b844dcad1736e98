"""What the git calls do, with either Python SDK. They are shell commands of the SDK's own making; a
repository beside the others stands in for a remote, and a small web server that asks for a password
for the rest."""

import shlex

from e2b import (
    CommandExitException,
    GitAuthException,
    GitUpstreamException,
    InvalidArgumentException,
)

from checks import araises, auntil, equal, true

# Serves a folder to whoever says `somebody` and `secret`, and writes its port beside it.
_SERVER = """
import base64, http.server, os
wanted = "Basic " + base64.b64encode(b"somebody:secret").decode()
class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        if self.headers.get("Authorization") == wanted:
            return super().do_GET()
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="x"')
        self.send_header("Content-Length", "0")
        self.end_headers()
server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
open("port.new", "w").write(str(server.server_address[1]))
os.rename("port.new", "port")
server.serve_forever()
"""


class Repositories:
    """Where things are, and the options every call here takes: the suite's own home, so that no
    global setting of whoever runs it is read or changed."""

    def __init__(self, box):
        self.box = box
        self.root = box.path("git")
        self.options = {"envs": {"HOME": self.root}, "timeout": 120}
        self.remote = f"{self.root}/remote of all.git"
        self.work = f"{self.root}/wörk tree"

    async def write(self, name, text):
        await self.box.files.write(f"{self.work}/{name}", text)

    async def log(self, path):
        command = f"git -C {shlex.quote(path)} log --format='%an <%ae> %s'"
        return (await self.box.run(command, **self.options)).stdout.splitlines()


async def settings(box):
    """Settings and identity, global and of one repository."""
    at = Repositories(box)
    git, options = box.git, at.options
    await box.files.make_dir(at.root)
    equal(await git.get_config("user.name", **options), None, "a setting that nobody made")
    await git.configure_user("Ünï User", "user@example.test", **options)
    equal(await git.get_config("user.name", **options), "Ünï User", "user.name")
    equal(await git.get_config("user.email", **options), "user@example.test", "user.email")
    await git.set_config("core.quotePath", "false", **options)
    await git.set_config("protocol.file.allow", "always", **options)
    await git.init(at.work, initial_branch="main", **options)
    await git.set_config("pull.rebase", "false", scope="local", path=at.work, **options)
    found = await git.get_config("pull.rebase", scope="local", path=at.work, **options)
    equal(found, "false", "a local setting")
    equal(await git.get_config("pull.rebase", **options), None, "it, asked for globally")
    await araises(InvalidArgumentException, git.set_config("", "x", **options))
    await araises(InvalidArgumentException, git.configure_user("", "", **options))
    await git.dangerously_authenticate(
        "somebody", "secret", host="nowhere.test", protocol="http", **options
    )
    stored = await box.run("cat .git-credentials", cwd=at.root, **options)
    equal(stored.stdout, "http://somebody:secret@nowhere.test\n", "stored credentials")
    await box.run("git config --global --unset credential.helper", **options)


async def commits(box):
    at = Repositories(box)
    git, options = box.git, at.options
    await at.write("plain.txt", "one\n")
    await at.write("with space/ünï 漢.txt", "two\n")
    status = await git.status(at.work, **options)
    equal((status.current_branch, status.has_untracked), ("main", True), "status before add")
    await git.add(at.work, files=["plain.txt"], **options)
    status = await git.status(at.work, **options)
    equal((status.staged_count, status.untracked_count), (1, 1), "status after adding one")
    await git.add(at.work, **options)
    await git.commit(at.work, "first: 'quoted' \"message\" ü", **options)
    status = await git.status(at.work, **options)
    true(status.is_clean, f"not clean after commit: {status}")
    await at.write("plain.txt", "changed\n")
    await git.add(at.work, all=True, **options)
    await git.commit(
        at.work, "second", author_name="Other", author_email="other@example.test", **options
    )
    await git.commit(at.work, "third", allow_empty=True, **options)
    await araises(CommandExitException, git.commit(at.work, "nothing", **options))
    wanted = [
        "Ünï User <user@example.test> third",
        "Other <other@example.test> second",
        "Ünï User <user@example.test> first: 'quoted' \"message\" ü",
    ]
    equal(await at.log(at.work), wanted, "log")


async def undoes(box):
    at = Repositories(box)
    git, options = box.git, at.options
    plain = f"{at.work}/plain.txt"
    await at.write("plain.txt", "dirty\n")
    await git.restore(at.work, ["plain.txt"], **options)
    equal(await box.files.read(plain), "changed\n", "a restored file")
    await at.write("plain.txt", "dirty\n")
    await git.add(at.work, **options)
    await git.restore(at.work, ["plain.txt"], staged=True, **options)
    equal((await git.status(at.work, **options)).staged_count, 0, "staged after restore")
    await git.add(at.work, **options)
    await git.reset(at.work, paths=["plain.txt"], **options)
    equal((await git.status(at.work, **options)).staged_count, 0, "staged after reset")
    await git.restore(at.work, ["plain.txt"], source="HEAD~2", **options)
    equal(await box.files.read(plain), "one\n", "a file of an older commit")
    await git.reset(at.work, mode="hard", target="HEAD~1", **options)
    equal(await box.files.read(plain), "changed\n", "a file after a hard reset")
    equal(len(await at.log(at.work)), 2, "commits after a hard reset")
    await araises(InvalidArgumentException, git.reset(at.work, mode="sideways", **options))
    await araises(InvalidArgumentException, git.restore(at.work, [], **options))


async def branches(box):
    at = Repositories(box)
    git, options = box.git, at.options
    await git.create_branch(at.work, "feature/ü", **options)
    found = await git.branches(at.work, **options)
    equal(
        (sorted(found.branches), found.current_branch), (["feature/ü", "main"], "feature/ü"), "all"
    )
    await at.write("feature.txt", "feature\n")
    await git.add(at.work, **options)
    await git.commit(at.work, "on the branch", **options)
    await git.checkout_branch(at.work, "main", **options)
    equal(await box.files.exists(f"{at.work}/feature.txt"), False, "the branch's file on main")
    await araises(CommandExitException, git.delete_branch(at.work, "feature/ü", **options))
    await git.delete_branch(at.work, "feature/ü", force=True, **options)
    equal((await git.branches(at.work, **options)).branches, ["main"], "branches left")
    await araises(CommandExitException, git.checkout_branch(at.work, "missing", **options))


async def remotes(box):
    """A remote by path: added, replaced, pushed to, cloned from, pulled from."""
    at = Repositories(box)
    git, options = box.git, at.options
    clone = f"{at.root}/clone"
    await git.init(at.remote, bare=True, initial_branch="main", **options)
    equal(await git.remote_get(at.work, "origin", **options), None, "no remote yet")
    await git.remote_add(at.work, "origin", "/no/such/place", **options)
    again = git.remote_add(at.work, "origin", at.remote, **options)
    await araises(CommandExitException, again)
    await git.remote_add(at.work, "origin", at.remote, overwrite=True, fetch=True, **options)
    equal(await git.remote_get(at.work, "origin", **options), at.remote, "remote")
    await araises(GitUpstreamException, git.pull(at.work, **options))
    await araises(GitUpstreamException, git.push(at.work, set_upstream=False, **options))
    await git.push(at.work, remote="origin", branch="main", **options)
    url = "file://" + at.remote.replace(" ", "%20")
    await git.clone(url, path=clone, **options)
    equal(await box.files.read(f"{clone}/plain.txt"), "changed\n", "a cloned file")
    await git.clone(url, f"{at.root}/one", branch="main", depth=1, **options)
    equal(len(await at.log(f"{at.root}/one")), 1, "commits of a clone of depth 1")
    await at.write("pushed.txt", "pushed\n")
    await git.add(at.work, **options)
    await git.commit(at.work, "pushed", **options)
    equal((await git.status(at.work, **options)).ahead, 1, "commits ahead")
    await git.push(at.work, **options)
    await git.pull(clone, **options)
    equal(await box.files.read(f"{clone}/pushed.txt"), "pushed\n", "a pulled file")
    await git.pull(clone, remote="origin", branch="main", **options)
    equal((await git.status(clone, **options)).upstream, "origin/main", "upstream")


async def passwords(box):
    """A remote behind a password: used for the call, and never left in the repository."""
    at = Repositories(box)
    git, options = box.git, at.options
    await box.run("git --bare update-server-info", cwd=at.remote, **options)
    await box.files.write(f"{at.root}/server.py", _SERVER)
    server = await box.start("exec python3 server.py", cwd=at.root, timeout=0)

    async def port():
        return await box.files.exists(f"{at.root}/port")

    try:
        await auntil(60, "the git server listens", port)
        number = await box.files.read(f"{at.root}/port")
        url = f"http://127.0.0.1:{number}/remote%20of%20all.git"
        with_password = {"username": "somebody", "password": "secret", **options}
        clone = f"{at.root}/by password"
        await araises(GitAuthException, git.clone(url, path=clone, **options))
        wrong = {**with_password, "password": "wrong"}
        await araises(GitAuthException, git.clone(url, path=clone, **wrong))
        await araises(
            InvalidArgumentException, git.clone(url, path=clone, password="secret", **options)
        )
        await git.clone(url, path=clone, **with_password)
        equal(await git.remote_get(clone, "origin", **options), url, "remote after a clone")
        await git.pull(clone, **with_password)
        await araises(GitAuthException, git.pull(clone, **options))
        # This server takes no pushes: what counts is that the password is gone afterwards.
        await git.commit(clone, "not to be pushed", allow_empty=True, **options)
        await araises(CommandExitException, git.push(clone, **with_password))
        equal(await git.remote_get(clone, "origin", **options), url, "remote after a push")
        kept = f"{at.root}/password kept"
        await git.clone(url, path=kept, dangerously_store_credentials=True, **with_password)
        true(
            "somebody:secret@" in await git.remote_get(kept, "origin", **options),
            "the password was not kept though asked for",
        )
    finally:
        await server.kill()


SCENARIOS = (settings, commits, undoes, branches, remotes, passwords)
