"""Which engines there are to be tested."""

from __future__ import annotations

import os

import pytest

from bridge.datapath.engine import Engine, choose
from bridge.datapath.engine_names import COMPILED, PURE
from bridge.errors import ConfigError


def engine(name: str) -> Engine:
    """The engine of that name; the test is skipped if this installation does not have it."""
    try:
        return choose(name)
    except ConfigError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


BOTH = (PURE, COMPILED)
