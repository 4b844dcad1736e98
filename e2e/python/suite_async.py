"""The official Python SDK, asyncio, against a live server. See ../README.md."""

import asyncio
import json
import sys
import time
from pathlib import Path

from e2b import (
    AsyncSandbox,
    CommandExitException,
    FileNotFoundException,
    InvalidArgumentException,
    PtySize,
    SandboxNotFoundException,
    SandboxQuery,
    TimeoutException,
)

import neighbourhood
import raw
import scenes
from checks import Suite, araises, auntil, equal, true
from scenes import COMMAND_S

suite = Suite("async")
SECOND_PROCESS = Path(__file__).with_name("second_process.py")


async def create(**options):
    options = {"timeout": 900, "request_timeout": 120, **options}
    metadata = {**suite.metadata, **options.pop("metadata", {})}
    return await AsyncSandbox.create("base", metadata=metadata, **options)


# --- commands -----------------------------------------------------------------------------------


async def commands_stream(sandbox):
    heard = scenes.Streamed()

    async def release(go):
        if go:
            await sandbox.files.write("/tmp/go", "")

    error = await araises(
        CommandExitException,
        sandbox.commands.run(
            scenes.STREAMED,
            on_stdout=lambda text: release(heard.note(out=text)),
            on_stderr=lambda text: release(heard.note(err=text)),
            timeout=COMMAND_S,
        ),
    )
    heard.judge(error)


async def commands_environment(sandbox):
    local = {"LOCAL": "local"}
    as_user, as_root = await asyncio.gather(
        sandbox.commands.run(scenes.ENVIRONMENT, envs=local, cwd="/tmp", timeout=COMMAND_S),
        sandbox.commands.run(
            scenes.ENVIRONMENT, envs=local, cwd="/", user="root", timeout=COMMAND_S
        ),
    )
    scenes.judge_environment(as_user.stdout, "user", "/home/user", "/tmp")
    scenes.judge_environment(as_root.stdout, "root", "/root", "/")
    await araises(InvalidArgumentException, sandbox.commands.run("true", cwd="/no/such/place"))


async def commands_stdin(sandbox):
    heard = asyncio.Queue()
    cat = await sandbox.commands.run(
        "cat", background=True, stdin=True, on_stdout=heard.put_nowait, timeout=COMMAND_S
    )
    scenes.judge_processes(await sandbox.commands.list(), cat.pid, "cat")
    await sandbox.commands.send_stdin(cat.pid, "hello\n")
    equal(await heard.get(), "hello\n", "what cat said")
    await cat.send_stdin("again\n")
    await cat.close_stdin()
    equal((await cat.wait()).stdout, "hello\nagain\n", "all cat said")


async def commands_reconnect(sandbox):
    first = await sandbox.commands.run("cat", background=True, stdin=True, timeout=COMMAND_S)
    await first.disconnect()
    second = await sandbox.commands.connect(first.pid, timeout=COMMAND_S)
    await second.send_stdin("still here\n")
    await second.close_stdin()
    equal((await second.wait()).stdout, "still here\n", "output after connecting anew")


async def commands_kill(sandbox):
    sleeper = await sandbox.commands.run("sleep 600", background=True, timeout=0)
    equal(await sandbox.commands.kill(sleeper.pid), True, "kill")
    equal((await araises(CommandExitException, sleeper.wait())).exit_code, -1, "exit code")
    true(sleeper.pid not in [p.pid for p in await sandbox.commands.list()], "still listed")
    equal(await sandbox.commands.kill(4_000_000), False, "kill of a pid that does not exist")


async def commands_timeout(sandbox):
    started = time.monotonic()
    await araises(TimeoutException, sandbox.commands.run("sleep 601", timeout=5))
    true(time.monotonic() - started < 60, "the timeout came late")

    async def killed():
        return all("sleep 601" not in process.args for process in await sandbox.commands.list())

    await auntil(15, "the command that ran out of time is killed", killed)


