"""Machines that die while they are paused, resumed or copied. See ../README.md.

deaths_suite.py [SCENARIO ...]
"""

import asyncio
import os
import sys
from pathlib import Path

from e2b import Sandbox

import deaths
from checks import Skip, Suite, auntil
from control_world import Sdk
from guest_clients import in_thread
from operator_api import TOKEN_FILE
from snapshots_run import scenarios

GONE_S = 30


def kept():
    """Snapshots and layers in the server's data folder, if that is on this machine."""
    if TOKEN_FILE not in os.environ:
        raise Skip(f"{TOKEN_FILE} names no file of the server's data folder")
    found = [Path(os.environ[TOKEN_FILE]).parent / folder for folder in ("snapshots", "layers")]
    return [sorted(map(str, folder.iterdir())) if folder.exists() else [] for folder in found]


async def kept_before():
    return await in_thread(kept)


async def nothing_kept(before):
    """No snapshot and no layer that was not there before."""

    async def as_before():
        return await in_thread(kept) == before

    await auntil(GONE_S, "snapshots and layers are what they were before", as_before)


async def run(suite, only):
    before = await suite.acheck("kept_before", kept_before)
    await scenarios(suite, Sdk("sync", Sandbox), deaths.SCENES, only)
    await suite.acheck("nothing_kept", nothing_kept, before)


if __name__ == "__main__":
    with Suite("deaths") as suite:
        asyncio.run(run(suite, sys.argv[1:]))
