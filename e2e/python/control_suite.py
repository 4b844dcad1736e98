"""The control plane by the official Python SDK, synchronous. See ../README.md."""

import sys

from e2b import Sandbox

from control_run import main

if __name__ == "__main__":
    main("sync", Sandbox, sys.argv[1:])
