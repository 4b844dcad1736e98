"""One running sandbox becomes several: by a snapshot that is kept, or by a fork. For both Python SDKs."""

import uuid

from e2b import InvalidArgumentException, SandboxException, SandboxNotFoundException, SandboxState

import raw
from checks import equal, true
from control_world import same
from guest_clients import in_thread
from snapshots_scenes import TICKER, ticks
from snapshots_world import BOOT_ID, MISSING, Keeping, left, together


class Streaming:
    """A command of the source that prints all the time: a copy must not cut it."""

    def __init__(self, source):
        self._source = source

    async def __aenter__(self):
        self._ticker = await self._source.box.start(TICKER, timeout=0)
        await self._ticker.heard("tick-2\n")
        return self

    async def goes_on(self):
        """The same stream says more, and has missed nothing."""
        heard = max(ticks(self._ticker.out))
        await self._ticker.heard(f"tick-{heard + 3}\n")
        found = ticks(self._ticker.out)
        equal(found, list(range(1, len(found) + 1)), "ticks on the stream of the source")

    async def __aexit__(self, kind, error, trace):
        if error is None:
            await self.goes_on()
            await self._ticker.kill()


async def judge_diverged(source, copies, pid, count):
    """Each has the source's state and from there on its own; `count` is what the source had."""
    for number, copy in enumerate(copies, 1):
        for step in range(1, number + 1):
            await copy.expect_next(pid, count + step)
        await copy.ask(f"/hold/of-copy-{number}")
        await copy.ask("/flush")
        await copy.box.files.write("own.txt", f"copy {number}")
    await source.expect_next(pid, count + 1)
    for number, copy in enumerate(copies, 1):
        equal(await copy.held(), f"common\nof-copy-{number}\n", "the open file of a copy")
        equal(await copy.box.files.read("own.txt"), f"copy {number}", "a file of a copy")
    equal(await source.box.files.exists("own.txt"), False, "a copy's file is in the source")
    equal(await source.held(), "", "the open file of the source")


async def judge_chance(machines):
    """No two draw the same: of the kernel, of a generator seeded by it after the copy, of UUIDs."""
    drawn = await together(*(machine.chance() for machine in machines))
    for what, column in zip(("the kernel's", "seeded", "UUIDs"), zip(*drawn), strict=True):
        equal(len(set(column)), len(machines), f"distinct random numbers, {what}: {column}")
    answers = await together(*(machine.identify() for machine in machines))
    equal([one.sandbox_id for one in answers], [one.id for one in machines], "ids the guests know")
    equal(len({one.random for one in answers}), len(machines), "distinct bytes of new processes")
    for answer in answers:
        answer.judge_clock()


async def ready_to_copy(world, **options):
    """A source with state, its keeper's pid and its count."""
    source = await world.keeping(**options)
    await source.next()
    pid, count = await source.next()
    await source.ask("/hold/common")
    return source, pid, count


# --- snapshots ----------------------------------------------------------------------------------


async def snapshot(world):
    """Three sandboxes of one snapshot, and the source never noticed."""
    source, pid, count = await ready_to_copy(world)
    async with Streaming(source):
        before = await world.info(source.sandbox)
        made = await world.snapshot(source)
        equal((await world.info(source.sandbox)).end_at, before.end_at, "end of the source")
    created = (world.create(made.snapshot_id, request_timeout=120) for _ in range(3))
    copies = [source.on(one) for one in await together(*created)]
    ids = [one.id for one in (source, *copies)]
    equal(len(set(ids)), 4, "ids")
    await judge_diverged(source, copies, pid, count)
    await judge_chance([source, *copies])
    same(await world.listed(), ids, "all of them")
    await world.end(*copies)
    # It outlives the sandbox it was taken from, and what came of it.
    await world.end(source)
    late = source.on(await world.create(made.snapshot_id, request_timeout=120))
    await late.expect_next(pid, count + 1)
    await world.end(late)
    await world.delete_snapshot(made.snapshot_id)


