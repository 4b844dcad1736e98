"""An old SDK generation, unmodified: v1 routes, and sandboxes addressed by host name alone.

Needs the packages of requirements-old.txt, so an environment of its own. See ../README.md.
"""

import os
import shutil
import tempfile
import time
from importlib import metadata

from checks import Suite, equal, raises, say, true
from tls_front import DOMAIN, TlsFront

suite = Suite("old")
COMMAND_S = 120


class Client:
    """The SDK with the options every call here needs. It is imported late: it reads the name of the
    file with trusted certificates from the environment when a client is made."""

    def __init__(self, front):
        os.environ["SSL_CERT_FILE"] = str(front.ca_file)
        import e2b

        self.e2b = e2b
        self.options = {"domain": DOMAIN, "proxy": front.url, "request_timeout": 120}

    def create(self, **fields):
        return self.e2b.Sandbox.create(
            "base", timeout=600, metadata=suite.metadata, **fields, **self.options
        )


def commands(client, sandbox):
    heard = []
    error = raises(
        client.e2b.CommandExitException,
        sandbox.commands.run,
        "echo $GLOBAL; echo warning >&2; exit 3",
        on_stdout=heard.append,
        timeout=COMMAND_S,
    )
    equal((error.exit_code, error.stdout, error.stderr), (3, "global\n", "warning\n"), "result")
    equal("".join(heard), "global\n", "what the callback heard")
    sleeper = sandbox.commands.run("sleep 600", background=True, timeout=0)
    true(sleeper.pid in [process.pid for process in sandbox.commands.list()], "not listed")
    equal(sleeper.kill(), True, "kill")


def files(sandbox):
    content = bytes(range(256))
    sandbox.files.write("folder/bytes", content)
    equal(bytes(sandbox.files.read("folder/bytes", format="bytes")), content, "bytes")
    equal([entry.name for entry in sandbox.files.list("folder")], ["bytes"], "list")
    equal(sandbox.files.exists("folder/bytes"), True, "exists")
    sandbox.files.remove("folder")
    equal(sandbox.files.exists("folder"), False, "exists after remove")


def lifecycle(client, sandbox):
    sdk, options = client.e2b.Sandbox, client.options
    info = sandbox.get_info()
    equal((info.sandbox_id, info.metadata), (sandbox.sandbox_id, suite.metadata), "info")
    query = client.e2b.SandboxQuery(metadata=suite.metadata)
    listed = sdk.list(query=query, **options).next_items()
    equal([entry.sandbox_id for entry in listed], [sandbox.sandbox_id], "list")
    sandbox.set_timeout(900)
    true((sandbox.get_info().end_at - info.end_at).total_seconds() > 200, "the end did not move")
    again = sdk.connect(sandbox.sandbox_id, timeout=900, **options)
    equal(again.commands.run("echo again", timeout=COMMAND_S).stdout, "again\n", "second handle")
    equal(sandbox.is_running(), True, "is_running")


def kill(sandbox):
    equal(sandbox.kill(), True, "first kill")
    equal(sandbox.kill(), False, "second kill")
    equal(sandbox.is_running(), False, "is_running")


def main():
    version = metadata.version("e2b")
    if tuple(map(int, version.split(".")[:2])) >= (2, 40):
        say(f"skip old.all: e2b {version} is installed, not the one of requirements-old.txt")
        return
    if not shutil.which("openssl"):
        say("skip old.all: the program openssl is missing")
        return
    with suite, tempfile.TemporaryDirectory() as directory, TlsFront(directory) as front:
        started = time.monotonic()
        client = Client(front)
        suite.remark(f"e2b {version} imported in {time.monotonic() - started:.1f} s")
        sandbox = suite.check("create", lambda: client.create(envs={"GLOBAL": "global"}))
        suite.check("commands", commands, client, sandbox)
        suite.check("files", files, sandbox)
        suite.check("lifecycle", lifecycle, client, sandbox)
        suite.check("kill", kill, sandbox)


if __name__ == "__main__":
    main()
