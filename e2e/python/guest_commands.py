"""What commands do, with either Python SDK: ends, streams, input, limits, what outlives them."""

import asyncio
import hashlib
import time
import zlib

from e2b import (
    AuthenticationException,
    CommandExitException,
    InvalidArgumentException,
    NotFoundException,
    SandboxException,
    TimeoutException,
)

from checks import Skip, araises, auntil, equal, true

MIB = 1024 * 1024
LINE = b"0123456789abcde\n"
STRING_MAX = 128 * 1024  # one argument or variable, with its end: Linux's MAX_ARG_STRLEN


async def is_running(box):
    equal(await box.is_running(), True, "is_running")


async def ends(box):
    result = await box.run("echo out; echo err >&2")
    equal((result.stdout, result.stderr, result.exit_code), ("out\n", "err\n", 0), "result")
    equal(result.error, None, "error of a command that ended well")
    for code in (1, 7, 126, 255):
        error = await araises(CommandExitException, box.run(f"echo some; exit {code}"))
        equal((error.exit_code, error.stdout), (code, "some\n"), "exit code and output")
        equal(error.error, f"exit status {code}", "error")
    error = await araises(CommandExitException, box.run("no-such-program"))
    equal(error.exit_code, 127, "exit code of a missing program")
    true("no-such-program" in error.stderr, f"stderr says {error.stderr!r}")
    error = await araises(CommandExitException, box.run("kill -TERM $$"))
    equal(error.exit_code, -1, "exit code of a command ended by a signal")
    true("terminated" in error.error, f"error says {error.error!r}")


async def odd_texts(box):
    odd = "spaces  and\ttabs, 'single' \"double\" $HOME `x` \\ ünïcödé 漢字 🦀 e\u0301"
    quoted = "'" + odd.replace("'", "'\\''") + "'"
    equal((await box.run(f"printf %s {quoted}")).stdout, odd, "text through the shell")
    given = await box.run('printf %s "$ODD"', envs={"ODD": odd + "\nsecond line"})
    equal(given.stdout, odd + "\nsecond line", "text through a variable")
    several = await box.run("echo one\n# a comment\n\necho two\n")
    equal(several.stdout, "one\ntwo\n", "a command of several lines")
    # Half a character, then its end, then bytes that are no text at all.
    split = await box.run(r"printf '\303'; sleep 0.3; printf '\251\377\0end'")
    equal(split.stdout, "é\ufffd\0end", "bytes cut inside a character")


async def folders(box):
    odd = box.path("a folder/ünder 'quotes' 漢")
    await box.files.make_dir(odd)
    equal((await box.run("pwd", cwd=odd)).stdout, odd + "\n", "pwd")
    equal((await box.run("pwd")).stdout, box.target.home + "\n", "pwd without cwd")
    await box.files.write(box.path("plain"), "")
    for wrong in (box.path("missing"), box.path("plain")):
        error = await araises(InvalidArgumentException, box.run("true", cwd=wrong))
        true(wrong in str(error), f"the error does not name {wrong}: {error}")


async def users(box):
    if box.target.native and box.target.user != "root":
        raise Skip("only root can run commands as somebody else")
    other = box.target.other_user
    equal((await box.run("id -un", user=other, cwd="/")).stdout, f"{other}\n", "who runs it")
    equal((await box.run("id -un")).stdout, f"{box.target.user}\n", "who runs it by default")
    error = await araises(AuthenticationException, box.run("true", user="no-such-user"))
    true("no-such-user" in str(error), f"the error does not name the user: {error}")


async def listed(box):
    envs = {"MARK": "ä b"}
    running = await box.start("exec cat", stdin=True, envs=envs, cwd=box.target.base)
    (entry,) = [entry for entry in await box.commands.list() if entry.pid == running.pid]
    equal((entry.cmd, list(entry.args)), ("/bin/bash", ["-l", "-c", "exec cat"]), "command")
    equal((entry.envs, entry.cwd, entry.tag), (envs, box.target.base, None), "envs, cwd, tag")
    await running.close_stdin()
    await running.wait()
    true(running.pid not in [entry.pid for entry in await box.commands.list()], "still listed")


async def stdin_every_way(box):
    running = await box.start("cat; echo over", stdin=True)
    await running.send_stdin("by the handle é\n")
    await running.heard("by the handle é\n")
    await running.send_stdin(b"bytes \xc3\xa9\n")
    await box.commands.send_stdin(running.pid, "by pid\n")
    await box.commands.send_stdin(running.pid, b"")
    await box.feed(running.pid, ["str ", b"and bytes\n", "", "漢\n"])
    await running.heard("漢\n")
    await box.commands.close_stdin(running.pid)
    wanted = "by the handle é\nbytes é\nby pid\nstr and bytes\n漢\nover\n"
    equal((await running.wait()).stdout, wanted, "what came back")


