"""The oracle itself: planted bugs, each of which cost some storage software data, are found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bridge.cache.awaited import AwaitedSlots
from bridge.cache.fetch import Fetcher
from bridge.cache.flush import Flusher
from bridge.cache.hits import CacheHits
from bridge.cache.in_flight import InFlight
from bridge.cache.index import Index
from bridge.cache.range_operations import RangeOperations
from bridge.cache.reads import Reads
from bridge.cache.resize import Resizer
from bridge.cache.writeback import Writeback
from bridge.cache.writes import Writes
from bridge.datapath.durability import ReplayingDurability
from bridge.datapath.turn import Outcome

from .world import run

PROGRAMS = 2500


def _fill_ignores_writes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Fetcher, "overtaken", lambda *_: None)


def _reconnect_ignores_written(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Writeback, "lost", lambda self: None)


def _write_does_not_clear_covered(patch: pytest.MonkeyPatch) -> None:
    real = Index.write

    def broken(self: Index, slot: int, bits: int) -> None:
        covered = self.covered[slot]
        real(self, slot, bits)
        self.covered[slot] = covered

    patch.setattr(Index, "write", broken)


def _rewritten_block_counts_as_sent(patch: pytest.MonkeyPatch) -> None:
    real = Index.write

    def broken(self: Index, slot: int, bits: int) -> None:
        sent, covered = self.sent[slot], self.covered[slot]
        real(self, slot, bits)
        self.sent[slot], self.covered[slot] = sent, covered

    patch.setattr(Index, "write", broken)


def _state_before_data(patch: pytest.MonkeyPatch) -> None:
    real = Writes._put

    def broken(self: Writes, *arguments: Any) -> None:
        slot, bits = arguments[3], arguments[5]
        index = self._index
        index.stored(slot, bits, bits & ~index.valid(slot), keep_open=False)
        real(self, *arguments)

    stored = Index.stored

    def again(self: Index, slot: int, bits: int, absent: int, *, keep_open: bool) -> None:
        stored(self, slot, bits, absent & ~self.valid(slot), keep_open=keep_open)

    patch.setattr(Index, "stored", again)
    patch.setattr(Writes, "_put", broken)
    patch.setattr(Writes, "_write_whole", lambda self, request: False)


def _data_before_dirty_mark(patch: pytest.MonkeyPatch) -> None:
    mark, put = Index.write, Writes._put

    def put_and_mark(self: Writes, *arguments: Any) -> None:
        put(self, *arguments)
        mark(self._index, arguments[3], arguments[5])

    patch.setattr(Index, "write", lambda self, slot, bits: None)
    patch.setattr(Writes, "_put", put_and_mark)
    patch.setattr(Writes, "_write_whole", lambda self, request: False)
    patch.setattr(CacheHits, "write_hit", lambda *_: False)


def _data_before_dirty_mark_of_a_hit(patch: pytest.MonkeyPatch) -> None:
    mark = Index.write

    def write_hit(self: CacheHits, offset: int, length: int, buffers: list[memoryview], /) -> bool:
        marked: list[tuple[Index, int, int]] = []
        with patch.context() as inner:
            inner.setattr(Index, "write", lambda *mark: marked.append(mark))
            hit = real(self, offset, length, buffers)
        for index, slot, bits in marked:
            mark(index, slot, bits)
        return hit

    real = CacheHits.write_hit
    patch.setattr(CacheHits, "write_hit", write_hit)


def _flush_does_not_wait_for_what_is_in_flight(patch: pytest.MonkeyPatch) -> None:
    real = Writeback.want_all

    def broken(self: Writeback, wait: Any) -> None:
        in_flight, self._in_flight = self._in_flight, InFlight()
        real(self, wait)
        self._in_flight = in_flight

    patch.setattr(Writeback, "want_all", broken)


def _flush_does_not_wait_for_what_is_dirty(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(AwaitedSlots, "mark", lambda self, slots: None)


def _write_does_not_wait_for_what_is_in_flight(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(InFlight, "of", lambda self, slot, bits: [])


def _fua_whatever_is_unflushed(patch: pytest.MonkeyPatch) -> None:
    real = Flusher._flush

    def broken(self: Flusher, running: Any) -> None:
        if running.fua:
            durability = self._durability
            durability.flushed(durability.answered, durability.epoch)
        real(self, running)

    patch.setattr(Flusher, "_flush", broken)


def _evicts_dirty(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("bridge.cache.slots._DIRTY", 0)


def _discard_drops_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(RangeOperations, "_drop", lambda self, each, error: None)


def _failed_flush_loses_nothing(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Writeback, "flush_failed", lambda self: None)


def _failed_flush_loses_what_was_replied_to_only(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Writeback) -> None:
        self._durability.acknowledged()
        self.lost()

    patch.setattr(Writeback, "flush_failed", broken)


def _reconnect_ends_no_epoch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(ReplayingDurability, "epoch", property(lambda self: self._ended))
    patch.setattr(ReplayingDurability, "done_in", lambda self, *, sent_in, generation: sent_in)


def _flush_vouches_for_whatever_epoch_there_is(patch: pytest.MonkeyPatch) -> None:
    def broken(self: ReplayingDurability, answered: int, epoch: int) -> bool:
        return real(self, answered, self.epoch)

    real = ReplayingDurability.flushed
    patch.setattr(ReplayingDurability, "flushed", broken)


def _clean_by_any_reply(patch: pytest.MonkeyPatch) -> None:
    real = Writeback._arrived

    def broken(self: Writeback, slot: int, bits: int, stable: bool) -> None:
        real(self, slot, bits, True)

    patch.setattr(Writeback, "_arrived", broken)


def _flush_cleans_what_came_after(patch: pytest.MonkeyPatch) -> None:
    real = Index.flush_ok

    def broken(self: Index, slot: int) -> bool:
        if self.covered[slot]:
            self.covered[slot] |= self.sent[slot]
        return real(self, slot)

    patch.setattr(Index, "flush_ok", broken)


def _failing_forgets_who_waits_for_room(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Writes, "_fail_for_room", lambda self, errno: None)


def _failing_forgets_who_waits_for_the_caches_disk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Reads, "refuse", lambda self, errno: None)


def _failing_forgets_partial_writes_of_cold_blocks(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Writes, errno: int) -> None:
        self._refused = errno
        if errno:
            self._fail_for_room(errno)

    patch.setattr(Writes, "refuse", broken)


def _growth_keeps_what_was_behind_the_end(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Resizer, "_complete_last_block", lambda *_: None)


def _growth_before_the_last_block_is_known(patch: pytest.MonkeyPatch) -> None:
    def broken(self: Resizer, size_bytes: int, outcome: Outcome) -> None:
        self._grow(size_bytes)
        self._common.turn.finish(outcome)

    patch.setattr(Resizer, "_read_last_block", broken)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plant",
    [
        _fill_ignores_writes,
        _reconnect_ignores_written,
        _write_does_not_clear_covered,
        _rewritten_block_counts_as_sent,
        _state_before_data,
        _data_before_dirty_mark,
        _data_before_dirty_mark_of_a_hit,
        _flush_does_not_wait_for_what_is_in_flight,
        _flush_does_not_wait_for_what_is_dirty,
        _write_does_not_wait_for_what_is_in_flight,
        _fua_whatever_is_unflushed,
        _evicts_dirty,
        _discard_drops_nothing,
        _failed_flush_loses_nothing,
        _failed_flush_loses_what_was_replied_to_only,
        _reconnect_ends_no_epoch,
        _flush_vouches_for_whatever_epoch_there_is,
        _clean_by_any_reply,
        _flush_cleans_what_came_after,
        _failing_forgets_who_waits_for_room,
        _failing_forgets_who_waits_for_the_caches_disk,
        _failing_forgets_partial_writes_of_cold_blocks,
        _growth_keeps_what_was_behind_the_end,
        _growth_before_the_last_block_is_known,
    ],
)
def test_planted_bug_is_found(
    plant: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    plant(monkeypatch)

    assert _finds_something()


def _finds_something() -> bool:
    for seed in range(PROGRAMS):
        try:
            run(seed)
        except Exception:  # The oracle's assertions, or what breaks before it can speak.
            return True
    return False
