"""Pause, resume, snapshots and forks by the official Python SDK, synchronous. See ../README.md.

snapshots_suite.py [SCENARIO ...]
"""

import sys

from e2b import Sandbox

from snapshots_run import main

if __name__ == "__main__":
    main("sync", Sandbox, sys.argv[1:])