async def stdin_refused(box):
    nobody = 4_000_000
    await araises(NotFoundException, box.commands.send_stdin(nobody, "x"))
    await araises(NotFoundException, box.commands.close_stdin(nobody))
    await araises(NotFoundException, box.feed(nobody, ["x"]))
    await araises(NotFoundException, box.commands.connect(nobody))
    equal(await box.commands.kill(nobody), False, "kill of a pid that does not exist")
    running = await box.start("sleep 600", timeout=0)  # without stdin
    await araises(SandboxException, running.send_stdin("x"))
    equal(await running.kill(), True, "kill")
    empty = await box.run("cat; echo over")
    equal(empty.stdout, "over\n", "a command without stdin reads nothing")


async def stdin_large(box):
    """All of it arrives, in order, at a program that reads more slowly than it is sent."""
    size = box.scale.stdin
    block = b"".join(b"%015d\n" % number for number in range(MIB // 16))
    running = await box.start("sha256sum; echo over", stdin=True, timeout=0)
    started = time.monotonic()
    wanted = hashlib.sha256()

    def pieces():
        for number in range(size // MIB):
            piece = b"%08d" % number + block[8:]
            wanted.update(piece)
            yield piece

    await box.feed(running.pid, pieces())
    await running.close_stdin()
    result = await running.wait()
    equal(result.stdout, f"{wanted.hexdigest()}  -\nover\n", "digest of what came")
    return rate("stdin", size, started)


async def long_output(box):
    size = box.scale.long_output
    started = time.monotonic()
    heard, check = 0, 0

    def take(text):
        nonlocal heard, check
        data = text.encode()
        heard, check = heard + len(data), zlib.crc32(data, check)

    result = await box.run(
        f"yes 0123456789abcde | head -c {size}", on_stdout=take, retain_output=False, timeout=0
    )
    equal(result.stdout, None, "retained output")
    equal(heard, size, "bytes heard")
    wanted, block = 0, LINE * (MIB // 16)
    for _ in range(size // MIB):
        wanted = zlib.crc32(block, wanted)
    equal(check, wanted, "checksum of what was heard")
    return rate("output", size, started)


async def both_streams(box):
    """Both full at once: neither may wait for the other."""
    count = 20_000 if box.target.native else 2_000
    command = f"seq {count} & seq {count} >&2; wait"
    result = await box.run(command)
    wanted = "".join(f"{number}\n" for number in range(1, count + 1))
    true(result.stdout == wanted, f"{len(result.stdout)} of {len(wanted)} characters on stdout")
    true(result.stderr == wanted, f"{len(result.stderr)} of {len(wanted)} characters on stderr")


async def many_at_once(box):
    count = box.scale.at_once
    started = time.monotonic()

    async def start(number):
        return await box.start(f"echo {number}; exec cat", stdin=True, timeout=0)

    running = await asyncio.gather(*(start(number) for number in range(count)))
    for number, one in enumerate(running):
        await one.heard(f"{number}\n")
    alive = {entry.pid for entry in await box.commands.list()}
    true(alive >= {one.pid for one in running}, "not all of them run at once")
    equal(await box.is_running(), True, "is_running with all of them")
    await asyncio.gather(*(one.send_stdin(f"to {n}") for n, one in enumerate(running)))
    await asyncio.gather(*(one.close_stdin() for one in running))
    results = await asyncio.gather(*(one.wait() for one in running))
    wanted = [f"{number}\nto {number}" for number in range(count)]
    equal([result.stdout for result in results], wanted, "what each said")
    return f"{count} commands at once: {time.monotonic() - started:.1f} s"


async def kills(box):
    stubborn = "trap '' TERM INT HUP; echo ready; while :; do sleep 0.1; done"
    running = await box.start(stubborn, timeout=0)
    await running.heard("ready")
    await box.shell(f"kill -TERM {running.pid}", cwd="/")
    equal(await box.commands.kill(running.pid), True, "kill")
    error = await araises(CommandExitException, running.wait())
    equal((error.exit_code, error.error), (-1, "signal: killed"), "how it ended")
    equal(await running.kill(), False, "kill of what has ended")


async def deadline(box):
    """Time is up for a command that ignores every signal it can."""
    mark = "deadline-of-the-guest-suite"
    stubborn = f"trap '' TERM INT HUP; : {mark}; while :; do sleep 0.1; done"
    await araises(TimeoutException, box.run(stubborn, timeout=3))

    async def gone():
        return all(mark not in str(entry.args) for entry in await box.commands.list())

    await auntil(20, "the overdue command is gone", gone)


async def outlives(box):
    """A child that has let go of its command's output lives on after it."""
    name = box.path("child")
    command = f"(while [ ! -e '{name}.go' ]; do sleep 0.1; done; touch '{name}.done') "
    result = await box.run(f"{command} </dev/null >/dev/null 2>&1 & echo started")
    equal(result.stdout, "started\n", "output of the command")
    await box.files.write(f"{name}.go", "")

    async def done():
        return await box.files.exists(f"{name}.done")

    await auntil(60, "the child that was left behind does its work", done)


async def outlives_with_pipe(box):
    """A child that keeps the output open must not keep its command's end from being told; nor may
    the end close or stop up the output under a child that goes on writing to it."""
    name = box.path("writer")
    lines = "head -c 65536 /dev/zero; sleep 0.1"
    loop = f"(while [ ! -e '{name}.go' ]; do {lines}; done; touch '{name}.done') & echo $!"
    ended = box.run(loop, timeout=0)
    result = await asyncio.wait_for(ended, 30 if box.target.native else 100)
    child = result.stdout.replace("\0", "").strip()
    true(child.isdigit(), f"the command said {child!r}")
    await box.shell("kill -0 " + child, cwd="/")
    for _ in range(5):  # as much as would fill a pipe several times over
        await box.run("sleep 0.3")
    await box.files.write(f"{name}.go", "")

    async def done():
        return await box.files.exists(f"{name}.done")

    await auntil(60, "the writer lives on and does its work", done)


async def environment(box):
    envs = {f"BIG_{number}": str(number % 10) * (64 * 1024 - 20) for number in range(16)}
    names = " ".join(f"${{#BIG_{number}}}" for number in range(16))
    result = await box.run(f'echo {names}; printf %s "$BIG_7" | tr -d 7 | wc -c', envs=envs)
    lengths, rest = result.stdout.splitlines()
    equal(lengths.split(), [str(64 * 1024 - 20)] * 16, "lengths of 1 MiB of variables")
    equal(rest.strip(), "0", "other characters in one of them")
    almost = "x" * (STRING_MAX - len("BIG=") - 1)
    kept = await box.run('echo "${#BIG}"', envs={"BIG": almost})
    equal(kept.stdout, f"{len(almost)}\n", "the longest variable Linux takes")
    error = await araises(SandboxException, box.run("true", envs={"BIG": almost + "x"}))
    true("128 KiB" in str(error), f"one byte more is refused with {error}")
    error = await araises(SandboxException, box.run(": " + "x" * STRING_MAX))
    true("128 KiB" in str(error), f"a command that long is refused with {error}")
    equal((await box.run("echo well")).stdout, "well\n", "the next command")


async def reconnects(box):
    running = await box.start("cat; exit 3", listen=False, stdin=True, timeout=0)
    await running.disconnect()
    second = await box.attach(running.pid)
    third = await box.attach(running.pid)
    await second.send_stdin("both hear this\n")
    for one in (second, third):
        await one.heard("both hear this\n")
    await third.close_stdin()
    for one in (second, third):
        equal((await araises(CommandExitException, one.wait())).exit_code, 3, "exit code")
    late = await box.attach(running.pid)  # a finished command stays known for half a minute
    equal((await araises(CommandExitException, late.wait())).exit_code, 3, "exit code, told late")


async def handle_members(box):
    """What the handles of the two SDKs offer beyond what every scenario uses."""
    running = await box.start("echo out; echo err >&2; exit 4", listen=False)
    if box.name == "sync":
        parts = list(running.handle)
        equal(sorted(part[:2] for part in parts if part[0]), [("out\n", None)], "iterated stdout")
        equal([part[1] for part in parts if part[1]], ["err\n"], "iterated stderr")
        return
    error = await araises(CommandExitException, running.wait())
    equal(error.exit_code, 4, "exit code of the error")
    handle = running.handle
    equal((handle.stdout, handle.stderr), ("out\n", "err\n"), "streams of the handle")
    equal((handle.exit_code, handle.error), (4, "exit status 4"), "end of the handle")


def rate(what, size, started):
    took = time.monotonic() - started
    return f"{what}: {size // MIB} MiB in {took:.1f} s, {size / MIB / took:.0f} MiB/s"


SCENARIOS = (
    is_running,
    ends,
    odd_texts,
    folders,
    users,
    listed,
    stdin_every_way,
    stdin_refused,
    stdin_large,
    long_output,
    both_streams,
    many_at_once,
    kills,
    deadline,
    outlives,
    outlives_with_pipe,
    environment,
    reconnects,
    handle_members,
)
