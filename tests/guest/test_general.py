"""What goes the general way is counted, by reason."""

from __future__ import annotations

from collections import Counter

import pytest

from bridge.datapath import cells
from bridge.guest import general
from bridge.guest.virtio.chain import Chain
from bridge.spec.virtio_blk import T_FLUSH, T_IN, T_OUT
from tests.datapath.engines import BOTH, engine
from tests.datapath.socket_twins import Twin
from tests.datapath.test_compiled import add, serve


def chain(type_: int) -> Chain:
    return 0, type_, 0, [], [], None, 0, None


def test_the_chain_that_stopped_the_usual_case_has_its_reason_and_what_follows_was_behind_it() -> (
    None
):
    counts: Counter[str] = Counter()
    general.count(counts, [chain(T_IN), chain(T_OUT), chain(T_IN)], cells.STOP_MISS)
    assert counts == {"miss": 1, "behind": 2}


def test_a_flush_is_counted_as_one_wherever_it_stands() -> None:
    counts: Counter[str] = Counter()
    general.count(counts, [chain(T_FLUSH), chain(T_IN), chain(T_FLUSH)], cells.STOP_FORM)
    assert counts == {"flush": 2, "behind": 1}


def test_without_the_usual_case_nothing_is_behind_anything() -> None:
    counts: Counter[str] = Counter()
    general.count(counts, [chain(T_IN), chain(T_OUT), chain(8)], general.OFF)
    assert counts == {"off": 2, "other": 1}


def test_every_reason_to_stop_has_a_word() -> None:
    for stop in range(1, cells.STOPS):
        counts: Counter[str] = Counter()
        general.count(counts, [chain(T_IN)], stop)
        assert set(counts) < set(general.WHY)


@pytest.mark.parametrize("name", BOTH)
def test_what_is_behind_a_flush_is_usual_again(name: str) -> None:
    twin = Twin(
        usual=True, slots=0, tracked=True, structured=True, event_idx=True, engine=engine(name)
    )
    for slot, type_ in enumerate([T_OUT, T_FLUSH, T_OUT, T_IN]):
        add(twin, slot, type_)
    ring = twin.ring
    assert ring is not None
    for _ in range(4):
        twin.turn()
        serve(twin)
    assert not ring.in_flight
    assert ring.requests == 4
    # A long read goes the general way outside of compiled turns.
    assert ring.general == {"flush": 1, "range": 1}
    assert twin.disk.usual is not None
    assert twin.disk.usual.served == 2
    twin.close()
