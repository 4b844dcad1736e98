"""What an agent's program does with the official Python SDK, here against your own machine.

Nothing in it knows Belljar: E2B_API_KEY, E2B_API_URL and E2B_SANDBOX_URL in the environment say
where sandboxes come from.
"""

import time
from contextlib import contextmanager

from e2b import Sandbox, SandboxQuery

COUNT = """
import time
for number in range(1, 4):
    print("line", number, flush=True)
    time.sleep(0.3)
"""


@contextmanager
def step(title):
    started = time.monotonic()
    yield
    print(f"  {time.monotonic() - started:6.2f} s  {title}", flush=True)


def show(text):
    for line in text.strip().splitlines():
        print(f"            > {line}", flush=True)


def main():
    began = time.monotonic()
    with step("create a sandbox"):
        sandbox = Sandbox.create("base", timeout=300, metadata={"purpose": "demo"})
    try:
        use(sandbox)
    finally:
        with step("kill it"):
            sandbox.kill()
    assert not sandbox.is_running()
    print(f"  {time.monotonic() - began:6.2f} s  in all", flush=True)


def use(sandbox):
    with step("run a command"):
        result = sandbox.commands.run("echo hello from $(hostname), kernel $(uname -r)")
    show(result.stdout)

    print("            a program that takes its time; every line as it comes:")
    with step("write a file, run it, stream its output"):
        sandbox.files.write("count.py", COUNT)
        sandbox.commands.run("python3 count.py", on_stdout=show)

    with step("write bytes, read them back, list the folder"):
        sandbox.files.write("data.bin", bytes(range(256)))
        assert sandbox.files.read("data.bin", format="bytes") == bytes(range(256))
        names = [entry.name for entry in sandbox.files.list("/home/user")]
        assert {"count.py", "data.bin"} <= set(names)

    with step("ask what it is"):
        info = sandbox.get_info()
    show(f"{info.cpu_count} CPU, {info.memory_mb} MB, until {info.end_at:%H:%M:%S} UTC")

    with step("find it in the list"):
        page = Sandbox.list(query=SandboxQuery(metadata={"purpose": "demo"})).next_items()
        assert sandbox.sandbox_id in [entry.sandbox_id for entry in page]


if __name__ == "__main__":
    main()
