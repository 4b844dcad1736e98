"""Servers that listen on the sandbox's loopback only, reached from outside as if they listened everywhere.

Plain HTTP with the standard library. See ../README.md.
"""

import hashlib
import socket
import time
import urllib.parse

import raw
from checks import Suite, equal, true, until
from raw import ENVD_PORT, RawSandbox, routed, to_port

suite = Suite("loopback")
FILE_BYTES = 20 * 1024 * 1024
CLOSED = "The sandbox is running but port is not open"

# Answers an upgrade and sends back what it reads, one connection after the other.
ECHO = """
import socket
server = socket.create_server(("127.0.0.1", 8083))
while True:
    peer, _ = server.accept()
    head = b""
    while not head.endswith(b"\\r\\n\\r\\n"):
        head += peer.recv(1)
    peer.sendall(b"HTTP/1.1 101 Switching\\r\\nConnection: upgrade\\r\\nUpgrade: echo\\r\\n\\r\\n")
    while piece := peer.recv(65536):
        peer.sendall(piece)
    peer.close()
"""


def content(sandbox):
    equal(sandbox.run("mkdir /tmp/www && echo hello >/tmp/www/hello")[0], 0, "making a file")


def serve(sandbox, address, port):
    """Starts a file server in the background; returns once it listens."""
    background(sandbox, f"python3 -m http.server --directory /tmp/www --bind {address} {port}", port)


def background(sandbox, command, port):
    listens = f"grep -qi ':{port:04X} [0:]* 0A' /proc/net/tcp /proc/net/tcp6"
    wait = f"for i in $(seq 300); do {listens} && exit 0; sleep 0.1; done; exit 1"
    code, out, err = sandbox.run(f"nohup {command} >/tmp/log.{port} 2>&1 & {wait}")
    equal(code, 0, f"start of {command!r}: {out} {err}")


def first_request(sandbox, address, port):
    """The very first request is answered: nothing in the guest has to find the server first."""
    serve(sandbox, address, port)
    started = time.monotonic()
    answer = to_port(sandbox.id, port, "/hello")
    took_ms = (time.monotonic() - started) * 1000
    equal((answer.status, answer.body), (200, b"hello\n"), f"GET from {address}")
    suite.remark(f"first_request: {address} answered after {took_ms:.0f} ms")


def many_requests(sandbox):
    for number in range(50):
        answer = to_port(sandbox.id, 8080, "/hello")
        equal((answer.status, answer.body), (200, b"hello\n"), f"request {number}")


def large_file(sandbox):
    make = f"head -c {FILE_BYTES} /dev/urandom >/tmp/www/large; sha256sum </tmp/www/large"
    wanted = sandbox.run(make)[1].split()[0]
    found = to_port(sandbox.id, 8080, "/large", timeout_s=110).body
    equal((len(found), hashlib.sha256(found).hexdigest()), (FILE_BYTES, wanted), "the file")


def upgraded(sandbox):
    """What a WebSocket needs: a 101, then bytes both ways, then an end that is passed on."""
    equal(sandbox.upload("/tmp/echo.py", ECHO.encode()).status, 200, "upload")
    background(sandbox, "python3 /tmp/echo.py", 8083)
    with connect() as stream:
        ask(stream, "GET", "/", 8083, sandbox, "Connection: upgrade\r\nUpgrade: echo\r\n")
        true(read_head(stream).startswith(b"HTTP/1.1 101 "), "no upgrade")
        for size in (1, 1000, 100_000):
            stream.sendall(b"x" * size)
            while size:
                piece = stream.recv(65536)
                true(piece, "the tunnel ended early")
                size -= len(piece)
        stream.shutdown(socket.SHUT_WR)
        equal(stream.recv(1), b"", "the end")


def moved(sandbox):
    """A server that comes back on every address is found there."""
    sandbox.run("pkill -f 'http[.]server.* 8080'")
    closed(sandbox, 8080)
    serve(sandbox, "0.0.0.0", 8080)
    equal(to_port(sandbox.id, 8080, "/hello").body, b"hello\n", "on every address")
    sandbox.run("pkill -f 'http[.]server.* 8080'")
    serve(sandbox, "127.0.0.1", 8080)
    equal(to_port(sandbox.id, 8080, "/hello").body, b"hello\n", "back on the loopback")


def closed(sandbox, port):
    def refused():
        answer = to_port(sandbox.id, port)
        wanted = {"sandboxId": sandbox.id, "message": CLOSED, "port": port, "code": 502}
        return (answer.status, answer.json()) == (502, wanted)

    until(10, f"port {port} is closed", refused)


def no_tunnels_for_clients(sandbox):
    for port in (ENVD_PORT, 8080):
        with connect() as stream:
            ask(stream, "CONNECT", "localhost:8080", port, sandbox, "Connection: close\r\n")
            true(read_head(stream).startswith(b"HTTP/1.1 405 "), f"CONNECT to port {port}")


def connect():
    url = urllib.parse.urlsplit(raw.setting("E2B_SANDBOX_URL"))
    return socket.create_connection((url.hostname, url.port), timeout=60)


def ask(stream, method, target, port, sandbox, more):
    head = f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n{more}"
    head += "".join(f"{k}: {v}\r\n" for k, v in routed(sandbox.id, port).items())
    stream.sendall(head.encode() + b"\r\n")


def read_head(stream):
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = stream.recv(1)
        true(byte, f"the connection ended after {head!r}")
        head += byte
    return head


def main():
    with suite:
        sandbox = suite.check("create", lambda: RawSandbox(suite.tag))
        suite.check("closed", closed, sandbox, 8080)
        suite.check("content", content, sandbox)
        suite.check("ipv4", first_request, sandbox, "127.0.0.1", 8080)
        suite.check("ipv6", first_request, sandbox, "::1", 8081)
        suite.check("everywhere", first_request, sandbox, "0.0.0.0", 8082)
        for body in (many_requests, large_file, upgraded, moved, no_tunnels_for_clients):
            suite.check(body.__name__, body, sandbox)


if __name__ == "__main__":
    main()
