"""The official command line, unmodified, against a live server. See ../README.md."""

import re
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python"))

import raw
from checks import Suite, equal, say, true, until
from program import ENTRY, Program, pinned_version

suite = Suite("cli")
MISSING = "i" + "0" * 20
METRIC_FIELDS = {"timestamp", "cpuCount", "cpuUsedPct", "memUsed", "memTotal", "memCache"}
METRIC_FIELDS |= {"diskUsed", "diskTotal"}


def sandbox(**metadata):
    """A sandbox that carries the suite's tag, which the command line cannot give one."""
    return raw.RawSandbox(suite.tag, metadata={"run": suite.tag, **metadata})


def detail(sandbox_id):
    return raw.api("GET", f"/sandboxes/{sandbox_id}")


def seconds_left(sandbox_id):
    end = datetime.fromisoformat(detail(sandbox_id).json()["endAt"].replace("Z", "+00:00"))
    return (end - datetime.now(timezone.utc)).total_seconds()


def passed(said):
    equal(said.code, 0, f"exit code; {said}")
    return said


def refused(said, *texts):
    """Exit code 1, and every text on stderr."""
    equal(said.code, 1, f"exit code; {said}")
    for text in texts:
        true(text in said.err, f"no {text!r} in {said}")
    return said


def tagged(**more):
    return ",".join(f"{key}={value}" for key, value in {"run": suite.tag, **more}.items())


# --- create, info, list -------------------------------------------------------------------------


def version(cli):
    equal(passed(cli.run("--version")).out.strip(), pinned_version(), "version")


def create_detached(cli):
    said = passed(cli.run("sandbox", "create", "base", "--detach", "--timeout", "600"))
    sandbox_id = said.out.strip()
    try:
        true(re.fullmatch(r"[a-z0-9]+", sandbox_id), f"no id alone on stdout: {said}")
        found = detail(sandbox_id).json()
        equal((found["sandboxID"], found["state"]), (sandbox_id, "running"), "what was created")
        true(found["envdAccessToken"], "the command line asks for a secured sandbox")
        true(560 < seconds_left(sandbox_id) <= 601, "the timeout is not the one given")
    finally:
        passed(cli.run("sandbox", "kill", sandbox_id))
    equal(detail(sandbox_id).status, 404, "status after kill")


def create_refused(cli):
    said = refused(cli.run("sandbox", "create", "no-such-template", "--detach"))
    true("template 'no-such-template' not found" in said.err, f"names no template: {said}")
    refused(cli.run("sandbox", "create", "--detach", "--timeout", "29"), "at least 30 seconds")


def several_at_once(cli):
    with ThreadPoolExecutor(4) as pool:
        created = list(
            pool.map(lambda _: cli.run("sandbox", "create", "--detach"), range(4))
        )
        ids = [passed(said).out.strip() for said in created]
        try:
            equal(len(set(ids)), 4, "distinct ids")
            line = 'echo "$E2B_SANDBOX_ID"'
            said = list(pool.map(lambda one: cli.run("sandbox", "exec", one, line), ids))
            equal([passed(one).out.strip() for one in said], ids, "who answered")
        finally:
            said = passed(cli.run("sandbox", "kill", *ids))
    equal(sorted(re.findall(r"Sandbox (\S+) has been killed", said.out)), sorted(ids), "killed")


def info(cli, box):
    found = passed(cli.run("sandbox", "info", box.id, "--format", "json")).json()
    wanted = detail(box.id).json()
    equal(found["sandboxId"], box.id, "sandboxId")
    equal(found["templateId"], wanted["templateID"], "templateId")
    equal((found["name"], found["state"]), ("base", "running"), "alias and state")
    equal(found["metadata"], {"run": suite.tag, "colour": "red"}, "metadata")
    for field in ("cpuCount", "memoryMB", "envdVersion", "lifecycle", "startedAt", "endAt"):
        equal(moment(found[field]), moment(wanted[field]), field)
    text = passed(cli.run("sandbox", "info", box.id)).out
    for line in (f"Sandbox ID: {box.id}", "State: running", "Alias: base", '"colour": "red"'):
        true(line in text, f"no {line!r} in {text!r}")


