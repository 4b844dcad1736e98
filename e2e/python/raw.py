"""The wire without an SDK: plain HTTP to the API and to a sandbox, with the standard library only.

The bad-input program needs requests that no SDK would send; the suites use it to clean up by a way
that does not depend on the SDK under test.
"""

import base64
import http.client
import json
import os
import struct
import sys
import urllib.parse
from dataclasses import dataclass

ENVD_PORT = 49983
END_OF_STREAM = 0x02  # Connect's envelope flag for the last frame


def setting(name):
    value = os.environ.get(name)
    if not value:
        print(
            f"failed to start: {name} is not set; `belljar up` prints it, `belljar env` exports it"
        )
        sys.exit(2)
    return value


@dataclass
class Answer:
    status: int
    headers: dict
    body: bytes

    def json(self):
        """The body as JSON, or None when it is something else."""
        try:
            return json.loads(self.body)
        except ValueError:
            return None

    @property
    def message(self):
        """The `message` of an error body, or the start of the text."""
        body = self.json()
        if isinstance(body, dict) and isinstance(body.get("message"), str):
            return body["message"]
        return self.body[:200].decode("utf-8", "replace")

    def __str__(self):
        return f"{self.status} {self.body[:200].decode('utf-8', 'replace')!r}"


def open_connection(base_url, timeout_s):
    url = urllib.parse.urlsplit(base_url)
    kind = http.client.HTTPSConnection if url.scheme == "https" else http.client.HTTPConnection
    return kind(url.hostname, url.port, timeout=timeout_s)


def request(base_url, method, path, body=None, headers=None, timeout_s=60):
    """One request on its own connection. `body` is bytes, or an iterable of bytes (sent chunked
    unless `headers` has Content-Length)."""
    connection = open_connection(base_url, timeout_s)
    try:
        connection.request(method, path, body=body, headers=headers or {})
        response = connection.getresponse()
        return Answer(
            response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
        )
    finally:
        connection.close()


def api(method, path, body=None, key=None, timeout_s=60, headers=None):
    """A control-plane request. `body` is encoded as JSON unless it is bytes already; `key` is False
    for a request without one."""
    headers = dict(headers or {})
    if key is not False:
        headers["X-API-Key"] = setting("E2B_API_KEY") if key is None else key
    if body is not None:
        headers["Content-Type"] = "application/json"
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return request(setting("E2B_API_URL"), method, path, body, headers, timeout_s)


def routed(sandbox_id, port=ENVD_PORT, token=None):
    """The headers that send a request to a port of a sandbox."""
    headers = {"E2b-Sandbox-Id": sandbox_id, "E2b-Sandbox-Port": str(port)}
    if token is not None:
        headers["X-Access-Token"] = token
    return headers


def to_port(sandbox_id, port, path="/", method="GET", headers=None, timeout_s=60):
    """A request to a server inside a sandbox, through the proxy."""
    headers = {**routed(sandbox_id, port), **(headers or {})}
    return request(setting("E2B_SANDBOX_URL"), method, path, None, headers, timeout_s)


def tagged_ids(tag):
    """Ids of the live sandboxes whose metadata has `run` = tag, by the paginated list."""
    query, ids, token = urllib.parse.quote(f"run={urllib.parse.quote(tag)}"), [], ""
    while True:
        page = api("GET", f"/v2/sandboxes?metadata={query}&limit=100&nextToken={token}")
        if page.status != 200:
            raise AssertionError(f"list answered {page}")
        ids += [entry["sandboxID"] for entry in page.json()]
        token = page.headers.get("x-next-token", "")
        if not token:
            return ids


class RawSandbox:
    """A sandbox driven without an SDK."""

    def __init__(self, tag, **fields):
        body = {"templateID": "base", "timeout": 900, "metadata": {"run": tag}, **fields}
        answer = api("POST", "/v2/sandboxes", body, timeout_s=120)
        if answer.status != 201:
            raise AssertionError(f"create answered {answer}")
        self.id = answer.json()["sandboxID"]
        self.token = answer.json()["envdAccessToken"]

    def envd(self, method, path, body=None, headers=None, timeout_s=120):
        headers = {**routed(self.id, token=self.token), **(headers or {})}
        return request(setting("E2B_SANDBOX_URL"), method, path, body, headers, timeout_s)

    def unary(self, procedure, message):
        return self.envd(
            "POST",
            f"/{procedure}",
            json.dumps(message).encode(),
            {"Content-Type": "application/json"},
        )

    def upload(self, path, body, length=None):
        headers = {"Content-Type": "application/octet-stream"}
        if length is not None:
            headers["Content-Length"] = str(length)
        target = "/files?" + urllib.parse.urlencode({"path": path})
        return self.envd("POST", target, body, headers, timeout_s=600)

    def download(self, path):
        return self.envd("GET", "/files?" + urllib.parse.urlencode({"path": path}), timeout_s=600)

    def run(self, command, user="user", timeout_s=120):
        """Runs a shell command; returns (exit code, stdout, stderr)."""
        start = {"process": {"cmd": "/bin/bash", "args": ["-l", "-c", command]}, "stdin": False}
        payload = json.dumps(start).encode()
        headers = {
            "Content-Type": "application/connect+json",
            "Connect-Protocol-Version": "1",
            "Connect-Timeout-Ms": str(timeout_s * 1000),
            "Authorization": "Basic " + base64.b64encode(f"{user}:".encode()).decode(),
        }
        body = struct.pack(">BI", 0, len(payload)) + payload
        answer = self.envd("POST", "/process.Process/Start", body, headers, timeout_s + 30)
        if answer.status != 200:
            raise AssertionError(f"process start answered {answer}")
        return read_process_stream(answer.body)


def envelopes(stream):
    """Splits a Connect stream into (flags, message)."""
    while stream:
        flags, length = struct.unpack(">BI", stream[:5])
        yield flags, json.loads(stream[5 : 5 + length])
        stream = stream[5 + length :]


def read_process_stream(stream):
    out, err, code, ended = b"", b"", None, False
    for flags, message in envelopes(stream):
        if flags & END_OF_STREAM:
            ended = True
            if "error" in message:
                raise AssertionError(f"process stream ended with {message['error']}")
            continue
        event = message.get("event", {})
        out += base64.b64decode(event.get("data", {}).get("stdout", ""))
        err += base64.b64decode(event.get("data", {}).get("stderr", ""))
        if "end" in event:
            code = event["end"].get("exitCode", 0)
    if code is None or not ended:
        raise AssertionError("process stream stopped before its end event")
    return code, out.decode(), err.decode()
