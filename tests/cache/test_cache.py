"""What the cache does for a guest, one behaviour each; `test_model` has the combinations."""

from __future__ import annotations

import errno
import gc
import itertools
import random
from typing import Any
from weakref import ref

import pytest

from bridge.datapath.buffers import slices
from bridge.datapath.request import (
    DISCARD,
    FLUSH,
    FUA,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)

from .fakes import BLOCK, EIO, GRANULE, FakeServer, Rig


def test_read_of_absent_block_fetches_it_once() -> None:
    rig = Rig()
    rig.server.image[:BLOCK] = b"s" * BLOCK

    first = rig.read(0, BLOCK)
    second = rig.read(512, 1024)

    assert (first, second) == (b"s" * BLOCK, b"s" * 1024)
    assert rig.server.ops(READ) == [(0, BLOCK)]


def test_reads_of_adjacent_absent_blocks_in_one_turn_are_one_fetch() -> None:
    rig = Rig()
    rig.end_turn = lambda: None  # type: ignore[method-assign]
    for block in (3, 1, 2):
        rig.start(READ, block * BLOCK, BLOCK)
    del rig.end_turn

    rig.end_turn()

    assert rig.server.ops(READ) == [(BLOCK, 3 * BLOCK)]


def test_two_reads_of_one_absent_block_share_a_fetch() -> None:
    rig = Rig()
    first = rig.start(READ, 0, BLOCK)
    second = rig.start(READ, 0, BLOCK)

    rig.serve()

    assert first.value == second.value == 0
    assert len(rig.server.seen) == 1


def test_fetch_overtaken_by_a_write_does_not_overwrite_it() -> None:
    rig = Rig()
    reading = rig.start(READ, 0, 2 * BLOCK)
    rig.start(WRITE, 0, data=b"n" * BLOCK)

    rig.serve()

    assert reading.value == 0
    assert rig.read(0, BLOCK) == b"n" * BLOCK


def test_read_error_of_the_server_reaches_the_guest_and_is_not_cached() -> None:
    rig = Rig()
    result = rig.start(READ, 0, BLOCK)
    rig.server.answer(error=EIO)

    assert result.value == EIO
    assert rig.read(0, BLOCK) == bytes(BLOCK)


def test_write_in_writeback_mode_completes_before_the_server_hears_of_it() -> None:
    rig = Rig()

    result = rig.start(WRITE, 0, data=b"a" * BLOCK)

    assert result.value == 0
    assert rig.server.seen == []


def test_write_of_part_of_an_absent_block_keeps_the_rest_of_it() -> None:
    rig = Rig()
    rig.server.image[:BLOCK] = b"s" * BLOCK

    rig.write(512, b"a" * 512)

    assert rig.read(0, BLOCK) == b"s" * 512 + b"a" * 512 + b"s" * (BLOCK - 1024)


def test_write_through_completes_with_the_servers_reply() -> None:
    rig = Rig(mode="writethrough")
    result = rig.start(WRITE, 0, data=b"a" * BLOCK)
    before = result.error

    rig.serve()

    assert (before, result.error) == (None, 0)
    assert rig.server.image[:BLOCK] == b"a" * BLOCK


def test_write_through_error_reaches_the_guest() -> None:
    rig = Rig(mode="writethrough")
    result = rig.start(WRITE, 0, data=b"a" * BLOCK)

    rig.server.answer(error=errno.ENOSPC)

    assert result.value == errno.ENOSPC


def test_fua_write_is_sent_with_fua_and_needs_no_flush() -> None:
    rig = Rig()

    rig.write(0, b"a" * BLOCK, flags=FUA)

    assert rig.server.seen == [(WRITE, 0, BLOCK, FUA)]


def test_fua_write_without_server_fua_is_write_and_flush() -> None:
    rig = Rig()
    rig.server.can_fua = False

    rig.write(0, b"a" * BLOCK, flags=FUA)

    assert [op for op, *_ in rig.server.seen] == [WRITE, FLUSH]


def test_flush_writes_out_in_disk_order_and_coalesced() -> None:
    rig = Rig(fua_granules=0, writeback_run_bytes=1 << 20)
    for granule in (9, 2, 1):
        rig.write(granule * GRANULE, b"a" * GRANULE)

    rig.flush()

    assert rig.server.ops(WRITE) == [(GRANULE, 2 * GRANULE), (9 * GRANULE, GRANULE)]
    assert rig.server.seen[-1][0] == FLUSH


