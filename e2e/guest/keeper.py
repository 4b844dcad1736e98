"""Runs in a sandbox and keeps state there is no other copy of: a counter, text written to an open
file but not flushed. It is asked by HTTP, which also shows that a listening server goes on.

    keeper.py PORT FILE

GET /next      adds one to the counter; `PID COUNT`
GET /count     the same without adding
GET /hold/TEXT writes a line to the open file, which stays in this process's buffer
GET /flush     gives the buffer to the kernel
GET /chance    three random numbers: of the kernel, of a generator seeded by it just now, a UUID
"""

import os
import random
import socket
import sys
import uuid

SILENT_S = 5  # a caller whose machine was paused away never says another word


def chance():
    fresh = random.Random(os.urandom(16)).getrandbits(128)
    return f"{os.urandom(16).hex()} {fresh:032x} {uuid.uuid4().hex}"


def main():
    count = 0
    held = open(sys.argv[2], "w", buffering=1 << 20)
    server = socket.create_server(("0.0.0.0", int(sys.argv[1])))
    while True:
        peer, _ = server.accept()
        with peer:
            try:
                peer.settimeout(SILENT_S)
                stream = peer.makefile("rwb")
                words = stream.readline().decode().split()
                while stream.readline().strip():
                    pass
                if len(words) < 2:
                    continue
                _, what, *text = words[1].split("/")
                answer = f"{os.getpid()} {count}"
                if what == "next":
                    count += 1
                    answer = f"{os.getpid()} {count}"
                elif what == "hold":
                    held.write(f"{text[0]}\n")
                elif what == "flush":
                    held.flush()
                elif what == "chance":
                    answer = chance()
                head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(answer)}\r\nConnection: close"
                stream.write(f"{head}\r\n\r\n{answer}".encode())
                stream.flush()
            except OSError:
                pass  # the caller has gone; the state stays


if __name__ == "__main__":
    main()
