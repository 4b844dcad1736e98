"""Twenty forks of one sandbox at once: how long until all of them answer, and what each costs.

    fork_bench.py [--count N] [--rounds N] [--held-mib N]

On the server's machine, as a user who may read its processes' memory maps. Nothing here passes or
fails by a time; it fails when a fork does not start, does not answer, or has not the source's state.
See ../README.md.
"""

import argparse
import os
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from e2b import Sandbox

from checks import Suite, equal, true
from guest_clients import COMMAND_S

MARK = "belljar-"  # in the name the server gives its machines' processes
KIB_FIELDS = ("Rss", "Pss", "Shared_Clean", "Private_Clean", "Private_Dirty")
FORK_REQUEST_S = 300
ROUND_S = 900


def machines():
    """The pids of all machines of servers on this host, with their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue  # it has ended meanwhile
        line = b" ".join(words).decode("utf-8", "replace")
        if b"qemu" in os.path.basename(words[0]) and MARK in line:
            found[int(entry.name)] = line
    return found


def memory(pid):
    """What the kernel says of a process's memory, KiB; `private` is what would be free without it."""
    fields = {}
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]:
        name, value = line.split(":", 1)
        if name in KIB_FIELDS:
            fields[name] = int(value.split()[0])
    fields["private"] = fields["Private_Clean"] + fields["Private_Dirty"]
    return fields


def answer(number, sandbox, began):
    """How long after `began` the fork has answered a command, which finds the source's state."""
    said = sandbox.commands.run('cat mark; echo "$E2B_SANDBOX_ID"', timeout=COMMAND_S).stdout
    took = time.monotonic() - began
    equal(said, f"of the source\n{sandbox.sandbox_id}\n", f"what fork {number} said")
    return took


def row(*cells):
    return "".join(f"{cell:>14}" for cell in cells)


def mib(kib):
    return f"{kib / 1024:.1f}"


class Bench:
    def __init__(self, suite, options):
        self.suite, self.options = suite, options
        self.source = None
        self.started, self.answered, self.private = [], [], []

    def prepare(self):
        self.source = Sandbox.create(
            "base", timeout=3600, metadata=self.suite.metadata, request_timeout=120
        )
        self.source.files.write("mark", "of the source\n")
        # Memory in use, so that what clones share is not nothing.
        size = f"{self.options.held_mib}M"
        self.source.commands.run(f"head -c {size} /dev/urandom > /dev/shm/held", timeout=COMMAND_S)
        return True

    def round(self, number):
        before = machines()
        count = self.options.count
        began = time.monotonic()
        made = self.source.fork(count=count, timeout=600, request_timeout=FORK_REQUEST_S)
        created = time.monotonic() - began
        forks = [one for one in made if not isinstance(one, Exception)]
        try:
            failed = [one for one in made if isinstance(one, Exception)]
            equal((len(made), failed), (count, []), "forks that did not start")
            with ThreadPoolExecutor(count) as pool:
                took = list(pool.map(lambda one: answer(*one, began), enumerate(forks)))
            self.started.append(created)
            self.answered.append(max(took))
            self.suite.remark(
                f"round {number}: {count} forks created in {created:.2f} s, the first answered "
                f"after {min(took):.2f} s, the median {statistics.median(took):.2f} s, "
                f"the last {max(took):.2f} s"
            )
            self.weigh(number, forks, before)
        finally:
            with ThreadPoolExecutor(count) as pool:
                list(pool.map(lambda one: one.kill(), forks))

    def weigh(self, number, forks, before):
        """A table of the clones' memory, after each has run a command and does nothing any more."""
        new = {pid: line for pid, line in machines().items() if pid not in before}
        ids = [one.sandbox_id for one in forks]
        named = [pid for pid, line in new.items() if any(one in line for one in ids)]
        new = named or list(new)
        true(len(new) >= len(forks), f"{len(new)} new machines on this host for {len(forks)} forks")
        self.suite.remark(f"round {number}: memory in MiB")
        self.suite.remark(row("pid", "resident", "proportional", "shared", "private", "dirty"))
        for pid in sorted(new):
            found = memory(pid)
            self.private.append(found["private"])
            cells = ("Rss", "Pss", "Shared_Clean", "private", "Private_Dirty")
            self.suite.remark(row(pid, *(mib(found[name]) for name in cells)))

    def summary(self):
        if not self.answered:
            return
        self.suite.remark(
            f"{self.options.count} forks until all answered: median "
            f"{statistics.median(self.answered):.2f} s, [{min(self.answered):.2f} to "
            f"{max(self.answered):.2f}] of {len(self.answered)} rounds; until the API had "
            f"answered: {statistics.median(self.started):.2f} s"
        )
        self.suite.remark(
            f"private memory of a clone: median {mib(statistics.median(self.private))} MiB, "
            f"at most {mib(max(self.private))} MiB of {len(self.private)}"
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=20, help="1 to 20, as many as the SDK allows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--held-mib", type=int, default=64)
    options = parser.parse_args()
    if not Path("/proc/self/smaps_rollup").exists():
        sys.exit("failed to start: no /proc/PID/smaps_rollup here; use Linux 4.14 or newer")
    with Suite("forks") as suite:
        bench = Bench(suite, options)
        ready = suite.check("prepare", bench.prepare)
        for number in range(1, options.rounds + 1):
            body = lambda _ready, number=number: bench.round(number)  # noqa: E731
            suite.check(f"round_{number}", body, ready, deadline_s=ROUND_S)
        bench.summary()


if __name__ == "__main__":
    main()
