"""An API that loses answers: forwards requests to the real one, and answers as it is told to.

What a client does when an answer is lost can be shown only if the request did arrive.
"""

import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import raw

KEPT = ("content-type", "x-next-token", "x-total-running", "retry-after", "should-retry")


@dataclass
class Lost:
    """The request is forwarded and done; the client hears this instead of the answer."""

    status: int
    headers: dict = field(default_factory=dict)


@dataclass
class Seen:
    method: str
    path: str
    headers: dict
    body: bytes


class Forwarder:
    """Use as a context manager. `url` is its address, `seen` all requests in order."""

    def __init__(self):
        self.seen = []
        self._plan = []
        self._lock = threading.Lock()

    def lose(self, *losses):
        """What becomes of the next answers, one after the other; later ones pass."""
        with self._lock:
            self.seen.clear()
            self._plan[:] = losses

    def __enter__(self):
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self.url = "http://127.0.0.1:%d" % self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def _next(self, seen):
        with self._lock:
            self.seen.append(seen)
            return self._plan.pop(0) if self._plan else None

    def _handler(self):
        forwarder = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _serve(self):
                headers = {name.lower(): value for name, value in self.headers.items()}
                body = self._body(headers)
                loss = forwarder._next(Seen(self.command, self.path, headers, body))
                for hop in ("host", "connection", "content-length", "transfer-encoding"):
                    headers.pop(hop, None)
                url = raw.setting("E2B_API_URL")
                answer = raw.request(url, self.command, self.path, body or None, headers)
                if loss is None:
                    self._answer(answer.status, answer.headers, answer.body)
                else:
                    text = b'{"code":%d,"message":"the answer was lost"}' % loss.status
                    lost = {"content-type": "application/json", **loss.headers}
                    self._answer(loss.status, lost, text)

            do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = _serve

            def _body(self, headers):
                """JavaScript sends chunks, Python a length."""
                if headers.get("transfer-encoding", "").lower() != "chunked":
                    return self.rfile.read(int(headers.get("content-length", 0)))
                body = b""
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
                return body

            def _answer(self, status, headers, body):
                self.send_response(status)
                for name in KEPT:
                    if name in headers:
                        self.send_header(name, headers[name])
                if status != 204:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if status != 204:
                    self.wfile.write(body)

            def log_message(self, *_):
                pass  # standard output is for the suite's lines

        return Handler
