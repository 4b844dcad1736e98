"""Sandboxes that fall asleep by themselves, are woken by who calls them, or come back without their
memory. For both Python SDKs."""

import time

from e2b import (
    GuestUnresponsiveException,
    InvalidArgumentException,
    SandboxException,
    SandboxState,
    ServiceBusyException,
)

import raw
from checks import araises, auntil, equal, true
from guest_clients import in_thread
from snapshots_world import PORT, Keeping, judge_paused_end, left, together

PAUSES = {"on_timeout": "pause"}
WAKES = {"on_timeout": "pause", "auto_resume": True}
DISK_ONLY = {"on_timeout": {"action": "pause", "mode": "filesystem"}}
# From a sandbox's end to the moment the API says that it is paused: its memory is written then.
FALLS_ASLEEP_S = 60
AUTO_RESUMED_S = 300

# Holds the guest's daemon still and itself not, as root of a control group of its own.
HOLD_DAEMON = """
mkdir /sys/fs/cgroup/held && sleep 1 &&
echo 1 > /sys/fs/cgroup/held/cgroup.procs && echo 1 > /sys/fs/cgroup/held/cgroup.freeze
"""


# --- by itself ----------------------------------------------------------------------------------


async def falls_asleep(world):
    """At its end it is paused, with all it was doing."""
    one = await world.keeping(lifecycle=PAUSES)
    info = await world.info(one.sandbox)
    equal(info.lifecycle, {"on_timeout": "pause", "auto_resume": False}, "lifecycle")
    pid, _ = await one.next()
    await world.sdk.call(one.sandbox, "set_timeout", 5)
    end = time.time() + 5
    await world.until_state(one.id, "paused", 5 + FALLS_ASLEEP_S)
    true(time.time() > end - 2, "paused before its end")
    judge_paused_end(await world.info(one.sandbox), (end, time.time()))
    equal(await world.listed(state=[SandboxState.PAUSED]), [one.id], "paused ones")
    equal(await world.sdk.call(one.sandbox, "is_running"), False, "is_running")
    answer = await in_thread(raw.to_port, one.id, PORT, "/next")
    equal(answer.status, 502, f"traffic does not wake it: {answer}")
    equal(await one.state(), "paused", "state after traffic")
    two = await one.connect(timeout=400)
    left(await world.info(two.sandbox), 400, "seconds left after the resume")
    await two.expect_next(pid, 2)
    equal((await world.info(two.sandbox)).lifecycle, info.lifecycle, "lifecycle after it")
    await world.end(two)


async def created_short(world):
    """The time given at its creation counts too, and a second sleep is like the first."""
    made = await world.create("base", timeout=5, lifecycle=PAUSES)
    one = Keeping(world, made)
    await world.until_state(one.id, "paused", 5 + FALLS_ASLEEP_S)
    two = await one.connect(timeout=5)
    await two.box.files.write("note", "written between two sleeps")
    await world.until_state(one.id, "paused", 5 + FALLS_ASLEEP_S)
    three = await two.connect()
    equal(await three.box.files.read("note"), "written between two sleeps", "the file")
    await world.end(three)


async def woken(world):
    """The first request to a port wakes it, and is answered by the server that was asleep."""
    one = await world.keeping(lifecycle=WAKES, timeout=120)
    pid, _ = await one.next()
    lifecycle = {"on_timeout": "pause", "auto_resume": True}
    equal((await world.info(one.sandbox)).lifecycle, lifecycle, "lifecycle")
    await one.pause()
    equal(await one.state(), "paused", "state")
    # Ten callers, one resume: each is answered, none is counted twice.
    answers = await together(*(one.next() for _ in range(10)))
    equal(sorted(answers), [(pid, count) for count in range(2, 12)], "pids and counts")
    info = await world.info(one.sandbox)
    equal(info.state, SandboxState.RUNNING, "state after the request")
    left(info, AUTO_RESUMED_S, "seconds left after traffic woke it", slack=30)
    await one.pause()
    # The guest's own daemon is traffic too, for who has the token.
    refused = await in_thread(
        raw.to_port, one.id, raw.ENVD_PORT, "/metrics", headers={"X-Access-Token": "0" * 64}
    )
    true(refused.status >= 400, f"with a wrong token: {refused}")
    equal(await one.state(), "paused", "state after a request with a wrong token")
    equal(await one.output("echo woken"), "woken\n", "a command to a paused sandbox")
    await one.expect_next(pid, 12)
    await world.end(one)


