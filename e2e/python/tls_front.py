"""Makes a plain-HTTP server look like a public domain, for an SDK that knows nothing else.

Older SDK releases cannot be told a URL: they go to `https://api.DOMAIN` and to
`https://PORT-ID.DOMAIN`. They do take an HTTP proxy, so this is one: every CONNECT ends here in TLS
under a certificate made for the run, and what is inside goes on unencrypted to the API or to the
sandbox proxy, its Host header as the SDK wrote it.
"""

import asyncio
import ssl
import subprocess
import threading
import urllib.parse
from pathlib import Path

import raw

DOMAIN = "sandboxes.test"
PIECE_BYTES = 65536


def make_certificate(subject, names, certificate_file, key_file):
    """One for a day, which nobody signed but itself."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
        + ["-subj", f"/CN={subject}", "-addext", f"subjectAltName={names}"]
        + ["-addext", "basicConstraints=critical,CA:FALSE"]
        + ["-keyout", str(key_file), "-out", str(certificate_file)],
        check=True,
        capture_output=True,
        timeout=60,
    )


class TlsFront:
    """Use as a context manager; `url` is the proxy, `ca_file` what the SDK must trust."""

    def __init__(self, directory):
        self.ca_file = Path(directory) / "certificate.pem"
        self._key_file = Path(directory) / "key.pem"
        self._loop = asyncio.new_event_loop()
        self._connections = set()

    def __enter__(self):
        self._make_certificate()
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._tls.load_cert_chain(self.ca_file, self._key_file)
        self._tls.set_alpn_protocols(["http/1.1"])
        self._server = self._loop.run_until_complete(
            asyncio.start_server(self._connected, "127.0.0.1", 0)
        )
        self.url = "http://127.0.0.1:%d" % self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    async def _stop(self):
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _make_certificate(self):
        names = f"DNS:{DOMAIN},DNS:*.{DOMAIN}"
        make_certificate(DOMAIN, names, self.ca_file, self._key_file)

    async def _connected(self, reader, writer):
        task = asyncio.current_task()
        self._connections.add(task)
        try:
            await self._serve(reader, writer)
        except (OSError, EOFError, ssl.SSLError, asyncio.CancelledError):
            pass  # the client went away, or the run is over
        finally:
            self._connections.discard(task)
            writer.transport.abort()

    async def _serve(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        method, target, _ = head.split(b" ", 2)
        if method != b"CONNECT":
            writer.write(b"HTTP/1.1 405 Method Not Allowed\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            return
        writer.write(b"HTTP/1.1 200 Connection established\r\n\r\n")
        await writer.drain()
        await writer.start_tls(self._tls)
        to_api = target.startswith(b"api.")
        server = urllib.parse.urlsplit(raw.setting("E2B_API_URL" if to_api else "E2B_SANDBOX_URL"))
        far_reader, far_writer = await asyncio.open_connection(server.hostname, server.port or 80)
        try:
            await asyncio.gather(pump(reader, far_writer), pump(far_reader, writer))
        finally:
            far_writer.transport.abort()


async def pump(reader, writer):
    while piece := await reader.read(PIECE_BYTES):
        writer.write(piece)
        await writer.drain()
    writer.close()