async def pty(sandbox):
    seen, grown = bytearray(), asyncio.Event()

    def on_data(data):
        seen.extend(data)
        grown.set()

    async def read_until(wanted):
        while wanted not in seen:
            grown.clear()
            await grown.wait()

    terminal = await sandbox.pty.create(
        PtySize(rows=24, cols=80), on_data=on_data, timeout=COMMAND_S
    )
    await sandbox.pty.send_stdin(terminal.pid, b"stty size; echo sum-$((40 + 2))\n")
    await read_until(b"24 80")
    await read_until(b"sum-42")
    await sandbox.pty.resize(terminal.pid, PtySize(rows=30, cols=100))
    await sandbox.pty.send_stdin(terminal.pid, b"stty size\n")
    await read_until(b"30 100")
    equal(await sandbox.pty.kill(terminal.pid), True, "kill")
    await araises(CommandExitException, terminal.wait())


# --- files --------------------------------------------------------------------------------------


async def files_content(sandbox):
    written = await sandbox.files.write("notes/héllo.txt", "grüße\n")
    equal(written.path, "/home/user/notes/héllo.txt", "path")
    equal(await sandbox.files.read("notes/héllo.txt"), "grüße\n", "text")
    await sandbox.files.write("notes/empty", b"")
    equal(await sandbox.files.read("notes/empty"), "", "empty file")
    await araises(FileNotFoundException, sandbox.files.read("notes/missing"))
    await sandbox.files.write("all-bytes", scenes.ALL_BYTES)
    found = await sandbox.files.read("all-bytes", format="bytes")
    equal(bytes(found), scenes.ALL_BYTES, "bytes")
    parts = [part async for part in await sandbox.files.read("all-bytes", format="stream")]
    equal(b"".join(parts), scenes.ALL_BYTES, "stream")


async def files_tree(sandbox):
    equal(await sandbox.files.make_dir("tree/deep"), True, "make_dir")
    equal(await sandbox.files.make_dir("tree/deep"), False, "make_dir of what exists")
    written = await sandbox.files.write_files(
        [{"path": "tree/a.txt", "data": "a"}, {"path": "tree/deep/b.bin", "data": b"\x00\x01"}]
    )
    equal([entry.name for entry in written], ["a.txt", "b.bin"], "write_files")
    listed = {entry.name: entry.type.value for entry in await sandbox.files.list("tree")}
    equal(listed, {"a.txt": "file", "deep": "dir"}, "list")
    entry = await sandbox.files.get_info("tree/a.txt")
    scenes.judge_entry(entry, "a.txt", "/home/user/tree/a.txt", 1)
    moved = await sandbox.files.rename("tree/a.txt", "tree/c.txt")
    equal(moved.path, "/home/user/tree/c.txt", "rename")
    equal(await sandbox.files.exists("tree/a.txt"), False, "old name exists")
    equal(await sandbox.files.exists("tree/c.txt"), True, "new name exists")
    await sandbox.files.remove("tree")
    equal(await sandbox.files.exists("tree"), False, "removed folder exists")
    await araises(FileNotFoundException, sandbox.files.list("tree"))


# --- the sandbox itself -------------------------------------------------------------------------


async def info(sandbox):
    scenes.judge_info(await sandbox.get_info(), sandbox.sandbox_id, suite.tag)
    equal(await sandbox.is_running(), True, "is_running")


async def set_timeout(sandbox):
    for seconds in (1800, 600):  # later, then sooner
        await sandbox.set_timeout(seconds)
        scenes.judge_end(await sandbox.get_info(), seconds)


async def listing(sandbox, other):
    async def ids(**query):
        pages, found = AsyncSandbox.list(query=SandboxQuery(**query), limit=1), []
        while pages.has_next:
            found += [entry.sandbox_id for entry in await pages.next_items()]
        return sorted(found)

    both = sorted([sandbox.sandbox_id, other.sandbox_id])
    equal(await ids(metadata=suite.metadata), both, "list by metadata, in pages of one")
    odd = {**suite.metadata, "odd": scenes.AWKWARD}
    equal(await ids(metadata=odd), [other.sandbox_id], "list by an odd value")


async def second_process(sandbox):
    await sandbox.files.write("note.txt", "from the first")
    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SECOND_PROCESS),
        sandbox.sandbox_id,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, errors = await worker.communicate()
    finally:
        if worker.returncode is None:
            worker.kill()
    equal(worker.returncode, 0, errors.decode()[-300:])
    wanted = {"note": "from the first", "id": sandbox.sandbox_id, "running": True}
    equal(json.loads(out), wanted, "what the second process saw")
    equal(await sandbox.files.read("answer.txt"), "got from the first", "what it left")
    again = await AsyncSandbox.connect(sandbox.sandbox_id, timeout=600)
    equal(await again.is_running(), True, "is_running of a second handle")


