"""Lifecycle events and webhooks over plain HTTP, against a server that may reach this machine.

Needs `belljar up --webhook-allow-private`, and the admin token for a second team: the variable
BELLJAR_ADMIN_TOKEN_FILE names its file. For deliveries over TLS, BELLJAR_TRUSTED_TLS names a folder with
`certificate.pem`, which the server trusts and which is for 127.0.0.1, and its `key.pem`. See ../README.md.
"""

import base64
import hashlib
import json
import os
import ssl
import tempfile
import threading
import time
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import raw
from checks import Skip, Suite, equal, say, true, until
from operator_api import TOKEN_FILE, Team, done, token
from tls_front import make_certificate

suite = Suite("webhooks")
SECRET = "a secret of the suite"
CREATED, UPDATED, KILLED = (f"sandbox.lifecycle.{name}" for name in ("created", "updated", "killed"))
ALL = [CREATED, UPDATED, KILLED]


TRUSTED_TLS = "BELLJAR_TRUSTED_TLS"


class Receiver:
    """A server that notes deliveries. `statuses` are the next answers; later ones are 200. With `tls`, a
    folder with a certificate and its key, it speaks nothing else."""

    def __init__(self, tls=None):
        self.got, self.statuses = [], []
        self._tls = tls
        self._lock = threading.Lock()

    def __enter__(self):
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                with receiver._lock:
                    receiver.got.append((time.monotonic(), headers, body))
                    status = receiver.statuses.pop(0) if receiver.statuses else 200
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def handle(self):
                try:
                    super().handle()
                except (OSError, ssl.SSLError):
                    pass  # the caller does not trust it

            def log_message(self, *_):
                pass  # standard output is for the suite's lines

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if self._tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self._tls / "certificate.pem", self._tls / "key.pem")
            # The handshake belongs to the connection's own thread, not to the one that accepts.
            self._server.socket = context.wrap_socket(
                self._server.socket, server_side=True, do_handshake_on_connect=False
            )
        scheme = "https" if self._tls else "http"
        self.url = f"{scheme}://127.0.0.1:{self._server.server_address[1]}/hook"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def of(self, sandbox_id):
        """What came for one sandbox: time, headers and event."""
        with self._lock:
            got = [(at, headers, json.loads(body)) for at, headers, body in self.got]
        return [one for one in got if one[2]["sandbox_id"] == sandbox_id]

    def types(self, sandbox_id):
        return [event["type"] for _, _, event in self.of(sandbox_id)]


@contextmanager
def webhook(url, **fields):
    body = {"name": "suite", "url": url, "enabled": True, "events": ALL, "signatureSecret": SECRET}
    made = done(raw.api("POST", "/events/webhooks", {**body, **fields}), 201)
    try:
        yield made
    finally:
        equal(raw.api("DELETE", f"/events/webhooks/{made['id']}").status, 204, "delete")


def life(timeout=120):
    """A sandbox that is created, prolonged and killed; its id."""
    body = {"templateID": "base", "timeout": timeout, "metadata": suite.metadata}
    sandbox_id = done(raw.api("POST", "/v2/sandboxes", body), 201)["sandboxID"]
    equal(raw.api("POST", f"/sandboxes/{sandbox_id}/timeout", {"timeout": 300}).status, 204, "set")
    equal(raw.api("DELETE", f"/sandboxes/{sandbox_id}").status, 204, "kill")
    return sandbox_id


def events_of(sandbox_id, query=""):
    return done(raw.api("GET", f"/events/sandboxes/{sandbox_id}?orderAsc=true{query}"), 200)