async def refused(world):
    """Combinations that could not be kept are refused before anything is created."""
    for lifecycle in (
        {"on_timeout": "kill", "auto_resume": True},
        {"on_timeout": {"action": "pause", "mode": "filesystem"}, "auto_resume": True},
        {"on_timeout": "sleep"},
    ):
        await araises(InvalidArgumentException, world.create("base", lifecycle=lifecycle))
    for fields in (
        {"autoResume": {"enabled": True}},
        {"autoPauseMemory": False},
        {"autoPause": True, "autoPauseMemory": False, "autoResume": {"enabled": True}},
        {"autoPause": "yes"},
    ):
        body = {"templateID": "base", "metadata": world.tag, **fields}
        answer = await in_thread(raw.api, "POST", "/v2/sandboxes", body)
        equal(answer.status, 400, f"status of {fields}: {answer}")
        true("auto" in answer.message, f"{answer} names no field of {fields}")
    one = await world.create()
    await world.fails(InvalidArgumentException, one, "pause", mode="half")
    await world.fails(InvalidArgumentException, one, "pause", mode="full", keep_memory=True)
    for path, body in (("pause", {"memory": "no"}), ("connect", {"timeout": 0})):
        answer = await in_thread(raw.api, "POST", f"/sandboxes/{one.sandbox_id}/{path}", body)
        equal(answer.status, 400, f"status of {path} with {body}: {answer}")
    equal(await world.listed(), [one.sandbox_id], "created nevertheless")
    equal((await world.info(one)).state, SandboxState.RUNNING, "state")
    await world.kill(one)


# --- without memory -----------------------------------------------------------------------------


async def judge_booted(one, before):
    """The disk is as it was; nothing that was in memory is."""
    true(await one.boot_id() != before, "the same boot id: it did not boot")
    equal(await one.box.files.read("kept.txt"), "on the disk", "a file on the disk")
    equal(await one.box.files.exists("/dev/shm/note"), False, "a file of a tmpfs")
    names = (await one.output("ps -e -o comm=")).split()
    true(not any(name.startswith("python") for name in names), f"it still runs: {names}")
    answer = await in_thread(raw.to_port, one.id, PORT, "/next")
    equal(answer.status, 502, f"its server still answers: {answer}")
    identity = await one.identify()
    equal(identity.sandbox_id, one.id, "the id the guest knows")
    identity.judge_clock()


async def prepared(world, **options):
    """A sandbox with something in memory and something on the disk, and its boot id."""
    one = await world.keeping(**options)
    await one.box.files.write("kept.txt", "on the disk")
    await one.box.files.write("/dev/shm/note", "in memory")
    return one, await one.boot_id()


async def disk_only(world):
    """Only the disk is kept, written out to its last byte; the sandbox boots when it comes back."""
    one, boot = await prepared(world, envs={"NAME": "a value"})
    await one.pause(mode="filesystem")
    equal(await one.state(), "paused", "state")

    async def mode():
        return (await world.detail(one.id)).get("pauseMode")

    equal(await auntil(30, "pauseMode is told", mode), "filesystem", "pauseMode")
    two = await one.connect()
    await judge_booted(two, boot)
    equal(await two.output('echo "$NAME"'), "a value\n", "a variable given at its creation")
    boot = await two.boot_id()
    await two.pause(keep_memory=False)  # the same by its older name
    three = await two.connect(on_resume="reboot")  # which it would do anyway
    true(await three.boot_id() != boot, "the second time it did not boot")
    equal(await three.box.files.read("kept.txt"), "on the disk", "a file, after two boots")
    await world.end(three)


async def reboot(world):
    """A full pause comes back without its memory when asked to."""
    one, boot = await prepared(world)
    await one.output("sync", user="root")  # as after a crash, only what was written out is there
    await one.pause()
    two = await one.connect(on_resume="reboot")
    await judge_booted(two, boot)
    equal(await two.state(), "running", "state")
    # To one that runs, the word says nothing.
    boot = await two.boot_id()
    await two.connect(on_resume="reboot")
    equal(await two.boot_id(), boot, "boot id after a second connect")
    await world.end(two)


