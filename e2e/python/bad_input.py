"""Input no careful client sends: every answer must be a clear error, and nothing may be lost.

Plain HTTP with the standard library, so that no SDK refuses the request first. See ../README.md.
"""

import hashlib
import random
import select
import socket
import time
import urllib.parse

import raw
from checks import Skip, Suite, equal, true
from raw import ENVD_PORT, RawSandbox, api, routed, to_port

suite = Suite("bad")
UNKNOWN_ID = "i" + "0" * 20
HUGE_BODY_BYTES = 300 * 1024 * 1024
LARGE_FILE_BLOCKS = 200  # of one MiB


def wants(answer, status, text, what):
    """An error in the API's or the daemon's shape: its code is its status, its text says it all."""
    body = answer.json()
    true(
        answer.status == status and isinstance(body, dict), f"{what}: wanted {status}, got {answer}"
    )
    equal(body.get("code"), status, f"{what}: code in the body")
    true(text.lower() in answer.message.lower(), f"{what}: {text!r} is not in {answer.message!r}")


def create(body):
    """A create that should fail. One that does not is tagged, so the suite kills it."""
    if isinstance(body, dict):
        body = {"templateID": "base", "metadata": suite.metadata, **body}
    return api("POST", "/v2/sandboxes", body)


# --- the API ------------------------------------------------------------------------------------


def keys():
    wrong = "e2b_" + "0" * 40
    opening = "error in openapi3filter.SecurityRequirementsError: security requirements failed: "
    for key in (wrong, "nonsense", "e2b_", raw.setting("E2B_API_KEY")[:-1], "e2b_" + "é" * 20):
        answer = api("GET", "/v2/sandboxes", key=key.encode("utf-8").decode("latin-1"))
        wants(answer, 401, "", f"key {key!r}")
        true(answer.message.startswith(opening), f"401 says {answer.message!r}")
    bare = raw.request(raw.setting("E2B_API_URL"), "GET", "/v2/sandboxes")
    wants(bare, 401, opening, "no key")
    wants(api("POST", "/sandboxes", {"templateID": "base"}, key=wrong), 401, opening, "create")
    wants(api("DELETE", f"/sandboxes/{UNKNOWN_ID}", key=wrong), 401, opening, "kill")


def unknown_template():
    for path in ("/v2/sandboxes", "/sandboxes"):
        body = {"templateID": "no-such-template", "metadata": suite.metadata}
        wants(api("POST", path, body), 404, "no-such-template", path)


def unknown_sandbox():
    """Unknown and malformed ids read the same: neither names a sandbox."""
    odd = ["UPPER", "a b", "../../etc/passwd", "x" * 3000, "\0", "ünï", "' OR 1=1 --", "i-"]
    for sandbox_id in [UNKNOWN_ID, *odd]:
        path = "/sandboxes/" + urllib.parse.quote(sandbox_id, safe="")
        for method, suffix, body in [
            ("GET", "", None),
            ("DELETE", "", None),
            ("POST", "/timeout", {"timeout": 60}),
            ("POST", "/refreshes", {"duration": 60}),
            ("POST", "/connect", {"timeout": 60}),
        ]:
            answer = api(method, path + suffix, body)
            wants(answer, 404, "doesn't exist", f"{method} {sandbox_id[:20]!r}{suffix}")
    answer = api("POST", f"/v2/sandboxes/{UNKNOWN_ID}/connect", {"timeout": 60})
    wants(answer, 404, UNKNOWN_ID, "v2 connect")


def unknown_route():
    wants(api("GET", "/no/such/route"), 404, "", "unknown route")
    answer = api("PATCH", "/sandboxes")
    true(answer.status in (404, 405), f"unknown method answered {answer}")


def timeouts(sandbox):
    odd = [(0, "greater than 0"), (-1, "greater than 0"), (10**9, "cannot be greater than")]
    odd += [(10**30, ""), (-(10**30), ""), (1.5, ""), ("60", "timeout"), (True, "timeout")]
    before = api("GET", f"/sandboxes/{sandbox.id}").json()["endAt"]
    for value, text in odd:
        wants(create({"timeout": value}), 400, text, f"create with timeout {value!r}")
        answer = api("POST", f"/sandboxes/{sandbox.id}/timeout", {"timeout": value})
        wants(answer, 400, text, f"set timeout {value!r}")
    wants(api("POST", f"/sandboxes/{sandbox.id}/timeout", {}), 400, "timeout", "no timeout")
    equal(api("GET", f"/sandboxes/{sandbox.id}").json()["endAt"], before, "endAt after refusals")