def events():
    sandbox_id = life()
    found = until(10, "three events", lambda: len(e := events_of(sandbox_id)) == 3 and e)
    equal([event["type"] for event in found], ALL, "types, oldest first")
    for event in found:
        equal((event["version"], event["event_category"]), ("v2", "lifecycle"), "kind of event")
        equal(event["sandbox_id"], sandbox_id, "sandbox")
        uuid.UUID(event["id"]), uuid.UUID(event["sandbox_execution_id"])
    equal(len({event["id"] for event in found}), 3, "distinct ids")
    execution = found[2]["event_data"]["execution"]
    true({"started_at", "vcpu_count", "memory_mb", "execution_time"} <= set(execution), "execution")
    true("set_timeout" in found[1]["event_data"], "set_timeout")
    equal([e["type"] for e in events_of(sandbox_id, f"&types={KILLED}")], [KILLED], "by type")
    two = events_of(sandbox_id, f"&types={KILLED}&types={CREATED}")
    equal([event["type"] for event in two], [CREATED, KILLED], "by two types")
    equal([e["type"] for e in events_of(sandbox_id, "&limit=1&offset=1")], [UPDATED], "a page")
    all_of_team = done(raw.api("GET", "/events/sandboxes?limit=100"), 200)
    true(found[2]["id"] in [event["id"] for event in all_of_team], "not among the team's events")
    for wrong in ("limit=101", "limit=x", "offset=-1", "types=sandbox.lifecycle.born"):
        answer = raw.api("GET", f"/events/sandboxes?{wrong}")
        equal(answer.status, 400, f"{wrong}: {answer}")
        true(wrong.split("=")[0] in answer.message, f"{answer} does not name {wrong}")


def expired_too():
    body = {"templateID": "base", "timeout": 1, "metadata": suite.metadata}
    sandbox_id = done(raw.api("POST", "/v2/sandboxes", body), 201)["sandboxID"]

    def killed():
        return [event for event in events_of(sandbox_id) if event["type"] == KILLED]

    (event,) = until(15, "the event of its end", killed)
    equal(event["event_data"]["reason"], "timeout", "reason")


def delivered():
    with Receiver() as receiver, webhook(receiver.url) as hook:
        true("signatureSecret" not in hook and SECRET not in json.dumps(hook), "the secret is shown")
        sandbox_id = life()
        until(30, "three deliveries", lambda: len(receiver.of(sandbox_id)) >= 3)
        equal(sorted(receiver.types(sandbox_id)), sorted(ALL), "types")
        stored = {event["id"]: event for event in events_of(sandbox_id)}
        for _, headers, event in receiver.of(sandbox_id):
            equal(event, stored[event["id"]], "the event as the API shows it")
            equal(headers["e2b-webhook-id"], hook["id"], "webhook")
            equal(headers["e2b-signature-version"], "v1", "version of the signature")
            true(headers["e2b-delivery-id"], "no delivery id")
        for _, headers, body in list(receiver.got):
            digest = hashlib.sha256(SECRET.encode() + body).digest()
            signature = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
            equal(headers["e2b-signature"], signature, "signature over secret and body")


def only_what_is_wanted():
    with Receiver() as receiver, Receiver() as silent:
        with webhook(receiver.url, events=[KILLED]), webhook(silent.url, enabled=False):
            sandbox_id = life()
            until(30, "the end is told", lambda: receiver.of(sandbox_id))
            until(10, "all events are there", lambda: len(events_of(sandbox_id)) == 3)
            equal(receiver.types(sandbox_id), [KILLED], "what came")
            equal(silent.got, [], "what came to one that is switched off")


def retried():
    """A refused delivery comes again, the same one, and counts as delivered then."""
    with Receiver() as receiver, webhook(receiver.url, events=[KILLED]) as hook:
        receiver.statuses[:] = [500]
        sandbox_id = life()
        until(60, "the second attempt", lambda: len(receiver.of(sandbox_id)) == 2)
        (first, one, event), (second, two, again) = receiver.of(sandbox_id)
        equal(again, event, "the event")
        equal(two["e2b-delivery-id"], one["e2b-delivery-id"], "the delivery")
        true(5 < second - first < 30, f"{second - first:.1f} s later")

        def finished():
            path = f"/events/webhooks/{hook['id']}/deliveries?state=delivered"
            return done(raw.api("GET", path), 200)

        (delivery,) = until(10, "the delivery is done", finished)
        equal(delivery["attempts"], 2, "attempts")


