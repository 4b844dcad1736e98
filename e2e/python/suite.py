"""The official Python SDK, synchronous, against a live server. See ../README.md."""

import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from e2b import (
    CommandExitException,
    FileNotFoundException,
    InvalidArgumentException,
    PtySize,
    Sandbox,
    SandboxNotFoundException,
    SandboxQuery,
    SandboxState,
    TimeoutException,
)

import neighbourhood
import raw
import scenes
from checks import Suite, equal, raises, true, until
from scenes import COMMAND_S

suite = Suite("sync")
SECOND_PROCESS = Path(__file__).with_name("second_process.py")


def create(**options):
    options = {"timeout": 900, "request_timeout": 120, **options}
    metadata = {**suite.metadata, **options.pop("metadata", {})}
    return Sandbox.create("base", metadata=metadata, **options)


def token_of(sandbox):
    return sandbox.connection_config.sandbox_headers["X-Access-Token"]


# --- commands -----------------------------------------------------------------------------------


def commands_stream(sandbox):
    heard = scenes.Streamed()

    def release(go):
        if go:
            sandbox.files.write("/tmp/go", "")

    error = raises(
        CommandExitException,
        sandbox.commands.run,
        scenes.STREAMED,
        on_stdout=lambda text: release(heard.note(out=text)),
        on_stderr=lambda text: release(heard.note(err=text)),
        timeout=COMMAND_S,
    )
    heard.judge(error)


def commands_long_output(sandbox):
    result = sandbox.commands.run("seq 100000; echo é", timeout=COMMAND_S)
    wanted = "".join(f"{number}\n" for number in range(1, 100_001)) + "é\n"
    true(result.stdout == wanted, f"{len(result.stdout)} characters came, not {len(wanted)}")


def commands_environment(sandbox):
    result = sandbox.commands.run(
        scenes.ENVIRONMENT, envs={"LOCAL": "local"}, cwd="/tmp", timeout=COMMAND_S
    )
    scenes.judge_environment(result.stdout, "user", "/home/user", "/tmp")
    result = sandbox.commands.run(
        scenes.ENVIRONMENT, envs={"LOCAL": "local"}, cwd="/", user="root", timeout=COMMAND_S
    )
    scenes.judge_environment(result.stdout, "root", "/root", "/")
    error = raises(InvalidArgumentException, sandbox.commands.run, "true", cwd="/no/such/place")
    true("/no/such/place" in str(error), f"the error names no path: {error}")


def commands_stdin(sandbox):
    cat = sandbox.commands.run("cat", background=True, stdin=True, timeout=COMMAND_S)
    scenes.judge_processes(sandbox.commands.list(), cat.pid, "cat")
    sandbox.commands.send_stdin(cat.pid, "hello\n")
    output = iter(cat)
    equal(next(output)[0], "hello\n", "what cat said")
    cat.send_stdin("again\n")
    cat.close_stdin()
    equal(cat.wait().stdout, "hello\nagain\n", "all cat said")


def commands_reconnect(sandbox):
    first = sandbox.commands.run("cat", background=True, stdin=True, timeout=COMMAND_S)
    first.disconnect()
    second = sandbox.commands.connect(first.pid, timeout=COMMAND_S)
    second.send_stdin("still here\n")
    second.close_stdin()
    equal(second.wait().stdout, "still here\n", "output after connecting anew")


def commands_kill(sandbox):
    sleeper = sandbox.commands.run("sleep 600", background=True, timeout=0)
    equal(sandbox.commands.kill(sleeper.pid), True, "kill")
    equal(raises(CommandExitException, sleeper.wait).exit_code, -1, "exit code")
    true(sleeper.pid not in [p.pid for p in sandbox.commands.list()], "still listed")
    equal(sandbox.commands.kill(4_000_000), False, "kill of a pid that does not exist")


def commands_timeout(sandbox):
    started = time.monotonic()
    raises(TimeoutException, sandbox.commands.run, "sleep 601", timeout=5)
    true(time.monotonic() - started < 60, "the timeout came late")

    def killed():
        return all("sleep 601" not in process.args for process in sandbox.commands.list())

    until(15, "the command that ran out of time is killed", killed)


def pty(sandbox):
    terminal = sandbox.pty.create(PtySize(rows=24, cols=80), timeout=COMMAND_S)
    output, seen = iter(terminal), b""

    def read_until(wanted):
        """Looks before it waits: what is wanted may have come with what was wanted before."""
        nonlocal seen
        while wanted not in seen:
            piece = next(output, None)
            true(piece, f"the terminal ended before it showed {wanted!r}: {seen[-200:]!r}")
            seen += piece[2] or b""

    sandbox.pty.send_stdin(terminal.pid, b"stty size; echo sum-$((40 + 2))\n")
    read_until(b"24 80")
    read_until(b"sum-42")
    sandbox.pty.resize(terminal.pid, PtySize(rows=30, cols=100))
    sandbox.pty.send_stdin(terminal.pid, b"stty size\n")
    read_until(b"30 100")
    equal(sandbox.pty.kill(terminal.pid), True, "kill")
    raises(CommandExitException, terminal.wait)