def moment(value):
    """Times are compared as times: JavaScript prints three digits of a second."""
    if isinstance(value, str) and value.endswith("Z"):
        return datetime.fromisoformat(value[:-1] + "+00:00").timestamp() // 0.001
    return value


def info_refused(cli, box):
    refused(cli.run("sandbox", "info", MISSING), f"Sandbox {MISSING} wasn't found")
    refused(cli.run("sandbox", "info", box.id, "-f", "xml"), "Unsupported output format: xml")


def listing(cli, box, other):
    def ids(*arguments):
        said = cli.run("sandbox", "list", "--format", "json", "--metadata", *arguments)
        return [entry["sandboxId"] for entry in passed(said).json()]

    oldest_first = [box.id, other.id]
    equal(ids(tagged()), oldest_first, "by metadata")
    equal(ids(tagged(colour="red")), [box.id], "by two pairs")
    equal(ids(tagged(colour="none")), [], "by a value nobody has")
    equal(ids(tagged(), "--order", "asc"), oldest_first, "ascending")
    equal(ids(tagged(), "--order", "desc"), oldest_first[::-1], "descending")
    equal(ids(tagged(), "--state", "running"), oldest_first, "running ones")
    equal(ids(tagged(), "--state", "paused"), [], "paused ones")
    equal(ids(tagged(), "--template", "base"), oldest_first, "by the template's alias")
    template = detail(box.id).json()["templateID"]
    equal(ids(tagged(), "--template", template), oldest_first, "by the template's id")
    equal(ids(tagged(), "--started-after", detail(other.id).json()["startedAt"]), [other.id], "new")
    equal(ids(tagged(), "--started-after", "2100-01-01T00:00:00Z"), [], "of the future")
    equal(ids(tagged(), "--limit", "1"), [other.id], "the newest one")
    equal(ids(tagged(), "--limit", "0"), oldest_first, "without a limit")


def listing_for_people(cli, box, other):
    table = passed(cli.run("sandbox", "list", "-m", tagged())).out
    rows = [line.split() for line in table.splitlines() if line]
    equal(rows[0][:2], ["SANDBOX", "ID"], "the table's head")
    equal([row[0] for row in rows[1:]], [box.id, other.id], "its rows")
    true("Running" in table and f'"run":"{suite.tag}"' in table, f"state or metadata: {table}")
    table = passed(cli.run("sandbox", "ls", "-m", tagged(), "-l", "1")).out
    true("Showing first 1 sandboxes" in table, f"says nothing of more: {table!r}")
    said = passed(cli.run("sandbox", "list", "-m", tagged(colour="none")))
    equal(said.out.strip(), "No sandboxes found", "an empty list")
    refused(cli.run("sandbox", "list", "-f", "xml"), "Unsupported output format: xml")
    refused(cli.run("sandbox", "list", "--order", "up"), "Invalid order")


def credentials(cli, box):
    wrong = "e2b_" + "0" * 40
    for command in (("list",), ("info", box.id), ("kill", box.id), ("exec", box.id, "true")):
        said = refused(cli.run("sandbox", *command, E2B_API_KEY=wrong), "AuthenticationError")
        true(wrong not in said.err + said.out, "the key is in the text")
    refused(cli.run("sandbox", "list", E2B_API_KEY=None), "E2B_API_KEY")
    equal(detail(box.id).status, 200, "status after a kill with a wrong key")


# --- exec ---------------------------------------------------------------------------------------


def exec_result(cli, box):
    said = cli.run("sandbox", "exec", box.id, "echo out; echo wärning >&2; exit 7")
    equal((said.code, said.out), (7, "out\n"), "exit code and stdout")
    true(said.err.startswith("wärning\n"), f"stderr: {said}")
    options = ("-u", "root", "-c", "/var", "-e", "GREETING=hi there=x")
    said = passed(cli.run("sandbox", "exec", *options, box.id, 'id -un; pwd; echo "$GREETING"'))
    equal(said.out, "root\n/var\nhi there=x\n", "user, folder and variable")
    said = passed(cli.run("sandbox", "exec", box.id, "--", "printf", "%s|", "a b", "it's", "$HOME"))
    equal(said.out, "a b|it's|$HOME|", "arguments as they were")
    said = passed(cli.run("sandbox", "exec", box.id, "seq 20000"))
    equal(said.out, "".join(f"{number}\n" for number in range(1, 20_001)), "long output")