def not_json():
    deep = b'{"templateID":' + b"[" * 100_000
    for body in (b"", b"{", b'{"templateID":', b"\xff\xfe\x00", b"[]", b'"base"', b"null", deep):
        answer = api("POST", "/v2/sandboxes", body)
        wants(answer, 400, "", f"body {body[:20]!r}")
        true(answer.message, f"body {body[:20]!r}: no reason given")


def wrong_types():
    for field, value in [
        ("templateID", 5),
        ("templateID", None),
        ("metadata", "text"),
        ("metadata", {"key": 1}),
        ("envVars", ["A=1"]),
        ("envVars", {"A": {"b": 1}}),
    ]:
        body = {"templateID": "base", "metadata": suite.metadata, field: value}
        wants(api("POST", "/v2/sandboxes", body), 400, field, f"{field} = {value!r}")
    wants(api("POST", "/v2/sandboxes", {"metadata": suite.metadata}), 400, "templateID", "missing")


def wrong_queries():
    for query in (
        "limit=0",
        "limit=-1",
        "limit=many",
        "limit=1000000",
        "state=asleep",
        "nextToken=%00",
    ):
        answer = api("GET", f"/v2/sandboxes?{query}")
        wants(answer, 400, "", f"list with {query}")


def huge_body(chunked):
    """Sends 300 MB until the server answers; it must answer, and must not take it all in."""
    url = urllib.parse.urlsplit(raw.setting("E2B_API_URL"))
    framing = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {HUGE_BODY_BYTES}"
    head = (
        f"POST /v2/sandboxes HTTP/1.1\r\nHost: {url.netloc}\r\nX-API-Key: "
        f"{raw.setting('E2B_API_KEY')}\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
    )
    block = b" " * 65536
    piece = b"%x\r\n%s\r\n" % (len(block), block) if chunked else block
    with socket.create_connection((url.hostname, url.port or 80), timeout=60) as wire:
        wire.sendall(head.encode())
        sent = send_until_answered(wire, piece)
        true(sent < HUGE_BODY_BYTES, "the server took all of it before it answered")
        status_line, _, rest = read_to_end(wire).partition(b"\r\n")
    equal(status_line.split(b" ")[1:2], [b"413"], f"status after {sent} bytes, {status_line!r}")
    true(b'"message"' in rest, f"no reason given: {rest[:200]!r}")


def send_until_answered(wire, piece):
    """Repeats `piece` until there is something to read; returns the bytes sent."""
    sent, rest = 0, memoryview(b"")
    while sent < HUGE_BODY_BYTES:
        readable, writable, _ = select.select([wire], [wire], [], 60)
        if readable or not writable:
            break
        rest = rest or memoryview(piece)
        wire.setblocking(False)
        try:
            count = wire.send(rest)
        except BlockingIOError:
            count = 0
        except (BrokenPipeError, ConnectionResetError):
            break  # hung up; what it said before that is still to be read
        finally:
            wire.settimeout(60)
        sent, rest = sent + count, rest[count:]
    return sent


def read_to_end(wire):
    """What the server said: to its end of file, or to the end of the one JSON body."""
    answer = b""
    while not answer.rstrip().endswith(b"}"):
        try:
            part = wire.recv(65536)
        except ConnectionResetError:
            break
        if not part:
            break
        answer += part
    return answer


# --- traffic ------------------------------------------------------------------------------------


def closed_port(sandbox):
    answer = to_port(sandbox.id, 9)
    wanted = {
        "sandboxId": sandbox.id,
        "message": "The sandbox is running but port is not open",
        "port": 9,
        "code": 502,
    }
    equal((answer.status, answer.json()), (502, wanted), "closed port")
    page = to_port(sandbox.id, 9, headers={"Accept": "text/html", "User-Agent": "Mozilla/5.0"})
    equal(page.status, 502, "closed port, for a browser")


def wrong_targets(sandbox):
    answer = to_port(UNKNOWN_ID, ENVD_PORT, "/health")
    wanted = {"sandboxId": UNKNOWN_ID, "message": "The sandbox was not found", "code": 502}
    equal((answer.status, answer.json()), (502, wanted), "unknown sandbox")
    url = raw.setting("E2B_SANDBOX_URL")
    for headers in (
        {},
        {"E2b-Sandbox-Id": sandbox.id},
        {"E2b-Sandbox-Port": "80"},
        routed("../etc"),
        routed("UPPER CASE"),
        {"Host": "nonsense.sandboxes.test"},
        {"Host": "80-.sandboxes.test"},
    ):
        answer = raw.request(url, "GET", "/health", headers=headers)
        true(answer.status == 400 and answer.body, f"{headers} answered {answer}")
    # A number that is no port is a closed one: 502 as for any other.
    answer = raw.request(url, "GET", "/health", headers=routed(sandbox.id, "65536"))
    equal(answer.status, 502, "a number that is no port")
    for port in ("", "abc", "-1", "99999999999999999999"):
        answer = raw.request(url, "GET", "/health", headers=routed(sandbox.id, port))
        true(answer.status in (400, 500) and answer.body, f"port {port!r} answered {answer}")


