"""An old SDK generation, unmodified: v1 routes, and sandboxes addressed by host name alone.

Needs the packages of requirements-old.txt, so an environment of its own. See ../README.md.
"""

import gc
import os
import shutil
import tempfile
import time
from importlib import metadata

from checks import Suite, equal, raises, say, true, until
from guest_clients import Recorder
from tls_front import DOMAIN, TlsFront

suite = Suite("old")
COMMAND_S = 120


class Client:
    """The SDK with the options every call here needs. It is imported late: it reads the name of the
    file with trusted certificates from the environment when a client is made."""

    def __init__(self, front):
        os.environ["SSL_CERT_FILE"] = str(front.ca_file)
        import e2b

        self.e2b = e2b
        self.recorder = Recorder()
        self.options = {"domain": DOMAIN, "proxy": front.url, "request_timeout": 120}

    def create(self, **fields):
        sandbox = self.e2b.Sandbox.create(
            "base", timeout=600, metadata=suite.metadata, **fields, **self.options
        )
        for part in (sandbox.commands, sandbox.pty, sandbox.files):
            self.recorder.watch(part)
        return sandbox

    def recorded(self, handle):
        self.recorder.watch(handle)
        return handle


def commands(client, sandbox):
    heard = []
    error = raises(
        client.e2b.CommandExitException,
        sandbox.commands.run,
        "echo $GLOBAL $LOCAL; pwd; echo wärning >&2; exit 3",
        envs={"LOCAL": "a b"},
        cwd="/tmp",
        on_stdout=heard.append,
        timeout=COMMAND_S,
    )
    wanted = (3, "global a b\n/tmp\n", "wärning\n")
    equal((error.exit_code, error.stdout, error.stderr), wanted, "result")
    equal("".join(heard), wanted[1], "what the callback heard")
    as_root = sandbox.commands.run("id -un; seq 20000", user="root", timeout=COMMAND_S).stdout
    numbers = "".join(f"{number}\n" for number in range(1, 20_001))
    true(as_root == "root\n" + numbers, f"{len(as_root)} characters of root's command")
    raises(client.e2b.TimeoutException, sandbox.commands.run, "sleep 601", timeout=3)


def background(client, sandbox):
    """Input, other subscribers, lists and kills: by the handle and by the process id."""
    cat = client.recorded(sandbox.commands.run("cat", background=True, stdin=True, timeout=0))
    sandbox.commands.send_stdin(cat.pid, "first é\n")
    output = iter(cat)
    equal(next(output)[0], "first é\n", "what cat said")
    cat.disconnect()
    again = sandbox.commands.connect(cat.pid, timeout=0)
    listed = {process.pid: process for process in sandbox.commands.list()}
    equal(list(listed[cat.pid].args), ["-l", "-c", "cat"], "its arguments")
    sandbox.commands.send_stdin(cat.pid, "second\n")
    equal(next(iter(again))[0], "second\n", "what the second subscriber heard")
    equal(sandbox.commands.kill(cat.pid), True, "kill")
    equal(sandbox.commands.kill(cat.pid), False, "kill of what has ended")
    sleeper = sandbox.commands.run("sleep 600", background=True, timeout=0)
    equal(sleeper.kill(), True, "kill by the handle")
    error = raises(client.e2b.CommandExitException, sleeper.wait)
    equal(error.exit_code, -1, "exit code of what was killed")


def pty(client, sandbox):
    terminal = sandbox.pty.create(client.e2b.PtySize(rows=24, cols=80), timeout=COMMAND_S)
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
    sandbox.pty.resize(terminal.pid, client.e2b.PtySize(rows=30, cols=100))
    sandbox.pty.send_stdin(terminal.pid, b"stty size\n")
    read_until(b"30 100")
    equal(sandbox.pty.kill(terminal.pid), True, "kill")
    raises(client.e2b.CommandExitException, terminal.wait)


def files(client, sandbox):
    content = bytes(range(256)) * 4000
    sandbox.files.write("folder/ä b", content)
    equal(bytes(sandbox.files.read("folder/ä b", format="bytes")), content, "bytes")
    parts = sandbox.files.read("folder/ä b", format="stream")
    true(b"".join(parts) == content, "the stream is not what was written")
    files = [{"path": "folder/empty", "data": ""}, {"path": "folder/below/c", "data": "grüße"}]
    equal([e.name for e in sandbox.files.write_files(files)], ["empty", "c"], "write_files")
    equal(sandbox.files.read("folder/empty"), "", "an empty file")
    equal(sandbox.files.read("~/folder/below/c"), "grüße", "text")
    names = sorted(entry.name for entry in sandbox.files.list("folder"))
    equal(names, ["below", "empty", "ä b"], "list")
    equal(len(sandbox.files.list("folder", depth=2)), 4, "entries of two levels")
    info = sandbox.files.get_info("folder/ä b")
    found = (info.size, info.type.value, info.owner, info.permissions, info.mode & 0o777)
    equal(found, (len(content), "file", "user", "-rw-r--r--", 0o644), "info")
    equal(sandbox.files.make_dir("folder/new"), True, "make_dir")
    equal(sandbox.files.make_dir("folder/new"), False, "make_dir of what exists")
    moved = sandbox.files.rename("folder/empty", "folder/new/moved")
    equal(moved.path, "/home/user/folder/new/moved", "rename")
    equal(sandbox.files.exists("folder/empty"), False, "exists under the old name")
    sandbox.files.write("/root/secret", "root's", user="root")
    equal(sandbox.files.read("/root/secret", user="root"), "root's", "root's file")
    raises(client.e2b.NotFoundException, sandbox.files.read, "folder/missing")
    raises(client.e2b.NotFoundException, sandbox.files.list, "folder/missing")
    raises(client.e2b.InvalidArgumentException, sandbox.files.read, "folder")
    sandbox.files.remove("folder")
    equal(sandbox.files.exists("folder"), False, "exists after remove")


