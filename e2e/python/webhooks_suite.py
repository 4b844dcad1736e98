"""Lifecycle events and webhooks over plain HTTP, against a server that may reach this machine.

Needs `belljar up --webhook-allow-private`, and the admin token for a second team: the variable
BELLJAR_ADMIN_TOKEN_FILE names its file. See ../README.md.
"""

import base64
import hashlib
import json
import threading
import time
import uuid
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import raw
from checks import Suite, equal, say, true, until
from operator_api import TOKEN_FILE, Team, done, token

suite = Suite("webhooks")
SECRET = "a secret of the suite"
CREATED, UPDATED, KILLED = (f"sandbox.lifecycle.{name}" for name in ("created", "updated", "killed"))
ALL = [CREATED, UPDATED, KILLED]


class Receiver:
    """A server that notes deliveries. `statuses` are the next answers; later ones are 200."""

    def __init__(self):
        self.got, self.statuses = [], []
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

            def log_message(self, *_):
                pass  # standard output is for the suite's lines

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = "http://127.0.0.1:%d/hook" % self._server.server_address[1]
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


def main():
    if token() is None:
        say(f"skip webhooks.all: {TOKEN_FILE} is not set; it names a file of the server's data folder")
        return
    with suite:
        for body in (events, expired_too, delivered, only_what_is_wanted, retried, other_team, refused):
            suite.check(body.__name__, body)


if __name__ == "__main__":
    main()
