"""What a sandbox's own programs can do to it: nothing takes the daemon down, and it can be held still.

Plain HTTP with the standard library. The host-only routes of the daemon are tried from inside, by root
in a control group of its own, since the proxy lets nobody reach them. See ../README.md.
"""

import base64
import json
import statistics
import struct
import threading
import time

import raw
from checks import Suite, equal, true, until
from raw import END_OF_STREAM, ENVD_PORT, RawSandbox, envelopes, read_process_stream, routed

suite = Suite("limits")
HOST_ONLY = ("init", "freeze", "unfreeze", "fsfreeze", "fsthaw", "collapse", "upgrade")
# A daemon that shared its processor with thousands of others would need minutes; an emulated CPU
# alone makes a request cost tens of milliseconds.
HEALTH_MEDIAN_S = 1.0
HEALTH_WORST_S = 10.0
# Long enough to be many; how many decides the processor, and whether ids or memory end first.
BOMB_S = 20
BOMB_PROCESSES_MIN = 200


class Background:
    """A command that runs while other things are tried. Its output is kept."""

    def __init__(self, sandbox, command, user="user", **fields):
        start = {"process": {"cmd": "/bin/bash", "args": ["-c", command]}, "stdin": False, **fields}
        payload = json.dumps(start).encode()
        headers = {
            **routed(sandbox.id, token=sandbox.token),
            "Content-Type": "application/connect+json",
            "Connect-Protocol-Version": "1",
            "Authorization": "Basic " + base64.b64encode(f"{user}:".encode()).decode(),
        }
        self._connection = raw.open_connection(raw.setting("E2B_SANDBOX_URL"), 300)
        body = struct.pack(">BI", 0, len(payload)) + payload
        self._connection.request("POST", "/process.Process/Start", body, headers)
        self._stream = self._connection.getresponse()
        first = self._frame()
        _, message = next(envelopes(first))
        true("event" in message, f"the start answered {message}")
        self.pid = message["event"]["start"]["pid"]
        self.bytes, self.end, self.error = b"", None, None
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _frame(self):
        head = self._stream.read(5)
        return head + self._stream.read(struct.unpack(">I", head[1:])[0])

    def _read(self):
        try:
            last = 0
            while not last & END_OF_STREAM:
                frame = self._frame()
                last = frame[0]
                self.bytes += frame
                for _, message in envelopes(frame):
                    self.end = message.get("event", {}).get("end", self.end)
        except Exception as error:  # for whoever waits, in another thread
            self.error = error
        self._connection.close()

    def wait(self, limit_s):
        """The end event; the command must end by itself or have been killed."""
        self._reader.join(limit_s)
        true(not self._reader.is_alive(), f"the command still runs after {limit_s} s")
        true(self.end is not None, f"the command's stream broke off: {self.error!r}")
        return self.end

    @property
    def is_running(self):
        return self._reader.is_alive()


class Health:
    """Asks the daemon for its health, each time on a new connection."""

    def __init__(self, sandbox):
        self.sandbox, self.took_s = sandbox, []

    def ask(self):
        started = time.monotonic()
        answer = raw.to_port(self.sandbox.id, ENVD_PORT, "/health", timeout_s=30)
        self.took_s.append(time.monotonic() - started)
        equal(answer.status, 204, "health")

    def ask_while(self, condition, pause_s=0.2):
        while condition():
            self.ask()
            time.sleep(pause_s)

    def judge(self, what):
        median, worst = statistics.median(self.took_s), max(self.took_s)
        suite.remark(
            f"{what}: {len(self.took_s)} times healthy, median {median * 1000:.0f} ms,"
            f" worst {worst * 1000:.0f} ms"
        )
        true(median < HEALTH_MEDIAN_S, f"the median answer took {median:.2f} s")
        true(worst < HEALTH_WORST_S, f"the slowest answer took {worst:.2f} s")


def read(sandbox, path):
    code, out, err = sandbox.run(f"cat {path}", user="root")
    equal(code, 0, f"reading {path}: {err}")
    return out.strip()


