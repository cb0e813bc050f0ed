"""Eviction alone, against LRU, ARC and S3-FIFO of libcachesim."""

from __future__ import annotations

from functools import cache

import pytest

from bridge.cache.eviction import UP, Evictor, Ghost

from ..tools import missing
from .traces import TRACES


@cache
def _misses(name: str, slots: int) -> float:
    """The miss ratio of our policy."""
    evictor = Evictor(slots)
    slot_of: dict[int, int] = {}
    granule_of = [0] * (slots + 1)
    free = list(range(slots, 0, -1))
    misses = 0
    trace = TRACES[name]()
    for granule in trace:
        slot = slot_of.get(granule, 0)
        if slot:
            evictor.touched[slot] = UP[evictor.touched[slot]]
            continue
        misses += 1
        if free:
            slot = free.pop()
        else:
            slot = evictor.candidate()
            evictor.evict(slot, granule_of[slot])
            del slot_of[granule_of[slot]]
        evictor.admit(slot, granule)
        slot_of[granule] = slot
        granule_of[slot] = granule
    return misses / len(trace)


def _reference(policy: str, name: str, slots: int) -> float:
    try:
        import libcachesim
    except ImportError:
        missing("libcachesim is not installed")
    oracle = getattr(libcachesim, policy)(cache_size=slots)
    trace = TRACES[name]()
    misses = 0
    for granule in trace:
        request = libcachesim.Request()
        request.obj_id = granule
        request.obj_size = 1
        misses += not oracle.get(request)
    return misses / len(trace)


@pytest.mark.slow
@pytest.mark.parametrize("slots", [500, 1000])
@pytest.mark.parametrize("name", ["zipf", "zipf + scan", "loop", "loop 1.1", "mixed"])
def test_misses_are_within_three_percent_of_the_best(name: str, slots: int) -> None:
    ours = _misses(name, slots)
    others = {each: _reference(each, name, slots) for each in ("LRU", "ARC", "S3FIFO")}

    assert ours <= others["LRU"]
    assert ours <= min(others.values()) * 1.03, (ours, others)


def test_scan_does_not_push_out_what_was_used_twice() -> None:
    evictor = Evictor(100)
    for slot in range(1, 101):
        evictor.admit(slot, slot)
    for slot in range(1, 51):
        evictor.touched[slot] = 2

    gone = set()
    for granule in range(1000, 1200):
        slot = evictor.candidate()
        evictor.evict(slot, granule - 500)
        gone.add(slot)
        evictor.admit(slot, granule)

    assert len(gone & set(range(1, 51))) <= 1


def test_parked_slot_is_never_a_candidate_until_released() -> None:
    evictor = Evictor(3)
    for slot in (1, 2, 3):
        evictor.admit(slot, slot)
    evictor.park(1)

    seen = set()
    for _ in range(2):
        slot = evictor.candidate()
        seen.add(slot)
        evictor.evict(slot, slot)
    nothing = evictor.candidate()
    evictor.release(1)

    assert (seen, nothing, evictor.candidate()) == ({2, 3}, 0, 1)


def test_ghost_forgets_after_one_life() -> None:
    ghost = Ghost(1000)
    ghost.add(1)
    for granule in range(10_000, 12_000):
        ghost.add(granule)

    assert not ghost.take(1)
    assert ghost.take(11_999)


def test_ghost_answers_once() -> None:
    ghost = Ghost(100)
    ghost.add(7)

    assert (ghost.take(7), ghost.take(7)) == (True, False)
