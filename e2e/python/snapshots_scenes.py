"""A sandbox is paused and comes back where it was. For both Python SDKs; judged by state inside the
guest that there is no other copy of."""

import asyncio
import time

from e2b import (
    CommandExitException,
    PtySize,
    SandboxException,
    SandboxNotFoundException,
    SandboxState,
    TimeoutException,
)

import raw
import scenes
from checks import araises, auntil, equal, true
from control_world import same
from guest_clients import COMMAND_S, in_thread
from snapshots_world import (
    CUT_S,
    HELD,
    MISSING,
    PORT,
    Keeping,
    asleep_for,
    judge_paused_end,
    left,
    together,
)

TICKER = "n=0; while :; do n=$((n + 1)); echo tick-$n; sleep 0.2; done"
SAME = ("sandbox_id", "template_id", "name", "metadata", "cpu_count", "memory_mb")
SAME += ("envd_version", "lifecycle", "sandbox_domain", "volume_mounts", "envd_unresponsive_at_pause")
HALF_MIB = 100  # in memory, and the same on the disk
# Longer than a clock may be off, so that one that stood still while paused is found out.
ASLEEP_S = 3 * scenes.CLOCK_TOLERANCE_S


# --- memory and disk ----------------------------------------------------------------------------


async def goes_on(world):
    """A counter in memory, an open file, a listening server, a tmpfs: all as they were left."""
    one = await world.keeping()
    pid, _ = await one.next()
    await one.expect_next(pid, 2)
    for text in ("first", "second"):
        await one.ask(f"/hold/{text}")
    await one.box.files.write("/dev/shm/note", "in memory only")
    boot = await one.boot_id()
    await one.pause()
    two = await one.connect()
    equal(two.id, one.id, "id after the resume")
    await two.expect_next(pid, 3)
    equal(await two.held(), "", "what is in the file before it is flushed")
    await two.ask("/hold/third")
    await two.ask("/flush")
    equal(await two.held(), "first\nsecond\nthird\n", f"what is in {HELD} at last")
    equal(await two.box.files.read("/dev/shm/note"), "in memory only", "a file of a tmpfs")
    equal(await two.boot_id(), boot, "boot id")
    # The handle of before is as good as the new one.
    equal((await one.output("echo still here")), "still here\n", "by the handle of before")
    await world.end(two)


async def random_bytes(world):
    """200 MB, half of it in memory and half on the disk, and that half read from the disk."""
    one = Keeping(world, await world.create("base", request_timeout=120))
    size, there = HALF_MIB * 1024 * 1024, "/dev/shm/random /home/user/random"
    make = f"for f in {there}; do head -c {size} /dev/urandom > $f; done"
    await one.output(make, timeout=300)
    before = await one.output(f"b2sum {there}", timeout=300)
    await one.pause()
    two = await one.connect()
    # What the kernel still had to write is written, and its copies of what it has written go.
    await two.output("sync; echo 1 > /proc/sys/vm/drop_caches", user="root", timeout=300)
    equal(await two.output(f"b2sum {there}", timeout=300), before, "digests")
    equal(await two.output(f"stat -c %s {there}"), f"{size}\n{size}\n", "sizes")
    await world.end(two)


async def ten_times(world):
    """Nothing is lost on the way, however often."""
    one = await world.keeping()
    pid, _ = await one.next()
    pauses = resumes = 0.0
    for number in range(10):
        await one.ask(f"/hold/line-{number}")
        await one.box.files.write(f"round-{number}.txt", f"written {number}\n")
        began = time.monotonic()
        await one.pause()
        paused = time.monotonic()
        one = await one.connect()
        resumed = time.monotonic()
        await one.expect_next(pid, number + 2)
        pauses, resumes = pauses + paused - began, resumes + resumed - paused
    await one.ask("/flush")
    equal(await one.held(), "".join(f"line-{n}\n" for n in range(10)), "the open file")
    contents = await one.output("cat round-*.txt")
    equal(contents, "".join(f"written {n}\n" for n in range(10)), "a file for each round")
    await world.end(one)
    return f"on average paused in {pauses * 100:.0f} ms, resumed in {resumes * 100:.0f} ms"


async def clock(world):
    """Right after a resume the time is now, not when the sandbox was paused."""
    one = Keeping(world, await world.create())
    before = await one.identify()
    await one.pause()
    await asleep_for(ASLEEP_S)
    after = await (await one.connect()).identify()
    after.judge_clock()
    equal(after.sandbox_id, before.sandbox_id, "the id the guest knows")
    true(after.random != before.random, "random bytes came twice")
    await world.end(one)


