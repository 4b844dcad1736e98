"""Everything a guest does, through the asyncio Python SDK. See ../README.md.

guest_suite_async.py [TOPIC[.SCENARIO] ...]
"""

import sys

import guest_run
from guest_clients import AsyncBox

if __name__ == "__main__":
    guest_run.main("guest.async", AsyncBox, sys.argv[1:], at_once=100, burst=1000)