async def falls_asleep_disk_only(world):
    one, boot = await prepared(world, lifecycle=DISK_ONLY)
    await world.sdk.call(one.sandbox, "set_timeout", 5)
    await world.until_state(one.id, "paused", 5 + FALLS_ASLEEP_S)

    async def mode():
        return (await world.detail(one.id)).get("pauseMode")

    equal(await auntil(30, "pauseMode is told", mode), "filesystem", "pauseMode")
    answer = await in_thread(raw.to_port, one.id, PORT, "/next")
    equal(answer.status, 502, f"traffic does not wake it: {answer}")
    await judge_booted(await one.connect(), boot)
    await world.end(one)


async def unresponsive(world):
    """A guest that does not answer: refused when that matters, else kept, marked, and booted anew."""
    one = Keeping(world, await world.create("base", request_timeout=120))
    await one.box.files.write("kept.txt", "on the disk")
    await one.output("sync", user="root")
    _held = await one.box.start(HOLD_DAEMON, user="root", listen=False, timeout=0)

    async def silent():
        answer = await in_thread(raw.to_port, one.id, raw.ENVD_PORT, "/health", timeout_s=2)
        return answer.status != 204

    async def held_still():
        try:
            return await silent()
        except OSError:  # no answer in time, which is what a daemon held still gives
            return True

    await auntil(60, "the daemon is held still", held_still)
    for options in ({"strict": True}, {"mode": "filesystem"}):
        await world.fails(ServiceBusyException, one.sandbox, "pause", retries=0, **options)
        equal(await one.state(), "running", f"state after a pause with {options} was refused")
    await one.pause()
    info = await world.info(one.sandbox)
    equal((info.state.value, info.envd_unresponsive_at_pause), ("paused", True), "what is told")
    await world.fails(GuestUnresponsiveException, world.Sandbox, "connect", one.id)
    equal(await one.state(), "paused", "state after the resume was refused")
    two = await one.connect(on_resume="reboot")
    equal(await two.box.files.read("kept.txt"), "on the disk", "a file on the disk")
    equal((await world.info(two.sandbox)).envd_unresponsive_at_pause, None, "the mark afterwards")
    await world.end(two)


async def resumed_by_old_route(world):
    """`POST /sandboxes/{id}/resume`, which released SDKs of the first generation call."""
    one = await world.keeping()
    pid, _ = await one.next()
    running = await in_thread(raw.api, "POST", f"/sandboxes/{one.id}/resume", {"timeout": 60})
    equal(running.status, 409, f"status for one that runs: {running}")
    await one.pause()
    body = {"timeout": 400, "autoPause": True}
    resumed = await in_thread(raw.api, "POST", f"/sandboxes/{one.id}/resume", body)
    equal((resumed.status, resumed.json()["sandboxID"]), (201, one.id), "the answer")
    await one.expect_next(pid, 2)
    info = await world.info(one.sandbox)
    left(info, 400, "seconds left")
    equal(info.lifecycle["on_timeout"], "pause", "at its end")
    for version, wanted in (("", 200), ("/v2", 200)):
        path = f"{version}/sandboxes/{one.id}/connect"
        answer = await in_thread(raw.api, "POST", path, {"timeout": 60})
        equal(answer.status, wanted, f"status of {path} for one that runs")
    await one.pause()
    answer = await in_thread(raw.api, "POST", f"/sandboxes/{one.id}/connect", {"timeout": 60})
    equal(answer.status, 201, "status of a connect that resumes")
    missing = await in_thread(raw.api, "POST", f"/sandboxes/{'i' + '0' * 20}/resume", {})
    equal(missing.status, 404, f"status for what is not there: {missing}")
    await araises(SandboxException, one.connect(timeout=0))
    await world.end(one)


SCENES = (falls_asleep, created_short, woken, refused, disk_only, reboot)
SCENES += (falls_asleep_disk_only, unresponsive, resumed_by_old_route)