def exec_input(cli, box):
    content = bytes(range(256)) * 1024
    said = cli.run("sandbox", "exec", box.id, "wc -c; echo end", stdin=content)
    equal(passed(said).out.split(), [str(len(content)), "end"], "what wc counted")
    said = cli.run("sandbox", "exec", box.id, "cat", stdin="grüße\n".encode())
    equal(passed(said).out, "grüße\n", "what cat gave back")
    # As much as a pipe holds: of more, the rest would meet a pipe without a reader.
    said = cli.run("sandbox", "exec", box.id, "head -c 1 > /dev/null; exit 4", stdin=content[:30000])
    equal(said.code, 4, f"exit code of what does not read to the end; {said}")


def processes(box):
    listed = box.unary("process.Process/List", {}).json().get("processes", [])
    return {entry["pid"]: " ".join(entry["config"].get("args", [])) for entry in listed}


def exec_background(cli, box):
    said = passed(cli.run("sandbox", "exec", "--background", box.id, "sleep 601"))
    pid = int(said.err.split()[0])
    true("sleep 601" in processes(box).get(pid, ""), f"{pid} does not run: {processes(box)}")
    passed(cli.run("sandbox", "exec", box.id, f"kill {pid}"))
    until(30, "the background command is gone", lambda: pid not in processes(box))


def exec_interrupted(cli, box):
    process = cli.start("sandbox", "exec", box.id, "echo begun; sleep 602")
    try:
        # The command line listens for signals once it knows that the command has begun.
        equal(process.stdout.readline(), b"begun\n", "output")
        process.send_signal(signal.SIGINT)
        said = cli.finish(process)
    finally:
        process.kill()
    true(said.code != 0, f"an interrupted command ended well: {said}")
    until(30, "it ends", lambda: all("sleep 602" not in one for one in processes(box).values()))


def exec_refused(cli, box):
    refused(cli.run("sandbox", "exec", MISSING, "true"), "SandboxNotFoundError", MISSING)
    said = refused(cli.run("sandbox", "exec", "-c", "/no/such", box.id, "true"), "/no/such")
    true("InvalidArgumentError" in said.err, f"not an argument's error: {said}")
    refused(cli.run("sandbox", "exec", "-u", "nobody-here", box.id, "true"), "AuthenticationError")


# --- terminals ----------------------------------------------------------------------------------


def connect(cli, box):
    with cli.terminal("sandbox", "connect", "-e", "MOOD=good", "-c", "/tmp", box.id) as terminal:
        terminal.until(f"Terminal connecting to sandbox {box.id}")
        terminal.type('stty size; pwd; echo "mood-$MOOD-$((40 + 2))"\r')
        terminal.until("24 80")
        terminal.until("/tmp")
        terminal.until("mood-good-42")
        terminal.resize(30, 100)
        terminal.type("until [ \"$(stty size)\" = '30 100' ]; do sleep 0.1; done; echo re-$((1+1))\r")
        terminal.until("re-2")
        terminal.type("sleep 603\r")
        until(60, "it runs", lambda: in_ps(box, "sleep 603"))
        terminal.type("\x03")
        terminal.type("echo still-$((2+1))\r")
        terminal.until("still-3")
        terminal.type("exit 0\r")
        terminal.until(f"Closing terminal connection to sandbox {box.id}")
        equal(terminal.finish(), 0, "exit code")
    equal(detail(box.id).json()["state"], "running", "state after the terminal is gone")


def in_ps(box, command):
    return command in box.run("ps -eo args")[1].splitlines()


def connect_as_root(cli, box):
    with cli.terminal("sandbox", "connect", "-u", "root", box.id) as terminal:
        terminal.until("Terminal connecting")
        terminal.type("echo i-am-$(id -un)\r")
        terminal.until("i-am-root")
        terminal.type("exit 3\r")
        true(terminal.finish() != 0, "the shell's exit code is lost")


