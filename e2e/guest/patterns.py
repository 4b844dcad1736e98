"""Known patterns over memory and over a file on the disk, rewritten and verified all the time.

    patterns.py PORT FILE MEMORY_PAGES DISK_PAGES SEED

Every page's content follows from where it is and how often it was rewritten, so that a byte that is
wrong is found whatever it was taken for. What is rewritten next follows from the seed and the number
of steps alone: who knows both (`Model`) knows what every page must hold, without asking.

Asked by HTTP, between two steps:

GET /state        `{"steps", "digest"}`
GET /verify       the same after a look at every page, with `pages` and `wrong`, the first few of them
GET /cold         the same after the kernel has written the file and dropped its copy of it
GET /reseed/SEED  from here on other pages are chosen
"""

import hashlib
import json
import os
import random
import select
import socket
import struct
import sys
from array import array

PAGE = 4096
TAPE_BYTES = 1 << 20
HEAD = struct.Struct("<QQQ")  # space, page, generation
MEMORY, DISK = 0, 1
MEMORY_STEP, DISK_STEP = 32, 16  # pages rewritten in a step
CHECK_STEP = 4  # pages of each space looked at in a step, of those not just written
PAUSE_S = 0.005  # between steps: several machines share two processors
SILENT_S = 5  # a caller whose machine was paused away never says another word
WRONG_SHOWN = 8


class Tape:
    """Random bytes of which every page is a piece behind a head that names the page."""

    def __init__(self):
        self._bytes = random.Random(0).randbytes(TAPE_BYTES)

    def page(self, space, index, generation):
        at = (space * 7_368_787 + index * 2_654_435_761 + generation * 40_503 * 9973) % (
            TAPE_BYTES - PAGE
        )
        return HEAD.pack(space, index, generation) + self._bytes[at : at + PAGE - HEAD.size]


class Model:
    """How often each page was rewritten. The same steps from the same seed give the same."""

    def __init__(self, memory_pages, disk_pages, seed):
        self.steps = 0
        self.generations = (array("L", [0]) * memory_pages, array("L", [0]) * disk_pages)
        self.reseed(seed)

    def reseed(self, seed):
        self._chooser = random.Random(seed)

    def step(self):
        """Counts one step; the (space, page) pairs that it rewrites, once for each time."""
        chosen = []
        for space, count in ((MEMORY, MEMORY_STEP), (DISK, DISK_STEP)):
            generations = self.generations[space]
            for _ in range(count):
                index = int(self._chooser.random() * len(generations))
                generations[index] += 1
                chosen.append((space, index))
        self.steps += 1
        return chosen

    def advance(self, steps):
        while self.steps < steps:
            self.step()

    def digest(self):
        whole = hashlib.sha256(struct.pack("<Q", self.steps))
        for generations in self.generations:
            whole.update(generations.tobytes())
        return whole.hexdigest()


class Patterns:
    """The pages themselves."""

    def __init__(self, path, memory_pages, disk_pages, seed):
        self._tape = Tape()
        self.model = Model(memory_pages, disk_pages, seed)
        self._memory = bytearray(memory_pages * PAGE)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self._looker = random.Random(seed)
        for space, generations in enumerate(self.model.generations):
            for index in range(len(generations)):
                self._write(space, index)

    def _write(self, space, index):
        page = self._tape.page(space, index, self.model.generations[space][index])
        if space == MEMORY:
            self._memory[index * PAGE : (index + 1) * PAGE] = page
        else:
            os.pwrite(self._file, page, index * PAGE)

    def _is_right(self, space, index):
        if space == MEMORY:
            found = self._memory[index * PAGE : (index + 1) * PAGE]
        else:
            found = os.pread(self._file, PAGE, index * PAGE)
        return found == self._tape.page(space, index, self.model.generations[space][index])

    def step(self):
        """Rewrites some pages and looks at some others; those that are wrong."""
        for space, index in self.model.step():
            self._write(space, index)
        wrong = []
        for space, generations in enumerate(self.model.generations):
            for _ in range(CHECK_STEP):
                index = int(self._looker.random() * len(generations))
                if not self._is_right(space, index):
                    wrong.append((space, index))
        return wrong

    def drop_copies(self):
        """What is read from the file after this comes from the disk."""
        os.fsync(self._file)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_DONTNEED)

    def verify(self):
        """Every page; those that are wrong."""
        return [
            (space, index)
            for space, generations in enumerate(self.model.generations)
            for index in range(len(generations))
            if not self._is_right(space, index)
        ]

    def state(self):
        return {"steps": self.model.steps, "digest": self.model.digest()}


class Server:
    def __init__(self, port, patterns):
        self._patterns = patterns
        self._socket = socket.create_server(("0.0.0.0", port))
        self._wrong = []  # found by a step and not told yet

    def run(self):
        while True:
            ready, _, _ = select.select([self._socket], [], [], PAUSE_S)
            if ready:
                peer, _ = self._socket.accept()
                with peer:
                    try:
                        self._answer(peer)
                    except OSError:
                        pass  # the caller has gone
            self._wrong += self._patterns.step()

    def _answer(self, peer):
        peer.settimeout(SILENT_S)
        stream = peer.makefile("rwb")
        words = stream.readline().decode().split()
        while stream.readline().strip():
            pass
        if len(words) < 2:
            return
        _, what, *more = words[1].split("/")
        body = json.dumps(self._said(what, more)).encode()
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        stream.write(head.encode() + body)
        stream.flush()

    def _said(self, what, more):
        if what == "reseed":
            self._patterns.model.reseed(int(more[0]))
        if what == "cold":
            self._patterns.drop_copies()
        if what not in ("verify", "cold"):
            return self._patterns.state()
        wrong, self._wrong = self._wrong + self._patterns.verify(), []
        pages = sum(map(len, self._patterns.model.generations))
        said = {"pages": pages, "wrong": len(wrong), "first": wrong[:WRONG_SHOWN]}
        return {**self._patterns.state(), **said}


def main():
    port, path, memory_pages, disk_pages, seed = sys.argv[1:]
    patterns = Patterns(path, int(memory_pages), int(disk_pages), int(seed))
    Server(int(port), patterns).run()


if __name__ == "__main__":
    main()
