"""What the pause, snapshot and fork scenarios share: sandboxes with a program whose state there is no
other copy of, and ways to ask for it. For both Python SDKs."""

import asyncio
import time
from datetime import datetime, timezone
from pathlib import Path

import raw
import scenes
from checks import auntil, equal, true
from control_world import World, near
from guest_clients import COMMAND_S, AsyncBox, SyncBox, in_thread

KEEPER = Path(__file__).resolve().parent.parent / "guest" / "keeper.py"
PORT = 8090
HELD = "/home/user/held.txt"
BOOT_ID = "cat /proc/sys/kernel/random/boot_id"
MISSING = "i" + "0" * 20
# For a stream that ended with its run; longer than any probe that finds out.
CUT_S = 45


class Plain:
    """A sandbox as it is created. Commands that set a scene run in the user's home."""

    scale = None
    base = "/home/user"


class Unrecorded:
    """Which methods of a guest are called, the guest suites count."""

    def watch(self, value, only=None):
        pass


class Keeping:
    """A sandbox whose keeper runs: `sandbox` is the SDK's handle, `box` has the guest's verbs."""

    def __init__(self, world, sandbox):
        self.world, self.sandbox, self.id = world, sandbox, sandbox.sandbox_id
        self.box = world.box(sandbox)

    async def ask(self, path):
        answer = await in_thread(raw.to_port, self.id, PORT, path)
        equal(answer.status, 200, f"status of the server in {self.id}, asked for {path}: {answer}")
        return answer.body.decode()

    async def next(self):
        """(pid, count) after adding one."""
        pid, count = (await self.ask("/next")).split()
        return int(pid), int(count)

    async def expect_next(self, pid, count):
        equal(await self.next(), (pid, count), f"pid and counter in {self.id}")

    async def chance(self):
        return (await self.ask("/chance")).split()

    async def output(self, command, **options):
        return (await self.box.run(command, **options)).stdout

    async def held(self):
        return await self.box.files.read(HELD)

    async def boot_id(self):
        return (await self.output(BOOT_ID)).strip()

    async def identify(self):
        asked_at = scenes.now()
        line = await self.output(scenes.IDENTITY)
        return scenes.Identity(line, asked_at, scenes.now())

    def on(self, sandbox):
        """The same machine's successor: a fork, or the handle of a resume."""
        return Keeping(self.world, sandbox)

    async def pause(self, **options):
        equal(await self.world.sdk.call(self.sandbox, "pause", **options), True, "pause")

    async def connect(self, **options):
        options = {"timeout": 600, **options}
        connect = self.world.sdk.call(self.world.Sandbox, "connect", self.id, **options)
        return self.on(await connect)

    async def state(self):
        return str((await self.world.info(self.sandbox)).state.value)


class SnapshotWorld(World):
    """The control plane's verbs, and sandboxes that keep something. `snapshots` is what was created
    by all scenarios of the run and not deleted yet."""

    def __init__(self, sdk, suite, snapshots):
        super().__init__(sdk, suite)
        self.snapshots = snapshots

    def box(self, sandbox):
        kind = SyncBox if self.sdk.name == "sync" else AsyncBox
        return kind(Plain(), sandbox, Unrecorded())

    async def keeping(self, **options):
        """A new sandbox with its keeper, which has counted nothing yet."""
        options = {"request_timeout": 120, **options}
        keeping = Keeping(self, await self.create("base", **options))
        await keeping.box.files.write("keeper.py", KEEPER.read_text())
        started = await keeping.box.start(
            f"exec python3 keeper.py {PORT} {HELD}", listen=False, cwd="/home/user", timeout=0
        )
        await started.disconnect()

        async def answers():
            answer = await in_thread(raw.to_port, keeping.id, PORT, "/count")
            return answer.status == 200

        await auntil(COMMAND_S, "the keeper answers", answers)
        return keeping

    async def fork(self, source, count=1, **options):
        """`count` forks of what keeps, each of which must have started."""
        options = {"timeout": 600, "request_timeout": 120, **options}
        made = await self.sdk.call(source.sandbox, "fork", count=count, **options)
        equal(len(made), count, "results")
        failed = [one for one in made if isinstance(one, Exception)]
        equal(failed, [], "forks that did not start")
        ids = {one.sandbox_id for one in made}
        true(len(ids) == count and source.id not in ids, f"ids {ids} of forks of {source.id}")
        return [source.on(one) for one in made]

    async def snapshot(self, source, **options):
        options = {"request_timeout": 120, **options}
        made = await self.sdk.call(source.sandbox, "create_snapshot", **options)
        true(made.snapshot_id, f"no id: {made}")
        self.snapshots.append(made.snapshot_id)
        return made

    async def delete_snapshot(self, snapshot_id):
        gone = await self.sdk.call(self.Sandbox, "delete_snapshot", snapshot_id)
        equal(gone, True, f"deleting {snapshot_id}")
        self.snapshots.remove(snapshot_id)

    async def listed_snapshots(self, target=None, limit=None, **query):
        """The ids on all pages, of the class or of a sandbox's handle."""
        target = target or self.Sandbox
        pages = await self.sdk.call(target, "list_snapshots", limit=limit, **query)
        found, counts = [], []
        while pages.has_next:
            page = await self.sdk.call(pages, "next_items")
            counts.append(len(page))
            found += [entry.snapshot_id for entry in page]
        true(all(count <= (limit or 100) for count in counts), f"pages of {counts}, limit {limit}")
        return found

    async def detail(self, sandbox_id):
        """What the API says of a sandbox, with what the SDK does not show."""
        answer = await in_thread(raw.api, "GET", f"/sandboxes/{sandbox_id}")
        equal(answer.status, 200, f"status of {answer}")
        return answer.json()

    async def until_state(self, sandbox_id, wanted, deadline_s):
        async def reached():
            return (await self.detail(sandbox_id))["state"] == wanted

        await auntil(deadline_s, f"{sandbox_id} is {wanted}", reached)

    async def end(self, *keepings):
        await self.kill(*(one.sandbox for one in keepings))


async def together(*coroutines):
    """Their results in order; they run at the same time."""
    return await asyncio.gather(*coroutines)


async def asleep_for(seconds):
    """That time passes while a sandbox is paused is what some scenarios are about."""
    await asyncio.sleep(seconds)


def judge_paused_end(info, paused_between):
    """The end of a paused sandbox is when it was paused."""
    earliest, latest = paused_between
    found = info.end_at.timestamp()
    true(
        earliest - 2 <= found <= latest + 2,
        f"a paused sandbox ends at {info.end_at}, paused {age(earliest)} to {age(latest)} s ago",
    )


def age(moment):
    return f"{time.time() - moment:.1f}"


def left(info, wanted, what, slack=5):
    seconds = (info.end_at - datetime.now(timezone.utc)).total_seconds()
    near(seconds, wanted, what, slack=slack)
