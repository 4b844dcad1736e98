"""Pause, resume, snapshots and forks by the official Python SDK, asyncio. See ../README.md.

snapshots_suite_async.py [SCENARIO ...]
"""

import sys

from e2b import AsyncSandbox

from snapshots_run import main

if __name__ == "__main__":
    main("async", AsyncSandbox, sys.argv[1:])
