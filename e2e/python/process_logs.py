"""What the processes of a sandbox say comes out of its logs, in both versions of the route.

Plain HTTP with the standard library, so that nothing stands between the check and the wire. See
../README.md.
"""

import json
import time
import urllib.parse

import raw
from checks import Suite, equal, true
from raw import RawSandbox, api

suite = Suite("logs")
UNKNOWN_ID = "i" + "0" * 20
# Lines wait at most a second in the guest; an emulated machine under load takes its time.
SOON_S = 30
FLOOD_BYTES = 8 * 1024 * 1024


def logs(sandbox, version="v2", **query):
    path = f"/v2/sandboxes/{sandbox.id}/logs" if version == "v2" else f"/sandboxes/{sandbox.id}/logs"
    answer = api("GET", f"{path}?{urllib.parse.urlencode(query)}")
    equal(answer.status, 200, f"{path} {query}: {answer}")
    return answer.json()


def entries(sandbox, **query):
    return logs(sandbox, **query)["logs"]


def awaited(sandbox, found, what, **query):
    """The log, once `found` says that what is looked for is in it."""
    until = time.monotonic() + SOON_S
    while True:
        seen = entries(sandbox, **query)
        if found(seen):
            return seen
        true(time.monotonic() < until, f"{what}: not in {json.dumps(seen)[:2000]}")
        time.sleep(0.1)


def said(text):
    return lambda seen: any(entry["message"] == text for entry in seen)


def one(seen, message):
    found = [entry for entry in seen if entry["message"] == message]
    equal(len(found), 1, f"entries that say {message!r}")
    return found[0]


def new_sandbox_is_silent(sandbox):
    """Nothing of the machine the template was saved from, and nothing of a neighbour."""
    equal(entries(sandbox), [], "log of a sandbox in which nothing ran")
    equal(logs(sandbox, "v1"), {"logs": [], "logEntries": []}, "version 1")


def both_streams(sandbox):
    command = "echo to-stdout; echo 'to-stderr ünï ✓' >&2; printf unfinished; exit 3"
    equal(sandbox.run(command)[0], 3, "exit code")
    seen = awaited(sandbox, lambda seen: any(end(e) for e in seen), "the end")
    out, err = one(seen, "to-stdout"), one(seen, "to-stderr ünï ✓")
    equal((out["level"], err["level"]), ("info", "error"), "levels")
    equal(out["fields"]["event_type"], "stdout", "stream")
    equal(err["fields"]["event_type"], "stderr", "stream")
    one(seen, "unfinished")
    pid = out["fields"]["pid"]
    true(pid.isdigit() and int(pid) > 1, f"pid {pid!r}")
    true(all(entry["fields"]["pid"] == pid for entry in seen), "one process, one pid")
    true(command[:20] in out["fields"]["cmd"], f"command {out['fields']['cmd']!r}")
    equal(seen[0]["fields"]["event_type"], "process_start", "first entry")
    true("exit status 3" in seen[-1]["message"], f"last entry {seen[-1]}")
    equal(seen[-1]["level"], "warn", "level of a failure")
    stamps = [milliseconds(entry["timestamp"]) for entry in seen]
    equal(stamps, sorted(stamps), "order")


def end(entry):
    return entry["fields"]["event_type"] == "process_end"


def version_one(sandbox):
    """The official command line parses each line and takes three of its fields for granted."""
    old, new = logs(sandbox, "v1"), entries(sandbox)
    equal(old["logEntries"], new, "the same entries")
    equal(len(old["logs"]), len(new), "as many lines")
    for line, entry in zip(old["logs"], new):
        parsed = json.loads(line["line"])
        equal(line["timestamp"], entry["timestamp"], "time")
        equal(parsed["message"], entry["message"], "message")
        equal(parsed["level"], entry["level"], "level")
        equal(parsed["logger"], "process", "logger")
    started = len(entries(sandbox))
    future = int(time.time() * 1000) + 3_600_000
    equal(logs(sandbox, "v1", start=future)["logs"], [], "lines of the future")
    true(started > 0 and len(logs(sandbox, "v1", limit=1)["logs"]) == 1, "limit")


def filters(sandbox):
    errors = entries(sandbox, level="error")
    equal([entry["message"] for entry in errors], ["to-stderr ünï ✓"], "level error")
    found = entries(sandbox, search="to-std")
    equal(len(found), 2, "search")
    equal(entries(sandbox, search="TO-STD"), [], "search minds the case")
    newest = entries(sandbox, direction="backward")
    equal(newest, entries(sandbox, direction="forward")[::-1], "backward")
    for query in ("limit=1001", "direction=up", "level=loud", "cursor=now", "search=" + "x" * 257):
        answer = api("GET", f"/v2/sandboxes/{sandbox.id}/logs?{query}")
        equal((answer.status, answer.json()["code"]), (400, 400), query)
    for path in (f"/v2/sandboxes/{UNKNOWN_ID}/logs", f"/sandboxes/{UNKNOWN_ID}/logs"):
        equal(api("GET", path).status, 404, path)