def connect_refused(cli, box):
    with cli.terminal("sandbox", "connect", MISSING) as terminal:
        terminal.until("SandboxNotFoundError")
        equal(terminal.finish(), 1, "exit code")


def create_with_terminal(cli, box):
    """As long as the terminal is open the sandbox lives for thirty seconds at a time; after it one."""
    with cli.terminal("sandbox", "create", "base") as terminal:
        terminal.until("Terminal connecting to template base with sandbox ID ")
        terminal.type('echo "id-$E2B_SANDBOX_ID-"\r')
        sandbox_id = terminal.take(r"id-(i[a-z0-9]+)-")
        try:
            until(30, "it is kept alive", lambda: 20 < seconds_left(sandbox_id) <= 30)
            terminal.type("exit\r")
            terminal.until("Closing terminal connection")
            equal(terminal.finish(), 0, "exit code")
            until(20, "it is gone", lambda: detail(sandbox_id).status == 404)
        finally:
            raw.api("DELETE", f"/sandboxes/{sandbox_id}")


# --- pause, resume, snapshots -------------------------------------------------------------------

NOTE = "/dev/shm/note"  # in memory, and nowhere else


def note(cli, sandbox_id):
    return passed(cli.run("sandbox", "exec", sandbox_id, f"cat {NOTE}")).out


def pause_resume(cli, _box):
    box = sandbox(colour="violet")
    box.run(f"echo kept > {NOTE}")
    said = passed(cli.run("sandbox", "pause", box.id))
    true(f"Sandbox {box.id} has been paused" in said.out, f"the pause: {said}")
    equal(detail(box.id).json()["state"], "paused", "state")
    said = passed(cli.run("sandbox", "ps", box.id))
    true(f"Sandbox {box.id} is already paused" in said.out, f"the second pause: {said}")
    said = passed(cli.run("sandbox", "resume", box.id))
    true(f"Sandbox {box.id} has been resumed" in said.out, f"the resume: {said}")
    equal(detail(box.id).json()["state"], "running", "state after the resume")
    equal(note(cli, box.id), "kept\n", "what was in memory")
    passed(cli.run("sandbox", "pause", box.id))
    equal(note(cli, box.id), "kept\n", "what a command finds that woke it")
    for command in ("pause", "resume"):
        refused(cli.run("sandbox", command, MISSING), f"Sandbox {MISSING} wasn't found")


def paused_one(cli, _box):
    box = sandbox(colour="indigo")
    passed(cli.run("sandbox", "pause", box.id))
    query = ("--metadata", tagged(colour="indigo"), "--format", "json", "--state")
    for state, wanted in (("paused", [box.id]), ("running", []), ("running,paused", [box.id])):
        listed = passed(cli.run("sandbox", "list", *query, state)).json()
        equal([entry["sandboxId"] for entry in listed], wanted, f"{state} ones")
    true("State: paused" in passed(cli.run("sandbox", "info", box.id)).out, "info for people")
    said = passed(cli.run("sandbox", "kill", box.id))
    true(f"Sandbox {box.id} has been killed" in said.out, f"kill of a paused one: {said}")
    equal(detail(box.id).status, 404, "status after that")


def connect_paused(cli, _box):
    box = sandbox(colour="violet")
    box.run(f"echo kept > {NOTE}")
    passed(cli.run("sandbox", "pause", box.id))
    with cli.terminal("sandbox", "connect", box.id) as terminal:
        terminal.until(f"Terminal connecting to sandbox {box.id}")
        terminal.type(f'echo "note-$(cat {NOTE})-$((1 + 1))"\r')
        terminal.until("note-kept-2")
        terminal.type("exit 0\r")
        equal(terminal.finish(), 0, "exit code")
    equal(detail(box.id).json()["state"], "running", "state")


def lifecycle(cli):
    options = ("--lifecycle.ontimeout", "pause", "--lifecycle.autoresume")
    sandbox_id = passed(cli.run("sandbox", "create", "--detach", *options)).out.strip()
    try:
        wanted = {"onTimeout": "pause", "autoResume": True}
        equal(detail(sandbox_id).json()["lifecycle"], wanted, "lifecycle")
    finally:
        passed(cli.run("sandbox", "kill", sandbox_id))


