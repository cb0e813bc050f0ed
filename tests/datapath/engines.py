"""Which engines there are to be tested."""

from __future__ import annotations

import pytest

from bridge.datapath.engine import Engine, choose
from bridge.datapath.engine_names import COMPILED, PURE
from bridge.errors import ConfigError
from tests.tiers import in_ci


def engine(name: str) -> Engine:
    """The engine of that name; the test is skipped if this installation does not have it."""
    try:
        return choose(name)
    except ConfigError as error:
        if in_ci():
            raise
        pytest.skip(str(error))


BOTH = (PURE, COMPILED)
