#!/usr/bin/env python3
"""Create-to-first-answer against the raw mechanism, interleaved in one run.

The raw mechanism is QEMU by hand: the command line of a live sandbox of the server under test,
with a qcow2 file over the same base disk instead of the server's disk, in a namespace with a tap
made beforehand. It is timed from exec to (a) the guest's `ready` on its serial port and (b) the
guest daemon's first HTTP answer over the tap. The server is timed from sending the create request
to (a) its 201, which it gives once the guest said `ready`, and (b) the guest daemon's first HTTP
answer through the proxy. Ratios are server / raw, of medians.

Needs root, `ip` and `qemu-img`, and the variables E2B_API_KEY, E2B_API_URL and E2B_SANDBOX_URL of
a server started on this machine with `--data-dir DIR`. Standard library only.
"""

import argparse
import concurrent.futures
import ctypes
import fcntl
import http.client
import json
import os
import re
import shutil
import signal
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import urllib.parse

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TAP_NO_PI_VNET_HDR = 0x0002 | 0x1000 | 0x4000
GUEST = ("169.254.0.21", 49983)
GATEWAY = "169.254.0.22/30"
GATEWAY_MAC = "02:be:11:00:00:16"
GUEST_MAC = "02:be:11:00:00:15"
DEADLINE_S = 60


