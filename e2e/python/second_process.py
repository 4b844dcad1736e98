"""Connects to a sandbox by its id from a process of its own, as a second worker would.

Usage: second_process.py SANDBOX_ID. Reads the note the first process left, answers it in a file,
and prints what it saw as one line of JSON.
"""

import json
import sys

from e2b import Sandbox


def main():
    sandbox = Sandbox.connect(sys.argv[1], timeout=600)
    note = sandbox.files.read("note.txt")
    result = sandbox.commands.run("echo $E2B_SANDBOX_ID", timeout=120)
    sandbox.files.write("answer.txt", f"got {note}")
    print(json.dumps({"note": note, "id": result.stdout.strip(), "running": sandbox.is_running()}))


if __name__ == "__main__":
    main()
