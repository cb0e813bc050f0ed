"""`python -m tests.torture.planted`: an nbd-bridge with a planted bug, to test the checker.

The environment variable names a bug of the simulation's. Nothing else is different.
"""

from __future__ import annotations

import os

import pytest

from bridge.cli.main import main
from tests.sim.planted import BUGS, RARE

VARIABLE = "NBD_BRIDGE_PLANTED_BUG"


def run() -> None:
    """Be the bridge."""
    with pytest.MonkeyPatch.context() as patch:
        (BUGS | RARE)[os.environ[VARIABLE]](patch)
        main()


if __name__ == "__main__":
    run()
