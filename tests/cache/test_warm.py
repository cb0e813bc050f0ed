"""Preloading ranges."""

from __future__ import annotations

from bridge.cache.warm import Warmer, data_ranges
from bridge.datapath.request import READ, Request
from bridge.spec.nbd import STATE_HOLE, STATE_ZERO
from tests.turns import finish

from .fakes import EIO, GRANULE, Rig


def test_holes_are_left_out_and_data_is_joined() -> None:
    extents = [
        (10, STATE_HOLE | STATE_ZERO),
        (5, 0),
        (7, STATE_ZERO),
        (100, STATE_HOLE | STATE_ZERO),
        (1, 0),
    ]

    assert list(data_ranges(extents, 1000)) == [(1010, 12), (1122, 1)]


def _warm(rig: Rig, ranges: list[tuple[int, int]], limit: int) -> tuple[list[int], list[int]]:
    progress: list[int] = []
    done: list[int] = []
    Warmer(
        rig.cache.submit,
        ranges,
        limit_bytes=limit,
        progress=progress.append,
        done=done.append,
    ).start()
    rig.end_turn()
    rig.serve()
    return progress, done


def test_warm_cache_needs_no_server() -> None:
    rig = Rig()

    progress, done = _warm(rig, [(0, 40 * GRANULE)], 64 * GRANULE)
    rig.server.seen.clear()
    rig.read(39 * GRANULE, GRANULE)

    assert progress[-1] == 40 * GRANULE
    assert done == [0]
    assert rig.server.seen == []


def test_warming_stops_at_its_limit() -> None:
    rig = Rig()

    progress, done = _warm(rig, [(0, 40 * GRANULE)], 3 * GRANULE)

    assert (progress[-1], done) == (3 * GRANULE, [0])
    assert sum(length for _, length in rig.server.ops(READ)) == 3 * GRANULE


def test_warming_bounds_the_reads_in_flight() -> None:
    seen: list[Request] = []
    warmer = Warmer(
        seen.append,
        [(0, 1 << 30)],
        limit_bytes=1 << 30,
        progress=lambda done_bytes: None,
        done=lambda failed_bytes: None,
    )

    warmer.start()

    assert len(seen) == 8


def test_stopped_warming_ends_when_its_reads_have_ended() -> None:
    seen: list[Request] = []
    done: list[int] = []
    warmer = Warmer(
        seen.append,
        [(0, 1 << 30)],
        limit_bytes=1 << 30,
        progress=lambda done_bytes: None,
        done=done.append,
    )
    warmer.start()
    warmer.stop()
    early = list(done)
    for request in seen[:]:
        finish(request)

    assert (early, done, len(seen)) == ([], [0], 8)


def test_warming_counts_the_bytes_that_could_not_be_read() -> None:
    seen: list[Request] = []
    done: list[int] = []
    warmer = Warmer(
        seen.append,
        [(0, 5 << 19)],
        limit_bytes=5 << 19,
        progress=lambda done_bytes: None,
        done=done.append,
    )
    warmer.start()

    for request, error in zip(seen[:], (0, EIO, EIO), strict=True):
        finish(request, error)

    assert done == [3 << 19]