def wrong_token(sandbox):
    for headers in ({}, {"X-Access-Token": ""}, {"X-Access-Token": "0" * 64}):
        for path in ("/files?path=/etc/hostname", "/envs", "/metrics"):
            answer = to_port(sandbox.id, ENVD_PORT, path, headers=headers)
            wants(answer, 401, "", f"{path} with {headers}")
    answer = to_port(sandbox.id, ENVD_PORT, "/process.Process/List", "POST")
    true(answer.status in (401, 415), f"list of processes without a token answered {answer}")
    reserved = to_port(sandbox.id, ENVD_PORT, "/init", "POST", {"X-Access-Token": sandbox.token})
    equal(reserved.status, 404, "the control plane's own route")


def broken_rpc(sandbox):
    unary = {"Content-Type": "application/json", "Connect-Protocol-Version": "1"}
    for body in (b"{", b"[]", b'{"process":5}', b"\xff"):
        answer = sandbox.envd("POST", "/process.Process/SendSignal", body, unary)
        true(answer.status == 400, f"SendSignal with {body!r} answered {answer}")
    answer = sandbox.unary(
        "process.Process/SendSignal", {"process": {"pid": 4_000_000}, "signal": 9}
    )
    equal((answer.status, answer.json()["code"]), (404, "not_found"), "unknown pid")
    stream = {"Content-Type": "application/connect+json", "Connect-Protocol-Version": "1"}
    for body in (b"", b"\x00\x00", b"\x00\xff\xff\xff\xff{}", b"\x00\x00\x00\x00\x01{"):
        answer = sandbox.envd("POST", "/process.Process/Start", body, stream)
        true(b'"error"' in answer.body or answer.status >= 400, f"Start {body!r} answered {answer}")
    answer = sandbox.unary("process.Process/NoSuchMethod", {})
    true(answer.status in (404, 501), f"unknown method answered {answer}")


# --- files --------------------------------------------------------------------------------------


def wrong_paths(sandbox):
    wants(sandbox.download("/no/such/file"), 404, "/no/such/file", "download of a missing file")
    wants(sandbox.download("/etc"), 400, "/etc", "download of a folder")
    wants(sandbox.upload("/etc", b"x"), 400, "/etc", "upload over a folder")
    for method, message in [
        ("Stat", {"path": "/no/such/file"}),
        ("ListDir", {"path": "/no/such/folder", "depth": 1}),
        ("Move", {"source": "/no/such/file", "destination": "/tmp/x"}),
    ]:
        answer = sandbox.unary(f"filesystem.Filesystem/{method}", message)
        equal((answer.status, answer.json()["code"]), (404, "not_found"), method)
    answer = sandbox.unary("filesystem.Filesystem/ListDir", {"path": "/etc/hostname"})
    equal((answer.status, answer.json()["code"]), (400, "invalid_argument"), "ListDir of a file")
    nobody = "/files?" + urllib.parse.urlencode(
        {"path": "/etc/hostname", "username": "nobody-here"}
    )
    wants(sandbox.envd("GET", nobody), 401, "nobody-here", "unknown user")


def odd_files(sandbox):
    contents = {
        "empty": b"",
        "binary": bytes(range(256)) * 4096,
        "name with spaces & ünïcode #%?.txt": b"text\n",
        "crlf": b"a\r\n--boundary\r\n\0",
    }
    for name, content in contents.items():
        answer = sandbox.upload(name, content)
        equal(answer.status, 200, f"upload of {name!r}: {answer}")
        equal(answer.json()[0]["path"], f"/home/user/{name}", "path")
        equal(sandbox.download(name).body, content, f"content of {name!r}")


def block(number):
    """One MiB that neither compresses nor repeats."""
    return random.Random(number).randbytes(1024 * 1024)


