"""Runs the control-plane scenarios with one of the two Python SDKs. See ../README.md."""

import asyncio

import control_faults
import control_scenes
from checks import Suite
from control_world import Sdk, World

SINGLE = (
    control_scenes.create_defaults,
    control_scenes.create_options,
    control_scenes.addresses,
    control_scenes.create_refused,
    control_scenes.create_not_yet,
    control_scenes.connect,
    control_scenes.set_timeout,
    control_scenes.kill,
    control_scenes.with_block,
    control_scenes.expiry,
    control_scenes.metrics,
    control_scenes.keys,
    control_scenes.client_object,
    control_scenes.not_yet,
    control_faults.at_once,
    control_faults.limit,
    control_faults.lost_others,
    control_faults.no_retry,
    control_faults.same_key,
    control_faults.key_codes,
    control_faults.lost_create,
)
# In this order: the last one takes away what the others look at.
LISTS = (
    control_scenes.listing,
    control_scenes.ordering,
    control_scenes.pages,
    control_scenes.pages_under_change,
)


async def scenarios(suite, sdk, only):
    def chosen(scenario):
        return not only or any(scenario.__name__.startswith(one) for one in only)

    for scenario in SINGLE:
        if chosen(scenario):
            await suite.acheck(scenario.__name__, scenario, World(sdk, Part(suite, scenario)))
    lists = [scenario for scenario in LISTS if chosen(scenario)]
    if lists:
        world = World(sdk, Part(suite, control_scenes.many))
        ids = await suite.acheck("many", control_scenes.many, world)
        for scenario in lists:
            await suite.acheck(scenario.__name__, scenario, world, ids)
    if not only:
        world = World(sdk, Part(suite, control_scenes.many))
        await suite.acheck("every_method_called", control_scenes.every_method_called, world)


class Part:
    """A scenario's own tag beside the suite's: what one that failed leaves behind is in nobody's
    way, and the suite's clean-up still finds it."""

    def __init__(self, suite, scenario):
        self.metadata = {**suite.metadata, "scenario": scenario.__name__}


def main(name, sandbox_class, only):
    with Suite(f"control.{name}") as suite:
        asyncio.run(scenarios(suite, Sdk(name, sandbox_class), only))