def test_flush_is_sent_only_after_every_write_was_replied_to() -> None:
    rig = Rig(fua_granules=0)
    rig.write(0, b"a" * BLOCK)
    rig.write(5 * GRANULE, b"b" * BLOCK)
    rig.start(FLUSH)

    rig.server.answer()
    rig.end_turn()

    assert rig.server.ops(FLUSH) == []


@pytest.mark.parametrize("error", [0, EIO])
def test_flush_that_has_ended_keeps_no_request(error: int) -> None:
    """It knows its chain: the guest's memory could not be let go of."""
    rig = Rig(fua_granules=0)
    rig.write(0, b"a" * BLOCK)
    flush = rig.start(FLUSH)
    rig.server.answer()
    rig.server.answer(error=error)
    ended, request = flush.error, ref(flush.request)
    del flush
    gc.collect()

    assert (ended, request()) == (error, None)


def test_flush_of_few_dirty_blocks_is_fua_writes_alone() -> None:
    rig = Rig()
    rig.flush()  # The first one cannot know what an earlier process left on the server.
    rig.server.seen.clear()
    rig.write(0, b"a" * BLOCK)

    assert rig.flush() == 0
    assert rig.server.seen == [(WRITE, 0, BLOCK, FUA)]


def test_flush_with_nothing_written_since_the_last_asks_nothing_of_the_server() -> None:
    rig = Rig()
    rig.write(0, b"a" * BLOCK)
    rig.flush()
    rig.server.seen.clear()

    assert rig.flush() == 0
    assert rig.server.seen == []


def test_flush_after_background_write_out_uses_a_real_flush() -> None:
    rig = Rig()
    rig.flush()
    rig.write(0, b"a" * BLOCK)
    rig.tick(6.0)
    rig.serve()
    rig.server.seen.clear()
    rig.write(9 * GRANULE, b"b" * BLOCK)

    rig.flush()

    assert [op for op, *_ in rig.server.seen] == [WRITE, FLUSH]


def test_failed_write_out_fails_the_flush_and_the_data_is_tried_again() -> None:
    rig = Rig()
    rig.write(0, b"a" * BLOCK)
    result = rig.start(FLUSH)

    rig.server.answer(error=EIO)

    assert result.value == EIO
    assert rig.read(0, BLOCK) == b"a" * BLOCK
    assert rig.flush() == 0
    assert rig.server.image[:BLOCK] == b"a" * BLOCK


def test_failed_server_flush_makes_written_blocks_dirty_again() -> None:
    rig = Rig(fua_granules=0)
    rig.write(0, b"a" * BLOCK)
    result = rig.start(FLUSH)
    rig.server.answer()

    rig.server.answer(error=EIO)

    assert result.value == EIO
    rig.server.seen.clear()
    assert rig.flush() == 0
    assert rig.server.ops(WRITE) == [(0, BLOCK)]


def test_written_blocks_are_sent_again_after_a_reconnect() -> None:
    """A server that lost power forgets what it acknowledged; its next flush says OK all the
    same (QEMU's nbd driver loses data that way)."""
    rig = Rig(fua_granules=0)
    rig.write(0, b"a" * BLOCK)
    rig.tick(6.0)
    rig.serve()
    rig.server.image[:BLOCK] = bytes(BLOCK)
    rig.server.generation += 1

    rig.reconnected()

    assert rig.flush() == 0
    assert rig.server.image[:BLOCK] == b"a" * BLOCK


def test_flush_whose_connection_was_replaced_begins_again() -> None:
    rig = Rig(fua_granules=0)
    rig.write(0, b"a" * BLOCK)
    result = rig.start(FLUSH)
    rig.server.answer()
    rig.server.image[:BLOCK] = bytes(BLOCK)
    rig.server.generation += 1
    rig.reconnected()

    rig.serve()

    assert result.value == 0
    assert rig.server.image[:BLOCK] == b"a" * BLOCK
    assert len(rig.server.ops(FLUSH)) == 2


def test_block_written_again_while_in_flight_is_sent_after_the_reply_only() -> None:
    rig = Rig()
    rig.write(0, b"1" * BLOCK)
    rig.tick(6.0)
    rig.start(WRITE, 0, data=b"2" * BLOCK)
    flush = rig.start(FLUSH)
    in_flight = list(rig.server.pending)

    rig.serve()

    assert len(in_flight) == 1
    assert bytes(in_flight[0].buffers[0]) == b"1" * BLOCK
    assert flush.value == 0
    assert rig.server.image[:BLOCK] == b"2" * BLOCK