def large_file(sandbox):
    wanted, started = hashlib.sha256(), time.monotonic()

    def blocks():
        for number in range(LARGE_FILE_BLOCKS):
            part = block(number)
            wanted.update(part)
            yield part

    length = LARGE_FILE_BLOCKS * 1024 * 1024
    equal(sandbox.upload("large", blocks(), length).status, 200, "upload")
    uploaded = time.monotonic()
    code, out, err = sandbox.run("sha256sum < large", timeout_s=600)
    equal((code, out.split()[:1]), (0, [wanted.hexdigest()]), f"hash in the guest {err}")
    hashed = time.monotonic()
    answer = sandbox.download("large")
    equal(hashlib.sha256(answer.body).hexdigest(), wanted.hexdigest(), "hash of the download")
    suite.remark(
        f"large_file: up {uploaded - started:.1f} s, down {time.monotonic() - hashed:.1f} s"
    )
    sandbox.run("rm large")


# Takes every free block, also those kept for root. Pointed at a daemon that serves a real machine,
# it would fill that machine's disk: it refuses unless it is plainly inside a sandbox.
FILL = """
[ "$(cat /run/e2b/.E2B_SANDBOX_ID)" = "$E2B_SANDBOX_ID" ] || { echo "no sandbox" >&2; exit 99; }
[ "$(df --output=size -BG / | tail -1 | tr -dc 0-9)" -le 64 ] || { echo "too large" >&2; exit 98; }
for size in 1G 100M 10M 1M 64K 4K; do
  while fallocate -l $size /fill.$((n++)) 2>/dev/null; do :; done
done
while echo x 2>/dev/null > /fill.small.$((m++)); do [ $m -gt 4096 ] && break; done
df --output=avail / | tail -1
"""


def full_disk(sandbox):
    equal(sandbox.upload("before", b"written before").status, 200, "upload before")
    try:
        code, out, err = sandbox.run(FILL, user="root", timeout_s=300)
        if code in (98, 99):
            raise Skip(f"filling this disk would be dangerous: {err.strip()}")
        true(int(out) < 64, f"{out.strip()} KiB still free")
        wants(sandbox.upload("too-much", b"x" * 1024 * 1024), 507, "", "upload to a full disk")
        equal(sandbox.run("echo alive")[:2], (0, "alive\n"), "a command on a full disk")
        equal(sandbox.download("before").body, b"written before", "a file from before")
    finally:
        room = sandbox.run("rm -f /fill.*", user="root")
    equal(room[0], 0, "making room")
    equal(sandbox.upload("after", b"written after").status, 200, "upload after")
    equal(sandbox.download("after").body, b"written after", "a file from after")


# --- and afterwards -----------------------------------------------------------------------------


def killed_sandbox():
    sandbox = RawSandbox(suite.tag)
    equal(api("DELETE", f"/sandboxes/{sandbox.id}").status, 204, "kill")
    wants(api("DELETE", f"/sandboxes/{sandbox.id}"), 404, sandbox.id, "second kill")
    wants(api("GET", f"/sandboxes/{sandbox.id}"), 404, sandbox.id, "detail")
    answer = sandbox.envd("GET", "/health")
    wanted = {"sandboxId": sandbox.id, "message": "The sandbox was not found", "code": 502}
    equal((answer.status, answer.json()), (502, wanted), "traffic")


def nothing_lost(sandbox):
    """The sandbox all of this happened beside still works, and no refused create left one."""
    equal(raw.tagged_ids(suite.tag), [sandbox.id], "sandboxes alive")
    equal(sandbox.run("echo alive")[:2], (0, "alive\n"), "a command")
    code = api("POST", f"/sandboxes/{sandbox.id}/timeout", {"timeout": 300}).status
    equal(code, 204, "set timeout")


def main():
    with suite:
        sandbox = suite.check("create", lambda: RawSandbox(suite.tag))
        for body in (keys, unknown_template, unknown_sandbox, unknown_route, not_json, wrong_types):
            suite.check(body.__name__, body)
        suite.check("wrong_queries", wrong_queries)
        suite.check("huge_body", huge_body, False)
        suite.check("huge_body_chunked", huge_body, True)
        for body in (timeouts, closed_port, wrong_targets, wrong_token, broken_rpc):
            suite.check(body.__name__, body, sandbox)
        for body in (wrong_paths, odd_files):
            suite.check(body.__name__, body, sandbox)
        suite.check("large_file", large_file, sandbox, deadline_s=900)
        suite.check("full_disk", full_disk, sandbox, deadline_s=600)
        suite.check("killed_sandbox", killed_sandbox)
        suite.check("nothing_lost", nothing_lost, sandbox)


if __name__ == "__main__":
    main()
