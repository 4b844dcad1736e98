"""A list of checks, run in order, one line each, every one with a deadline.

Lines on stdout:
    ok NAME (MS ms)
    FAIL NAME: reason
    skip NAME: reason
    # a remark
The exit code is 1 if any check failed. A check that needs the result of one that did not pass is
skipped. Every sandbox a suite creates carries the suite's tag in its metadata; at the end the suite
kills what still carries it, so that a run which died half-way leaves nothing either.
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
        if any(thread.is_alive() for thread in self._threads):
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
            late = time.monotonic() - started >= deadline_s
            outcome["error"] = TimeoutError(f"no result within {deadline_s} s") if late else error
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
        return None

    def _fail(self, name, error):
        self.failed += 1
        where = ""  # the innermost line of a suite: neither the SDK's nor this file's
        for frame in traceback.extract_tb(error.__traceback__):
            folder, file = os.path.split(frame.filename)
            if folder == os.path.dirname(__file__) and file != os.path.basename(__file__):
                where = f" [{file}:{frame.lineno}]"
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
