"""The usual case of a turn does what the general path does: see `twins`."""

from __future__ import annotations

import pytest

from tests.datapath.engines import BOTH, engine
from tests.datapath.twins import Script


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("seed", range(40))
def test_nobody_outside_can_tell_the_usual_case_from_the_general_path(seed: int, name: str) -> None:
    Script(seed, engine(name)).run(60)
