"""Machines that die while they are kept: `kill -9` of a machine's process at many moments of a pause,
a copy and a resume, and guests that turn themselves off. Whatever the moment, a sandbox is paused with
all it had, or it is gone and nothing of it is left. For the Python SDK, on the server's machine as root.
"""

import asyncio
import os
import signal
import time

from e2b import SandboxException, SandboxNotFoundException

from checks import araises, auntil, equal, true
from fork_bench import machines
from guest_clients import in_thread

GONE_S = 30
APPEARS_S = 20
# From the moment something is asked for to the machine's death. A pause of such a sandbox takes some
# 100 ms on an idle host and more beside others; a resume 150 ms.
MOMENTS_S = (0, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32)
# What `reboot -f` does; a machine that would start anew ends.
REBOOT = "python3 -c 'import ctypes; ctypes.CDLL(None).reboot(0x1234567)'"


def machine_of(sandbox_id):
    found = [pid for pid, line in machines().items() if sandbox_id in line]
    true(len(found) < 2, f"machines of {sandbox_id}: {found}")
    return found[0] if found else None


def end(pid):
    """As the kernel would, when memory is short; it may have ended meanwhile."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


async def outcome(call):
    """What a call answered, or the exception it raised."""
    try:
        return await call
    except Exception as error:
        return error


async def gone(world, one):
    async def is_gone():
        found = await outcome(world.info(one.sandbox))
        return isinstance(found, SandboxNotFoundException)

    await auntil(GONE_S, f"{one.id} is gone", is_gone)
    equal(machine_of(one.id), None, f"machine of {one.id}")


class Origin:
    """A snapshot of a sandbox that counts: each copy costs a fraction of a second."""

    def __init__(self, world, snapshot_id, pid):
        self.world, self.snapshot_id, self.pid = world, snapshot_id, pid
        self.first = None

    @classmethod
    async def make(cls, world):
        first = await world.keeping()
        pid, _ = await first.next()
        made = await world.snapshot(first)
        origin = cls(world, made.snapshot_id, pid)
        origin.first = first
        return origin

    async def copy(self):
        made = await self.world.create(self.snapshot_id, request_timeout=120)
        one = self.first.on(made)
        await one.expect_next(self.pid, 2)
        return one

    async def end(self):
        await self.world.end(self.first)
        await self.world.delete_snapshot(self.snapshot_id)


async def goes_on(world, origin, one):
    """It is paused with all it had, and comes back."""
    equal(await one.state(), "paused", f"state of {one.id}")
    equal(machine_of(one.id), None, f"machine of {one.id}")
    back = await one.connect()
    await back.expect_next(origin.pid, 3)
    await world.end(back)


# --- the machine's process ------------------------------------------------------------------------


async def running(world):
    """It is gone, and is not listed."""
    one = await world.keeping()
    end(machine_of(one.id))
    await gone(world, one)
    await araises(SandboxNotFoundException, one.connect())
    equal(await world.listed(), [], "sandboxes left")


async def pausing(world):
    """Paused with all it had, or gone."""
    origin = await Origin.make(world)
    paused = 0
    for moment in MOMENTS_S:
        one = await origin.copy()
        pid = machine_of(one.id)
        call = asyncio.create_task(outcome(world.sdk.call(one.sandbox, "pause")))
        await asyncio.sleep(moment)
        end(pid)
        if isinstance(said := await call, Exception):
            await gone(world, one)
            continue
        equal(said, True, f"pause, killed after {moment} s")
        await goes_on(world, origin, one)
        paused += 1
    await origin.end()
    return f"{paused} of {len(MOMENTS_S)} were paused before their machine was killed"


async def resuming(world):
    """Paused as before, so that the SDK's next try brings it back; or, when it ran already, gone as
    any that is killed while it runs."""
    origin = await Origin.make(world)
    came_back = 0
    for moment in MOMENTS_S:
        one = await origin.copy()
        await one.pause()
        call = asyncio.create_task(outcome(one.connect()))
        deadline = time.monotonic() + APPEARS_S
        while (pid := await in_thread(machine_of, one.id)) is None:
            true(time.monotonic() < deadline and not call.done(), "no machine, and no answer")
        await asyncio.sleep(moment)
        end(pid)
        back = await call
        if isinstance(back, Exception):
            await goes_on(world, origin, one)
            came_back += 1
        elif await in_thread(machine_of, one.id) in (pid, None):
            await gone(world, one)
        else:
            await back.expect_next(origin.pid, 3)
            await world.end(back)
            came_back += 1
    await origin.end()
    return f"{came_back} of {len(MOMENTS_S)} machines were killed before they ran, and came back"


async def copying(world):
    """The forks have all it had or do not exist; it is gone."""
    origin = await Origin.make(world)
    made = 0
    for moment in MOMENTS_S:
        one = await origin.copy()
        pid = machine_of(one.id)
        call = asyncio.create_task(outcome(world.sdk.call(one.sandbox, "fork", timeout=600)))
        await asyncio.sleep(moment)
        end(pid)
        said = await call
        forks = [] if isinstance(said, Exception) else said
        for fork in [one.on(fork) for fork in forks if not isinstance(fork, Exception)]:
            await fork.expect_next(origin.pid, 3)
            await world.end(fork)
            made += 1
        await gone(world, one)
    await origin.end()
    return f"{made} of {len(MOMENTS_S)} were forked before their machine was killed"


# --- the guest ------------------------------------------------------------------------------------


async def daemon(world):
    """A guest's own kernel keeps its daemon from being killed; all goes on, also over a pause."""
    one = await world.keeping()
    pid, _ = await one.next()
    await one.output("kill -9 1; kill -ABRT 1; kill -SEGV 1", user="root")
    await one.expect_next(pid, 2)
    await one.pause()
    back = await one.connect()
    await back.expect_next(pid, 3)
    await world.end(back)


async def rebooting(world):
    """A guest that turns its machine off is gone, or was paused before that."""
    origin = await Origin.make(world)
    one = await origin.copy()
    await araises(SandboxException, one.output(REBOOT, user="root"))
    await gone(world, one)
    paused = 0
    for moment in (0, 0.05, 0.2):
        one = await origin.copy()
        await one.output(f"(sleep {moment}; {REBOOT}) > /dev/null 2>&1 &", user="root")
        said = await outcome(world.sdk.call(one.sandbox, "pause"))
        if not isinstance(said, Exception):
            paused += 1
            equal(await one.state(), "paused", "state")
            # It goes on to do what it was about to.
            await outcome(one.connect())
        await gone(world, one)
    await origin.end()
    return f"{paused} of 3 were paused before they turned themselves off"


SCENES = [running, pausing, resuming, copying, daemon, rebooting]