def test_flush_timer_is_armed_by_the_first_write_and_makes_it_durable() -> None:
    rig = Rig(writeback_age_s=1000.0, flush_interval_s=60.0)
    idle = rig.cache.next_deadline()
    rig.write(0, b"a" * BLOCK)

    due = rig.cache.next_deadline()
    rig.tick(60.0)
    rig.serve()

    assert (idle, due) == (None, 60.0)
    assert rig.server.image[:BLOCK] == b"a" * BLOCK
    assert rig.cache.index.dirty_blocks == 0
    assert rig.cache.next_deadline() is None


def test_flush_timer_made_shorter_counts_for_what_was_written_before() -> None:
    rig = Rig(writeback_age_s=1000.0, flush_interval_s=0)
    rig.write(0, b"a" * BLOCK)

    rig.cache.flush_interval_s = 10
    rig.write(0, b"b" * BLOCK)  # to an open block: no more than a copy
    rig.tick(10.0)
    rig.serve()

    assert rig.server.image[:BLOCK] == b"b" * BLOCK
    assert rig.cache.index.dirty_blocks == 0


def test_failed_timed_flush_is_tried_again() -> None:
    rig = Rig(writeback_age_s=1000.0)
    rig.write(0, b"a" * BLOCK)
    rig.tick(60.0)
    rig.server.answer(error=EIO)

    due = rig.cache.next_deadline()
    assert due is not None
    rig.tick(due)
    rig.serve()

    assert rig.cache.index.dirty_blocks == 0


def test_write_out_by_age_starts_without_a_flush() -> None:
    rig = Rig(writeback_age_s=5.0)
    rig.write(0, b"a" * BLOCK)

    rig.tick(4.0)
    early = list(rig.server.seen)
    rig.tick(6.0)

    assert early == []
    assert rig.server.ops(WRITE) == [(0, BLOCK)]


def test_deadline_that_has_come_is_acted_on_however_the_clock_rounds() -> None:
    """The deadline was a sum, and the question whether it has come a difference, which may round to
    less: at that very moment nothing was sent, and the deadline came again and again."""
    for hundredths in range(50_800, 50_900):  # with the age, past a power of two
        rig = Rig(writeback_age_s=5.0, flush_interval_s=0)
        rig.now = hundredths / 100
        rig.write(0, b"a" * BLOCK)
        due = rig.cache.next_deadline()
        assert due is not None
        rig.tick(due)
        assert rig.server.ops(WRITE) == [(0, BLOCK)]


def test_large_write_out_takes_many_turns_and_reaches_what_may_be_in_flight() -> None:
    rig = Rig(granules=64, slots=64, writeback_requests=40, writeback_turn_requests=16)
    for granule in range(64):
        rig.write(granule * GRANULE, b"a" * BLOCK)
    rig.cache.submit(Request(FLUSH, 0, 0, [], lambda _: None))

    in_flight = []
    while not in_flight or rig.turn.pending:
        rig.turn.end()
        in_flight.append(len(rig.server.pending))

    assert in_flight == [16, 32, 40]


def test_write_waits_for_blocks_of_its_granule_that_are_on_their_way() -> None:
    """Also when they left long before, and one by one."""
    rig = Rig(mode="writethrough")
    first = rig.start(WRITE, 0, data=b"a" * BLOCK)
    rig.start(WRITE, 4 * BLOCK, data=b"b" * BLOCK)
    last = rig.start(WRITE, 8 * BLOCK, data=b"c" * BLOCK)

    rig.server.answer(2)
    waits = last.error is None and first.error is None
    rig.server.answer(1)
    rig.server.answer(0)

    assert waits
    assert (first.value, last.value) == (0, 0)
    assert not rig.cache._writeback._in_flight.each()


def test_write_waits_for_a_write_out_that_began_in_the_granule_before() -> None:
    rig = Rig(mode="writethrough")
    rig.start(WRITE, GRANULE - BLOCK, data=b"a" * 2 * BLOCK)
    last = rig.start(WRITE, GRANULE + 8 * BLOCK, data=b"c" * BLOCK)

    rig.server.answer(1)
    waits = last.error is None
    rig.server.answer(0)

    assert waits
    assert last.value == 0


def test_deadline_appears_while_older_data_is_being_sent() -> None:
    rig = Rig(writeback_requests=1, flush_interval_s=0, writeback_age_s=5)
    rig.write(0, b"a" * BLOCK)
    rig.write(9 * GRANULE, b"a" * BLOCK)
    rig.tick(6.0)
    assert rig.cache.next_deadline() is None

    rig.start(WRITE, 20 * GRANULE, data=b"b" * BLOCK)

    assert rig.cache.next_deadline() == 11.0