def snapshots(cli, _box):
    box, name = sandbox(colour="violet"), f"{suite.tag}-noted"
    box.run(f"echo kept > {NOTE}")
    said = passed(cli.run("sandbox", "snapshot", "create", box.id, "--name", name))
    found = re.search(r"Created snapshot (\S+) from sandbox (\S+)", said.out)
    true(found and found.group(2) == box.id, f"what was created: {said}")
    snapshot_id, created = found.group(1), None
    try:
        for query in ((box.id,), ("--name", name)):
            listed = passed(cli.run("sandbox", "snap", "list", *query, "-f", "json")).json()
            equal([entry["snapshotId"] for entry in listed], [snapshot_id], f"listed by {query}")
            true(any(name in one for one in listed[0]["names"]), f"names: {listed}")
        table = passed(cli.run("sandbox", "snapshot", "list", box.id)).out
        true("SNAPSHOT ID" in table and snapshot_id in table, f"for people: {table!r}")
        created = passed(cli.run("sandbox", "create", snapshot_id, "--detach")).out.strip()
        equal(note(cli, created), "kept\n", "what was in memory")
    finally:
        if created:
            passed(cli.run("sandbox", "kill", created))
        said = passed(cli.run("sandbox", "snapshot", "delete", snapshot_id))
    true(f"Snapshot {snapshot_id} has been deleted" in said.out, f"deleted: {said}")
    said = passed(cli.run("sandbox", "snapshot", "delete", snapshot_id))
    true(f"Snapshot {snapshot_id} wasn't found" in said.err, f"deleted again: {said}")
    said = passed(cli.run("sandbox", "snapshot", "list", box.id))
    true("No snapshots found" in said.out, f"listed after that: {said}")
    refused(cli.run("sandbox", "snapshot", "create", MISSING), f"Sandbox {MISSING} wasn't found")
    refused(cli.run("sandbox", "create", snapshot_id, "--detach"), "not found")


# --- logs, metrics ------------------------------------------------------------------------------


def logs(cli, _box):
    box = sandbox()  # the command line shows the oldest thousand lines: others have written more
    box.run("echo to-stdout; echo to-stderr >&2; exit 9")

    def lines(*arguments):
        return passed(cli.run("sandbox", "logs", box.id, "--format", "json", *arguments)).json_lines()

    def complete():
        return any("exit status 9" in line["message"] for line in lines())

    until(60, "the end of the command is in the logs", complete)
    found = {line["message"]: line["level"] for line in lines()}
    equal((found["to-stdout"], found["to-stderr"]), ("info", "error"), "levels")
    errors = lines("--level", "error")
    true("to-stderr" in [line["message"] for line in errors], "error lines")
    equal({line["level"] for line in errors}, {"error"}, "levels of --level error")
    true({line["level"] for line in lines("--level", "WARN")} <= {"warn", "error"}, "--level WARN")
    true(lines("--loggers", "process"), "the logger of processes")
    equal(lines("--loggers", "nobody"), [], "a logger that does not exist")
    text = passed(cli.run("sandbox", "logs", box.id)).out
    true(f"Logs for sandbox {box.id}" in text and "to-stdout" in text, f"for people: {text[-300:]}")
    refused(cli.run("sandbox", "logs", MISSING), "[404] not found", MISSING)
    refused(cli.run("sandbox", "logs", box.id, "--level", "loud"), "Invalid log level")
    refused(cli.run("sandbox", "logs", box.id, "--format", "xml"), "Invalid log format")


def samples(cli, sandbox_id, *arguments):
    said = cli.run("sandbox", "metrics", sandbox_id, "--format", "json", *arguments)
    return passed(said).json_lines()


