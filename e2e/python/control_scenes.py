"""What a user does with sandboxes from outside: create, find, prolong, end. For both Python SDKs."""

import asyncio
import logging
import os
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone

from e2b import (
    E2B,
    AuthenticationException,
    InvalidArgumentException,
    SandboxException,
    SandboxNotFoundException,
    SandboxState,
)

import raw
import scenes
from checks import araises, auntil, equal, true
from control_world import NOT_YET, near, same, seconds_left
from guest_clients import in_thread

MISSING = "i" + "0" * 20
MANY = 105  # more than the largest page


# --- create and look ----------------------------------------------------------------------------


async def create_defaults(world):
    sandbox = await world.sdk.call(world.Sandbox, "create", metadata=world.tag)
    info = await world.info(sandbox)
    equal(info.sandbox_id, world.sdk.read(sandbox, "sandbox_id"), "id")
    equal((info.name, info.state), ("base", SandboxState.RUNNING), "alias and state")
    near((info.end_at - info.started_at).total_seconds(), 300, "seconds to live", slack=0.5)
    near((datetime.now(timezone.utc) - info.started_at).total_seconds(), 0, "age")
    true(info.cpu_count >= 1 and info.memory_mb >= 128, f"size: {info}")
    true(tuple(map(int, info.envd_version.split("."))) >= (0, 6, 7), f"envd {info.envd_version}")
    true(info.template_id, "a template's id")
    equal(info.metadata, world.tag, "metadata")
    equal(info.lifecycle, {"on_timeout": "kill", "auto_resume": False}, "lifecycle")
    equal((info.volume_mounts, info.envd_unresponsive_at_pause), ([], None), "what is not there")
    equal(await world.sdk.call(sandbox, "is_running"), True, "is_running")
    await world.kill(sandbox)


async def create_options(world):
    lines = []
    logger = logging.Logger("of one sandbox")
    logger.addHandler(logging.NullHandler())
    logger.addFilter(lambda record: bool(lines.append(record.getMessage())) or True)
    odd = {"odd": scenes.AWKWARD, "empty": "", "ключ": "值"}
    sandbox = await world.create(
        "base",
        timeout=123,
        metadata=odd,
        envs={"NAME": "value"},
        secure=False,
        allow_internet_access=False,
        lifecycle={"on_timeout": "kill", "auto_resume": False},
        logger=logger,
        request_timeout=60,
        api_headers={"X-Of-The-Caller": "ignored"},
    )
    info = await world.info(sandbox)
    equal(info.metadata, {**world.tag, **odd}, "metadata")
    near(seconds_left(info), 123, "seconds left")
    equal(info.allow_internet_access, False, "internet access")
    equal(info.lifecycle, {"on_timeout": "kill", "auto_resume": False}, "lifecycle")
    true(any("/v2/sandboxes" in line for line in lines), f"the logger heard {lines}")
    token = sandbox.connection_config.sandbox_headers["X-Access-Token"]
    true(len(token) >= 32, "a sandbox of this generation is secured, whatever `secure` says")
    by_id = await world.create(info.template_id)
    equal((await world.info(by_id)).template_id, info.template_id, "by the template's id")
    await world.kill(sandbox, by_id)


async def addresses(world):
    """What the SDK makes of the answers: names of hosts and signed addresses of files."""
    sandbox = await world.create()
    sandbox_id = world.sdk.read(sandbox, "sandbox_id")
    domain = world.sdk.read(sandbox, "sandbox_domain")
    host = await world.sdk.call(sandbox, "get_host", 8080)
    equal(host, f"8080-{sandbox_id}.{domain}", "host name")
    mcp = await world.sdk.call(sandbox, "get_mcp_url")
    true(f"50005-{sandbox_id}." in mcp, f"MCP address {mcp}")
    for name in ("download_url", "upload_url"):
        url = await world.sdk.call(sandbox, name, "a b", use_signature_expiration=60)
        true("signature=v1_" in url and "signature_expiration=" in url, f"{name}: {url}")
    for name in ("envd_api_url", "envd_direct_url"):
        equal(world.sdk.read(sandbox, name), raw.setting("E2B_SANDBOX_URL"), name)
    equal(world.sdk.read(sandbox, "traffic_access_token"), None, "token of a public sandbox")
    equal(world.sdk.read(sandbox, "connection_config").api_key, raw.setting("E2B_API_KEY"), "key")
    await world.kill(sandbox)