# --- what was open ------------------------------------------------------------------------------


async def cut(running, what):
    """A stream of a run that is over ends, with an error that does not invent an exit."""
    try:
        error = await asyncio.wait_for(araises(SandboxException, running.wait()), CUT_S)
    except asyncio.TimeoutError:
        raise AssertionError(f"{what} still waits {CUT_S} s after the pause") from None
    true(not isinstance(error, CommandExitException), f"{what} ended with {error!r}")


def ticks(text):
    return [int(line.split("-")[1]) for line in text.splitlines() if line.startswith("tick-")]


async def old_streams(world):
    """Streams of before the pause end; the processes behind them go on and can be connected to."""
    one = Keeping(world, await world.create("base", request_timeout=120))
    ticker = await one.box.start(TICKER, timeout=0)
    cat = await one.box.start("cat", stdin=True, timeout=0)
    terminal = await one.box.terminal(PtySize(rows=24, cols=80), timeout=0)
    await one.box.pty.send_stdin(terminal.pid, b"MARK=kept; echo set-$((1 + 1))\n")
    await terminal.shown(b"set-2")
    await ticker.heard("tick-3\n")
    await one.pause()
    for running, what in ((ticker, "a command"), (cat, "stdin"), (terminal, "a terminal")):
        await cut(running, what)
    two = await one.connect()
    again = await two.box.attach(ticker.pid, timeout=0)
    heard = max(ticks(ticker.out))
    await again.until("the ticker goes on", lambda: len(ticks(again.out)) > 2)
    first = ticks(again.out)[0]
    true(first > heard, f"tick {first} after the resume, {heard} before the pause")
    cat = await two.box.attach(cat.pid, timeout=0)
    await cat.send_stdin("after\n")
    await cat.heard("after\n")
    terminal = await two.box.attach_terminal(terminal.pid, timeout=0)
    await two.box.pty.send_stdin(terminal.pid, b"echo $MARK-$((40 + 2))\n")
    await terminal.shown(b"kept-42")
    await world.end(two)


async def old_watch(world):
    """The polled watch goes on in the guest's daemon; the pushed one ends and says so."""
    one = Keeping(world, await world.create("base", request_timeout=120))
    await one.box.files.make_dir("watched")
    watch = await one.box.watch("watched")
    await one.box.files.write("watched/before", "x")
    await watch.saw("create", "before")
    await one.pause()
    two = await one.connect()
    if world.sdk.name == "async":

        async def ended():
            return watch.exits

        await auntil(CUT_S, "the watch of before ends", ended)
        equal(len(watch.exits), 1, "ends of the watch")
        true(isinstance(watch.exits[0], SandboxException), f"it ended with {watch.exits[0]!r}")
        watch = await two.box.watch("watched")
    await two.box.files.write("watched/after", "x")
    await watch.saw("create", "after")
    await watch.stop()
    await world.end(two)


# --- what the API says --------------------------------------------------------------------------


async def terms(world):
    """Id, metadata, variables, token and domain are the same; the time to live is the resume's."""
    odd = {"odd": scenes.AWKWARD}
    made = await world.create("base", metadata=odd, envs={"NAME": "a value"}, timeout=600)
    one = Keeping(world, made)
    before = await world.info(one.sandbox)
    began = time.time()
    await one.pause(mode="full")
    paused = await world.info(one.sandbox)
    judge_paused_end(paused, (began, time.time()))
    equal((paused.state, paused.metadata), (SandboxState.PAUSED, {**world.tag, **odd}), "paused")
    equal((await world.detail(one.id)).get("pauseMode"), "full", "pauseMode")
    two = await one.connect(timeout=700)
    after = await world.info(two.sandbox)
    left(after, 700, "seconds left after the resume")
    for name in SAME:
        wanted = getattr(before, name)
        equal((getattr(paused, name), getattr(after, name)), (wanted, wanted), name)
    equal(after.state, SandboxState.RUNNING, "state")
    equal((await world.detail(one.id)).get("pauseMode"), None, "pauseMode of a running one")
    headers = [one.sandbox.connection_config.sandbox_headers for one in (one, two)]
    true(headers[0] == headers[1], "another token")
    equal(two.sandbox.sandbox_domain, one.sandbox.sandbox_domain, "domain")
    equal(await two.output('echo "$NAME"'), "a value\n", "a variable")
    # A running one is only ever prolonged.
    for timeout, wanted in ((30, 700), (900, 900)):
        again = await world.sdk.call(two.sandbox, "connect", timeout=timeout)
        left(await world.info(again), wanted, f"left after another {timeout}")
    await world.end(two)


