"""Where the guest suites run: in a sandbox of a live server, or against a daemon of their own.

Without BELLJAR_ENVD it is a sandbox. With it, the path of a `belljar-envd`, that program is
started in host mode on this machine and the SDKs are pointed at it by their debug mode: the same
daemon, without an emulated CPU, so that every size is the full one.
"""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

import raw
from checks import until

START_S = 20
STOP_S = 20
MIB = 1024 * 1024
SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Scale:
    """How much of everything. The issue's figures, except where an emulated CPU makes them cost
    minutes: there, each figure is reached by one suite (`full`) and the others stay small."""

    big_file: int
    long_output: int
    stdin: int
    entries: int
    at_once: int
    burst: int


NATIVE = Scale(
    big_file=1024 * MIB,
    long_output=64 * MIB,
    stdin=100 * MIB,
    entries=10_000,
    at_once=100,
    burst=2000,
)
LIVE = Scale(
    big_file=16 * MIB,
    long_output=4 * MIB,
    stdin=2 * MIB,
    entries=500,
    at_once=8,
    burst=100,
)


class Target:
    """Use as a context manager around a suite. Everything below `folder` is the suite's."""

    native = False
    user, home = "user", "/home/user"
    other_user = "root"
    scale = LIVE

    def __init__(self, **full):
        self.folder = f"guest suite {uuid.uuid4().hex[:8]}"
        self.base = f"{self.home}/{self.folder}"
        self.scale = Scale(**{**vars(self.scale), **full})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return False

    def remarks(self):
        """What there is to say about the daemon at the end of a run."""
        return []


class NativeTarget(Target):
    native = True
    scale = NATIVE

    def __init__(self, program):
        account = pwd.getpwuid(os.getuid())
        self.user, self.home = account.pw_name, account.pw_dir
        self.other_user = "nobody"
        self._program = program
        super().__init__()

    def __enter__(self):
        self._log = tempfile.TemporaryFile()
        # Beside what it stands in for: on the same disk, with the same features.
        self._scratch = tempfile.mkdtemp(prefix=".guest-suite-", dir=self.home)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        self._daemon = subprocess.Popen(
            self._command(port),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env={"PATH": SEARCH_PATH, "HOME": self.home},
        )
        os.environ.update(E2B_DEBUG="true", E2B_SANDBOX_URL=url)
        try:
            until(START_S, "the daemon answers", lambda: self._answers(url), pause_s=0.05)
        except BaseException:
            self._stop()
            raise
        return self

    def _command(self, port):
        """For root, in a mount namespace where the home is an empty folder: no login script of
        whoever runs this takes part, and nothing of theirs can be harmed."""
        listen = ["--host-mode", "--listen", f"127.0.0.1:{port}"]
        if os.getuid() != 0:
            return [self._program, *listen]
        program = shutil.copy(self._program, self._scratch)  # it may lie below the home itself
        script = 'mount --bind "$1" "$HOME" && cd "$HOME" && shift && exec "$@"'
        inside = f"{self.home}/{os.path.basename(program)}"
        return ["unshare", "--mount", "sh", "-c", script, "sh", self._scratch, inside, *listen]

    def __exit__(self, *_):
        self._stop()
        return False

    def remarks(self):
        status = Path(f"/proc/{self._daemon.pid}/status").read_text()
        sizes = dict(line.split(":", 1) for line in status.splitlines())
        return [
            f"daemon: {sizes['VmRSS'].strip()} resident at the end, "
            f"{sizes['VmHWM'].strip()} at most, {sizes['Threads'].strip()} threads"
        ]

    def _answers(self, url):
        if self._daemon.poll() is not None:
            self._log.seek(0)
            said = self._log.read()[-500:].decode("utf-8", "replace")
            raise RuntimeError(f"the daemon ended with {self._daemon.returncode}: {said}")
        try:
            return raw.request(url, "GET", "/health", timeout_s=5).status == 204
        except OSError:
            return False

    def _stop(self):
        self._daemon.send_signal(signal.SIGTERM)
        try:
            self._daemon.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._daemon.kill()
            self._daemon.wait()
            raise AssertionError(f"the daemon ignored SIGTERM for {STOP_S} s") from None
        finally:
            self._log.close()
            for folder in (self.base, self._scratch):
                shutil.rmtree(folder, ignore_errors=True)


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def target(**full):
    """The target the environment asks for. `full` names sizes of a live run that this suite takes
    in full."""
    program = os.environ.get("BELLJAR_ENVD")
    if program:
        return NativeTarget(program)
    return Target(**full)
