"""The control plane by the official Python SDK, asyncio. See ../README.md."""

import sys

from e2b import AsyncSandbox

from control_run import main

if __name__ == "__main__":
    main("async", AsyncSandbox, sys.argv[1:])