def enter(namespace):
    """Moves this thread into a network namespace."""
    fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    try:
        if LIBC.setns(fd, CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(fd)


class Server:
    """The server under test, over its two plain HTTP ports."""

    def __init__(self):
        self.key = os.environ["E2B_API_KEY"]
        self.api = urllib.parse.urlsplit(os.environ["E2B_API_URL"]).netloc
        self.traffic = urllib.parse.urlsplit(os.environ["E2B_SANDBOX_URL"]).netloc

    def call(self, method, path, body=None):
        connection = http.client.HTTPConnection(self.api, timeout=DEADLINE_S)
        headers = {"X-API-Key": self.key, "Content-Type": "application/json"}
        connection.request(method, path, json.dumps(body) if body is not None else None, headers)
        answer = connection.getresponse()
        data = answer.read()
        connection.close()
        if answer.status >= 300:
            raise RuntimeError(f"{method} {path}: {answer.status} {data[:300]!r}")
        return json.loads(data) if data else None

    def create(self, **more):
        """Answers (seconds to 201, seconds to the first HTTP answer, sandbox id)."""
        body = {"templateID": "base", "timeout": 300, **more}
        start = time.monotonic()
        sandbox = self.call("POST", "/v2/sandboxes", body)
        created = time.monotonic() - start
        connection = http.client.HTTPConnection(self.traffic, timeout=DEADLINE_S)
        headers = {"E2b-Sandbox-Id": sandbox["sandboxID"], "E2b-Sandbox-Port": "49983"}
        connection.request("GET", "/health", headers=headers)
        status = connection.getresponse().status
        answered = time.monotonic() - start
        connection.close()
        if status != 204:
            raise RuntimeError(f"/health through the proxy: {status}")
        return created, answered, sandbox["sandboxID"]

    def kill(self, sandbox_id):
        self.call("DELETE", f"/sandboxes/{sandbox_id}")


class Raw:
    """QEMU by hand, on the command line of one of the server's own sandboxes."""

    def __init__(self, server, folder, slots):
        self.folder = folder
        # Without internet access it is none that stood ready under another name.
        _, _, sandbox_id = server.create(allow_internet_access=False)
        try:
            self.args = self.command_line(sandbox_id)
        finally:
            server.kill(sandbox_id)
        self.slots = [f"bjbench{index}" for index in range(slots)]

    def open(self):
        for name in self.slots:
            self.make_namespace(name)

    @staticmethod
    def command_line(sandbox_id):
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                with open(f"/proc/{pid}/cmdline", "rb") as file:
                    text = file.read().decode(errors="replace")
                words = text.split("\0")[:-1]
                if "qemu-system" in words[0] and any(sandbox_id in word for word in words):
                    return [Raw.resolved(pid, word) for word in words]
            except (OSError, IndexError):
                continue
        raise RuntimeError(f"no QEMU process of sandbox {sandbox_id}")

    @staticmethod
    def resolved(pid, word):
        """Names the file behind a descriptor the live process was handed."""
        return re.sub(r"/proc/self/fd/(\d+)", lambda m: os.readlink(f"/proc/{pid}/fd/{m[1]}"), word)

    @staticmethod
    def make_namespace(name):
        # A run that was killed may have left one.
        subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)
        for command in (
            f"ip netns add {name}",
            f"ip -n {name} tuntap add tap0 mode tap vnet_hdr",
            f"ip -n {name} link set tap0 address {GATEWAY_MAC} up",
            f"ip -n {name} addr add {GATEWAY} dev tap0",
            f"ip -n {name} neigh replace {GUEST[0]} lladdr {GUEST_MAC} dev tap0 nud permanent",
        ):
            subprocess.run(command.split(), check=True)

    def close(self):
        for name in self.slots:
            subprocess.run(["ip", "netns", "del", name], check=False)

    def prepare(self, slot):
        """Makes the private disk, which is not timed."""
        memory = next(json.loads(w)["mem-path"] for w in self.args if "mem-path" in w)
        base = os.path.join(os.path.dirname(memory), "rootfs.ext4")
        disk = os.path.join(self.folder, f"{slot}.qcow2")
        if os.path.exists(disk):
            os.unlink(disk)
        create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, disk]
        subprocess.run(create, check=True)
        return os.path.join(os.path.dirname(memory), "state"), disk

    def arguments(self, disk, monitor, control, tap):
        args = []
        for word in self.args:
            if word.startswith("socket,id=monitor"):
                word = f"socket,id=monitor,fd={monitor}"
            elif word.startswith("socket,id=control"):
                word = f"socket,id=control,fd={control}"
            elif word.startswith("tap,id="):
                word = re.sub(r"fd=\d+", f"fd={tap}", word)
            elif '"node-name":"root"' in word:
                source = {"driver": "file", "filename": disk}
                word = json.dumps({"driver": "qcow2", "node-name": "root", "file": source})
            elif word.startswith("belljar-"):
                word = "bench-raw"
            args.append(word)
        return args

    def create(self, slot, state, disk):
        """Answers (seconds to `ready`, seconds to the first HTTP answer)."""
        monitor, monitor_end = socket.socketpair()
        control, control_end = socket.socketpair()
        tap = os.open("/dev/null", os.O_RDWR)

        def in_child():
            enter(slot)
            fd = os.open("/dev/net/tun", os.O_RDWR)
            name = struct.pack("16sH22x", b"tap0", IFF_TAP_NO_PI_VNET_HDR)
            fcntl.ioctl(fd, TUNSETIFF, name)
            os.dup2(fd, tap)
            os.set_inheritable(tap, True)

        args = self.arguments(disk, monitor_end.fileno(), control_end.fileno(), tap)
        start = time.monotonic()
        process = subprocess.Popen(
            args,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=(monitor_end.fileno(), control_end.fileno(), tap),
            preexec_fn=in_child,
        )
        try:
            monitor_end.close()
            control_end.close()
            os.close(tap)
            self.load(monitor, state)
            ready = self.become_ready(control, start)
            answered = self.first_http_answer(slot, start)
            return ready, answered
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            monitor.close()
            control.close()

    @staticmethod
    def load(monitor, state):
        monitor.settimeout(DEADLINE_S)
        lines = monitor.makefile("rb")
        lines.readline()
        capabilities = [{"capability": c, "state": True} for c in ("x-ignore-shared", "events")]
        address = {"transport": "file", "filename": state, "offset": 0}
        channel = {"channels": [{"channel-type": "main", "addr": address}]}
        for name, arguments in (
            ("qmp_capabilities", {}),
            ("migrate-set-capabilities", {"capabilities": capabilities}),
            ("migrate-incoming", channel),
        ):
            monitor.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
            while True:
                answer = json.loads(lines.readline())
                if "return" in answer:
                    break
                if "error" in answer:
                    raise RuntimeError(f"{name}: {answer['error']}")

    @staticmethod
    def become_ready(control, start):
        control.settimeout(DEADLINE_S)
        now = time.time_ns()
        init = {"type": "init", "nonce": 1, "sandbox_id": "ibench", "time_unix_ns": now,
                "entropy_hex": os.urandom(32).hex()}
        control.sendall(json.dumps(init).encode() + b"\n")
        lines = control.makefile("rb")
        while json.loads(lines.readline()).get("type") != "ready":
            pass
        return time.monotonic() - start

    @staticmethod
    def first_http_answer(slot, start):
        def ask():
            enter(slot)
            connection = http.client.HTTPConnection(*GUEST, timeout=DEADLINE_S)
            connection.request("GET", "/health")
            status = connection.getresponse().status
            taken = time.monotonic() - start
            connection.close()
            if status != 204:
                raise RuntimeError(f"/health of the raw guest: {status}")
            return taken

        # A thread of its own: it stays in the namespace until it ends.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            return thread.submit(ask).result()