def test_timer_armed_during_a_flush_counts_when_that_ends() -> None:
    rig = Rig(writeback_age_s=1000.0, fua_granules=0)
    rig.write(0, b"a" * BLOCK)
    rig.start(FLUSH)
    rig.server.answer()
    rig.start(WRITE, 9 * GRANULE, data=b"b" * BLOCK)
    before = rig.cache.next_deadline()

    rig.server.answer()

    assert (before, rig.cache.next_deadline()) == (1000.0, 60.0)


def test_failed_background_write_out_pauses_before_the_next() -> None:
    rig = Rig(flush_interval_s=0)
    rig.write(0, b"a" * BLOCK)
    rig.tick(6.0)
    rig.server.answer(error=EIO)

    due = rig.cache.next_deadline()

    assert due is not None
    assert due >= 7.0


def test_writers_wait_in_order_at_the_hard_dirty_limit() -> None:
    rig = Rig(
        slots=64, dirty_hard_ratio=4 / 64, dirty_flush_ratio=1.0, roomy_ratios=None, fua_granules=0
    )
    done = [rig.start(WRITE, at * GRANULE, data=b"%d" % at * BLOCK) for at in range(8)]

    finished = [result.error for result in done]
    rig.serve()

    assert finished == [0] * 4 + [None] * 4
    assert [result.value for result in done] == [0] * 8
    assert rig.read(7 * GRANULE, BLOCK) == b"7" * BLOCK


def test_dirty_set_larger_than_the_cache_loses_nothing() -> None:
    """nbdkit's cache filter evicts dirty blocks: 920 of 1024 were lost."""
    rig = Rig(granules=256, slots=64)
    for at in range(256):
        rig.write(at * GRANULE + BLOCK, b"%03d" % at * 1024 + b"x" * 1024)

    rig.flush()

    for at in range(256):
        base = at * GRANULE + BLOCK
        assert rig.server.image[base : base + 3] == b"%03d" % at


def test_discard_waits_for_write_out_and_drops_the_range() -> None:
    rig = Rig()
    rig.write(0, b"a" * GRANULE)
    rig.tick(6.0)
    discard = rig.start(DISCARD, 0, GRANULE)
    sent_early = rig.server.ops(DISCARD)

    rig.serve()

    assert (sent_early, discard.value) == ([], 0)
    assert rig.cache.index.dirty_blocks == 0
    assert rig.read(0, BLOCK) == bytes(BLOCK)


def test_failed_discard_keeps_what_the_guest_wrote() -> None:
    rig = Rig()
    rig.write(0, b"a" * GRANULE)
    discard = rig.start(DISCARD, 0, GRANULE)

    rig.server.answer(error=EIO)

    assert discard.value == EIO
    assert rig.read(0, BLOCK) == b"a" * BLOCK


def test_write_during_a_discard_comes_after_it() -> None:
    rig = Rig()
    rig.start(DISCARD, 0, GRANULE)
    write = rig.start(WRITE, 0, data=b"a" * BLOCK)
    early = write.error

    rig.serve()
    rig.flush()

    assert (early, write.error) == (None, 0)
    assert rig.server.image[:BLOCK] == b"a" * BLOCK


def test_large_write_zeroes_is_durable_when_it_completes() -> None:
    rig = Rig(zero_copy_bytes=0)

    result = rig.start(WRITE_ZEROES, 0, 4 * GRANULE)
    rig.serve()

    assert result.value == 0
    assert rig.server.seen == [(WRITE_ZEROES, 0, 4 * GRANULE, FUA)]


def test_write_zeroes_over_cached_data_reads_as_zeroes() -> None:
    rig = Rig(zero_copy_bytes=0)
    rig.write(0, b"a" * GRANULE)

    rig.start(WRITE_ZEROES, 512, 3 * BLOCK)
    rig.serve()

    assert rig.read(0, 4 * BLOCK + 512) == (b"a" * 512 + bytes(3 * BLOCK) + b"a" * BLOCK)


def test_discard_longer_than_a_piece_is_split() -> None:
    rig = Rig(exclusive_run_bytes=GRANULE)

    rig.start(DISCARD, 0, 3 * GRANULE)
    rig.serve()

    assert rig.server.ops(DISCARD) == [(at * GRANULE, GRANULE) for at in range(3)]


def test_write_zeroes_on_a_server_without_it_does_not_grow_the_stack() -> None:
    rig = Rig(granules=4096, slots=4096, dirty_hard_ratio=1.0)
    rig.server.can_write_zeroes = False

    result = rig.start(WRITE_ZEROES, 0, 4096 * GRANULE)
    rig.serve()

    assert result.value == 0


