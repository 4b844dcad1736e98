"""Everything a guest does, through the synchronous Python SDK. See ../README.md.

guest_suite.py [TOPIC[.SCENARIO] ...]
"""

import sys

import guest_run
from guest_clients import SyncBox
from guest_target import MIB

if __name__ == "__main__":
    guest_run.main("guest.sync", SyncBox, sys.argv[1:], entries=10_000, stdin=100 * MIB)
