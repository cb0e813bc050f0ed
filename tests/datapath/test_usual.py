"""The usual case of a turn does what the general path does: see `twins`."""

from __future__ import annotations

import pytest

from bridge.datapath.engine_names import COMPILED
from tests.datapath import socket_twins
from tests.datapath.engines import BOTH, engine
from tests.datapath.twins import Script


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("seed", range(40))
def test_guest_and_server_cannot_tell_the_usual_case_from_the_general_path(
    seed: int, name: str
) -> None:
    Script(seed, engine(name)).run(60)


@pytest.mark.parametrize("seed", range(100, 140))
def test_guest_and_server_cannot_tell_compiled_turns_from_the_general_path(seed: int) -> None:
    socket_twins.Script(seed, engine(COMPILED), turns=True).run(60)


def test_a_flush_in_the_ring_of_a_compiled_turn_does_not_tell_of_its_answers() -> None:
    """What a turn answers is not shown to the guest while there is something left in its rings that
    it wrote before: in this script a flush that fails."""
    socket_twins.Script(75, engine(COMPILED), turns=True, in_one_piece=True).run(60)