def test_request_beyond_the_disk_is_refused() -> None:
    rig = Rig()
    size = rig.server.size_bytes

    assert rig.start(READ, size - 512, 1024).value == errno.EINVAL
    assert rig.start(WRITE, size, data=b"a" * 512).value == errno.EINVAL


def test_fetches_in_flight_are_bounded_and_the_rest_follows() -> None:
    rig = Rig(fetch_bytes=2 * GRANULE, fetch_run_bytes=GRANULE)
    results = [rig.start(READ, at * 2 * GRANULE, GRANULE) for at in range(8)]

    in_flight = len(rig.server.pending)
    rig.serve()

    assert in_flight == 2
    assert [result.value for result in results] == [0] * 8


def test_prefetch_makes_later_reads_hits() -> None:
    rig = Rig()
    rig.prefetch(0, 4 * GRANULE)
    rig.server.seen.clear()

    rig.read(0, 4 * GRANULE)

    assert rig.server.seen == []


def test_sequential_reads_are_read_ahead_with_a_growing_window() -> None:
    rig = Rig(granules=1024, slots=1024, readahead_bytes=1 << 20)
    misses = []
    for at in range(0, 8 << 20, GRANULE):
        result = rig.start(READ, at, GRANULE)
        misses.append(result.error is None)
        rig.serve()

    lengths = [length for _, length in rig.server.ops(READ)]

    assert sum(misses) == 2
    assert max(lengths) >= 256 * 1024


def test_several_sequential_streams_are_read_ahead_at_a_time() -> None:
    rig = Rig(granules=1024, slots=1024, readahead_bytes=1 << 20)
    misses = 0
    for at in range(0, 2 << 20, GRANULE):
        for stream in range(8):
            misses += rig.start(READ, (stream * 8 << 20) + at, GRANULE).error is None
            rig.serve()

    assert misses == 2 * 8


def test_random_reads_are_not_read_ahead() -> None:
    rig = Rig(granules=1024, slots=1024, readahead_bytes=1 << 20)
    for at in (500, 3, 77, 900, 41, 600, 2, 333):
        rig.read(at * GRANULE, BLOCK)

    assert all(length == BLOCK for _, length in rig.server.ops(READ))


def test_sequential_scan_in_small_reads_leaves_the_hot_set_alone() -> None:
    rig = Rig(granules=4096, slots=256, readahead_bytes=1 << 20)
    for _ in range(3):
        for at in range(150):
            rig.read(at * GRANULE, BLOCK)
    for at in range(300 * GRANULE, 1500 * GRANULE, BLOCK):
        rig.read(at, BLOCK)
    rig.server.seen.clear()

    for at in range(150):
        rig.read(at * GRANULE, BLOCK)

    assert len(rig.server.seen) < 25


def test_large_reads_of_a_long_stream_go_past_the_cache() -> None:
    rig = Rig(granules=1024, slots=1024, readahead_bytes=1 << 20)
    rig.server.image[:] = random.Random(1).randbytes(1 << 20) * 64
    for at in range(0, 16 << 20, 1 << 20):
        assert rig.read(at, 1 << 20) == rig.server.image[at : at + (1 << 20)]

    assert rig.cache.stats.read_bypassed >= 8
    assert rig.cache.index.valid_blocks * BLOCK < 8 << 20


def test_large_read_with_a_dirty_block_does_not_go_past_the_cache() -> None:
    rig = Rig(granules=1024, slots=1024, readahead_bytes=1 << 20)
    rig.write((12 << 20) + 5 * BLOCK, b"n" * BLOCK)
    for at in range(0, 16 << 20, 1 << 20):
        data = rig.read(at, 1 << 20)
        if at == 12 << 20:
            assert data[5 * BLOCK : 6 * BLOCK] == b"n" * BLOCK


def test_many_turns_keep_memory_flat() -> None:
    rig = Rig(granules=512, slots=64, readahead_bytes=1 << 20)
    cache = rig.cache
    for turn in range(3000):
        at = turn * 7919 % 512
        rig.write(at * GRANULE, b"a" * BLOCK)
        rig.read((at * 31 % 512) * GRANULE, BLOCK)
        if turn % 50 == 0:
            rig.flush()
            rig.tick(rig.now + 3)

    rig.flush()
    writeback, fetcher = cache._writeback, cache._fetcher
    assert not writeback._awaited
    assert not writeback._deferred
    assert not writeback._in_flight.each()
    assert not writeback.written
    assert len(writeback.ring._marks) < 10
    assert not fetcher.fetching
    assert len(cache._readahead._streams) <= 32
    assert len(cache._readahead._marks) <= 32


