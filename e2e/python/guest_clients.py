"""Both Python SDKs behind one set of verbs, so that a scenario is written once.

Every public method of the SDK's objects is called under its own name: `box.files`, `box.git` and so
on are the SDK's own (in the synchronous one each call runs in a thread). The verbs here only cover
what the two spell differently: callbacks or iteration, a pushed watch or a polled one.
"""

import asyncio
import inspect
import sys
import threading

from checks import auntil, true

COMMAND_S = 120


async def in_thread(body, *args, **kwargs):
    """Like asyncio.to_thread, but a call that hangs cannot keep the program from ending."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()

    def settle(put, value):
        if not future.cancelled():
            put(value)

    def report(put, value):
        if not loop.is_closed():  # a call that outlived the run has nobody to tell
            loop.call_soon_threadsafe(settle, put, value)

    def run():
        try:
            value = body(*args, **kwargs)
        except BaseException as error:  # handed on to whoever awaits
            report(future.set_exception, error)
        else:
            report(future.set_result, value)

    threading.Thread(target=run, daemon=True).start()
    return await future


class Threaded:
    """Gives every method of a synchronous object as a coroutine."""

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        member = getattr(self._inner, name)
        if not callable(member):
            return member
        return lambda *args, **kwargs: in_thread(member, *args, **kwargs)


class Recorder:
    """Which public members of the SDK's classes a run has used, from outside the SDK."""

    def __init__(self):
        self._used = {}
        self._classes = set()

    def watch(self, value, only=None):
        """Watches the class of `value`: wraps its public methods and properties in place."""
        kind = type(value)
        if kind in self._classes:
            return
        self._classes.add(kind)
        for name, member in list(inspect.getmembers_static(kind)):
            public = not name.startswith("_") or name in ("__iter__", "__aenter__")
            if not public or (only and name not in only):
                continue
            if isinstance(member, property):
                wrapped = property(self._noting(kind, name, member.fget))
            elif inspect.isfunction(member):
                wrapped = self._noting(kind, name, member)
            else:
                continue
            setattr(kind, name, wrapped)

    def _noting(self, kind, name, body):
        key = f"{kind.__name__}.{name}"
        self._used.setdefault(key, 0)

        def noting(*args, **kwargs):
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if not caller.startswith("e2b"):
                self._used[key] += 1
            return body(*args, **kwargs)

        return noting

    def unused(self):
        return sorted(key for key, count in self._used.items() if not count)

    def count(self):
        return len(self._used)


class Heard:
    """What came so far, and a way to wait for more. Told from any thread."""

    def __init__(self):
        self._loop = asyncio.get_running_loop()
        self._grown = asyncio.Event()
        self.out, self.err, self.terminal = "", "", b""

    def note(self, out="", err="", terminal=b""):
        self.out, self.err = self.out + out, self.err + err
        self.terminal += terminal
        self._loop.call_soon_threadsafe(self._grown.set)

    async def until(self, what, probe, deadline_s=COMMAND_S):
        async def wait():
            while not probe():
                self._grown.clear()
                await self._grown.wait()

        try:
            await asyncio.wait_for(wait(), deadline_s)
        except asyncio.TimeoutError:
            so_far = self.terminal[-200:] or (self.out[-200:], self.err[-200:])
            raise AssertionError(f"not within {deadline_s} s: {what}; came {so_far!r}") from None


class Running(Heard):
    """A command or terminal in the background. `handle` is the SDK's."""

    def __init__(self, box, handle=None):
        super().__init__()
        self._box = box
        self._ended = None
        if handle is not None:
            self.took(handle)

    def took(self, handle):
        self._box.recorder.watch(handle)
        self.handle = handle
        self.pid = handle.pid
        return self

    def listen(self):
        """Has the synchronous SDK read: it does so only when asked. The other always does."""
        if self._box.name == "sync" and self._ended is None:
            self._ended = asyncio.ensure_future(
                in_thread(
                    self.handle.wait,
                    on_stdout=lambda text: self.note(out=text),
                    on_stderr=lambda text: self.note(err=text),
                    on_pty=lambda data: self.note(terminal=data),
                )
            )
            # Some scenarios do not care how it ends.
            self._ended.add_done_callback(lambda task: task.cancelled() or task.exception())
        return self

    async def wait(self):
        if self._box.name == "async":
            return await self.handle.wait()
        self.listen()
        return await asyncio.shield(self._ended)

    async def heard(self, text):
        await self.until(f"{text!r} on stdout", lambda: text in self.out)

    async def shown(self, data):
        await self.until(f"{data!r} on the terminal", lambda: data in self.terminal)

    async def _call(self, name, *args, **kwargs):
        member = getattr(self.handle, name)
        if self._box.name == "async":
            return await member(*args, **kwargs)
        return await in_thread(member, *args, **kwargs)

    async def kill(self):
        return await self._call("kill")

    async def send_stdin(self, data):
        await self._call("send_stdin", data)

    async def close_stdin(self):
        await self._call("close_stdin")

    async def disconnect(self):
        """For the synchronous SDK only before `listen`: it closes what `listen` reads."""
        await self._call("disconnect")


class Watch:
    """A watch and what it has reported."""

    def __init__(self, box):
        self._box = box
        self.events, self.exits = [], []
        self.handle = None

    async def refresh(self):
        if self._box.name == "sync":
            self.events += await in_thread(self.handle.get_new_events)

    async def until(self, what, probe, deadline_s=60):
        async def asked():
            await self.refresh()
            return probe(self.events)

        try:
            await auntil(deadline_s, what, asked, pause_s=0.05)
        except AssertionError as error:
            last = [(event.type.value, event.name) for event in self.events[-12:]]
            raise AssertionError(f"{error}; {len(self.events)} came, the last {last}") from None

    async def saw(self, kind, name):
        def probe(events):
            return any(event.type.value == kind and event.name == name for event in events)

        await self.until(f"{kind} of {name}", probe)

    async def stop(self):
        stop = self.handle.stop
        await (stop() if self._box.name == "async" else in_thread(stop))


