"""What takes minutes, through both Python SDKs at once: ten minutes of silence, with the SDK's own
settings for idle connections, beside a gigabyte of output, of input and of file. See ../README.md.

    guest_long.py [SECONDS OF SILENCE]
"""

import asyncio
import sys
import time

from e2b import PtySize

import guest_commands
import guest_files
from checks import Suite, equal, say
from guest_clients import AsyncBox, Recorder, SyncBox
from guest_target import MIB
from guest_target import target as chosen_target

SILENCE_S = 600
FULL = {"big_file": 1024 * MIB, "long_output": 1024 * MIB, "stdin": 100 * MIB}
DEADLINE_S = 1500


async def silent_command(box, silence_s):
    """Nothing on the stream but what the daemon itself sends to keep it open."""
    started = time.monotonic()
    result = await box.run(f"sleep {silence_s}; echo over; exit 0", timeout=0)
    equal(result.stdout, "over\n", "what the silent command said at last")
    return f"told its end after {time.monotonic() - started:.1f} s"


async def silent_terminal(box, silence_s):
    terminal = await box.terminal(PtySize(rows=24, cols=80), timeout=0)
    line = f"stty -echo; PS1=; sleep {silence_s}; echo over-$((1 + 1)); exit\n"
    await box.pty.send_stdin(terminal.pid, line.encode())
    over = "the end of the silence"
    await terminal.until(over, lambda: b"over-2" in terminal.terminal, deadline_s=DEADLINE_S)
    equal((await terminal.wait()).exit_code, 0, "exit code")


async def silent_watch(box, silence_s):
    folder = box.path("silent")
    await box.files.make_dir(folder)
    watch = await box.watch(folder)
    await asyncio.sleep(silence_s)  # what is waited for is that nothing happens
    await box.files.write(f"{folder}/at last", "x")
    await watch.saw("create", "at last")
    equal(watch.exits, [], "ends of the watch")
    await watch.stop()


async def idle_client(box, silence_s):
    """A client that has not called for that long finds its connections, or makes new ones."""
    await box.run("true")
    await asyncio.sleep(silence_s)
    equal((await box.run("echo back")).stdout, "back\n", "a command after a long pause")


async def large(box):
    """One after the other: they share one processor."""
    said = []
    for body in (guest_commands.long_output, guest_commands.stdin_large, guest_files.big):
        said.append(await body(box))
    return "; ".join(said)


async def run(suite, target, silence_s):
    async def create(kind):
        options = {"timeout": 3000, "metadata": suite.metadata, "request_timeout": 120}
        box = await kind.create(target, Recorder(), **options)
        await box.files.make_dir(target.base)
        return box

    async def checked(name, body, *args):
        said = await suite.acheck(name, body, *args, deadline_s=DEADLINE_S)
        if isinstance(said, str):
            suite.remark(f"{name}: {said}")

    checks = []
    for kind in (SyncBox, AsyncBox):
        box = await suite.acheck(f"create_{kind.name}", create, kind)
        for body in (silent_command, silent_terminal, silent_watch, idle_client):
            checks.append(checked(f"{kind.name}.{body.__name__}", body, box, silence_s))
    # Another sandbox: in one with a busy processor, silence would prove less.
    checks.append(checked("large", large, await suite.acheck("create_large", create, SyncBox)))
    await asyncio.gather(*checks)
    for line in target.remarks():
        suite.remark(line)


def main():
    silence_s = int(sys.argv[1]) if len(sys.argv) > 1 else SILENCE_S
    target = chosen_target(**FULL)
    prefix = "long.native" if target.native else "long"
    if target.native:
        target.scale.long_output = FULL["long_output"]
    with Suite(prefix, on_server=not target.native) as suite, target:
        say(f"# {prefix}: {silence_s} s of silence, {target.scale}")
        asyncio.run(run(suite, target, silence_s))


if __name__ == "__main__":
    main()