async def names_and_lists(world):
    """Named ones are found and started by name; the newest of a name counts."""
    name = f"suite-{uuid.uuid4().hex[:12]}"
    source, other = await together(world.keeping(), world.create())
    plain = await world.snapshot(source)
    await source.next()
    named = await world.snapshot(source, name=name)
    true(any(name in one for one in named.names), f"{name} is not among {named.names}")
    of_other = await world.snapshot(Keeping(world, other), name=f"{name}-other:v1")
    mine = [plain.snapshot_id, named.snapshot_id]
    same(await world.listed_snapshots(sandbox_id=source.id), mine, "of the source")
    same(await world.listed_snapshots(source.sandbox), mine, "of the source's handle")
    same(await world.listed_snapshots(source.sandbox, limit=1), mine, "in pages of one")
    equal(await world.listed_snapshots(name=name), [named.snapshot_id], "by the name")
    by_id = await world.listed_snapshots(name=plain.snapshot_id)
    equal(by_id, [plain.snapshot_id], "by the id")
    equal(await world.listed_snapshots(other, name=name), [], "of another with that name")
    tagged = await world.listed_snapshots(name=f"{name}-other:v1")
    equal(tagged, [of_other.snapshot_id], "by a name with its tag")
    equal(await world.listed_snapshots(name=f"{name}-nobody"), [], "by a name nobody has")
    equal(await world.listed_snapshots(sandbox_id=MISSING), [], "of nobody")
    everything = await world.listed_snapshots(limit=2)
    missed = {*mine, of_other.snapshot_id} - set(everything)
    true(not missed, f"{missed} are not in {everything}")
    equal(len(everything), len(set(everything)), "repetitions on the pages")
    await source.next()
    newer = await world.snapshot(source, name=name)
    copy = source.on(await world.create(name, request_timeout=120))
    equal((await copy.next())[1], 3, "the counter of the newest of a name")
    await world.kill(source.sandbox, other, copy.sandbox)
    taken = {one.snapshot_id for one in (plain, named, of_other, newer)}
    for one in taken:  # two of one name may be one snapshot by now
        await world.sdk.call(world.Sandbox, "delete_snapshot", one)
    world.snapshots[:] = [one for one in world.snapshots if one not in taken]
    equal(await world.listed_snapshots(sandbox_id=source.id), [], "after all were deleted")


async def deleted(world):
    """What was deleted is not started any more, and says so."""
    source = await world.keeping()
    made = await world.snapshot(source)
    await world.delete_snapshot(made.snapshot_id)
    again = await world.sdk.call(world.Sandbox, "delete_snapshot", made.snapshot_id)
    equal(again, False, "the second time")
    never = await world.sdk.call(world.Sandbox, "delete_snapshot", "no-such-snapshot")
    equal(never, False, "what never was")
    call = (SandboxException, world.Sandbox, "create", made.snapshot_id)
    error = await world.fails(*call, metadata=world.tag, wanted="not found")
    equal(error.status_code, 404, f"status of {error!r}")
    await world.fails(SandboxNotFoundException, world.Sandbox, "create_snapshot", MISSING)
    for name in ("Not A Name!", "x" * 200):
        await world.fails(SandboxException, source.sandbox, "create_snapshot", name=name)
    equal(await world.listed_snapshots(source.sandbox), [], "snapshots")
    equal(await world.listed(), [source.id], "sandboxes")
    await world.end(source)


async def disk_snapshot(world):
    """Of the disk alone: what is created from it boots, and the source goes on with its memory."""
    source, pid, count = await ready_to_copy(world)
    await source.box.files.write("kept.txt", "on the disk, not synced")
    await source.box.files.write("/dev/shm/note", "in memory")
    async with Streaming(source):
        made = await world.snapshot(source, mode="filesystem")
    await source.expect_next(pid, count + 1)
    copy = source.on(await world.create(made.snapshot_id, request_timeout=120))
    equal(await copy.box.files.read("kept.txt"), "on the disk, not synced", "a file on the disk")
    equal(await copy.box.files.exists("/dev/shm/note"), False, "a file of a tmpfs")
    boots = [await one.output(BOOT_ID) for one in (source, copy)]
    true(boots[0] != boots[1], "the same boot id: it did not boot")
    names = (await copy.output("ps -e -o comm=")).split()
    true(not any(name.startswith("python") for name in names), f"it runs: {names}")
    identity = await copy.identify()
    equal(identity.sandbox_id, copy.id, "the id the guest knows")
    identity.judge_clock()
    await world.end(source, copy)
    await world.delete_snapshot(made.snapshot_id)


