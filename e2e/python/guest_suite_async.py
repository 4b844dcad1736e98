"""Everything a guest does, through the asyncio Python SDK. See ../README.md.

    guest_suite_async.py [TOPIC[.SCENARIO] ...]
"""

import sys

import guest_run
from guest_clients import AsyncBox
from guest_target import MIB

if __name__ == "__main__":
    guest_run.main("guest.async", AsyncBox, sys.argv[1:], big_file=1024 * MIB, at_once=100)