def following(sandbox):
    """Whoever goes on after the last time seen gets every line once, in order."""
    count = 1500
    equal(sandbox.run(f"for n in $(seq {count}); do echo follow-$n; done")[0], 0, "exit code")
    got, cursor, until = [], 0, time.monotonic() + SOON_S
    while f"follow-{count}" not in got:
        true(time.monotonic() < until, f"{len(got)} lines so far, the last {got[-1:]}")
        page = entries(sandbox, cursor=cursor, search="follow-", limit=400)
        got += [entry["message"] for entry in page if entry["fields"]["event_type"] == "stdout"]
        if page:
            cursor = milliseconds(page[-1]["timestamp"]) + 1
        else:
            time.sleep(0.1)
    equal(got, [f"follow-{n}" for n in range(1, count + 1)], "lines")


def milliseconds(stamp):
    whole, _, fraction = stamp.rstrip("Z").partition(".")
    seconds = int(time.mktime(time.strptime(whole, "%Y-%m-%dT%H:%M:%S"))) - time.timezone
    return seconds * 1000 + int((fraction + "000")[:3])


def unheard_output(sandbox):
    """What a process says when its caller has left, or listened to something else."""
    sandbox.run("(sleep 1; echo from-the-background) & disown; exit 0")
    awaited(sandbox, said("from-the-background"), "background", search="from-the-background")
    sandbox.run("printf 'prompt> '; sleep 3; echo answered")
    seen = awaited(sandbox, said("answered"), "what follows a prompt", direction="backward")
    one(seen, "prompt> ")


def long_lines(sandbox):
    sandbox.run("head -c 10000 /dev/zero | tr '\\0' x; echo; echo after-it")
    seen = awaited(sandbox, said("after-it"), "a line after a long one", direction="backward")
    parts = [entry for entry in seen if set(entry["message"]) == {"x"}]
    equal(sum(len(entry["message"]) for entry in parts), 10000, "characters")
    true(all(len(entry["message"]) <= 4096 for entry in parts), "length of a part")
    equal([entry["fields"].get("continues") for entry in parts], [None, "true", "true"], "marks")


def flood(sandbox):
    """Output without measure costs its process little, and the log says what it left out."""
    lines = FLOOD_BYTES // 64
    command = f"yes {'f' * 63} | head -n {lines}"
    quiet, heard = timed(sandbox, f"{command} > /dev/null"), timed(sandbox, command)
    seen = awaited(
        sandbox,
        lambda seen: any(e["fields"]["event_type"] == "dropped" for e in seen),
        "what was left out",
        direction="backward",
        level="warn",
    )
    notice = next(entry for entry in seen if entry["fields"]["event_type"] == "dropped")
    equal(notice["fields"]["logger"], "envd", "who says so")
    suite.remark(
        f"flood: {FLOOD_BYTES >> 20} MiB in {heard:.1f} s, to nowhere {quiet:.1f} s; "
        f"{notice['message'].split(' of output')[0]} left out in one notice"
    )
    sandbox.run("echo after-the-flood")
    awaited(sandbox, said("after-the-flood"), "the log after it", direction="backward")


def timed(sandbox, command):
    began = time.monotonic()
    equal(sandbox.run(command, timeout_s=600)[0], 0, command[:40])
    return time.monotonic() - began


def neighbours(sandbox):
    """Each sandbox has its own log, which goes with it."""
    other = RawSandbox(suite.tag)
    other.run("echo only-here")
    awaited(other, said("only-here"), "a neighbour's line")
    equal(entries(sandbox, search="only-here"), [], "a neighbour's line")
    true(all("flood" not in entry["message"] for entry in entries(other)), "lines of another")
    equal(api("DELETE", f"/sandboxes/{other.id}").status, 204, "kill")
    equal(api("GET", f"/v2/sandboxes/{other.id}/logs").status, 404, "log of a killed sandbox")


def no_token(sandbox):
    text = json.dumps(logs(sandbox, "v1")) + json.dumps(entries(sandbox, direction="backward"))
    true(sandbox.token not in text, "the guest's token is in its log")
    true(raw.setting("E2B_API_KEY") not in text, "the API key is in a log")


def main():
    with suite:
        sandbox = suite.check("create", lambda: RawSandbox(suite.tag))
        for body in (new_sandbox_is_silent, both_streams, version_one, filters, following):
            suite.check(body.__name__, body, sandbox)
        for body in (unheard_output, long_lines):
            suite.check(body.__name__, body, sandbox)
        suite.check("flood", flood, sandbox, deadline_s=900)
        for body in (neighbours, no_token):
            suite.check(body.__name__, body, sandbox)


if __name__ == "__main__":
    main()