def one_at_a_time(server, raw, rounds):
    ours, theirs = [], []
    for _ in range(rounds):
        state, disk = raw.prepare(raw.slots[0])
        theirs.append(raw.create(raw.slots[0], state, disk))
        created, answered, sandbox_id = server.create()
        server.kill(sandbox_id)
        ours.append((created, answered))
    return ours, theirs


def many_at_once(server, raw, count, rounds):
    """Each round's figure is when the last of `count` had answered."""
    ours, theirs = [], []
    with concurrent.futures.ThreadPoolExecutor(count) as threads:
        for _ in range(rounds):
            prepared = [(slot, *raw.prepare(slot)) for slot in raw.slots[:count]]
            taken = list(threads.map(lambda p: raw.create(*p), prepared))
            theirs.append(tuple(max(column) for column in zip(*taken)))
            taken = list(threads.map(lambda _: server.create(), range(count)))
            ours.append(tuple(max(column) for column in list(zip(*taken))[:2]))
            list(threads.map(lambda t: server.kill(t[2]), taken))
    return ours, theirs


def report(name, ours, theirs, limit):
    rows = []
    for column, what in enumerate(("ready", "first HTTP answer")):
        server = [row[column] * 1000 for row in ours]
        raw = [row[column] * 1000 for row in theirs]
        ratio = statistics.median(server) / statistics.median(raw)
        rows.append({
            "case": name, "to": what, "n": len(server), "limit": limit,
            "server_ms": round(statistics.median(server), 1),
            "server_range_ms": [round(min(server), 1), round(max(server), 1)],
            "raw_ms": round(statistics.median(raw), 1),
            "raw_range_ms": [round(min(raw), 1), round(max(raw), 1)],
            "ratio": round(ratio, 2), "met": ratio <= limit,
        })
    return rows


def resident_kib(pid):
    with open(f"/proc/{pid}/status") as file:
        return int(re.search(r"VmRSS:\s+(\d+)", file.read())[1])


def weigh(server, belljar, data_dir, envd):
    """What the server and the guest daemon weigh: rows like those of [report]."""
    with open(os.path.join(data_dir, "server.json")) as file:
        pid = json.load(file)["pid"]
    rows = [("server resident, no sandbox", resident_kib(pid), 60 * 1024)]
    _, _, sandbox_id = server.create()
    try:
        exec_ = [belljar, "--data-dir", data_dir, "sandbox", "exec", "--user", "root", sandbox_id]
        status = subprocess.run([*exec_, "cat /proc/1/status"], check=True, capture_output=True)
        resident = int(re.search(rb"VmRSS:\s+(\d+)", status.stdout)[1])
    finally:
        server.kill(sandbox_id)
    rows.append(("guest daemon resident", resident, 8 * 1024))
    rows.append(("guest daemon on disk", os.path.getsize(envd) // 1024, 5 * 1024))
    return [{"what": what, "kib": kib, "limit_kib": limit, "met": kib <= limit}
            for what, kib, limit in rows]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--at-once", type=int, default=10)
    parser.add_argument("--belljar", required=True, help="the program under test")
    parser.add_argument("--data-dir", required=True, help="data folder of the running server")
    parser.add_argument("--envd", required=True, help="the static guest daemon")
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="belljar-bench-")
    server = Server()
    rows = weigh(server, options.belljar, options.data_dir, options.envd)
    raw = Raw(server, folder, options.at_once)
    try:
        raw.open()
        one_at_a_time(server, raw, 2)  # Warms page caches and pools; not counted.
        rows += report("one", *one_at_a_time(server, raw, options.rounds), 1.5)
        rounds = max(3, options.rounds // 3)
        rows += report(f"{options.at_once} at once, the last",
                       *many_at_once(server, raw, options.at_once, rounds), 2.0)
    finally:
        raw.close()
        shutil.rmtree(folder)
    for row in rows:
        print(json.dumps(row))
    sys.exit(0 if all(row["met"] for row in rows) else 1)


if __name__ == "__main__":
    main()