def test_streams_that_replace_one_another_leave_no_marks() -> None:
    # One that begins anew and comes to where another would go on took its place, but not its mark:
    # a guest could leave any number of them, and each read looks through all.
    rig = Rig(granules=1024, slots=64, readahead_bytes=1 << 20)
    for granule in range(0, 1024 - 8, 8):
        at = granule * GRANULE
        rig.read(at, BLOCK)
        rig.read(at + BLOCK, BLOCK)
        rig.start(DISCARD, at, 2 * BLOCK)
        rig.serve()
        rig.read(at, 2 * BLOCK)

    readahead = rig.cache._readahead
    assert len(readahead._streams) == 32
    assert set(readahead._marks.values()) <= set(readahead._streams.values())


def test_prefetch_is_not_written_to_guest_buffers_twice() -> None:
    rig = Rig()
    assert rig.prefetch(0, BLOCK) == 0
    assert rig.start(PREFETCH, 0, BLOCK).value == 0


def test_flush_without_any_connection_fails_at_once_and_keeps_dirty_data() -> None:
    rig = Rig()
    for granule in range(8):
        rig.start(WRITE, granule * GRANULE, data=b"a" * BLOCK)
        rig.start(WRITE, granule * GRANULE + 2 * BLOCK, data=b"a" * BLOCK)
    rig.server.fails = EIO

    assert rig.start(FLUSH).value == EIO

    rig.server.fails = 0
    assert rig.flush() == 0
    assert rig.server.image[7 * GRANULE :][:BLOCK] == b"a" * BLOCK


class Gone(FakeServer):
    """No connection any more, and a limit to how often that may be tried."""

    tries = 0

    def submit(self, request: Request) -> None:
        if self.fails:
            self.tries += 1
            assert self.tries < 50, "sent and refused without end"
        super().submit(request)


def test_block_that_is_refused_while_another_of_its_slot_is_in_flight_is_not_sent_without_end() -> (
    None
):
    """A guest that stopped while the server was slow kept the bridge busy until a reply came."""
    rig = Rig(server=Gone(64 * GRANULE))
    rig.start(WRITE, 0, data=b"1" * BLOCK)
    rig.tick(6.0)
    rig.start(WRITE, 0, data=b"2" * BLOCK)
    rig.start(WRITE, 2 * BLOCK, data=b"3" * BLOCK)
    rig.server.fails = EIO
    flush = rig.start(FLUSH)
    assert flush.error is None  # The first write-out is in flight.
    rig.serve()
    assert flush.value == EIO

    rig.server.fails = 0
    assert rig.flush() == 0
    assert rig.server.image[:BLOCK] == b"2" * BLOCK
    assert rig.server.image[2 * BLOCK : 3 * BLOCK] == b"3" * BLOCK


def test_reads_that_fail_at_once_do_not_pile_up_on_the_stack() -> None:
    rig = Rig(granules=4096, fetch_bytes=GRANULE, fetch_run_bytes=BLOCK)
    results = [rig.start(READ, granule * GRANULE, BLOCK) for granule in range(4096)]

    rig.server.fails = EIO
    rig.server.answer(error=EIO)

    assert {result.error for result in results} <= {EIO, None}
    rig.server.fails = 0
    rig.serve()
    assert all(result.error is not None for result in results)


def test_write_that_waits_for_room_fails_when_the_server_is_given_up() -> None:
    rig = Rig(granules=128, slots=64)
    results = [rig.start(WRITE, granule * GRANULE, data=b"a" * BLOCK) for granule in range(64)]
    waiting = [each for each in results if each.error is None]
    assert waiting

    rig.server.gone = True
    while rig.server.pending:
        rig.server.answer(error=EIO)
        rig.end_turn()
    late = rig.start(WRITE, 100 * GRANULE, data=b"b" * BLOCK)

    assert {each.error for each in waiting} == {EIO}
    assert late.error == EIO


def test_write_that_waits_for_room_waits_on_while_the_server_only_refuses_data() -> None:
    rig = Rig(granules=128, slots=64)
    results = [rig.start(WRITE, granule * GRANULE, data=b"a" * BLOCK) for granule in range(64)]
    waiting = [each for each in results if each.error is None]

    while rig.server.pending:
        rig.server.answer(error=errno.ENOSPC)
        rig.end_turn()
    early = {each.error for each in waiting}
    rig.tick(100)
    rig.serve()

    assert early == {None}
    assert {each.error for each in results} == {0}


