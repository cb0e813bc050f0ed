"""The usual case of a turn does what the general path does: see `twins`."""

from __future__ import annotations

import pytest

from tests.datapath.twins import Script


@pytest.mark.parametrize("seed", range(40))
def test_nobody_outside_can_tell_the_usual_case_from_the_general_path(seed: int) -> None:
    Script(seed).run(60)