# --- forks --------------------------------------------------------------------------------------


async def fork_four(world):
    """Each fork starts where the source was, with its terms and an id of its own."""
    odd = {"odd": "a value"}
    source, pid, count = await ready_to_copy(world, metadata=odd, envs={"NAME": "given"})
    before = await world.info(source.sandbox)
    async with Streaming(source):
        forks = await world.fork(source, count=4, timeout=300)
    equal((await world.info(source.sandbox)).end_at, before.end_at, "end of the source")
    infos = await together(*(world.info(one.sandbox) for one in forks))
    for info in infos:
        equal((info.state, info.metadata), (SandboxState.RUNNING, {**world.tag, **odd}), "a fork")
        left(info, 300, "seconds left of a fork", slack=15)
        equal((info.cpu_count, info.memory_mb), (before.cpu_count, before.memory_mb), "its size")
    headers = {one.sandbox.connection_config.sandbox_headers["X-Access-Token"] for one in forks}
    equal(len(headers), 4, "tokens of their own")
    await judge_diverged(source, forks, pid, count)
    await judge_chance([source, *forks])
    equal(await forks[0].output('echo "$NAME"'), "given\n", "a variable in a fork")
    same(await world.listed(), [one.id for one in (source, *forks)], "all of them")
    equal(await world.listed_snapshots(sandbox_id=source.id), [], "a fork leaves no snapshot")
    # The source is not needed any more, and one of them more or less is nothing to the others.
    await world.end(source, forks[0])
    await forks[1].pause()
    await (await forks[1].connect()).expect_next(pid, count + 3)
    await forks[3].expect_next(pid, count + 5)
    await world.end(*forks[1:])


async def fork_of_fork(world):
    """Forks fork, and a snapshot of what came of that has everything that happened on the way."""
    source, pid, count = await ready_to_copy(world)
    (first,) = await world.fork(source)
    await first.expect_next(pid, count + 1)
    await first.box.files.write("first.txt", "by the first")
    by_class = await world.sdk.call(world.Sandbox, "fork", first.id, request_timeout=120)
    equal(len(by_class), 1, "forks when no count is given")
    true(not isinstance(by_class[0], Exception), f"it did not start: {by_class}")
    second = first.on(by_class[0])
    left(await world.info(second.sandbox), 15, "seconds left when none are given", slack=8)
    await world.sdk.call(second.sandbox, "set_timeout", 600)
    await second.expect_next(pid, count + 2)
    await second.box.files.write("second.txt", "by the second")
    made = await world.sdk.call(world.Sandbox, "create_snapshot", second.id, request_timeout=120)
    world.snapshots.append(made.snapshot_id)
    await world.end(source, first, second)
    last = source.on(await world.create(made.snapshot_id, request_timeout=120))
    await last.expect_next(pid, count + 3)
    equal(await last.output("cat first.txt second.txt"), "by the firstby the second", "files")
    await last.ask("/flush")
    equal(await last.held(), "common\n", "what the source had not flushed")
    await last.pause()
    resumed = await last.connect()
    await resumed.expect_next(pid, count + 4)
    await world.end(resumed)
    await world.delete_snapshot(made.snapshot_id)


async def fork_refused(world):
    source = await world.keeping()
    for count in (0, 21, -1):
        call = (InvalidArgumentException, source.sandbox, "fork")
        await world.fails(*call, count=count)
    for body in ({"count": 101}, {"count": 0}, {"timeout": 0}, {"count": "two"}):
        answer = await in_thread(raw.api, "POST", f"/sandboxes/{source.id}/fork", body)
        equal(answer.status, 400, f"status of a fork with {body}: {answer}")
    await source.pause()
    text = f"Sandbox '{source.id}' is paused and cannot be forked; resume it first"
    error = await world.fails(SandboxException, source.sandbox, "fork", wanted=text)
    equal(error.status_code, 409, f"status of {error!r}")
    equal(await source.state(), "paused", "state after a refused fork")
    await world.fails(SandboxNotFoundException, world.Sandbox, "fork", MISSING, count=2)
    equal(await world.listed(), [source.id], "forked nevertheless")
    await world.end(source)


SCENES = (snapshot, names_and_lists, deleted, disk_snapshot)
SCENES += (fork_four, fork_of_fork, fork_refused)
