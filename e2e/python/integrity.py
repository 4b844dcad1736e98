"""Not one byte wrong: a program in a sandbox writes known patterns over memory and disk while the
sandbox is paused, resumed, copied and forked at random. See ../README.md.

    integrity.py [--rounds N] [--seed N] [--memory-mib N] [--disk-mib N]

What every page must hold follows from a seed and a number of steps; this program computes it too, so
that a sandbox which came back as it was some time before is found out as well as a page that did.
"""

import argparse
import copy
import random
import statistics
import sys
import time
from pathlib import Path

from e2b import Sandbox

import raw
from checks import Suite, equal, say, true, until

GUEST = Path(__file__).resolve().parent.parent / "guest"
sys.path.insert(0, str(GUEST))

from patterns import PAGE, Model  # noqa: E402

PORT = 8091
MIB = 1024 * 1024
FORKS_MAX = 3  # alive at a time beside the first; each costs a processor's time
READY_S = 300  # of an emulated processor that fills its pages
VERIFY_S = 300
WRITES_S = 120
WRITES = 20  # steps a machine does, of some fifty pages each, before something is done to it
ROUND_S = 900
LIFE_S = 3600  # renewed in every round
# How often each is drawn.
ACTIONS = {"pause": 4, "fork": 3, "snapshot": 1, "disturb": 1}


class Machine:
    """A sandbox with the program, and what it must hold."""

    def __init__(self, sandbox, model, name):
        self.sandbox, self.model, self.name = sandbox, model, name
        self.pages = 0

    @property
    def id(self):
        return self.sandbox.sandbox_id

    def ask(self, path):
        answer = raw.to_port(self.id, PORT, path, timeout_s=VERIFY_S)
        equal(answer.status, 200, f"status of {self.name}, asked for {path}: {answer}")
        return answer.json()

    def _judge(self, said):
        at_least = self.model.steps
        true(
            said["steps"] >= at_least,
            f"{self.name} is at step {said['steps']} and was at {at_least}: it went back in time",
        )
        self.model.advance(said["steps"])
        what = f"digest of what {self.name} has rewritten up to step {said['steps']}"
        equal(said["digest"], self.model.digest(), what)
        return said

    def verify(self, cold=False):
        """Looks at every page; how many."""
        said = self._judge(self.ask("/cold" if cold else "/verify"))
        equal(said["wrong"], 0, f"wrong pages of {self.name}, the first of them {said['first']}")
        equal(said["pages"], sum(map(len, self.model.generations)), "pages looked at")
        self.pages += said["pages"]
        return said["pages"]

    def write_on(self):
        """Waits until it has rewritten more: a machine that was only looked at has little to lose."""
        wanted = self.model.steps + WRITES
        what = f"{self.name} rewrites its pages"
        until(WRITES_S, what, lambda: self._judge(self.ask("/state"))["steps"] >= wanted)

    def reseed(self, seed):
        """From here on it goes its own way."""
        self._judge(self.ask(f"/reseed/{seed}"))
        self.model.reseed(seed)

    def successor(self, sandbox, name):
        return Machine(sandbox, copy.deepcopy(self.model), name)


