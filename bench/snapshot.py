"""Restores a machine by hand, from QEMU's own full stream, for comparison with `belljar-runtime`.

Boots the contract suite's guest, has it write a pattern over some of its memory, saves the whole machine as one
stream (`migrate` to a file), and times new processes from exec to the guest's answer. The driver's figures of the same
guest, devices and content come from its own test:

    BELLJAR_BENCH=1 cargo test -p belljar-runtime --test host_qemu snapshots_are_measured -- --nocapture

Needs root, QEMU, rustc and the guest assets (`BELLJAR_ASSETS`). Say MEMORY_MIB WRITTEN_MIB [ROUNDS].
"""

import json
import os
import pathlib
import re
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = pathlib.Path(__file__).resolve().parent
GUEST = HERE.parent / "crates/runtime/tests/fixtures/contract_guest.rs"
ASSETS = pathlib.Path(os.environ.get("BELLJAR_ASSETS", "~/.cache/belljar/assets")).expanduser()
LIMIT_S = 120


class Machine:
    """One QEMU process, and lines to and from its monitor and its guest."""

    def __init__(self, folder, disk, memory_mib, arguments):
        self.monitor, monitor = socket.socketpair()
        self.control, control = socket.socketpair()
        command = [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
            "-machine", "microvm,acpi=off,isa-serial=off,rtc=on,auto-kernel-cmdline=on,x-option-roms=off,memory-backend=ram",
            "-global", "virtio-mmio.force-legacy=false", "-accel", "tcg,tb-size=128",
            "-cpu", "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt,+rdrand", "-smp", "1", "-m", f"{memory_mib}M",
            "-object", f"memory-backend-ram,id=ram,size={memory_mib}M",
            "-chardev", f"socket,id=monitor,fd={monitor.fileno()}", "-mon", "chardev=monitor,mode=control",
            "-device", "virtio-serial-device,id=serial", "-chardev", "null,id=console",
            "-device", "virtconsole,bus=serial.0,chardev=console", "-chardev", f"socket,id=control,fd={control.fileno()}",
            "-device", "virtserialport,bus=serial.0,chardev=control,name=belljar.control.1",
            "-blockdev", json.dumps({"driver": "file", "node-name": "root", "filename": str(disk)}),
            "-device", "virtio-blk-device,drive=root", "-object", "rng-builtin,id=entropy",
            "-device", "virtio-rng-device,rng=entropy", *arguments,
        ]
        log = (folder / "qemu.log").open("a")
        ends = (monitor.fileno(), control.fileno())
        self.process = subprocess.Popen(command, pass_fds=ends, stdout=log, stderr=log)
        monitor.close()
        control.close()
        for end in (self.monitor, self.control):
            end.settimeout(LIMIT_S)
        self.said = self.monitor.makefile("r")
        self.heard = self.control.makefile("r")
        self.execute("qmp_capabilities")

    def execute(self, command, **arguments):
        line = json.dumps({"execute": command, "arguments": arguments}) + "\n"
        self.monitor.sendall(line.encode())
        while True:
            answer = json.loads(self.said.readline())
            if "error" in answer:
                raise SystemExit(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]

    def migrated(self):
        """Waits for the event: polling would take turns with what it waits for."""
        while True:
            event = json.loads(self.said.readline())
            if event.get("event") == "MIGRATION" and event["data"]["status"] in ("completed", "failed"):
                if event["data"]["status"] == "failed":
                    raise SystemExit("the machine could not be saved or restored; see its log")
                return

    def ask(self, **env_vars):
        line = json.dumps({"type": "init", "nonce": 1, "env_vars": env_vars}, separators=(",", ":")) + "\n"
        self.control.sendall(line.encode())
        while True:
            answer = json.loads(self.heard.readline())
            if answer["type"] == "ready":
                return answer["envd_version"]

    def end(self):
        self.process.kill()
        self.process.wait()
        for end in (self.said, self.heard, self.monitor, self.control):
            end.close()


def tiny_disk(folder):
    (folder / "tree/usr/sbin").mkdir(parents=True)
    for name in ("dev", "sys", "proc"):
        (folder / "tree" / name).mkdir()
    static = ["-O", "-C", "target-feature=+crt-static", "-C", "panic=abort", "-C", "strip=symbols"]
    program = folder / "tree/usr/sbin/belljar-envd"
    subprocess.run(["rustc", "--edition", "2024", *static, "-o", program, GUEST], check=True)
    disk = folder / "disk"
    make = ["/sbin/mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-d", folder / "tree", disk, "8M"]
    subprocess.run(make, check=True)
    return disk


def main(memory_mib, written_mib, rounds):
    folder = pathlib.Path(tempfile.mkdtemp(prefix="belljar-raw-"))
    try:
        disk = tiny_disk(folder)
        events = {"capabilities": [{"capability": "events", "state": True}]}
        mhz = re.search(r"cpu MHz\s*: (\d+)", pathlib.Path("/proc/cpuinfo").read_text())
        words = "quiet panic=-1 reboot=t console=hvc0 root=/dev/vda rootfstype=ext4 rw init=/usr/sbin/belljar-envd"
        clock = f"tsc_early_khz={int(mhz[1]) * 1000} tsc=reliable"
        boot = ["-kernel", str(ASSETS / "vmlinux"), "-append", f"{words} {clock}"]
        origin = Machine(folder, disk, memory_mib, boot)
        digest = origin.ask(SCRIBBLE="5", BYTES=str(written_mib << 20))
        origin.execute("stop")
        origin.execute("migrate-set-capabilities", **events)
        stream = folder / "stream"
        origin.execute("migrate-set-parameters", **{"max-bandwidth": 1 << 40})
        origin.execute("migrate", uri=f"file:{stream}")
        origin.migrated()
        origin.end()
        times = []
        for _ in range(rounds):
            began = time.monotonic()
            machine = Machine(folder, disk, memory_mib, ["-incoming", "defer"])
            machine.execute("migrate-set-capabilities", **events)
            machine.execute("migrate-incoming", uri=f"file:{stream}")
            machine.migrated()
            machine.execute("cont")
            machine.ask()
            times.append((time.monotonic() - began) * 1000)
            if machine.ask(RECALL="yes") != digest:
                raise SystemExit("the restored memory is another")
            machine.end()
        size_mib = stream.stat().st_size >> 20
        print(
            f"raw: {written_mib} MiB written of {memory_mib}, a stream of {size_mib} MiB; "
            f"ready {statistics.median(times):.0f} ms [{min(times):.0f} to {max(times):.0f}]"
        )
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 5)