def over_tls():
    """To whom the server's machine trusts, and to nobody who only says so."""
    if TRUSTED_TLS not in os.environ:
        raise Skip(f"{TRUSTED_TLS} names no certificate that the server trusts")
    with tempfile.TemporaryDirectory() as folder:
        strange = Path(folder)
        make_certificate("localhost", "IP:127.0.0.1", strange / "certificate.pem", strange / "key.pem")
        with Receiver(Path(os.environ[TRUSTED_TLS])) as known, Receiver(strange) as unknown:
            with webhook(known.url, events=[KILLED]), webhook(unknown.url, events=[KILLED]) as hook:
                sandbox_id = life()
                until(30, "the delivery", lambda: known.types(sandbox_id) == [KILLED])

                def tried():
                    found = done(raw.api("GET", f"/events/webhooks/{hook['id']}/deliveries"), 200)
                    return [one for one in found if one["attempts"] > 0]

                (delivery,) = until(20, "an attempt at the other", tried)
                true("certificate" in delivery["lastError"].lower(), f"why it failed: {delivery}")
                equal(unknown.got, [], "what came to who is not trusted")


def other_team():
    sandbox_id = life()
    until(10, "events", lambda: events_of(sandbox_id))
    with Receiver() as receiver, webhook(receiver.url) as hook, Team() as other:
        equal(other.api("GET", f"/events/sandboxes/{sandbox_id}").status, 404, "events")
        equal(done(other.api("GET", "/events/sandboxes"), 200), [], "all events")
        equal(done(other.api("GET", "/events/webhooks"), 200), [], "webhooks")
        path = f"/events/webhooks/{hook['id']}"
        for method, tail, body in (
            ("GET", "", None),
            ("PATCH", "", {"enabled": False}),
            ("DELETE", "", None),
            ("GET", "/deliveries", None),
        ):
            equal(other.api(method, path + tail, body).status, 404, f"{method} {tail}")
        theirs = done(other.create(), 201)["sandboxID"]
        equal(other.api("DELETE", f"/sandboxes/{theirs}").status, 204, "kill")
        mine = life()
        until(30, "our own events", lambda: KILLED in receiver.types(mine))
        equal(receiver.of(theirs), [], "events of the other team")


def refused():
    good = {"name": "suite", "url": "https://example.com/", "events": [KILLED]}
    good["signatureSecret"] = SECRET
    for field, value in (
        ("url", "ftp://example.com/"),
        ("url", "no url"),
        ("url", "https://" + "x" * 3000),
        ("events", []),
        ("events", ["sandbox.lifecycle.born"]),
        ("signatureSecret", "short"),
        ("name", ""),
    ):
        answer = raw.api("POST", "/events/webhooks", {**good, field: value})
        equal(answer.status, 400, f"{field}={str(value)[:40]}: {answer}")
        true(field in answer.message, f"{answer} does not name {field}")
        true("short" not in answer.message, "the secret is in the text")
    equal(raw.api("GET", f"/events/webhooks/{uuid.uuid4()}").status, 404, "an unknown one")
    equal(raw.api("GET", f"/events/sandboxes/i{'0' * 20}").status, 404, "an unknown sandbox")


CHECKS = (
    events,
    expired_too,
    delivered,
    only_what_is_wanted,
    retried,
    over_tls,
    other_team,
    refused,
)


def main():
    if token() is None:
        say(f"skip webhooks.all: {TOKEN_FILE} is not set; it names a file of the server's data folder")
        return
    with suite:
        for body in CHECKS:
            suite.check(body.__name__, body)


if __name__ == "__main__":
    main()
