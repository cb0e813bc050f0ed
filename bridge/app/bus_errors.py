"""A last word before a bus error ends the process."""

from __future__ import annotations

import contextlib
import faulthandler
import sys


def report_bus_errors() -> None:
    """Have the interpreter write to stderr where it was when a signal like SIGBUS ends it.

    A mapped file that somebody made shorter does that: guest memory, in-flight region or dirty log
    (the front-end), or the cache file. The place in the traceback says which. No code of ours can
    run then, and going on is not possible.
    """
    with contextlib.suppress(OSError, ValueError, RuntimeError):  # stderr may be closed
        if sys.stderr is not None:
            faulthandler.enable(sys.stderr)
