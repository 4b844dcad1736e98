"""Runs the guest scenarios with one of the two Python SDKs. See ../README.md."""

import asyncio

import guest_commands
import guest_files
import guest_git
import guest_pty
import guest_watch
from checks import Suite, equal, say, true
from guest_clients import Recorder, every_member_used
from guest_target import target as chosen_target

TOPICS = {
    "commands": guest_commands,
    "pty": guest_pty,
    "files": guest_files,
    "watch": guest_watch,
    "git": guest_git,
}
# One transfer of a gigabyte through an emulated CPU takes minutes.
DEADLINE_S = 400


async def run(suite, kind, target, only):
    recorder = Recorder()

    async def create():
        options = {"timeout": 3000, "metadata": suite.metadata, "request_timeout": 120}
        box = await kind.create(target, recorder, **options)
        await box.files.make_dir(target.base)
        return box

    box = await suite.acheck("create", create)
    for topic, module in TOPICS.items():
        for scenario in module.SCENARIOS:
            name = f"{topic}.{scenario.__name__}"
            if not only or any(name.startswith(one) for one in only):
                said = await suite.acheck(name, scenario, box, deadline_s=DEADLINE_S)
                if isinstance(said, str):
                    suite.remark(f"{name}: {said}")
    if not only:
        await suite.acheck("every_method_called", used, recorder)
    await suite.acheck("nothing_running", nothing_running, box)
    for line in target.remarks():
        suite.remark(line)


async def used(recorder):
    true(recorder.count() >= 50, f"only {recorder.count()} members found: the search is broken")
    every_member_used(recorder)


async def nothing_running(box):
    """What a scenario left would spoil the next; the daemon still answers after all of them."""
    left = [entry.args for entry in await box.commands.list()]
    for entry in await box.commands.list():
        await box.commands.kill(entry.pid)
    equal(left, [], "commands left running")
    equal(await box.is_running(), True, "is_running")
    await box.files.remove(box.target.base)


def main(prefix, kind, only, **full):
    target = chosen_target(**full)
    if target.native:
        prefix = f"{prefix}.native"
    with Suite(prefix, on_server=not target.native) as suite, target:
        say(f"# {prefix}: {target.scale}")
        asyncio.run(run(suite, kind, target, only))
