"""Runs the pause, snapshot and fork scenarios with one of the two Python SDKs. See ../README.md."""

import asyncio
import urllib.parse

import raw
import snapshots_copies
import snapshots_lifecycle
import snapshots_scenes
from checks import Suite, equal
from control_world import SNAPSHOTS, Sdk
from guest_clients import in_thread
from snapshots_world import SnapshotWorld

SCENES = snapshots_scenes.SCENES + snapshots_copies.SCENES + snapshots_lifecycle.SCENES


class Part:
    """A scenario's own tag beside the suite's: what one that failed leaves is in nobody's way."""

    def __init__(self, suite, scene):
        self.metadata = {**suite.metadata, "scene": scene.__name__}


async def scenarios(suite, sdk, scenes, only):
    """Those of `scenes` whose names begin with one of `only`, or all."""
    snapshots = []
    try:
        for scene in scenes:
            if only and not any(scene.__name__.startswith(one) for one in only):
                continue
            world = SnapshotWorld(sdk, Part(suite, scene), snapshots)
            deadline_s = snapshots_scenes.DEADLINE_S
            said = await suite.acheck(scene.__name__, scene, world, deadline_s=deadline_s)
            if isinstance(said, str):
                suite.remark(f"{scene.__name__}: {said}")
            await leave_nothing_running(world)
    finally:
        # Snapshots carry no metadata, so that the suite's own clean-up cannot find them.
        for snapshot_id in list(snapshots):
            path = f"/templates/{urllib.parse.quote(snapshot_id, safe='')}"
            await in_thread(raw.api, "DELETE", path)


async def leave_nothing_running(world):
    """What a scenario that failed left would cost the next ones a processor."""
    left = await world.listed()
    for sandbox_id in left:
        await in_thread(raw.api, "DELETE", f"/sandboxes/{sandbox_id}")


async def every_method_called(sdk):
    wanted = {(form, name) for form, name in sdk.members(SNAPSHOTS) if name in SNAPSHOTS}
    equal(len({name for _, name in wanted}), len(SNAPSHOTS), "methods the SDK still has")
    equal(sorted(" ".join(one) for one in wanted - sdk.called), [], "never called")


async def run(suite, sdk, only):
    await scenarios(suite, sdk, SCENES, only)
    if not only:
        await suite.acheck("every_method_called", every_method_called, sdk)


def main(name, sandbox_class, only):
    with Suite(f"snapshots.{name}") as suite:
        asyncio.run(run(suite, Sdk(name, sandbox_class), only))
