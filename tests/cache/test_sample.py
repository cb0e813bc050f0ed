"""A comparison with the server while guests go on."""

from __future__ import annotations

import pytest

from bridge.datapath.request import DISCARD, READ, WRITE
from tests.turns import finish

from .fakes import BLOCK, GRANULE, Rig


def test_block_that_left_the_cache_during_the_comparison_is_no_evidence() -> None:
    """What guests had asked for before a reconnect is answered first, and takes its place."""
    rig = Rig(granules=16, slots=3)
    for granule in range(16):
        rig.server.image[granule * GRANULE : (granule + 1) * GRANULE] = bytes([granule]) * GRANULE
    rig.prefetch(0, 3 * GRANULE)
    results: list[int] = []

    waiting = [rig.start(READ, granule * GRANULE, GRANULE) for granule in range(3, 6)]
    rig.check_sample(results.append)
    rig.serve()

    assert [each.value for each in waiting] == [0, 0, 0]
    assert results == [0]
    assert rig.cache.index.valid_blocks == 3 * 16


def test_block_is_no_evidence_whose_place_another_with_the_same_content_has_taken() -> None:
    """It is written meanwhile, in another place, and what the server has is that."""
    rig = Rig(granules=16, slots=3)
    rig.prefetch(0, 3 * GRANULE)
    results: list[int] = []
    rig.check_sample(results.append)
    compared, rig.server.pending[:] = list(rig.server.pending), []
    for granule in range(3, 6):
        rig.read(granule * GRANULE, GRANULE)
    for granule in range(3):
        rig.write(granule * GRANULE, b"x" * GRANULE)
        assert rig.flush() == 0
        for other in range(6, 9):
            rig.read(other * GRANULE, GRANULE)

    rig.server.pending[:] = compared
    rig.serve()

    assert results == [0]


@pytest.mark.parametrize("is_early", [True, False])
@pytest.mark.parametrize("op", [WRITE, DISCARD])
def test_block_that_became_another_and_durable_during_the_comparison_is_no_evidence(
    op: int, is_early: bool
) -> None:
    """The server read it before or after that, on another connection, and is heard of late."""
    rig = Rig()
    rig.write(0, b"a" * BLOCK)
    assert rig.flush() == 0
    rig.prefetch(BLOCK, GRANULE - BLOCK)
    results: list[int] = []
    rig.check_sample(results.append)
    late = next(each for each in rig.server.pending if each.offset == 0)
    rig.server.pending.remove(late)
    before = rig.server.image[:BLOCK]

    data = b"b" * BLOCK if op == WRITE else b""
    changed = rig.start(op, 0, BLOCK, data)
    rig.serve()
    assert changed.value == 0
    assert rig.flush() == 0
    rig.read(0, BLOCK)
    late.buffers[0][:] = before if is_early else rig.server.image[:BLOCK]
    finish(late)

    assert results == [0]
    assert rig.cache.index.valid_blocks == 16