async def create_refused(world):
    async def refused(wanted, status, *args, **options):
        error = await araises(SandboxException, world.create(*args, **options))
        true(wanted in str(error), f"no {wanted!r} in {error!r}")
        equal(error.status_code, status, f"status of {error!r}")

    await refused("template 'no-such-template' not found", 404, "no-such-template")
    await refused("tag 'none' does not exist for template 'base'", 404, "base:none")
    await refused("Invalid template reference", 400, "No Template/at all")
    await refused("Timeout must be greater than 0", 400, timeout=0)
    await refused("Timeout must be greater than 0", 400, timeout=-5)
    await refused("Timeout cannot be greater than", 400, timeout=10_000_000)
    await refused("timeout", 400, timeout="soon")
    await refused("metadata", 400, metadata={"number": 5})
    await refused("envVars", 400, envs={"NUMBER": 5})


async def create_not_yet(world):
    """What comes with later parts is refused by the field's name, never taken and ignored."""
    for field, options in {
        "network": {"network": {"allow_out": ["1.1.1.1"], "deny_out": ["0.0.0.0/0"]}},
        "volumeMounts": {"volume_mounts": {"/data": "a-volume"}},
        "iam": {"iam": {"tokens": {"aws": {"audience": "a", "token_type": "JWT-SVID"}}}},
    }.items():
        error = await araises(SandboxException, world.create("base", **options))
        true(field in str(error), f"{error!r} does not name {field}")
    await araises(SandboxException, world.create("base", mcp={"browserbase": {}}))
    equal(await world.listed(), [], "created nevertheless")


# --- prolong and end ----------------------------------------------------------------------------


async def connect(world):
    """Never shortens; gives a handle that works as the first one does."""
    sandbox = await world.create(timeout=600)
    for timeout, left in ((30, 600), (None, 600), (900, 900)):
        again = await world.sdk.call(world.Sandbox, "connect", sandbox.sandbox_id, timeout=timeout)
        equal(again.sandbox_id, sandbox.sandbox_id, "id")
        near(seconds_left(await world.info(again)), left, f"left after {timeout}")
    same_headers = again.connection_config.sandbox_headers == sandbox.connection_config.sandbox_headers
    true(same_headers, "another token")
    again = await world.sdk.call(sandbox, "connect", timeout=1200)
    near(seconds_left(await world.info(again)), 1200, "left by the instance")
    equal(await world.sdk.call(again, "is_running"), True, "is_running")
    await world.fails(SandboxException, sandbox, "connect", timeout=0, wanted="Timeout must be")
    await world.fails(SandboxNotFoundException, world.Sandbox, "connect", MISSING, wanted=MISSING)
    await world.fails(SandboxNotFoundException, world.Sandbox, "connect", "No/Id", wanted="No/Id")
    await world.kill(sandbox)


async def set_timeout(world):
    sandbox = await world.create(timeout=600)
    for seconds in (1800, 60):
        await world.sdk.call(sandbox, "set_timeout", seconds)
        near(seconds_left(await world.info(sandbox)), seconds, "left by the instance")
    await world.sdk.call(world.Sandbox, "set_timeout", sandbox.sandbox_id, 900)
    info = await world.sdk.call(world.Sandbox, "get_info", sandbox.sandbox_id)
    near(seconds_left(info), 900, "left by the class")
    for wrong, text in ((-1, "imeout"), (10_000_000, "Timeout cannot be greater than")):
        await world.fails(SandboxException, sandbox, "set_timeout", wrong, wanted=text)
    near(seconds_left(await world.info(sandbox)), 900, "left after what was refused")
    await world.fails(SandboxNotFoundException, world.Sandbox, "set_timeout", MISSING, 60)
    await world.kill(sandbox)