class Soak:
    def __init__(self, suite, options):
        self.suite, self.options = suite, options
        self.random = random.Random(options.seed)
        self.first, self.forks = None, []
        self.pages = self.made = 0
        self.times = {}
        self.snapshots = set()

    def start(self):
        memory = self.options.memory_mib * MIB // PAGE
        disk = self.options.disk_mib * MIB // PAGE
        sandbox = Sandbox.create(
            "base", timeout=LIFE_S, metadata=self.suite.metadata, request_timeout=120
        )
        sandbox.files.write("patterns.py", (GUEST / "patterns.py").read_text())
        command = f"exec python3 patterns.py {PORT} pages {memory} {disk} {self.options.seed}"
        sandbox.commands.run(command, background=True, timeout=0).disconnect()
        self.first = Machine(sandbox, Model(memory, disk, self.options.seed), "the first")

        def answers():
            return raw.to_port(sandbox.sandbox_id, PORT, "/state", timeout_s=60).status == 200

        until(READY_S, "the program has filled its pages", answers, pause_s=1)
        self.pages += self.first.verify()

    def round(self, number):
        machine = self.random.choice([self.first, *self.forks])
        machine.write_on()
        action = self.random.choices(list(ACTIONS), ACTIONS.values())[0]
        said = getattr(self, action)(machine)
        looked = 0
        for one in [self.first, *self.forks]:
            # The disk's own copy every now and then; the kernel's in memory else.
            looked += one.verify(cold=self.random.random() < 0.3)
            one.sandbox.set_timeout(LIFE_S)
        self.pages += looked
        while len(self.forks) > FORKS_MAX:
            self.end(self.random.choice(self.forks))
        self.suite.remark(
            f"round {number}: {action} of {machine.name}, {said}; {looked} pages right of "
            f"{1 + len(self.forks)}, the first at step {self.first.model.steps}"
        )

    def pause(self, machine):
        took = self._timed("pause", machine.sandbox.pause)
        equal(took[1], True, f"pause of {machine.name}")
        again = self._timed("resume", lambda: Sandbox.connect(machine.id, timeout=LIFE_S))
        machine.sandbox = again[1]
        return f"{took[0]:.0f} ms, back in {again[0]:.0f} ms"

    def disturb(self, machine):
        """Paused and resumed three times without a moment between."""
        return ", ".join([self.pause(machine) for _ in range(3)])

    def fork(self, machine):
        count = self.random.randint(1, 2)
        took, made = self._timed(
            "fork", lambda: machine.sandbox.fork(timeout=LIFE_S, count=count, request_timeout=120)
        )
        failed = [one for one in made if isinstance(one, Exception)]
        equal((len(made), failed), (count, []), "forks")
        for sandbox in made:
            self._add(machine, sandbox)
        return f"{count} in {took:.0f} ms"

    def snapshot(self, machine):
        took, made = self._timed(
            "snapshot", lambda: machine.sandbox.create_snapshot(request_timeout=120)
        )
        self.snapshots.add(made.snapshot_id)
        sandbox = Sandbox.create(
            made.snapshot_id, timeout=LIFE_S, metadata=self.suite.metadata, request_timeout=120
        )
        self._add(machine, sandbox)
        return f"{took:.0f} ms"

    def _add(self, machine, sandbox):
        """It holds what the machine held, and goes its own way from here."""
        self.made += 1
        one = machine.successor(sandbox, f"copy {self.made}")
        one.reseed(self.random.getrandbits(32))
        self.forks.append(one)

    def _timed(self, what, body):
        began = time.monotonic()
        value = body()
        took = (time.monotonic() - began) * 1000
        self.times.setdefault(what, []).append(took)
        return took, value

    def end(self, machine):
        """A last look from the disk, then it is killed."""
        self.pages += machine.verify(cold=True)
        equal(machine.sandbox.kill(), True, f"kill of {machine.name}")
        self.forks.remove(machine)

    def finish(self):
        for machine in list(self.forks):
            self.end(machine)
        self.pages += self.first.verify(cold=True)
        equal(self.first.sandbox.kill(), True, "kill of the first")

    def delete_snapshots(self):
        for snapshot_id in list(self.snapshots):
            Sandbox.delete_snapshot(snapshot_id)
            self.snapshots.discard(snapshot_id)

    def figures(self):
        for what, times in sorted(self.times.items()):
            yield f"{what}: median {statistics.median(times):.0f} ms of {len(times)}"


def soak(suite, options):
    """The pages looked at when nothing was wrong; None else."""
    one = Soak(suite, options)
    try:
        if suite.check("start", lambda: one.start() or True, deadline_s=READY_S + 60) is None:
            return None
        for number in range(1, options.rounds + 1):
            before = suite.failed
            suite.check(f"round_{number}", one.round, number, deadline_s=ROUND_S)
            if suite.failed > before:  # what is wrong once is wrong from there on
                return None
        suite.check("last_look", one.finish, deadline_s=ROUND_S)
        return one.pages if not suite.failed else None
    finally:
        suite.check("snapshots_deleted", one.delete_snapshots)
        for line in one.figures():
            suite.remark(line)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().getrandbits(32))
    parser.add_argument("--memory-mib", type=int, default=64)
    parser.add_argument("--disk-mib", type=int, default=32)
    options = parser.parse_args()
    with Suite("integrity") as suite:
        say(f"# integrity: {vars(options)}")
        pages = soak(suite, options)
        if pages is not None:
            say(f"ok integrity rounds={options.rounds} pages={pages}")


if __name__ == "__main__":
    main()