def metrics(cli, box):
    found = until(60, "a first sample", lambda: samples(cli, box.id), pause_s=1)
    last = found[-1]
    true(METRIC_FIELDS <= set(last), f"fields: {sorted(last)}")
    wanted = detail(box.id).json()
    equal(last["cpuCount"], wanted["cpuCount"], "processors")
    # The kernel keeps some of the memory for itself, and the file system some of the disk.
    mib = 1024 * 1024
    true(0.7 < last["memTotal"] / (wanted["memoryMB"] * mib) <= 1, f"memory: {last}")
    true(0.7 < last["diskTotal"] / (wanted["diskSizeMB"] * mib) <= 1.01, f"disk: {last}")
    true(0 < last["memUsed"] < last["memTotal"], f"memory in use: {last}")
    true(0 < last["diskUsed"] < last["diskTotal"], f"disk in use: {last}")
    true(0 <= last["cpuUsedPct"] <= 100 * last["cpuCount"], f"processor time: {last}")
    text = passed(cli.run("sandbox", "metrics", box.id)).out
    true(f"Metrics for sandbox {box.id}" in text and "CPU" in text, f"for people: {text[-300:]}")
    refused(cli.run("sandbox", "metrics", box.id, "--format", "xml"), "Invalid log format")
    refused(cli.run("sandbox", "metrics", MISSING), MISSING)


def follow(cli, box):
    """Both kinds of following end by themselves when the sandbox is killed."""
    marked = sandbox()
    told = cli.start("sandbox", "logs", "--follow", marked.id)
    figures = cli.start("sandbox", "metrics", "--follow", marked.id)
    try:
        marked.run("echo marked-line")
        until(60, "samples", lambda: samples(cli, marked.id), pause_s=1)
        until(60, "the logs", lambda: "marked-line" in cli.run("sandbox", "logs", marked.id).out)
        # Both ask every 400 ms, so that they have seen it too by now; the next question is the
        # one that ends them.
        passed(cli.run("sandbox", "kill", marked.id))
        shown = cli.finish(told)
        true("marked-line" in shown.out, f"the line did not come: {shown}")
        cli.finish(figures)
    finally:
        told.kill()
        figures.kill()


# --- kill ---------------------------------------------------------------------------------------


def kill(cli, box, other):
    extra = sandbox(colour="blue")
    said = passed(cli.run("sandbox", "kill", other.id, MISSING))
    true(f"Sandbox {other.id} has been killed" in said.out, f"what lived: {said}")
    true(f"Sandbox {MISSING} wasn't found" in said.err, f"what did not: {said}")
    refused(cli.run("sandbox", "kill"), "You need to specify")
    refused(cli.run("sandbox", "kill", "--all", box.id), "You cannot use")
    said = passed(cli.run("sandbox", "kill", "--all", "--metadata", tagged(colour="blue")))
    true("Killed 1 running sandboxes" in said.out, f"all with a metadata value: {said}")
    equal((detail(extra.id).status, detail(box.id).status), (404, 200), "who is left")
    said = passed(cli.run("sandbox", "kill", "-a", "-m", tagged(colour="blue")))
    true("No running sandboxes" in said.out, f"nothing to kill: {said}")
    passed(cli.run("sandbox", "kl", box.id))
    equal(detail(box.id).status, 404, "status after kill")


def main():
    if not ENTRY.exists():
        say(f"skip cli.all: {ENTRY} is missing; `cargo xtask setup` installs it")
        return
    if not shutil.which("node"):
        say("skip cli.all: the program node is missing")
        return
    with suite, Program() as cli:
        for body in (version, create_detached, create_refused, several_at_once):
            suite.check(body.__name__, body, cli)
        box = suite.check("sandbox", lambda: sandbox(colour="red"))
        other = suite.check("another_sandbox", lambda: sandbox(colour="green"))
        for body in (info, info_refused, credentials):
            suite.check(body.__name__, body, cli, box)
        for body in (listing, listing_for_people):
            suite.check(body.__name__, body, cli, box, other)
        for body in (exec_result, exec_input, exec_background, exec_interrupted, exec_refused):
            suite.check(body.__name__, body, cli, box)
        for body in (connect, connect_as_root, connect_refused, create_with_terminal):
            suite.check(body.__name__, body, cli, box)
        for body in (pause_resume, paused_one, connect_paused, snapshots):
            suite.check(body.__name__, body, cli, box)
        suite.check("lifecycle", lifecycle, cli)
        for body in (logs, metrics, follow):
            suite.check(body.__name__, body, cli, box)
        suite.check("kill", kill, cli, box, other)


if __name__ == "__main__":
    main()