def watch(client, sandbox):
    sandbox.files.make_dir("watched/below")
    handle = client.recorded(sandbox.files.watch_dir("watched", recursive=True))
    sandbox.files.write("watched/below/file", "x")
    sandbox.files.remove("watched/below/file")
    seen = []

    def complete():
        seen.extend((event.type.value, event.name) for event in handle.get_new_events())
        return {("create", "below/file"), ("remove", "below/file")} <= set(seen)

    until(30, "the file's coming and going", complete)
    handle.stop()
    raises(client.e2b.SandboxException, handle.get_new_events)


def every_method_called(client):
    unused = client.recorder.unused()
    true(client.recorder.count() >= 25, "the SDK's methods were not found")
    equal(unused, [], "never called")


def lifecycle(client, sandbox):
    sdk, options = client.e2b.Sandbox, client.options
    info = sandbox.get_info()
    equal((info.sandbox_id, info.metadata), (sandbox.sandbox_id, suite.metadata), "info")
    query = client.e2b.SandboxQuery(metadata=suite.metadata)
    listed = sdk.list(query=query, **options).next_items()
    equal([entry.sandbox_id for entry in listed], [sandbox.sandbox_id], "list")
    sandbox.set_timeout(900)
    true((sandbox.get_info().end_at - info.end_at).total_seconds() > 200, "the end did not move")
    again = sdk.connect(sandbox.sandbox_id, timeout=900, **options)
    equal(again.commands.run("echo again", timeout=COMMAND_S).stdout, "again\n", "second handle")
    equal(sandbox.is_running(), True, "is_running")


def control(client, sandbox):
    """What this generation asks of the API beyond the life of one sandbox."""
    sdk, options = client.e2b.Sandbox, client.options
    other = client.create(allow_internet_access=False)
    both = sorted([sandbox.sandbox_id, other.sandbox_id])
    for state, wanted in ((None, both), ("running", both), ("paused", [])):
        states = state and [client.e2b.SandboxState(state)]
        query = client.e2b.SandboxQuery(metadata=suite.metadata, state=states)
        pages, found = sdk.list(query=query, limit=1, **options), []
        while pages.has_next:
            found += [entry.sandbox_id for entry in pages.next_items()]
        equal(sorted(found), wanted, f"pages of one, state {state}")
    sdk.set_timeout(other.sandbox_id, 60, **options)
    info = sdk.get_info(other.sandbox_id, **options)
    lasts = (info.end_at - info.started_at).total_seconds()
    true(55 < lasts < 300, f"it lives for {lasts} s")
    samples = until(60, "a sample", lambda: other.get_metrics(), pause_s=1)
    true(0 < samples[-1].mem_used < samples[-1].mem_total, f"memory: {samples[-1]}")
    equal(len(sdk.get_metrics(other.sandbox_id, **options)) >= 1, True, "samples by the class")
    equal(sdk.kill(other.sandbox_id, **options), True, "kill by the class")
    equal(sdk.kill(other.sandbox_id, **options), False, "second kill")
    # This generation then asks for a resume, which a server without pausing does not know.
    raises(client.e2b.SandboxException, sdk.connect, other.sandbox_id, **options)
    raises(client.e2b.SandboxException, client.e2b.Sandbox.create, "no-such-template", **options)
    wrong = {**options, "api_key": "e2b_" + "0" * 40}
    raises(client.e2b.AuthenticationException, sandbox.get_info, **wrong)


def kill(sandbox):
    equal(sandbox.kill(), True, "first kill")
    equal(sandbox.kill(), False, "second kill")
    equal(sandbox.is_running(), False, "is_running")


def scene(name, body, *args):
    """A check, and the collection of what it left, while no call is in flight.

    This SDK generation can lock itself up, whatever the server does. The answer to a background
    command is a generator that gives its connection back when it is closed, under the lock of the
    connection pool, which does not let the same thread in twice. An exception that a check keeps
    ties the generator into a cycle; so it is closed whenever Python happens to look for cycles, and
    that may be in the few lines that hold the lock: then this call and every later one hang. The
    suite therefore has Python look for cycles here and nowhere else.
    """
    value = suite.check(name, body, *args)
    if suite.idle():  # what hangs may hold the lock
        gc.collect()
    return value


def main():
    version = metadata.version("e2b")
    if tuple(map(int, version.split(".")[:2])) >= (2, 40):
        say(f"skip old.all: e2b {version} is installed, not the one of requirements-old.txt")
        return
    if not shutil.which("openssl"):
        say("skip old.all: the program openssl is missing")
        return
    with suite, tempfile.TemporaryDirectory() as directory, TlsFront(directory) as front:
        gc.disable()  # see scene()
        started = time.monotonic()
        client = Client(front)
        suite.remark(f"e2b {version} imported in {time.monotonic() - started:.1f} s")
        sandbox = scene("create", lambda: client.create(envs={"GLOBAL": "global"}))
        for body in (commands, background, pty, files, watch):
            scene(body.__name__, body, client, sandbox)
        scene("every_method_called", every_method_called, client)
        scene("lifecycle", lifecycle, client, sandbox)
        scene("control", control, client, sandbox)
        scene("kill", kill, sandbox)


if __name__ == "__main__":
    main()