async def kill(world):
    sandbox, other = await asyncio.gather(world.create(), world.create())
    equal(await world.sdk.call(sandbox, "kill"), True, "first kill")
    equal(await world.sdk.call(sandbox, "kill"), False, "second kill")
    killed = await asyncio.gather(
        *(world.sdk.call(world.Sandbox, "kill", other.sandbox_id) for _ in range(4))
    )
    true(True in killed, f"four kills at once: {killed}")
    equal(await world.sdk.call(world.Sandbox, "kill", MISSING), False, "kill of what never was")
    await world.fails(SandboxNotFoundException, sandbox, "get_info", wanted=sandbox.sandbox_id)
    await world.fails(SandboxNotFoundException, sandbox, "set_timeout", 60)
    await world.fails(SandboxNotFoundException, sandbox, "connect")
    await world.fails(SandboxNotFoundException, world.Sandbox, "get_info", MISSING, wanted=MISSING)
    equal(await world.sdk.call(sandbox, "is_running"), False, "is_running")
    equal(await world.listed(), [], "still listed")


async def with_block(world):
    """Leaving the block kills."""
    if world.sdk.name == "sync":

        def body():
            with world.Sandbox.create("base", metadata=world.tag) as sandbox:
                return sandbox.sandbox_id

        sandbox_id = await in_thread(body)
    else:
        async with await world.create() as sandbox:
            sandbox_id = sandbox.sandbox_id
    await world.gone(sandbox_id)


async def expiry(world):
    """To the second: alive before its end, gone after it, prolonged not at all."""
    kept, prolonged = await asyncio.gather(world.create(timeout=2), world.create(timeout=2))
    await world.sdk.call(prolonged, "set_timeout", 600)
    info = await world.info(kept)
    await world.gone(kept.sandbox_id)
    late = (datetime.now(timezone.utc) - info.end_at).total_seconds()
    true(-0.3 < late < 3, f"gone {late:.2f} s after its end")
    equal(await world.sdk.call(kept, "kill"), False, "kill of what has expired")
    await world.fails(SandboxNotFoundException, world.Sandbox, "connect", kept.sandbox_id)
    await world.fails(SandboxNotFoundException, kept, "set_timeout", 60)
    equal(await world.listed(), [prolonged.sandbox_id], "who is left")
    await world.kill(prolonged)


# --- find ---------------------------------------------------------------------------------------