# --- files --------------------------------------------------------------------------------------


def files_text(sandbox):
    written = sandbox.files.write("notes/héllo.txt", "grüße\n")
    equal(written.path, "/home/user/notes/héllo.txt", "path")
    equal(sandbox.files.read("notes/héllo.txt"), "grüße\n", "text")
    sandbox.files.write("notes/héllo.txt", "short")
    equal(sandbox.files.read("/home/user/notes/héllo.txt"), "short", "overwritten text")
    sandbox.files.write("notes/empty", "")
    equal(sandbox.files.read("notes/empty"), "", "empty file")
    raises(FileNotFoundException, sandbox.files.read, "notes/missing")


def files_bytes(sandbox):
    sandbox.files.write("all-bytes", scenes.ALL_BYTES)
    equal(bytes(sandbox.files.read("all-bytes", format="bytes")), scenes.ALL_BYTES, "bytes")
    with sandbox.files.read("all-bytes", format="stream") as stream:
        equal(b"".join(stream), scenes.ALL_BYTES, "stream")
    parts = [scenes.ALL_BYTES] * 64
    sandbox.files.write("streamed", iter(parts), gzip=True)
    equal(sandbox.files.get_info("streamed").size, len(b"".join(parts)), "streamed size")


def files_tree(sandbox):
    equal(sandbox.files.make_dir("tree/deep"), True, "make_dir")
    equal(sandbox.files.make_dir("tree/deep"), False, "make_dir of what exists")
    written = sandbox.files.write_files(
        [{"path": "tree/a.txt", "data": "a"}, {"path": "tree/deep/b.bin", "data": b"\x00\x01"}]
    )
    equal([entry.name for entry in written], ["a.txt", "b.bin"], "write_files")
    listed = {entry.name: entry for entry in sandbox.files.list("tree")}
    equal(sorted(listed), ["a.txt", "deep"], "list")
    equal(listed["deep"].type.value, "dir", "type of a folder")
    deep = sorted(entry.path for entry in sandbox.files.list("tree", depth=2))
    equal(deep[-1], "/home/user/tree/deep/b.bin", "list with depth 2")
    scenes.judge_entry(sandbox.files.get_info("tree/a.txt"), "a.txt", "/home/user/tree/a.txt", 1)
    moved = sandbox.files.rename("tree/a.txt", "tree/c.txt")
    equal(moved.path, "/home/user/tree/c.txt", "rename")
    equal(sandbox.files.exists("tree/a.txt"), False, "old name exists")
    equal(sandbox.files.exists("tree/c.txt"), True, "new name exists")
    sandbox.files.remove("tree")
    equal(sandbox.files.exists("tree"), False, "removed folder exists")
    raises(FileNotFoundException, sandbox.files.list, "tree")
    raises(FileNotFoundException, sandbox.files.get_info, "tree")


def files_users(sandbox):
    sandbox.files.write("/root/secret", "for root", user="root")
    equal(sandbox.files.read("/root/secret", user="root"), "for root", "root's file")
    sandbox.files.write("tagged", "x", metadata={"kind": "note"})
    equal(sandbox.files.get_info("tagged").metadata, {"kind": "note"}, "file metadata")


# --- the sandbox itself -------------------------------------------------------------------------


def info(sandbox):
    found = sandbox.get_info()
    scenes.judge_info(found, sandbox.sandbox_id, suite.tag)
    scenes.judge_end(found, 900, slack_s=600)
    equal(sandbox.is_running(), True, "is_running")


def set_timeout(sandbox):
    for seconds in (1800, 600):  # later, then sooner
        sandbox.set_timeout(seconds)
        scenes.judge_end(sandbox.get_info(), seconds)
    Sandbox.connect(sandbox.sandbox_id, timeout=30)  # connecting never shortens
    scenes.judge_end(sandbox.get_info(), 600, slack_s=30)


def listing(sandbox, other):
    def ids(**query):
        pages, found = Sandbox.list(query=SandboxQuery(**query), limit=1), []
        while pages.has_next:
            page = pages.next_items()
            true(len(page) <= 1, "a page longer than its limit")
            found += [entry.sandbox_id for entry in page]
        return sorted(found)

    both = sorted([sandbox.sandbox_id, other.sandbox_id])
    equal(ids(metadata=suite.metadata), both, "list by metadata, in pages of one")
    equal(ids(metadata={**suite.metadata, "odd": scenes.AWKWARD}), [other.sandbox_id], "odd value")
    equal(ids(metadata={**suite.metadata, "odd": "no"}), [], "list by a value nobody has")
    equal(ids(metadata=suite.metadata, state=[SandboxState.RUNNING]), both, "list of running ones")