class Box:
    """A sandbox and the verbs."""

    def __init__(self, target, sandbox, recorder):
        self.target, self.scale = target, target.scale
        self.sandbox, self.recorder = sandbox, recorder
        recorder.watch(sandbox, only=("is_running",))
        for part in (sandbox.commands, sandbox.pty, sandbox.files, sandbox.git):
            recorder.watch(part)

    def path(self, name):
        return f"{self.target.base}/{name}"

    async def run(self, command, **options):
        """`commands.run` to its end."""
        return await self.commands.run(command, **{"timeout": COMMAND_S, **options})

    async def shell(self, command, **options):
        """The output of a command that only sets a scene; as root, in the suite's folder."""
        options = {"user": "root", "cwd": self.target.base, **options}
        return (await self.run(command, **options)).stdout


class SyncBox(Box):
    name = "sync"

    def __init__(self, target, sandbox, recorder):
        super().__init__(target, sandbox, recorder)
        self.commands, self.files = Threaded(sandbox.commands), Threaded(sandbox.files)
        self.git, self.pty = Threaded(sandbox.git), Threaded(sandbox.pty)

    @classmethod
    async def create(cls, target, recorder, **options):
        from e2b import Sandbox

        return cls(target, await in_thread(Sandbox.create, "base", **options), recorder)

    async def is_running(self):
        return await in_thread(self.sandbox.is_running)

    async def start(self, command, listen=True, **options):
        options = {"timeout": COMMAND_S, **options}
        handle = await self.commands.run(command, background=True, **options)
        running = Running(self, handle)
        return running.listen() if listen else running

    async def attach(self, pid, listen=True, **options):
        options = {"timeout": COMMAND_S, **options}
        running = Running(self, await self.commands.connect(pid, **options))
        return running.listen() if listen else running

    async def feed(self, pid, pieces):
        await self.commands.stream_input(pid, pieces, timeout=0)

    async def feed_terminal(self, pid, pieces):
        await self.pty.stream_input(pid, pieces, timeout=0)

    async def terminal(self, size, **options):
        options = {"timeout": COMMAND_S, **options}
        return Running(self, await self.pty.create(size, **options)).listen()

    async def attach_terminal(self, pid, listen=True, **options):
        running = Running(self, await self.pty.connect(pid, **{"timeout": COMMAND_S, **options}))
        return running.listen() if listen else running

    async def upload(self, path, pieces, **options):
        return await self.files.write(path, iter(pieces), **options)

    async def download(self, path, take, **options):
        def read():
            with self.sandbox.files.read(path, format="stream", **options) as stream:
                for piece in stream:
                    take(piece)

        await in_thread(read)

    async def watch(self, path, **options):
        watch = Watch(self)
        watch.handle = await self.files.watch_dir(path, **options)
        self.recorder.watch(watch.handle)
        return watch


class AsyncBox(Box):
    name = "async"

    def __init__(self, target, sandbox, recorder):
        super().__init__(target, sandbox, recorder)
        self.commands, self.files = sandbox.commands, sandbox.files
        self.git, self.pty = sandbox.git, sandbox.pty

    @classmethod
    async def create(cls, target, recorder, **options):
        from e2b import AsyncSandbox

        return cls(target, await AsyncSandbox.create("base", **options), recorder)

    async def is_running(self):
        return await self.sandbox.is_running()

    async def start(self, command, listen=True, **options):
        running = Running(self)
        options = {"timeout": COMMAND_S, **self._hearing(running), **options}
        return running.took(await self.commands.run(command, background=True, **options))

    async def attach(self, pid, listen=True, **options):
        running = Running(self)
        options = {"timeout": COMMAND_S, **self._hearing(running), **options}
        return running.took(await self.commands.connect(pid, **options))

    def _hearing(self, running):
        return {
            "on_stdout": lambda text: running.note(out=text),
            "on_stderr": lambda text: running.note(err=text),
        }

    async def feed(self, pid, pieces):
        await self._feed(self.commands.stream_input(pid, timeout=0), pieces)

    async def feed_terminal(self, pid, pieces):
        await self._feed(self.pty.stream_input(pid, timeout=0), pieces)

    async def _feed(self, handle, pieces):
        self.recorder.watch(handle)
        async with handle:
            for piece in pieces:
                await handle.send(piece)
            await handle.close()

    async def terminal(self, size, **options):
        running = Running(self)
        options = {"timeout": COMMAND_S, **options}
        handle = await self.pty.create(
            size, on_data=lambda data: running.note(terminal=data), **options
        )
        return running.took(handle)

    async def attach_terminal(self, pid, listen=True, **options):
        running = Running(self)
        options = {"timeout": COMMAND_S, **options}
        handle = await self.pty.connect(
            pid, on_data=lambda data: running.note(terminal=data), **options
        )
        return running.took(handle)

    async def upload(self, path, pieces, **options):
        async def stream():
            for piece in pieces:
                yield piece

        return await self.files.write(path, stream(), **options)

    async def download(self, path, take, **options):
        async with await self.files.read(path, format="stream", **options) as stream:
            async for piece in stream:
                take(piece)

    async def watch(self, path, **options):
        watch = Watch(self)
        watch.handle = await self.files.watch_dir(
            path, watch.events.append, on_exit=watch.exits.append, timeout=0, **options
        )
        self.recorder.watch(watch.handle)
        return watch


def every_member_used(recorder):
    unused = recorder.unused()
    true(not unused, f"never called: {', '.join(unused)}")