async def while_paused(world):
    """What a paused sandbox answers, and that none of it wakes it."""
    one, other = await together(world.keeping(), world.create())
    await one.next()
    equal(await world.sdk.call(world.Sandbox, "pause", one.id, strict=True), True, "pause")
    equal(await world.sdk.call(world.Sandbox, "pause", one.id), False, "pause by the class")
    equal(await world.sdk.call(world.Sandbox, "beta_pause", one.id), False, "its old name")
    for name in ("pause", "beta_pause"):
        equal(await world.sdk.call(one.sandbox, name), False, f"{name} by the instance")
    again = await in_thread(raw.api, "POST", f"/sandboxes/{one.id}/pause", {})
    equal((again.status, (again.json() or {}).get("code")), (409, 409), f"answer {again}")
    await world.fails(SandboxNotFoundException, one.sandbox, "set_timeout", 600)
    equal(await world.sdk.call(one.sandbox, "is_running"), False, "is_running")
    await araises(TimeoutException, one.box.run("true"))
    answer = await in_thread(raw.to_port, one.id, PORT, "/next")
    equal(answer.status, 502, f"status of a port of a paused sandbox: {answer}")
    states = SandboxState
    equal(await world.listed(state=[states.PAUSED]), [one.id], "paused ones")
    equal(await world.listed(state=[states.RUNNING]), [other.sandbox_id], "running ones")
    both = [one.id, other.sandbox_id]
    same(await world.listed(state=[states.PAUSED, states.RUNNING]), both, "of both states")
    same(await world.listed(limit=1), both, "without a state, in pages of one")
    equal((await world.info(one.sandbox)).state, SandboxState.PAUSED, "state after all that")
    _, count = await (await one.connect()).next()
    equal(count, 2, "the counter")
    await world.kill(one.sandbox, other)


async def at_once(world):
    """Many pauses are one pause, many connects one resume."""
    one = await world.keeping()
    pid, _ = await one.next()
    paused = await together(*(world.sdk.call(one.sandbox, "pause") for _ in range(4)))
    equal(sorted(paused), [False, False, False, True], "pauses at once")
    handles = await together(*(one.connect(timeout=600) for _ in range(8)))
    answers = await together(*(handle.next() for handle in handles))
    equal({answer[0] for answer in answers}, {pid}, "pids")
    equal(sorted(count for _, count in answers), list(range(2, 10)), "counts")
    resumed = f"/events/sandboxes/{one.id}?types=sandbox.lifecycle.resumed"

    async def told():
        answer = await in_thread(raw.api, "GET", resumed)
        equal(answer.status, 200, f"status of {answer}")
        return answer.json()

    events = await auntil(10, "the resume is among the events", told)
    equal(len(events), 1, "resumes among the events")
    await world.end(one)


async def kill_paused(world):
    """Nothing is left of a paused sandbox that is killed; what was copied of it stays."""
    one = await world.keeping()
    copied = await world.snapshot(one)
    await one.pause()
    equal(await world.sdk.call(one.sandbox, "kill"), True, "kill of a paused one")
    equal(await world.sdk.call(one.sandbox, "kill"), False, "second kill")
    for name in ("get_info", "pause", "create_snapshot", "fork", "connect"):
        await world.fails(SandboxNotFoundException, one.sandbox, name)
    await world.fails(SandboxNotFoundException, world.Sandbox, "connect", one.id, wanted=one.id)
    for name in ("pause", "fork", "create_snapshot"):
        await world.fails(SandboxNotFoundException, world.Sandbox, name, MISSING)
    equal(await world.listed(), [], "still listed")
    answer = await in_thread(raw.to_port, one.id, PORT, "/next")
    equal(answer.status, 502, f"status of a port of it: {answer}")
    equal(await world.listed_snapshots(sandbox_id=one.id), [copied.snapshot_id], "its snapshots")
    two = one.on(await world.create(copied.snapshot_id, request_timeout=120))
    equal((await two.next())[1], 1, "the counter of what was copied")
    await world.end(two)
    await world.delete_snapshot(copied.snapshot_id)


SCENES = (goes_on, ten_times, random_bytes, clock, old_streams, old_watch)
SCENES += (terms, while_paused, at_once, kill_paused)
# Two sandboxes at most, but 200 MB of random bytes through an emulated processor.
DEADLINE_S = 3 * COMMAND_S
