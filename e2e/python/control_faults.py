"""Answers that get lost, requests that come twice: what the SDK makes of them, and what is left."""

import asyncio
import uuid

from e2b import (
    InvalidArgumentException,
    RateLimitException,
    SandboxException,
    SandboxNotFoundException,
    ServiceBusyException,
)

import raw
from checks import Skip, araises, equal, true
from control_world import near, same, seconds_left
from forwarder import Forwarder, Lost
from guest_clients import in_thread
from operator_api import TOKEN_FILE, Team, token

UNAVAILABLE = Lost(503)


async def lost_create(world):
    """The SDK repeats a create whose answer was lost; with a key that makes no second sandbox."""
    key = f"key-{uuid.uuid4()}"
    with Forwarder() as forwarder:
        forwarder.lose(UNAVAILABLE, Lost(429, {"should-retry": "true", "retry-after": "1"}))
        sandbox = await world.create(api_url=forwarder.url, idempotency_key=key)
        sent = [(one.method, one.path, one.headers.get("idempotency-key")) for one in forwarder.seen]
        equal(sent, [("POST", "/v2/sandboxes", key)] * 3, "requests")
    equal(await world.listed(), [sandbox.sandbox_id], "what was created")
    equal(await world.sdk.call(sandbox, "is_running"), True, "is_running")
    await world.kill(sandbox)


async def lost_others(world):
    """Other calls are safe to repeat: they say how it shall be, not what shall change."""
    sandbox = await world.create()
    with Forwarder() as forwarder:
        through = {"api_url": forwarder.url}
        forwarder.lose(UNAVAILABLE)
        await world.sdk.call(sandbox, "set_timeout", 900, **through)
        near(seconds_left(await world.info(sandbox)), 900, "seconds left")
        forwarder.lose(UNAVAILABLE)
        again = await world.sdk.call(
            world.Sandbox, "connect", sandbox.sandbox_id, timeout=1200, **through
        )
        equal(again.sandbox_id, sandbox.sandbox_id, "connected to")
        forwarder.lose(UNAVAILABLE)
        equal(await world.sdk.call(sandbox, "kill", **through), False, "repeated kill")
        equal(len(forwarder.seen), 2, "kills sent")
    await world.fails(SandboxNotFoundException, sandbox, "get_info")


async def no_retry(world):
    """Told not to, the SDK does not repeat: the error is the first answer's."""
    with Forwarder() as forwarder:
        forwarder.lose(Lost(503, {"should-retry": "false"}))
        await araises(ServiceBusyException, world.create(api_url=forwarder.url))
        equal(len(forwarder.seen), 1, "requests")
        forwarder.lose(UNAVAILABLE)
        await araises(ServiceBusyException, world.create(api_url=forwarder.url, retries=0))
        equal(len(forwarder.seen), 1, "requests without retries")
    left = await world.listed()
    equal(len(left), 2, "the requests were done all the same")
    for sandbox_id in left:
        await world.sdk.call(world.Sandbox, "kill", sandbox_id)


async def same_key(world):
    """One key is one sandbox: one after the other, at once, and not for another request."""
    key = f"key-{uuid.uuid4()}"
    first = await world.create(idempotency_key=key)
    again = await world.create(idempotency_key=key)
    equal(again.sandbox_id, first.sandbox_id, "the second answer")
    headers, other = again.connection_config.sandbox_headers, first.connection_config.sandbox_headers
    equal(headers, other, "its token")
    for changed in ({"timeout": 601}, {"metadata": {"x": "y"}}, {"envs": {"A": "b"}}):
        error = await araises(SandboxException, world.create(**changed, idempotency_key=key))
        true(error.status_code in (409, 422), f"another request with the key: {error!r}")
    equal(await world.listed(), [first.sandbox_id], "what was created")
    key = f"key-{uuid.uuid4()}"
    many = await asyncio.gather(
        *(world.create(idempotency_key=key) for _ in range(5)), return_exceptions=True
    )
    errors = [one for one in many if isinstance(one, Exception)]
    # Those that come while the first is under way may be told so.
    true(all(getattr(one, "status_code", 0) == 409 for one in errors), f"errors: {errors}")
    ids = {one.sandbox_id for one in many if not isinstance(one, Exception)}
    equal(len(ids), 1, "sandboxes of five creates at once")
    same(await world.listed(), ids | {first.sandbox_id}, "what was created")
    for sandbox_id in ids | {first.sandbox_id}:
        await world.sdk.call(world.Sandbox, "kill", sandbox_id)


async def key_codes(world):
    """The codes a client tells these cases apart by, without the SDK between."""
    key = f"key-{uuid.uuid4()}"

    def create(idempotency_key, **fields):
        body = {"templateID": "base", "timeout": 60, "metadata": world.tag, **fields}
        return raw.api(
            "POST", "/v2/sandboxes", body, headers={"Idempotency-Key": idempotency_key}
        )

    def codes():
        first, other = create(key), create(key, timeout=61)
        equal(first.status, 201, "first")
        equal(other.json().get("error_code"), "idempotency_request_mismatch", "another request")
        for wrong in ("UPPER", "with space", "", "x" * 256):
            answer = create(wrong)
            equal(answer.status, 400, f"key {wrong[:10]!r}: {answer}")
            true("Idempotency-Key" in answer.message, f"names no header: {answer}")
        equal(raw.api("DELETE", f"/sandboxes/{first.json()['sandboxID']}").status, 204, "kill")

    await in_thread(codes)
    for wrong in ("UPPER", "with space", "", "x" * 256, 7):
        await araises(InvalidArgumentException, world.create(idempotency_key=wrong))
    equal(await world.listed(), [], "what was created")


async def limit(world):
    """The limit of a team is an error of its own kind, and does not come by repeating."""
    if token() is None:
        raise Skip(f"{TOKEN_FILE} is not set: a team with a limit cannot be made")
    team = await in_thread(Team, limitOverrides={"maxConcurrentSandboxes": 1})
    try:
        sandbox = await world.create(api_key=team.key)
        error = await araises(RateLimitException, world.create(api_key=team.key))
        true("the maximum number of concurrent E2B sandboxes (1)" in str(error), f"text: {error!r}")
        equal(await world.sdk.call(sandbox, "kill", api_key=team.key), True, "kill")
        again = await world.create(api_key=team.key)
        # The class asks with the key of the environment, which is the first team's.
        await world.fails(SandboxNotFoundException, world.Sandbox, "get_info", again.sandbox_id)
        equal(await world.sdk.call(again, "kill", api_key=team.key), True, "kill")
    finally:
        await in_thread(team.__exit__)


async def at_once(world):
    """Thirty creates, all different; all killed, all gone."""
    created = await asyncio.gather(*(world.create() for _ in range(30)))
    ids = {sandbox.sandbox_id for sandbox in created}
    equal(len(ids), 30, "distinct ids")
    same(await world.listed(), ids, "listed")
    killed = await asyncio.gather(*(world.sdk.call(sandbox, "kill") for sandbox in created))
    equal(killed, [True] * 30, "kills")
    equal(await world.listed(), [], "left")