async def identify(sandbox):
    asked_at = scenes.now()
    result = await sandbox.commands.run(scenes.IDENTITY, timeout=COMMAND_S)
    return scenes.Identity(result.stdout, asked_at, scenes.now())


async def clock(sandbox):
    (await identify(sandbox)).judge_clock()


async def server_on_port(sandbox):
    def ask():
        return asyncio.to_thread(raw.to_port, sandbox.sandbox_id, scenes.WEB_PORT, "/index.html")

    async def answered():
        answer = await ask()
        return answer.status != 502 and answer

    equal((await ask()).status, 502, "status of a closed port")
    await sandbox.files.write("www/index.html", "<p>served</p>")
    server = await sandbox.commands.run(
        scenes.WEB_SERVER, background=True, cwd="/home/user/www", timeout=0
    )
    answer = await auntil(90, "the web server answers", answered)
    equal((answer.status, answer.body), (200, b"<p>served</p>"), "by headers")
    equal(await server.kill(), True, "kill of the server")


async def isolation(sandbox, _other):
    token = sandbox.connection_config.sandbox_headers["X-Access-Token"]
    with neighbourhood.Bait() as bait:
        targets = await asyncio.to_thread(neighbourhood.forbidden_targets, token, bait)
        suite.remark(f"isolation: {len(targets)} addresses tried")
        result = await sandbox.commands.run(scenes.reach(targets), timeout=COMMAND_S)
        scenes.judge_reach(result.stdout)
        equal(bait.visitors, 0, "connections the host's bait saw")


async def ten_at_once():
    started = time.monotonic()
    sandboxes = await asyncio.gather(*(create() for _ in range(10)))
    created = time.monotonic()
    answers = await asyncio.gather(*(identify(sandbox) for sandbox in sandboxes))
    answered = time.monotonic()
    scenes.judge_clones([sandbox.sandbox_id for sandbox in sandboxes], answers)
    kills = await asyncio.gather(*(sandbox.kill() for sandbox in sandboxes))
    equal(kills, [True] * 10, "kills")
    suite.remark(
        f"ten_at_once: created in {created - started:.2f} s, "
        f"answered {answered - created:.2f} s later"
    )


async def kill(sandbox):
    equal(await sandbox.kill(), True, "first kill")
    equal(await sandbox.kill(), False, "second kill")
    equal(await sandbox.is_running(), False, "is_running")
    await araises(SandboxNotFoundException, sandbox.get_info())
    await araises(TimeoutException, sandbox.commands.run("true"))


async def expiry():
    sandbox = await create(timeout=5)
    started = time.monotonic()

    async def gone():
        try:
            await sandbox.get_info()
        except SandboxNotFoundException:
            return True

    async def stopped():
        return not await sandbox.is_running()

    await auntil(12, "the API forgets a sandbox past its end", gone)
    true(time.monotonic() - started > 3, "gone before its end")
    await auntil(5, "is_running is False", stopped)


async def run():
    sandbox = await suite.acheck("create", lambda: create(envs={"GLOBAL": "global"}))
    other = await suite.acheck("create_another", lambda: create(metadata={"odd": scenes.AWKWARD}))
    for body in (commands_stream, commands_environment, commands_stdin, commands_reconnect):
        await suite.acheck(body.__name__, body, sandbox)
    for body in (commands_kill, commands_timeout, pty, files_content, files_tree):
        await suite.acheck(body.__name__, body, sandbox)
    for body in (info, set_timeout, second_process, clock, server_on_port):
        await suite.acheck(body.__name__, body, sandbox)
    await suite.acheck("list", listing, sandbox, other)
    await suite.acheck("isolation", isolation, sandbox, other)
    await suite.acheck("ten_at_once", ten_at_once, deadline_s=300)
    await suite.acheck("expiry", expiry)
    await suite.acheck("kill", kill, sandbox)


def main():
    with suite:
        asyncio.run(run())


if __name__ == "__main__":
    main()
