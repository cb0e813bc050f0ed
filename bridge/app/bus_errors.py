"""A traceback when a bus error ends the process."""

from __future__ import annotations

import contextlib
import faulthandler
import sys


def report_bus_errors() -> None:
    """Have the interpreter write a traceback to stderr when a signal like SIGBUS ends it.

    SIGBUS comes when another process makes a mapped file shorter: the front-end can do that to
    guest memory, in-flight region and dirty log, and any process of our user to the cache file. The
    traceback shows which. The process cannot go on, nor run any code of ours.
    """
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # stderr may be closed
        if sys.stderr is not None:
            faulthandler.enable(sys.stderr)
