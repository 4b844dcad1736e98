"""Runs the official command line as a user does: with pipes, or in a terminal.

It is found in `node_modules` beside this file. It gets a home of its own, so that no login of the
user who runs the suite takes part, and is told not to look for updates of itself.
"""

import codecs
import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import tempfile
import termios
import time
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent
ENTRY = FOLDER / "node_modules/@e2b/cli/dist/index.js"
COMMAND_S = 120
COLOURS = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07")


def pinned_version():
    return json.loads((FOLDER / "package.json").read_text())["dependencies"]["@e2b/cli"]


@dataclass
class Said:
    """How a run ended and what it printed, without colours."""

    code: int
    out: str
    err: str

    def json(self):
        return json.loads(self.out)

    def json_lines(self):
        return [json.loads(line) for line in self.out.splitlines() if line]

    def __str__(self):
        # An error comes first and its stack after it.
        return f"exit {self.code}, out {self.out[-300:]!r}, err {self.err[:300]!r}"


class Program:
    """The command line with its home. Use as a context manager."""

    def __enter__(self):
        self._home = tempfile.TemporaryDirectory()
        return self

    def __exit__(self, *_):
        self._home.cleanup()

    def environment(self, **changes):
        """The caller's, without what would change what the command line does. A change to None
        takes the variable away."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("E2B_", "FORCE_COLOR"))}
        for name in ("E2B_API_KEY", "E2B_API_URL", "E2B_SANDBOX_URL"):
            kept[name] = os.environ[name]
        kept |= {"HOME": self._home.name, "NO_UPDATE_NOTIFIER": "1", "TZ": "UTC", "TERM": "xterm"}
        kept |= changes
        return {name: value for name, value in kept.items() if value is not None}

    def start(self, *arguments, stdin=subprocess.DEVNULL, **changes):
        return subprocess.Popen(
            ["node", str(ENTRY), *arguments],
            stdin=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=self.environment(**changes),
        )

    def run(self, *arguments, stdin=None, timeout_s=COMMAND_S, **changes):
        """Runs it to its end. `stdin` is bytes for a pipe, None for a closed input; the other
        keywords change its environment."""
        process = self.start(
            *arguments, stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE, **changes
        )
        return self.finish(process, stdin, timeout_s)

    def finish(self, process, stdin=None, timeout_s=COMMAND_S):
        try:
            out, err = process.communicate(stdin, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            said = Said(-1, clean(out), clean(err))
            raise AssertionError(f"no end within {timeout_s} s; {said}") from None
        return Said(process.returncode, clean(out), clean(err))

    def terminal(self, *arguments, rows=24, columns=80):
        return Terminal(["node", str(ENTRY), *arguments], self.environment(), rows, columns)


class Terminal:
    """The program in a terminal of its own. Use as a context manager: it ends with it."""

    def __init__(self, arguments, environment, rows, columns):
        self.shown = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.code = None
        self._pid, self._master = pty.fork()
        if self._pid == 0:
            try:
                os.execvpe(arguments[0], arguments, environment)
            finally:
                os._exit(127)  # the program is missing
        self.resize(rows, columns)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.code is None:
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)
        os.close(self._master)

    def resize(self, rows, columns):
        """The kernel tells the program by a signal."""
        fcntl.ioctl(self._master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, text):
        os.write(self._master, text.encode())

    def until(self, wanted, deadline_s=COMMAND_S):
        """Reads on until `wanted` is shown after what was waited for before."""
        end = time.monotonic() + deadline_s
        while wanted not in self.shown:
            if not self._read(end):
                raise AssertionError(f"{wanted!r} was not shown, but {self.shown[-500:]!r}")
        self.shown = self.shown.split(wanted, 1)[1]

    def finish(self, deadline_s=COMMAND_S):
        """Reads to the end; gives the exit code."""
        end = time.monotonic() + deadline_s
        while self._read(end):
            pass
        while self.code is None:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif time.monotonic() > end:
                raise AssertionError(f"still runs after {deadline_s} s: {self.shown[-500:]!r}")
            else:
                time.sleep(0.05)
        return self.code

    def take(self, pattern, deadline_s=COMMAND_S):
        """Reads on until the pattern matches, and gives its first group."""
        end = time.monotonic() + deadline_s
        while not (found := re.search(pattern, self.shown)):
            if not self._read(end):
                raise AssertionError(f"{pattern!r} was not shown, but {self.shown[-500:]!r}")
        return found.group(1)

    def _read(self, end):
        """False at the end of the output and when time is up."""
        ready, _, _ = select.select([self._master], [], [], max(0, end - time.monotonic()))
        if not ready:
            return False
        try:
            piece = os.read(self._master, 65536)
        except OSError:  # Linux says EIO when the last process of the terminal is gone
            return False
        # A sequence that is cut by the end of the piece stays until its rest has come.
        self.shown = COLOURS.sub("", self.shown + self._decoder.decode(piece))
        return bool(piece)


def clean(data):
    return COLOURS.sub("", data.decode("utf-8", "replace"))