def counter(sandbox, path, name):
    """One number of a control group's `name value` lines."""
    return int(dict(line.split() for line in read(sandbox, path).splitlines())[name])


# --- who is where -------------------------------------------------------------------------------


def groups(sandbox):
    code, out, _ = sandbox.run("cat /proc/self/cgroup /proc/self/oom_score_adj")
    equal((code, out.split()), (0, ["0::/sandbox/user", "100"]), "a command")
    terminal = Background(
        sandbox, "cat /proc/self/cgroup", pty={"size": {"cols": 80, "rows": 24}}, stdin=True
    )
    terminal.wait(60)
    data = [m["event"]["data"]["pty"] for _, m in envelopes(terminal.bytes)
            if "data" in m.get("event", {})]
    equal(b"".join(map(base64.b64decode, data)).strip(), b"0::/sandbox/pty", "a terminal")
    equal(read(sandbox, "/proc/1/cgroup"), "0::/daemon", "the daemon")
    equal(read(sandbox, "/proc/1/oom_score_adj"), "-1000", "the daemon's score")


def limits(sandbox):
    total = int(read(sandbox, "/proc/meminfo").split()[1]) * 1024
    reserve = min(total // 8, 128 * 1024 * 1024)
    page = 4096
    group = "/sys/fs/cgroup"
    most = int(read(sandbox, f"{group}/sandbox/memory.max"))
    true(abs(most - (total - reserve)) <= page, f"{most} of {total} bytes for user processes")
    true(int(read(sandbox, f"{group}/daemon/memory.min")) > 0, "memory kept for the daemon")
    threads = int(read(sandbox, "/proc/sys/kernel/threads-max"))
    ids = int(read(sandbox, "/proc/sys/kernel/pid_max"))
    true(int(read(sandbox, f"{group}/sandbox/pids.max")) < min(threads, ids), "process ids are left")
    weights = [int(read(sandbox, f"{group}/{name}/cpu.weight")) for name in ("daemon", "sandbox")]
    true(weights[0] > weights[1], f"processor weights {weights}")


def containers(sandbox):
    """Root may make limited groups beside ours, as container engines do."""
    script = """set -e; g=/sys/fs/cgroup/mine; mkdir $g; echo 64M > $g/memory.max
    (echo 0 > $g/cgroup.procs; cat /proc/self/cgroup); rmdir $g"""
    equal(sandbox.run(script, user="root"), (0, "0::/mine\n", ""), "a group of root's own")


# --- hostile programs ---------------------------------------------------------------------------


def fork_bomb(sandbox):
    bomb = Background(sandbox, "exec 2>/dev/null; :(){ :|:& };:; exec sleep 600")
    health, end = Health(sandbox), time.monotonic() + BOMB_S
    health.ask_while(lambda: time.monotonic() < end)
    killed = sandbox.unary(
        "process.Process/SendSignal", {"process": {"pid": bomb.pid}, "signal": "SIGNAL_SIGKILL"}
    )
    equal(killed.status, 200, f"kill: {killed}")
    health.ask_while(lambda: bomb.is_running)
    equal(bomb.wait(60)["status"], "signal: killed", "the end of the bomb")
    started = time.monotonic()
    equal(sandbox.run("echo alive")[:2], (0, "alive\n"), "a command after the bomb")
    suite.remark(f"fork_bomb: a command {time.monotonic() - started:.1f} s after the kill")
    health.judge("fork_bomb")
    group = "/sys/fs/cgroup/sandbox"
    true(int(read(sandbox, f"{group}/pids.peak")) > BOMB_PROCESSES_MIN, "the bomb went off")
    until(60, "the bomb is gone", lambda: int(read(sandbox, f"{group}/pids.current")) < 32)


HOG = "import sys; hog = []\nwhile True: hog.append(b'x' * (8 << 20))"


def memory_hog(sandbox):
    events = "/sys/fs/cgroup/sandbox/memory.events"
    before = counter(sandbox, events, "oom_kill")
    hog = Background(sandbox, f'exec python3 -c "{HOG}"')
    health = Health(sandbox)
    health.ask_while(lambda: hog.is_running)
    end = hog.wait(1)
    equal((end["status"], end["exitCode"]), ("signal: killed", -1), "the end of the hog")
    equal(sandbox.run("echo alive")[:2], (0, "alive\n"), "a command after the hog")
    health.judge("memory_hog")
    equal(counter(sandbox, events, "oom_kill"), before + 1, "processes killed for memory")


# --- holding still ------------------------------------------------------------------------------


def proxy_refuses(sandbox):
    for name in HOST_ONLY:
        answer = sandbox.envd("POST", f"/{name}", b"")
        equal((answer.status, answer.json()["code"]), (404, 404), name)


# Runs as root in the topmost control group, which is never frozen: `call` is a host's request.
INSIDE = """
import json, os, socket, subprocess, sys, time
sandbox = open("/run/e2b/.E2B_SANDBOX_ID").read()
if sandbox != os.environ.get("E2B_SANDBOX_ID"): sys.exit("no sandbox")
open("/sys/fs/cgroup/cgroup.procs", "w").write("0")
def call(path, body=b"", method="POST", token=%r):
    head = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close"]
    head += [f"Content-Length: {len(body)}"] + ([f"X-Access-Token: {token}"] if token else [])
    with socket.create_connection(("127.0.0.1", %d), 60) as wire:
        wire.sendall("\\r\\n".join(head + ["", ""]).encode() + body)
        answer = b"".join(iter(lambda: wire.recv(65536), b""))
    head, _, body = answer.partition(b"\\r\\n\\r\\n")
    return int(head.split()[1]), body.decode()
def check(found, wanted, what):
    if found != wanted: sys.exit(f"{what}: found {found!r}, wanted {wanted!r}")
"""


def inside(sandbox, script):
    program = INSIDE % (sandbox.token, ENVD_PORT) + script
    equal(sandbox.upload("/root/inside.py", program.encode()).status, 200, "upload")
    code, out, err = sandbox.run("python3 -I -S /root/inside.py", user="root")
    equal(code, 0, f"inside: {out[-300:]} {err[-500:]}")
    return out


def freeze(sandbox):
    # A pause that costs no process: `read` waits on a pipe nobody writes.
    tick = "exec 3<> <(:); while :; do echo >> /dev/shm/ticks; read -t 0.05 -u 3; done"
    ticker = Background(sandbox, tick)
    script = """
def ticks(): return os.path.getsize("/dev/shm/ticks")
check(call("/freeze", token=None)[0], 401, "freeze without a token")
check(call("/freeze?maxWaitMs=99999999")[0], 400, "an endless wait")
check(call("/freeze?maxCgroups=1")[0], 409, "one group at most")
check(call("/freeze?mode=nonsense")[0], 400, "an unknown mode")
status, body = call("/freeze?mode=user&maxCgroups=512&maxWaitMs=20000")
answer = json.loads(body)
check((status, answer["frozen"], answer["cgroups"]), (200, True, 3), "freeze")
before = ticks()
time.sleep(2)
check(ticks(), before, "ticks while frozen")
check(call("/health", b"", "GET", None)[0], 204, "health while frozen")
check(call("/unfreeze")[0], 204, "unfreeze")
check(call("/unfreeze")[0], 204, "unfreeze again")
end = time.monotonic() + 60
while ticks() == before:
    if time.monotonic() > end: sys.exit("no tick after the thaw")
    time.sleep(0.1)
print("frozen after", answer["waitedMs"], "ms")
"""
    suite.remark(f"freeze: {inside(sandbox, script).strip()}")
    killed = sandbox.unary(
        "process.Process/SendSignal", {"process": {"pid": ticker.pid}, "signal": "SIGNAL_SIGKILL"}
    )
    equal(killed.status, 200, "kill of the ticker")
    ticker.wait(60)


def freeze_disks(sandbox):
    script = """
check(call("/fsfreeze", token=None)[0], 401, "fsfreeze without a token")
check(call("/fsthaw")[0], 204, "fsthaw of what is not frozen")
check(call("/fsfreeze")[0], 204, "fsfreeze")
check(call("/fsfreeze")[0], 204, "fsfreeze again")
writer = subprocess.Popen(["touch", "/root/while-frozen"])
try:
    writer.wait(2)
    sys.exit("a write went through while frozen")
except subprocess.TimeoutExpired: pass
check(call("/health", b"", "GET", None)[0], 204, "health while frozen")
check(open("/root/inside.py").readline(), "\\n", "reading while frozen")
check(call("/fsthaw")[0], 204, "fsthaw")
check(writer.wait(60), 0, "the write after the thaw")
check(os.path.exists("/root/while-frozen"), True, "the file after the thaw")
"""
    inside(sandbox, script)
    equal(sandbox.upload("after", b"x").status, 200, "upload after the thaw")


def not_implemented(sandbox):
    script = """
for name in ("collapse", "upgrade"):
    status, body = call("/" + name)
    check((status, json.loads(body)["code"], "not implemented" in body), (501, 501, True), name)
"""
    inside(sandbox, script)


# --- what a host tells it -----------------------------------------------------------------------


def kernel_settings(sandbox):
    """What an init of a distribution sets; the daemon's rules on links count on the first two."""
    names = ("hardlinks", "symlinks", "regular", "fifos")
    found = [read(sandbox, f"/proc/sys/fs/protected_{name}") for name in names]
    equal(found, ["1"] * len(names), "protections of links and shared folders")


def clock_source(sandbox):
    """A clock that counts timer ticks loses those that a busy host delivers late."""
    source = read(sandbox, "/sys/devices/system/clocksource/clocksource0/current_clocksource")
    true(source in ("tsc", "kvm-clock"), f"the guest tells time by {source}; build its template again")


def clock(sandbox):
    """Set back by years: what waits for a length of time still waits that long."""
    sleeper = Background(sandbox, "sleep 4; echo slept")
    script = """
before, started = time.time(), time.monotonic()
body = json.dumps({"timestamp": "2001-02-03T04:05:06Z"}).encode()
check(call("/init", body)[0], 204, "init")
check(time.strftime("%Y-%m-%d", time.gmtime()), "2001-02-03", "the date after")
later = time.gmtime(before + time.monotonic() - started)
body = json.dumps({"timestamp": time.strftime("%Y-%m-%dT%H:%M:%SZ", later)}).encode()
check(call("/init", body)[0], 204, "init")
check(abs(time.time() - before) < 60, True, "the clock at the end")
"""
    inside(sandbox, script)
    equal(sleeper.wait(60)["status"], "exit status 0", "the sleeper")
    equal(read_process_stream(sleeper.bytes)[1], "slept\n", "the sleeper's word")


def authorities(sandbox):
    script = """
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
read = lambda: open(BUNDLE).read() if os.path.exists(BUNDLE) else ""
own = read()
pem = "-----BEGIN CERTIFICATE-----\\nMAMBAf8=\\n-----END CERTIFICATE-----\\n"
init = lambda **fields: call("/init", json.dumps(fields).encode())[0]
for _ in range(2):
    check(init(caBundle=pem), 204, "init with a bundle")
    check(read().count(pem), 1, "the authority in the bundle")
check(read().startswith(own), True, "the machine's own authorities")
check(init(caBundle="hello"), 400, "init with nonsense")
check(init(caBundle=""), 204, "init without a bundle")
check(read().strip(), own.strip(), "the bundle afterwards")
check(init(volumeMounts=[{"nfs_target": "x", "path": "/y"}]), 400, "init with a volume")
"""
    inside(sandbox, script)


def main():
    with suite:
        sandbox = suite.check("create", lambda: RawSandbox(suite.tag))
        for body in (groups, limits, containers, proxy_refuses):
            suite.check(body.__name__, body, sandbox)
        suite.check("memory_hog", memory_hog, sandbox, deadline_s=300)
        suite.check("fork_bomb", fork_bomb, sandbox, deadline_s=300)
        for body in (kernel_settings, freeze, freeze_disks, not_implemented, clock_source, clock, authorities):
            suite.check(body.__name__, body, sandbox, deadline_s=300)


if __name__ == "__main__":
    main()
