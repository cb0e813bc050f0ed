"""Somebody else wrote the image, or it is another one: what may be believed of a cache."""

from __future__ import annotations

import pytest

from .fakes import BLOCK, GRANULE, Rig


def test_foreign_write_seen_by_generation_drops_the_clean_part_only() -> None:
    rig = Rig()
    rig.cache.note_export(5, 4, b"")
    rig.prefetch(0, GRANULE)
    rig.write(GRANULE, b"a" * BLOCK)

    kept = rig.cache.note_export(6, 5, b"")
    dropped = rig.cache.note_export(9, 8, b"")

    assert (kept, dropped) == (0, 16)
    assert rig.read(GRANULE, BLOCK) == b"a" * BLOCK


@pytest.mark.parametrize(
    ("generation", "written", "identity"),
    [(1, 0, b"a" * 16), (58, 57, b"b" * 16), (56, 0, b"")],
    ids=["counters begin anew", "another identity", "fewer sessions, no identity"],
)
def test_another_volume_of_the_same_name_drops_the_clean_part(
    generation: int, written: int, identity: bytes
) -> None:
    """Removed and made again, or restored: whatever its counters say, it is not what was cached."""
    rig = Rig()
    rig.cache.note_export(57, 57, b"a" * 16)
    rig.prefetch(0, GRANULE)

    assert "another volume" in rig.cache.foreign_change(generation, written, identity)
    assert rig.cache.note_export(generation, written, identity) == 16
    assert not rig.cache.foreign_change(generation + 1, generation, identity)


def test_identity_is_learnt_of_a_server_that_begins_to_give_one() -> None:
    rig = Rig()
    rig.cache.note_export(57, 57, b"")
    rig.prefetch(0, GRANULE)

    assert rig.cache.note_export(58, 57, b"a" * 16) == 0
    assert rig.cache.foreign_change(59, 57, b"b" * 16)


def test_sample_that_differs_drops_the_clean_part() -> None:
    rig = Rig()
    rig.prefetch(0, 8 * GRANULE)
    rig.write(9 * GRANULE, b"a" * BLOCK)
    rig.server.image[:] = b"z" * len(rig.server.image)
    results: list[int] = []

    rig.check_sample(results.append)
    rig.serve()

    assert results[0] > 0
    assert rig.cache.index.valid_blocks == 1


def test_sample_that_is_the_same_keeps_everything() -> None:
    rig = Rig()
    rig.prefetch(0, 8 * GRANULE)
    results: list[int] = []

    rig.check_sample(results.append)
    rig.serve()

    assert results == [0]
    assert rig.cache.index.valid_blocks == 8 * 16


@pytest.mark.parametrize("used", [1, 4, 16])
def test_sample_finds_what_is_cached_in_a_large_cache_that_is_nearly_empty(used: int) -> None:
    rig = Rig(granules=2048, slots=2048)
    rig.prefetch(0, used * GRANULE)
    rig.server.image[: used * GRANULE] = b"z" * (used * GRANULE)
    results: list[int] = []

    rig.check_sample(results.append)
    rig.serve()

    assert results == [used]
    assert rig.cache.index.valid_blocks == 0
