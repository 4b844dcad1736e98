#!/usr/bin/env python3
"""Creates with and without a sandbox that stands ready, against the raw mechanism, in one run.

The server under test was started with `--warm base=1` or more. Rounds take turns: QEMU by hand (see
create.py), a create that no spare fits (without internet access), and one that takes a spare, each
when as many stand ready as before. Timed from sending the request, or from exec, to the guest's
`ready` and to its daemon's first HTTP answer.

    pools.py --data-dir DIR [--rounds N]

Needs what create.py needs. Standard library only.
"""

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
import time

import create

READY_S = 60
SETTLED_S = 2  # nothing of a start is left to be done after this


def machines(server_pid):
    """The processes of the server's machines."""
    found = set()
    for task in os.listdir(f"/proc/{server_pid}/task"):
        try:
            with open(f"/proc/{server_pid}/task/{task}/children") as file:
                found.update(file.read().split())
        except OSError:
            continue  # that thread has ended
    return found


class Bench:
    def __init__(self, options):
        self.server = create.Server()
        with open(os.path.join(options.data_dir, "server.json")) as file:
            self.pid = json.load(file)["pid"]
        self.standing = self.settled()

    def settled(self):
        """How many machines there are when their number has not changed for a while."""
        deadline = time.monotonic() + READY_S
        seen, since = None, time.monotonic()
        while time.monotonic() < deadline:
            now = machines(self.pid)
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > SETTLED_S:
                return len(now)
            time.sleep(0.05)
        raise RuntimeError(f"the server's machines still change after {READY_S} s")

    def timed(self, **more):
        """(seconds to ready, seconds to the first HTTP answer) of one create."""
        if self.settled() != self.standing:
            raise RuntimeError(f"not {self.standing} machines stand ready any more")
        created, answered, sandbox_id = self.server.create(**more)
        self.server.kill(sandbox_id)
        return created, answered


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--data-dir", required=True, help="data folder of the running server")
    options = parser.parse_args()
    bench = Bench(options)
    if bench.standing == 0:
        sys.exit("failed to start: no sandbox stands ready; start the server with --warm base=1")
    folder = tempfile.mkdtemp(prefix="belljar-bench-")
    raw = create.Raw(bench.server, folder, 1)
    rows = {"raw": [], "started": [], "stood ready": []}
    try:
        raw.open()
        for number in range(options.rounds + 1):
            state, disk = raw.prepare(raw.slots[0])
            taken = {
                "raw": raw.create(raw.slots[0], state, disk),
                "started": bench.timed(allow_internet_access=False),
                "stood ready": bench.timed(),
            }
            if number > 0:  # the first warms page caches
                for name, row in taken.items():
                    rows[name].append(row)
    finally:
        raw.close()
        shutil.rmtree(folder)
    for name, taken in rows.items():
        for column, what in enumerate(("ready", "first HTTP answer")):
            values = [row[column] * 1000 for row in taken]
            against = statistics.median(row[column] * 1000 for row in rows["raw"])
            print(json.dumps({
                "case": name, "to": what, "n": len(values),
                "ms": round(statistics.median(values), 1),
                "range_ms": [round(min(values), 1), round(max(values), 1)],
                "of_raw": round(statistics.median(values) / against, 2),
            }), flush=True)


if __name__ == "__main__":
    main()
