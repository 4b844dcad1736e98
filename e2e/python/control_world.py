"""Both Python SDKs' control plane behind one way to call, so that a scenario is written once."""

import asyncio
import inspect
from datetime import datetime, timezone

import raw
from checks import araises, auntil, equal, true
from guest_clients import in_thread

# Comes with network rules: until then the server must refuse, not pretend.
NOT_YET = {"update_network"}
# They are about what is in a guest, which is a guest in name only here: the snapshot suites show
# these, the guest suites the first four of the others, and the token comes with MCP.
SNAPSHOTS = {"pause", "beta_pause", "fork"}
SNAPSHOTS |= {"create_snapshot", "list_snapshots", "delete_snapshot"}
ELSEWHERE = {"commands", "files", "git", "pty", "get_mcp_token", *SNAPSHOTS}


class Sdk:
    """One of the two SDKs. Notes which members of the sandbox class were called, and how: of the
    class with an id, or of an instance."""

    def __init__(self, name, sandbox_class):
        self.name = name
        self.Sandbox = sandbox_class
        self.called = set()

    async def call(self, target, name, /, *args, **kwargs):
        """Calls a method of a class or of an instance. The synchronous one runs in a thread."""
        self.called.add(("class" if inspect.isclass(target) else "instance", name))
        member = getattr(target, name)
        if self.name == "sync":
            return await in_thread(member, *args, **kwargs)
        value = member(*args, **kwargs)
        return await value if inspect.isawaitable(value) else value

    def read(self, target, name):
        """A property of an instance."""
        self.called.add(("instance", name))
        return getattr(target, name)

    def members(self, wanted=frozenset()):
        """Every public method and property, once for each form it can be called in; of those that
        other suites call, only the `wanted` ones."""
        for name, member in inspect.getmembers_static(self.Sandbox):
            if name.startswith("_") or name in ELSEWHERE - wanted:
                continue
            if hasattr(member, "class_method_name"):  # the SDK's own: callable in both forms
                yield from (("class", name), ("instance", name))
            elif isinstance(member, (classmethod, staticmethod)):
                yield ("class", name)
            elif isinstance(member, property) or inspect.isfunction(member):
                yield ("instance", name)


class World:
    """What a scenario works with: the SDK, the suite's tag, and verbs that several of them need."""

    def __init__(self, sdk, suite):
        self.sdk, self.suite = sdk, suite
        self.Sandbox = sdk.Sandbox

    @property
    def tag(self):
        return self.suite.metadata

    async def create(self, *args, **options):
        metadata = {**self.tag, **options.pop("metadata", {})}
        options = {"timeout": 600, **options}
        return await self.sdk.call(self.Sandbox, "create", *args, metadata=metadata, **options)

    async def info(self, sandbox):
        return await self.sdk.call(sandbox, "get_info")

    async def kill(self, *sandboxes):
        await asyncio.gather(*(self.sdk.call(sandbox, "kill") for sandbox in sandboxes))

    async def listed(self, limit=None, order=None, between=None, **query):
        """The ids on all pages; `between` is awaited after each page with its ids."""
        from e2b import SandboxQuery

        query = SandboxQuery(**{"metadata": self.tag, **query})
        pages = await self.sdk.call(self.Sandbox, "list", query=query, limit=limit, order=order)
        found, counts = [], []
        while pages.has_next:
            page = await self.sdk.call(pages, "next_items")
            counts.append(len(page))
            found += [entry.sandbox_id for entry in page]
            if between:
                await between([entry.sandbox_id for entry in page])
        true(all(count <= (limit or 100) for count in counts), f"pages of {counts}, limit {limit}")
        return found

    async def fails(self, kind, target, name, /, *args, wanted="", **kwargs):
        """The error of a call, whose text must contain `wanted`."""
        error = await araises(kind, self.sdk.call(target, name, *args, **kwargs))
        true(wanted in str(error), f"no {wanted!r} in {error!r}")
        return error

    async def gone(self, sandbox_id):
        """The API knows it no more."""

        async def asked():
            answer = await in_thread(raw.api, "GET", f"/sandboxes/{sandbox_id}")
            return answer.status == 404

        await auntil(10, f"{sandbox_id} is gone", asked)


def seconds_left(info):
    return (info.end_at - datetime.now(timezone.utc)).total_seconds()


def near(found, wanted, what, slack=3):
    true(abs(found - wanted) <= slack, f"{what}: {found:.1f}, wanted {wanted} within {slack}")


def same(found, wanted, what):
    """Equal as sets, without repetitions."""
    equal(len(found), len(set(found)), f"{what}: repetitions")
    equal(set(found) ^ set(wanted), set(), f"{what}: too many or too few")
