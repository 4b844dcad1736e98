"""A list of checks, run in order, one line each, every one with a deadline.

Lines on stdout:
    ok NAME (MS ms)
    FAIL NAME: reason
    skip NAME: reason
    # a remark
After a FAIL for a deadline, remarks say where the calls that did not come back are stuck. The exit
code is 1 if any check failed. A check that needs the result of one that did not pass is skipped.
Every sandbox a suite creates carries the suite's tag in its metadata; at the end the suite kills
what still carries it, so that a run which died half-way leaves nothing either.
"""

import asyncio
import os
import signal
import sys
import threading
import time
import traceback
import uuid

import raw

DEADLINE_S = 120
STUCK_FRAMES = 8  # of a call that does not come back: enough to see which lock or socket holds it


class Skip(Exception):
    """Raised by a check that cannot be made here; its text says why."""


def say(line):
    print(line, flush=True)


class Suite:
    def __init__(self, prefix, on_server=True):
        """`on_server` is false for a suite that talks to a daemon of its own: there are no
        settings to look for, and no sandboxes to clean up."""
        self.prefix = prefix
        self.on_server = on_server
        self.tag = f"{prefix}-{uuid.uuid4().hex[:12]}"
        self.failed = 0
        self._threads = []

    @property
    def metadata(self):
        return {"run": self.tag}

    def __enter__(self):
        if self.on_server:
            for name in ("E2B_API_KEY", "E2B_API_URL", "E2B_SANDBOX_URL"):
                raw.setting(name)
        # A polite kill unwinds like an exception, so that the clean-up below runs.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        return self

    def __exit__(self, kind, error, trace):
        if error is not None and not isinstance(error, SystemExit):
            self._fail("suite", error)
        if self.on_server:
            self._kill_all()
        code = error.code if isinstance(error, SystemExit) else int(self.failed > 0)
        if not self.idle():
            # What overran its deadline or was interrupted still holds a thread, deep inside the
            # SDK; the interpreter could not end in peace.
            sys.stdout.flush()
            os._exit(code)
        sys.exit(code)

    def check(self, name, body, *args, deadline_s=DEADLINE_S):
        """Runs `body(*args)` in a thread; returns what it returns, None if it did not pass."""
        if self._lacks_input(name, args):
            return None
        outcome = {}

        def run():
            try:
                outcome["value"] = body(*args)
            except BaseException as error:  # a check must not be able to end the suite
                outcome["error"] = error

        started = time.monotonic()
        thread = threading.Thread(target=run, daemon=True)
        self._threads.append(thread)
        thread.start()
        thread.join(deadline_s)
        if thread.is_alive():
            outcome["error"] = TimeoutError(f"no result within {deadline_s} s")
            outcome["stuck"] = stacks_of_others()
        return self._report(name, started, outcome)

    async def acheck(self, name, body, *args, deadline_s=DEADLINE_S):
        """The same for a coroutine function."""
        if self._lacks_input(name, args):
            return None
        outcome = {}
        started = time.monotonic()
        try:
            outcome["value"] = await asyncio.wait_for(body(*args), deadline_s)
        except asyncio.TimeoutError as error:
            outcome["error"] = error
            if time.monotonic() - started >= deadline_s:
                outcome["error"] = TimeoutError(f"no result within {deadline_s} s")
                # Where the cancellation met the coroutine, and threads it could not reach.
                met = traceback.extract_tb((error.__cause__ or error).__traceback__)
                outcome["stuck"] = [("coroutine", met), *stacks_of_others()]
        except Exception as error:
            outcome["error"] = error
        return self._report(name, started, outcome)

    def remark(self, text):
        say(f"# {self.prefix}.{text}")

    def _lacks_input(self, name, args):
        if any(argument is None for argument in args):
            say(f"skip {self.prefix}.{name}: needs an earlier check that did not pass")
            return True
        return False

    def _report(self, name, started, outcome):
        error = outcome.get("error")
        if error is None:
            say(f"ok {self.prefix}.{name} ({(time.monotonic() - started) * 1000:.0f} ms)")
            return outcome.get("value")
        if isinstance(error, Skip):
            say(f"skip {self.prefix}.{name}: {error}")
        else:
            self._fail(name, error)
            for line in stuck_lines(outcome.get("stuck", [])):
                self.remark(f"{name}: {line}")
        return None

    def idle(self):
        """Whether no check that overran its deadline still runs."""
        return not any(thread.is_alive() for thread in self._threads)

    def _fail(self, name, error):
        self.failed += 1
        where = ""  # the innermost line of a suite
        for frame in traceback.extract_tb(error.__traceback__):
            if in_suite(frame):
                where = f" [{os.path.basename(frame.filename)}:{frame.lineno}]"
        text = " ".join(str(error).split()) or "no reason given"
        say(f"FAIL {self.prefix}.{name}: {type(error).__name__}: {text[:500]}{where}")

    def _kill_all(self):
        """Kills what still carries the tag, and fails if any of it survives that."""
        try:
            for sandbox_id in raw.tagged_ids(self.tag):
                raw.api("DELETE", f"/sandboxes/{sandbox_id}")
            left = raw.tagged_ids(self.tag)
            if left:
                raise AssertionError(f"still listed after kill: {left}")
            say(f"ok {self.prefix}.nothing_left")
        except Exception as error:
            self._fail("nothing_left", error)


def stacks_of_others():
    """Name and stack of every thread but the caller's, as they are at this moment."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return [
        (names.get(ident, str(ident)), traceback.extract_stack(frame))
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]


def stuck_lines(stacks):
    """The innermost frames of the stacks that pass through a suite, one line for each stack: those
    are calls that do not come back. Threads that merely wait for work have no such frame."""
    for name, stack in stacks:
        own = [frame for frame in stack if in_suite(frame)]
        if own:
            inner = stack[-STUCK_FRAMES:]
            shown = inner if own[-1] in inner else own[-1:] + inner
            places = [f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in shown]
            yield f"{name} is stuck in {' > '.join(places)}"


def in_suite(frame):
    """Whether a line is of the programs beside this file or in a folder beside theirs: neither the
    SDK's nor this file's."""
    folder, file = os.path.split(os.path.abspath(frame.filename))
    here, this = os.path.split(os.path.abspath(__file__))
    return os.path.dirname(folder) == os.path.dirname(here) and file != this


def equal(found, wanted, what):
    if found != wanted:
        raise AssertionError(f"{what}: found {found!r}, wanted {wanted!r}")


def true(condition, what):
    if not condition:
        raise AssertionError(what)


def raises(kind, body, *args, **kwargs):
    """Calls and returns the exception, which must be of `kind`."""
    try:
        value = body(*args, **kwargs)
    except kind as error:
        return error
    raise AssertionError(f"wanted {kind.__name__}, got the value {value!r}")


async def araises(kind, awaitable):
    try:
        value = await awaitable
    except kind as error:
        return error
    raise AssertionError(f"wanted {kind.__name__}, got the value {value!r}")


def until(deadline_s, what, probe, pause_s=0.2):
    """Asks `probe` until it gives something true; for conditions only the server can announce."""
    end = time.monotonic() + deadline_s
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s} s: {what}")
        time.sleep(pause_s)


async def auntil(deadline_s, what, probe, pause_s=0.2):
    end = time.monotonic() + deadline_s
    while True:
        value = await probe()
        if value:
            return value
        if time.monotonic() > end:
            raise AssertionError(f"not within {deadline_s} s: {what}")
        await asyncio.sleep(pause_s)
