"""`python -m tests.torture.planted`: an nbd-bridge with a planted bug, to test the checker.

The environment variable names a bug of the simulation's, or one of those here. Nothing else is
different.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from bridge.cli.main import main
from bridge.server.link import Link
from tests.sim.planted import BUGS, RARE


def descriptor_kept(patch: pytest.MonkeyPatch) -> None:
    """Each connection to the server costs a descriptor."""
    real = Link._resume

    def resume(self: Link, *args: Any) -> None:
        os.dup(0)
        real(self, *args)

    patch.setattr(Link, "_resume", resume)


def memory_kept(patch: pytest.MonkeyPatch) -> None:
    """Each connection to the server costs 256 KiB."""
    real = Link._resume
    kept: list[bytes] = []

    def resume(self: Link, *args: Any) -> None:
        kept.append(os.urandom(256 << 10))
        real(self, *args)

    patch.setattr(Link, "_resume", resume)


LEAKS = {bug.__name__: bug for bug in (descriptor_kept, memory_kept)}
VARIABLE = "TORTURE_PLANTED_BUG"


def run() -> None:
    """Be the bridge."""
    with pytest.MonkeyPatch.context() as patch:
        (BUGS | RARE | LEAKS)[os.environ.pop(VARIABLE)](patch)
        main()


if __name__ == "__main__":
    run()
