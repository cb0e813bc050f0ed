"""Somebody else wrote the image, or it is another one: what may be believed of a cache."""

from __future__ import annotations

import pytest

from .fakes import BLOCK, GRANULE, Rig


def test_foreign_write_seen_by_generation_drops_the_clean_part_only() -> None:
    rig = Rig()
    rig.cache.note_export_generation(5, 4)
    rig.prefetch(0, GRANULE)
    rig.write(GRANULE, b"a" * BLOCK)

    kept = rig.cache.note_export_generation(6, 5)
    dropped = rig.cache.note_export_generation(9, 8)

    assert (kept, dropped) == (0, 16)
    assert rig.read(GRANULE, BLOCK) == b"a" * BLOCK


def test_sample_that_differs_drops_the_clean_part() -> None:
    rig = Rig()
    rig.prefetch(0, 8 * GRANULE)
    rig.write(9 * GRANULE, b"a" * BLOCK)
    rig.server.image[:] = b"z" * len(rig.server.image)
    results: list[int] = []

    rig.cache.check_sample(results.append)
    rig.serve()

    assert results[0] > 0
    assert rig.cache.index.valid_blocks == 1


def test_sample_that_is_the_same_keeps_everything() -> None:
    rig = Rig()
    rig.prefetch(0, 8 * GRANULE)
    results: list[int] = []

    rig.cache.check_sample(results.append)
    rig.serve()

    assert results == [0]
    assert rig.cache.index.valid_blocks == 8 * 16


@pytest.mark.parametrize("used", [1, 4, 16])
def test_sample_finds_what_is_cached_in_a_large_cache_that_is_nearly_empty(used: int) -> None:
    rig = Rig(granules=2048, slots=2048)
    rig.prefetch(0, used * GRANULE)
    rig.server.image[: used * GRANULE] = b"z" * (used * GRANULE)
    results: list[int] = []

    rig.cache.check_sample(results.append)
    rig.serve()

    assert results == [used]
    assert rig.cache.index.valid_blocks == 0