async def many(world):
    """The sandboxes that `listing` and `pages` look through; in pieces, to create in some order."""
    created = []
    while len(created) < MANY:
        kind = ("red", "green", "blue")[len(created) // 10 % 3]
        created += await asyncio.gather(
            *(world.create(metadata={"colour": kind}) for _ in range(min(10, MANY - len(created))))
        )
    ids = {sandbox.sandbox_id for sandbox in created}
    equal(len(ids), MANY, "distinct ids")
    return ids


async def listing(world, ids):
    red = await world.listed(metadata={**world.tag, "colour": "red"})
    true(0 < len(red) < MANY, f"{len(red)} red ones")
    same(await world.listed(metadata=world.tag), ids, "by the tag alone")
    equal(await world.listed(metadata={**world.tag, "colour": "none"}), [], "by a value of nobody")
    same(await world.listed(state=[SandboxState.RUNNING]), ids, "running ones")
    equal(await world.listed(state=[SandboxState.PAUSED]), [], "paused ones")
    both = [SandboxState.RUNNING, SandboxState.PAUSED]
    same(await world.listed(state=both), ids, "of both states")
    template = (await world.sdk.call(world.Sandbox, "get_info", red[0])).template_id
    same(await world.listed(template="base"), ids, "by the template's alias")
    same(await world.listed(template=template), ids, "by the template's id")
    odd = await world.create(metadata={"odd": scenes.AWKWARD, "k=&": "v%2B+"})
    for key, value in (("odd", scenes.AWKWARD), ("k=&", "v%2B+")):
        found = await world.listed(metadata={**world.tag, key: value})
        equal(found, [odd.sandbox_id], f"by {key}={value}")
    await world.kill(odd)


async def ordering(world, ids):
    """By the time of the start over the whole result, not within a page."""
    from e2b import SandboxQuery

    newest = await world.listed(limit=20)
    equal(await world.listed(limit=7, order="desc"), newest, "descending is the default")
    equal(await world.listed(limit=7, order="asc"), newest[::-1], "ascending")
    same(newest, ids, "in pages of 20")
    query = SandboxQuery(metadata=world.tag)
    pages = await world.sdk.call(world.Sandbox, "list", query=query)
    starts = [entry.started_at for entry in await world.sdk.call(pages, "next_items")]
    equal(starts, sorted(starts, reverse=True), "times of the start")
    middle = await world.sdk.call(world.Sandbox, "get_info", newest[MANY // 2])
    after = await world.listed(started_after=middle.started_at)
    true(after == newest[: len(after)], "started after: not the newest ones")
    true(middle.sandbox_id in after, "started at that time counts too")
    local = middle.started_at.astimezone().replace(tzinfo=None)
    equal(await world.listed(started_after=local), after, "a time without a zone")
    future = datetime.now(timezone.utc) + timedelta(days=1)
    equal(await world.listed(started_after=future), [], "of the future")
    await world.fails(InvalidArgumentException, await tagged(world, order="up"), "next_items")


async def tagged(world, **options):
    from e2b import SandboxQuery

    query = SandboxQuery(metadata=world.tag)
    return await world.sdk.call(world.Sandbox, "list", query=query, **options)


async def pages(world, ids):
    for limit in (1, 33, 100, None):
        same(await world.listed(limit=limit), ids, f"pages of {limit}")
    for limit in (101, -1):
        wrong = await tagged(world, limit=limit)
        await world.fails(SandboxException, wrong, "next_items", wanted="limit")
    wrong = await tagged(world, next_token="no token")
    await world.fails(SandboxException, wrong, "next_items", wanted="nextToken")
    first = await tagged(world, limit=40)
    head = [entry.sandbox_id for entry in await world.sdk.call(first, "next_items")]
    # The token is good in another list, in another process as well.
    rest = await tagged(world, limit=100, next_token=first.next_token)
    head += [entry.sandbox_id for entry in await world.sdk.call(rest, "next_items")]
    same(head, ids, "one page, and the rest from its token")
    equal(rest.has_next, False, "has_next at the end")
    await araises(Exception, world.sdk.call(rest, "next_items"))


async def pages_under_change(world, ids):
    """What is there all the time comes once, whatever comes and goes between two pages."""
    killed, fresh = set(), []

    async def change(page):
        for sandbox_id in page[:3]:
            killed.add(sandbox_id)
            await world.sdk.call(world.Sandbox, "kill", sandbox_id)
        fresh.append((await world.create()).sandbox_id)

    found = await world.listed(limit=10, between=change)
    same([one for one in found if one not in fresh], ids, "what was there from the start")
    true(not set(found) & set(fresh), "newer ones appear on later pages of the newest first")
    left = (ids - killed) | set(fresh)
    same(await world.listed(), left, "what is left")
    while left:
        piece = [left.pop() for _ in range(min(10, len(left)))]
        await asyncio.gather(*(world.sdk.call(world.Sandbox, "kill", one) for one in piece))
    equal(await world.listed(), [], "after the last kill")


# --- metrics ------------------------------------------------------------------------------------


async def metrics(world):
    sandbox = await world.create()

    async def sampled():
        return await world.sdk.call(sandbox, "get_metrics")

    found = await auntil(30, "a first sample", sampled, pause_s=0.5)
    info, last = await world.info(sandbox), found[-1]
    equal(last.cpu_count, info.cpu_count, "processors")
    true(0 <= last.cpu_used_pct <= 100 * last.cpu_count, f"processor time: {last}")
    true(0 <= last.mem_used <= last.mem_total, f"memory: {last}")
    true(0 <= last.disk_used <= last.disk_total, f"disk: {last}")
    true(info.started_at - timedelta(seconds=1) <= last.timestamp, f"taken before it began: {last}")

    async def two():
        return len(times := [one.timestamp for one in await sampled()]) >= 2 and times

    times = await auntil(30, "a second sample", two, pause_s=0.5)
    equal(times, sorted(times), "order of the samples")
    gaps = [(b - a).total_seconds() for a, b in zip(times, times[1:])]
    true(all(3 <= gap <= 8 for gap in gaps), f"one in five seconds, but {gaps}")

    async def between(start, end):
        found = await world.sdk.call(
            world.Sandbox, "get_metrics", sandbox.sandbox_id, start=start, end=end
        )
        return [one.timestamp for one in found]

    day = timedelta(days=1)
    later = await between(times[0] + timedelta(seconds=2), None)
    true(times[0] not in later and times[1] in later, f"from the second on: {later}")
    earlier = await between(None, times[0] + timedelta(seconds=1))
    true(times[0] in earlier and times[1] not in earlier, f"up to the first: {earlier}")
    equal(await between(times[0] - 2 * day, times[0] - day), [], "of the day before")
    await world.fails(SandboxNotFoundException, world.Sandbox, "get_metrics", MISSING)
    await world.kill(sandbox)


# --- who asks -----------------------------------------------------------------------------------


@contextmanager
def without_environment():
    kept = {name: os.environ.pop(name) for name in list(os.environ) if name.startswith("E2B_")}
    try:
        yield kept
    finally:
        os.environ.update(kept)


async def keys(world):
    wrong = "e2b_" + "0" * 40
    sandbox = await world.create()
    for call in (
        world.create(api_key=wrong),
        world.sdk.call(sandbox, "get_info", api_key=wrong),
        world.sdk.call(sandbox, "kill", api_key=wrong),
        world.sdk.call(sandbox, "set_timeout", 60, api_key=wrong),
        world.sdk.call(world.Sandbox, "connect", sandbox.sandbox_id, api_key=wrong),
        world.sdk.call(await tagged(world, api_key=wrong), "next_items"),
        world.create(api_key="not a key"),
        world.create(api_key="e2b_"),
    ):
        error = await araises(AuthenticationException, call)
        true("security requirements failed" in str(error), f"the text of {error!r}")
        true(wrong not in str(error), "the key is in the text")
    right = raw.setting("E2B_API_KEY")
    os.environ["E2B_API_KEY"] = wrong  # what is passed wins
    try:
        equal((await world.sdk.call(sandbox, "get_info", api_key=right)).metadata, world.tag, "info")
    finally:
        os.environ["E2B_API_KEY"] = right
    with without_environment():
        error = await araises(AuthenticationException, world.create())
        true("E2B_API_KEY" in str(error), f"without any key: {error!r}")
    equal((await world.info(sandbox)).sandbox_id, sandbox.sandbox_id, "still there")
    await world.kill(sandbox)


async def client_object(world):
    """An `E2B` client holds its own settings: none of the environment, none of another client."""
    with without_environment() as kept:
        options = {
            "api_key": kept["E2B_API_KEY"],
            "api_url": kept["E2B_API_URL"],
            "sandbox_url": kept["E2B_SANDBOX_URL"],
        }
        name = "Sandbox" if world.sdk.name == "sync" else "AsyncSandbox"
        bound = getattr(E2B(**options), name)
        stranger = getattr(E2B(**{**options, "api_key": "e2b_" + "1" * 40}), name)
        sandbox = await world.sdk.call(bound, "create", "base", metadata=world.tag, timeout=60)
        again = await world.sdk.call(bound, "connect", sandbox.sandbox_id)
        equal(await world.sdk.call(again, "is_running"), True, "is_running")
        found = await world.sdk.call(await world.sdk.call(bound, "list"), "next_items")
        true(sandbox.sandbox_id in [entry.sandbox_id for entry in found], "not listed")
        call = world.sdk.call(stranger, "get_info", sandbox.sandbox_id)
        await araises(AuthenticationException, call)
        equal(await world.sdk.call(bound, "kill", sandbox.sandbox_id), True, "kill")


# --- all of it ----------------------------------------------------------------------------------


async def not_yet(world):
    """Methods of later parts fail with an error, and leave the sandbox as it was."""
    sandbox = await world.create()
    arguments = {"update_network": {"class": (sandbox.sandbox_id, {}), "instance": ({},)}}
    for form, name in sorted(world.sdk.members()):
        if name not in NOT_YET:
            continue
        target = world.Sandbox if form == "class" else sandbox
        default = (sandbox.sandbox_id,) if form == "class" else ()
        given = arguments.get(name, {}).get(form, default)
        try:
            value = await world.sdk.call(target, name, *given)
        except Exception:
            continue
        raise AssertionError(f"{form} {name} gave {value!r}")
    info = await world.info(sandbox)
    equal((info.state, info.metadata), (SandboxState.RUNNING, world.tag), "after all of them")
    await world.kill(sandbox)


async def every_method_called(world):
    wanted = set(world.sdk.members())
    true(len(wanted) >= 20, f"only {len(wanted)} members found: the search is broken")
    never = sorted(" ".join(one) for one in wanted - world.sdk.called)
    equal(never, [], "never called")