def _searches(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The granules for which a slot is looked for from now on."""
    searched: list[int] = []
    obtain = rig.cache._common.slots.obtain

    def counted(granule: int) -> int:
        searched.append(granule)
        return obtain(granule)

    monkeypatch.setattr(rig.cache._common.slots, "obtain", counted)
    return searched


def test_write_that_waits_for_a_slot_looks_again_only_when_there_may_be_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not because time passes, other requests come, or a flush has ended that made no room."""
    rig = Rig(granules=128, slots=8, dirty_hard_ratio=1.0, roomy_ratios=None)
    for slot in range(1, 9):
        rig.write(slot * GRANULE, b"c" * BLOCK)
    assert rig.flush() == 0
    for slot in range(1, 9):
        rig.cache._common.slots.pin(slot)
    write = rig.start(WRITE, 100 * GRANULE, data=b"w" * BLOCK)
    searched = _searches(rig, monkeypatch)

    for now in range(1, 9):
        rig.tick(now * 100)
        assert rig.read(now * GRANULE, BLOCK) == b"c" * BLOCK
        assert rig.flush() == 0
    assert (searched, write.error) == ([], None)
    rig.cache._common.slots.unpin(3)
    rig.turn.want()
    rig.end_turn()

    assert (searched, write.error) == ([100], 0)


def test_partial_write_whose_fetch_was_overtaken_by_a_discard_fetches_again() -> None:
    """There is room, so there is nothing to wait for: no flush, no timer."""
    rig = Rig()
    write = rig.start(WRITE, 512, data=b"w" * 512)
    discard = rig.start(DISCARD, 0, GRANULE)
    rig.server.answer(1)
    assert discard.error == 0

    rig.serve()

    assert write.error == 0
    assert len(rig.server.ops(READ)) == 2
    assert rig.server.ops(FLUSH) == []


def test_flush_that_failed_is_not_tried_again_by_writes_that_wait_for_room() -> None:
    """Only by the timer: a server that cannot flush would be asked as often as a guest writes."""
    rig = Rig(granules=128, slots=8)
    for granule in range(20):
        rig.start(WRITE, granule * GRANULE, data=b"a" * BLOCK)
    while rig.server.pending:
        rig.server.answer(error=errno.EIO)
    sent = len(rig.server.seen)
    assert rig.cache.waiting["room"]

    rig.now += 0.001
    for granule in range(20, 40):
        rig.start(WRITE, granule * GRANULE, data=b"a" * BLOCK)

    assert len(rig.server.seen) == sent
    rig.tick(100)
    rig.serve()
    assert rig.cache.waiting["room"] == 0


def test_write_zeroes_into_the_cache_let_the_turn_end() -> None:
    """A server without WRITE_ZEROES, and a guest that zeroes a terabyte."""
    rig = Rig(granules=4096, slots=4096, dirty_hard_ratio=1.0)
    rig.server.can_write_zeroes = False
    ended: list[int] = []
    length = 1024 * GRANULE
    rig.cache.submit(
        Request(WRITE_ZEROES, 0, length, [], lambda request: ended.append(request.error))
    )
    rig.turn.end()
    in_one_turn = rig.cache.index.dirty_slots

    turns = 0
    while rig.turn.pending:
        rig.turn.end()
        turns += 1

    assert in_one_turn < 200
    assert turns >= 1024 // 200
    assert ended == [0]


@pytest.mark.parametrize("blocks", [1, 3, 1024 * GRANULE // BLOCK])
def test_zeroes_are_not_stored_once_their_request_is_abandoned(blocks: int) -> None:
    """The guest was told that they failed, and may go on elsewhere: what would become dirty here is
    older than what it writes there."""
    rig = Rig(granules=4096, slots=4096, dirty_hard_ratio=1.0)
    rig.server.can_write_zeroes = False
    at = BLOCK // 2
    request = Request(WRITE_ZEROES, at, blocks * BLOCK, [], lambda _: None)
    ended: list[int] = []
    rig.cache.submit(request)
    rig.turn.end()
    dirty = rig.cache.index.dirty_slots
    request.abandon(lambda request: ended.append(request.error), memoryview(b""))

    rig.serve()
    while rig.turn.pending:
        rig.turn.end()

    assert ended == [errno.ECANCELED]
    assert rig.cache.index.dirty_slots == dirty < 200


@pytest.mark.parametrize("op", [DISCARD, WRITE_ZEROES])
def test_an_abandoned_discard_that_has_to_wait_is_not_done_later(op: int) -> None:
    """While the server says nothing the guest starts anew: what it writes then must stay."""
    rig = Rig()
    rig.start(op, 0, 8 * GRANULE)
    request = Request(op, 6 * GRANULE, 8 * GRANULE, [], lambda _: None)
    ended: list[int] = []
    rig.cache.submit(request)
    rig.turn.end()
    request.abandon(lambda request: ended.append(request.error), memoryview(b""))

    written = rig.start(WRITE, 9 * GRANULE, data=b"new!" * 1024)
    rig.serve()

    assert written.value == 0
    assert ended == [errno.ECANCELED]
    assert rig.read(9 * GRANULE, BLOCK) == b"new!" * 1024


class _Counted:
    """A number that counts how often it is compared."""

    compared = 0

    def __init__(self, value: int) -> None:
        self.value = value

    def __lt__(self, other: object) -> bool:
        type(self).compared += 1
        return self.value < int(other)  # type: ignore[call-overload]

    def __gt__(self, other: object) -> bool:
        type(self).compared += 1
        return self.value > int(other)  # type: ignore[call-overload]

    def __int__(self) -> int:
        return self.value


def test_discards_in_progress_are_found_without_looking_at_each() -> None:
    """32 segments in each of 1024 chains are 32,768."""
    rig = Rig(granules=2048, slots=64)
    for number in range(1024):
        rig.start(DISCARD, number * 2 * GRANULE, BLOCK)
    discards = rig.cache._busy_ranges
    _Counted.compared = 0

    found = discards.overlapping(_Counted(801), _Counted(802))  # type: ignore[arg-type]

    assert len(discards) == 1024
    assert found is None
    assert _Counted.compared < 30
    block_of_one = 1023 * 2 * 16
    assert discards.overlapping(block_of_one, block_of_one + 1) is not None
    rig.serve()
    assert not discards


def test_discards_of_the_same_blocks_are_not_all_looked_at_each_time() -> None:
    rig = Rig()
    count = 3000
    discards = [rig.start(DISCARD, 0, GRANULE) for _ in range(count)]
    read = rig.start(READ, 0, BLOCK)
    range_operations = rig.cache._range_operations
    tried = 0
    begin = range_operations.begin

    def counted(each: Any) -> None:
        nonlocal tried
        tried += 1
        begin(each)

    range_operations.begin = counted  # type: ignore[method-assign]
    rig.serve()

    assert [discard.value for discard in discards] == [0] * count
    assert read.value == 0
    assert tried < 70 * count


def test_fetches_that_wait_are_not_sorted_again_for_each_reply() -> None:
    rig = Rig(granules=1 << 14, slots=64, fetch_bytes=GRANULE, fetch_run_bytes=GRANULE)
    order = list(range(2000))
    random.Random(1).shuffle(order)
    results = [rig.start(READ, number * 2 * GRANULE, BLOCK) for number in order]
    fetcher = rig.cache._fetcher

    assert [-fetch.first for fetch in fetcher._pending] == sorted(
        -fetch.first for fetch in fetcher._pending
    )
    rig.serve()

    assert {result.value for result in results} == {0}
    sent = [offset for offset, _ in rig.server.ops(READ)]
    assert len(sent) == 2000


def test_buffers_of_a_request_are_cut_right_however_many_there_are() -> None:
    dice = random.Random(1)
    data = bytes(dice.randrange(256) for _ in range(5000))
    whole = memoryview(bytearray(data))
    for _ in range(300):
        cuts = sorted(dice.sample(range(1, 5000), dice.choice((0, 3, 15, 16, 17, 200))))
        buffers = [whole[a:b] for a, b in itertools.pairwise([0, *cuts, 5000])]
        start = dice.randrange(5000)
        length = dice.randrange(1, 5000 - start + 1)
        assert b"".join(slices(buffers, start, length)) == data[start : start + length]


def test_writes_that_evict_what_the_others_have_fetched_all_come_to_their_end() -> None:
    """Each covers two blocks in part. In a full cache the second block of one took the place of the
    first one of another, for ever."""
    rig = Rig(granules=16, slots=3)
    data = b"w" * 2 * BLOCK
    at = [granule * GRANULE + BLOCK // 2 for granule in range(8)]
    writes = [rig.start(WRITE, offset, data=data) for offset in at]
    for _ in range(50):
        # The first block of each, then the last one of each, then the rest.
        for block in (0, 2, 1):
            for request in list(rig.server.pending):
                if request.offset // BLOCK % (GRANULE // BLOCK) == block:
                    rig.server.answer(rig.server.pending.index(request))
    assert [write.error for write in writes] == [0] * 8
    assert rig.flush() == 0
    for offset in at:
        assert rig.server.image[offset : offset + len(data)] == data
