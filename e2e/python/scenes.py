"""What the Python suites ask a sandbox to do and how they judge what comes back.

The sandbox may be a machine with an emulated CPU, some thirty times slower than the host: commands
are few, and none is timed except to prove order.
"""

import shlex
import time
from datetime import datetime, timezone

from checks import equal, true

COMMAND_S = 120  # for one command on a busy emulated CPU
CLOCK_TOLERANCE_S = 2.0

# Prints on both streams, then runs on until the client, told by those lines, makes the file. If
# output came only at the end, the file would never be made and the command would never end.
STREAMED = (
    "echo first; echo warning >&2; until [ -e /tmp/go ]; do sleep 0.2; done; echo last; exit 3"
)

ENVIRONMENT = 'echo "$GLOBAL|$LOCAL|$HOME|$USER|$E2B_SANDBOX|$(pwd)|$(id -un)"'

# Which sandbox answers, what its random pool gives, what time it thinks it is.
IDENTITY = 'echo "$E2B_SANDBOX_ID $(od -An -v -tx1 -N16 /dev/urandom | tr -d " ") $(date +%s.%N)"'

# A metadata value that must survive being encoded twice on its way into a list query.
AWKWARD = "a b&c=d/é+%20"

ALL_BYTES = bytes(range(256)) * 16

WEB_PORT = 8080
WEB_SERVER = f"exec python3 -m http.server {WEB_PORT}"


class Streamed:
    """What the callbacks of STREAMED heard."""

    def __init__(self):
        self.out = self.err = ""
        self._released = False

    def note(self, out="", err=""):
        """Notes a piece; True once, when both streams have spoken and the command may go on."""
        self.out, self.err = self.out + out, self.err + err
        release = bool(self.out and self.err) and not self._released
        self._released = self._released or release
        return release

    def judge(self, error):
        """`error` is the SDK's exit exception."""
        equal(error.exit_code, 3, "exit code")
        equal((error.stdout, error.stderr), ("first\nlast\n", "warning\n"), "result")
        equal((self.out, self.err), ("first\nlast\n", "warning\n"), "what the callbacks heard")


def judge_environment(line, user, home, cwd):
    equal(line.strip(), f"global|local|{home}|{user}|true|{cwd}|{user}", "environment")


def judge_info(info, sandbox_id, tag):
    equal(info.sandbox_id, sandbox_id, "sandbox id")
    equal(str(getattr(info.state, "value", info.state)), "running", "state")
    true(info.cpu_count >= 1, f"cpu count {info.cpu_count}")
    true(info.memory_mb >= 128, f"memory {info.memory_mb} MB")
    true(info.template_id, "no template id")
    equal(info.metadata.get("run"), tag, "metadata")
    now = datetime.now(timezone.utc)
    true(info.started_at <= now < info.end_at, f"not now: {info.started_at} to {info.end_at}")


def judge_end(info, seconds_from_now, slack_s=10):
    left = (info.end_at - datetime.now(timezone.utc)).total_seconds()
    true(abs(left - seconds_from_now) < slack_s, f"ends in {left:.1f} s, not {seconds_from_now}")


def judge_processes(processes, pid, command):
    found = [process for process in processes if process.pid == pid]
    equal(len(found), 1, f"processes with pid {pid}")
    equal(found[0].cmd, "/bin/bash", "cmd")
    equal(list(found[0].args), ["-l", "-c", command], "args")


def judge_entry(entry, name, path, size):
    equal(entry.name, name, "name")
    equal(entry.path, path, "path")
    equal(entry.type.value, "file", "type")
    equal(entry.size, size, "size")
    equal(entry.owner, "user", "owner")
    equal(entry.permissions, "-rw-r--r--", "permissions")
    equal(entry.mode & 0o777, 0o644, "mode")


class Identity:
    """One answer to IDENTITY, with the host's clock before and after asking."""

    def __init__(self, line, asked_at, answered_at):
        self.sandbox_id, self.random, clock = line.split()
        self.clock = float(clock)
        self.asked_at, self.answered_at = asked_at, answered_at

    def judge_clock(self):
        early, late = self.asked_at - self.clock, self.clock - self.answered_at
        true(
            max(early, late) < CLOCK_TOLERANCE_S,
            f"the guest's clock is off by {max(early, late):.2f} s",
        )


def judge_clones(ids, answers):
    """Every sandbox answered as itself, with random bytes no sibling has."""
    equal([answer.sandbox_id for answer in answers], ids, "ids")
    equal(len({answer.random for answer in answers}), len(ids), "distinct random bytes")
    for answer in answers:
        equal(len(answer.random), 32, "hex digits of 16 random bytes")
        answer.judge_clock()


# Opens every address given, all at once, and names those that answered within five seconds.
# `gateway` stands for the guest's own default route.
_REACH = """
import errno, select, socket, struct, sys, time
gateway = "127.255.255.254"
for line in open("/proc/net/route").read().splitlines()[1:]:
    field = line.split()
    if field[1] == "00000000":
        gateway = socket.inet_ntoa(struct.pack("<L", int(field[2], 16)))
waiting, reached = {}, []
for target in sys.argv[1:]:
    host, port = target.rsplit(":", 1)
    s = socket.socket()
    s.setblocking(False)
    code = s.connect_ex((gateway if host == "gateway" else host, int(port)))
    if code == 0:
        reached.append(target)
    elif code == errno.EINPROGRESS:
        waiting[s] = target
end = time.monotonic() + 5
while waiting and time.monotonic() < end:
    for s in select.select([], list(waiting), [], 0.5)[1]:
        target = waiting.pop(s)
        if s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
            reached.append(target)
print("reached " + " ".join(sorted(reached)))
"""
OWN_DAEMON = "127.0.0.1:49983"


def reach(targets):
    """A command that tries every `address:port`, and one that must answer: the guest's daemon."""
    return shlex.join(["python3", "-c", _REACH, OWN_DAEMON, *targets])


def judge_reach(output):
    """Only the guest's own daemon may have answered; that it did shows the probe works."""
    equal(output.split(), ["reached", OWN_DAEMON], "what the sandbox could connect to")


def now():
    return time.time()