def second_process(sandbox):
    sandbox.files.write("note.txt", "from the first")
    answer = subprocess.run(
        [sys.executable, str(SECOND_PROCESS), sandbox.sandbox_id],
        capture_output=True,
        timeout=COMMAND_S,
    )
    equal(answer.returncode, 0, answer.stderr.decode()[-300:])
    wanted = {"note": "from the first", "id": sandbox.sandbox_id, "running": True}
    equal(json.loads(answer.stdout), wanted, "what the second process saw")
    equal(sandbox.files.read("answer.txt"), "got from the first", "what it left")


def identify(sandbox):
    asked_at = scenes.now()
    line = sandbox.commands.run(scenes.IDENTITY, timeout=COMMAND_S).stdout
    return scenes.Identity(line, asked_at, scenes.now())


def clock(sandbox):
    identify(sandbox).judge_clock()


def server_on_port(sandbox):
    def ask(headers=None):
        return raw.to_port(sandbox.sandbox_id, scenes.WEB_PORT, "/index.html", headers=headers)

    closed = ask()
    equal(closed.status, 502, "status of a closed port")
    true("port is not open" in closed.message, f"a closed port says {closed}")
    sandbox.files.write("www/index.html", "<p>served</p>")
    sandbox.commands.run(scenes.WEB_SERVER, background=True, cwd="/home/user/www", timeout=0)
    answer = until(90, "the web server answers", lambda: (a := ask()).status != 502 and a)
    equal((answer.status, answer.body), (200, b"<p>served</p>"), "by headers")
    host = f"{scenes.WEB_PORT}-{sandbox.sandbox_id}.sandboxes.test"
    by_host = raw.request(
        raw.setting("E2B_SANDBOX_URL"), "GET", "/index.html", headers={"Host": host}
    )
    equal((by_host.status, by_host.body), (200, b"<p>served</p>"), "by host name")


def isolation(sandbox, _other):
    with neighbourhood.Bait() as bait:
        targets = neighbourhood.forbidden_targets(token_of(sandbox), bait)
        suite.remark(f"isolation: {len(targets)} addresses tried")
        result = sandbox.commands.run(scenes.reach(targets), timeout=COMMAND_S)
        scenes.judge_reach(result.stdout)
        equal(bait.visitors, 0, "connections the host's bait saw")


def ten_at_once():
    started = time.monotonic()
    with ThreadPoolExecutor(10) as pool:
        sandboxes = list(pool.map(lambda _: create(), range(10)))
        created = time.monotonic()
        answers = list(pool.map(identify, sandboxes))
        answered = time.monotonic()
        scenes.judge_clones([sandbox.sandbox_id for sandbox in sandboxes], answers)
        equal(list(pool.map(lambda sandbox: sandbox.kill(), sandboxes)), [True] * 10, "kills")
    suite.remark(
        f"ten_at_once: created in {created - started:.2f} s, "
        f"answered {answered - created:.2f} s later"
    )


def kill(sandbox):
    equal(sandbox.kill(), True, "first kill")
    equal(sandbox.kill(), False, "second kill")
    equal(sandbox.is_running(), False, "is_running")
    raises(SandboxNotFoundException, sandbox.get_info)
    raises(SandboxNotFoundException, Sandbox.connect, sandbox.sandbox_id)
    raises(TimeoutException, sandbox.commands.run, "true")
    true(sandbox.sandbox_id not in raw.tagged_ids(suite.tag), "still listed")


def expiry():
    sandbox = create(timeout=5)
    started = time.monotonic()

    def gone():
        try:
            sandbox.get_info()
        except SandboxNotFoundException:
            return True

    until(12, "the API forgets a sandbox past its end", gone)
    true(time.monotonic() - started > 3, "gone before its end")
    until(5, "is_running is False", lambda: not sandbox.is_running())
    equal(sandbox.kill(), False, "kill of an expired sandbox")


def main():
    with suite:
        sandbox = suite.check("create", lambda: create(envs={"GLOBAL": "global"}))
        other = suite.check("create_another", lambda: create(metadata={"odd": scenes.AWKWARD}))
        for body in (commands_stream, commands_environment, commands_stdin, commands_reconnect):
            suite.check(body.__name__, body, sandbox)
        for body in (commands_long_output, commands_kill, commands_timeout, pty):
            suite.check(body.__name__, body, sandbox)
        for body in (files_text, files_bytes, files_tree, files_users):
            suite.check(body.__name__, body, sandbox)
        for body in (info, set_timeout, second_process, clock, server_on_port):
            suite.check(body.__name__, body, sandbox)
        suite.check("list", listing, sandbox, other)
        suite.check("isolation", isolation, sandbox, other)
        suite.check("ten_at_once", ten_at_once, deadline_s=300)
        suite.check("expiry", expiry)
        suite.check("kill", kill, sandbox)


if __name__ == "__main__":
    main()
