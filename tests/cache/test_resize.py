"""A disk that grows under its cache; `test_model` has it among all other faults."""

from __future__ import annotations

import errno

from bridge.datapath.request import DISCARD, FLUSH, READ, WRITE, WRITE_ZEROES

from .fakes import BLOCK, EIO, GRANULE, Result, Rig

OLD = 64 * GRANULE
SHORT = OLD - BLOCK + 1024
"""A disk that ends within a block."""
NEW = 80 * GRANULE


class Resize:
    """A resize in progress or not."""

    def __init__(self, rig: Rig, size_bytes: int, *, content: bytes = b"") -> None:
        """The server has `content`, repeated, where it has grown."""
        rig.server.grow((content or b"\0") * (size_bytes - rig.server.size_bytes))
        self.error: int | None = None
        rig.resize(size_bytes, self._done)

    def _done(self, error: int) -> None:
        assert self.error is None, "done twice"
        self.error = error


def test_write_past_the_old_size_fails_before_and_works_after_growing() -> None:
    rig = Rig()
    before = rig.write(OLD, b"a" * BLOCK)

    resize = Resize(rig, NEW)

    assert (before, resize.error) == (errno.EINVAL, 0)
    assert rig.write(NEW - BLOCK, b"n" * BLOCK) == 0
    assert rig.flush() == 0
    assert rig.server.image[NEW - BLOCK :] == b"n" * BLOCK
    assert rig.start(READ, NEW, BLOCK).value == errno.EINVAL


def test_all_of_a_grown_disk_passes_through_the_same_slots() -> None:
    rig = Rig()
    Resize(rig, NEW)

    for granule in range(80):
        assert rig.write(granule * GRANULE, bytes([granule]) * BLOCK) == 0

    assert rig.flush() == 0
    for granule in range(80):
        assert rig.read(granule * GRANULE, BLOCK) == bytes([granule]) * BLOCK
        assert rig.server.image[granule * GRANULE] == granule


def test_cache_that_had_room_for_the_disk_leaves_reads_some_room_after_growing() -> None:
    """Limits that suit a cache as large as its disk would let dirty data take every slot."""
    rig = Rig()
    Resize(rig, NEW)

    for granule in range(64):
        rig.start(WRITE, granule * GRANULE, data=b"d" * BLOCK)

    assert rig.cache.index.dirty_slots < 64


def test_resize_to_the_same_or_a_smaller_size_changes_nothing() -> None:
    rig = Rig()

    for size_bytes in (OLD, OLD - GRANULE):
        results = []
        rig.resize(size_bytes, results.append)
        assert results == [0]

    assert rig.cache.size_bytes == OLD


def test_disk_too_large_for_any_cache_is_refused_and_the_old_size_stays() -> None:
    rig = Rig()
    results: list[int] = []

    rig.resize(1 << 62, results.append)

    assert results == [errno.EFBIG]
    assert rig.write(OLD - BLOCK, b"a" * BLOCK) == 0


def grown_in_a_block(rig: Rig, new: int = NEW) -> None:
    resize = Resize(rig, new, content=b"s")
    assert resize.error is None
    rig.serve()
    assert resize.error == 0


def test_dirty_last_block_goes_to_the_server_with_what_that_has_behind_it() -> None:
    rig = Rig(size=SHORT)
    rig.start(WRITE, SHORT - 1024, data=b"d" * 1024)

    grown_in_a_block(rig)

    assert rig.read(SHORT - 1024, BLOCK) == b"d" * 1024 + b"s" * (BLOCK - 1024)
    assert rig.flush() == 0
    assert rig.server.image[SHORT - 1024 : OLD] == b"d" * 1024 + b"s" * (BLOCK - 1024)


def test_clean_last_block_shows_what_the_server_has_behind_it() -> None:
    rig = Rig(size=SHORT)
    rig.read(SHORT - 512, 512)

    grown_in_a_block(rig)

    assert rig.read(SHORT - 512, 1024) == bytes(512) + b"s" * 512


def test_second_growth_within_the_same_block_completes_it_again() -> None:
    rig = Rig(size=SHORT)
    rig.write(SHORT - 1024, b"d" * 1024)

    grown_in_a_block(rig, SHORT + 512)
    grown_in_a_block(rig, SHORT + 1024)

    assert rig.read(SHORT - 512, 1536) == b"d" * 512 + b"s" * 1024


def test_two_resizes_at_a_time_end_at_the_larger_size() -> None:
    rig = Rig(size=SHORT)
    first = Resize(rig, SHORT + 512, content=b"s")
    second = Resize(rig, NEW, content=b"t")

    rig.server.answer(1)
    rig.serve()

    assert (first.error, second.error) == (0, 0)
    assert rig.cache.size_bytes == NEW
    assert rig.read(SHORT, 1024) == b"s" * 512 + b"t" * 512


def test_disk_keeps_its_size_until_its_last_block_was_read() -> None:
    rig = Rig(size=SHORT)
    resize = Resize(rig, NEW)

    early = rig.start(READ, SHORT, 512)
    rig.server.answer(error=EIO)

    assert (early.value, resize.error) == (errno.EINVAL, EIO)
    assert rig.start(READ, SHORT, 512).value == errno.EINVAL


def test_fetch_sent_before_the_growth_does_not_fill_the_last_block() -> None:
    rig = Rig(size=SHORT)
    reading = rig.start(READ, SHORT - 512, 512)
    resize = Resize(rig, NEW, content=b"s")

    rig.server.answer(1)
    assert resize.error == 0
    after = rig.start(READ, SHORT, 512)
    rig.serve()

    assert (reading.value, after.value) == (0, 0)
    assert bytes(after.request.buffers[0]) == b"s" * 512


def test_write_out_in_flight_while_the_disk_grows_ends_where_it_did() -> None:
    rig = Rig(size=SHORT)
    rig.start(WRITE, SHORT - 1024, data=b"d" * 1024)
    flush = rig.start(FLUSH)
    resize = Resize(rig, NEW, content=b"s")

    rig.server.answer(1)
    rig.serve()

    assert (flush.value, resize.error) == (0, 0)
    assert rig.server.ops(WRITE) == [(SHORT - 1024, 1024)]
    assert rig.read(SHORT - 512, 1024) == b"d" * 512 + b"s" * 512


def test_range_to_the_old_end_does_not_drop_what_was_written_behind_it_meanwhile() -> None:
    for op in (DISCARD, WRITE_ZEROES):
        rig = Rig(size=SHORT, zero_copy_bytes=0, exclusive_run_bytes=GRANULE)
        whole = rig.start(op, SHORT - 1024 - 3 * GRANULE, 3 * GRANULE + 1024)
        resize = Resize(rig, NEW, content=b"s")
        rig.server.answer(len(rig.server.pending) - 1)
        rig.end_turn()

        write = rig.start(WRITE, SHORT, data=b"w" * 512)
        rig.serve()

        assert (resize.error, write.value, whole.value) == (0, 0, 0)
        assert rig.read(SHORT, 512) == b"w" * 512
        assert rig.flush() == 0
        assert rig.server.image[SHORT : SHORT + 512] == b"w" * 512


def test_range_that_waits_its_turn_while_the_disk_grows_leaves_the_old_last_block_alone() -> None:
    for op in (DISCARD, WRITE_ZEROES):
        rig = Rig(size=SHORT, zero_copy_bytes=0)
        start = SHORT - 1024 - 3 * GRANULE
        before = rig.start(op, start, 3 * GRANULE + 1024)
        waiting = rig.start(op, start, 3 * GRANULE + 1024)
        Resize(rig, NEW, content=b"s")
        rig.server.answer(len(rig.server.pending) - 1)
        rig.end_turn()
        write = rig.start(WRITE, SHORT, data=b"w" * 512)

        rig.serve()

        assert (before.value, write.value, waiting.value) == (0, 0, 0)
        assert rig.read(SHORT, 512) == b"w" * 512
        assert rig.flush() == 0
        assert rig.server.image[SHORT : SHORT + 512] == b"w" * 512


def test_discard_to_the_old_end_does_not_touch_the_grown_part() -> None:
    for op in (DISCARD, WRITE_ZEROES):
        rig = Rig(size=SHORT, zero_copy_bytes=0, exclusive_run_bytes=GRANULE)
        rig.write(SHORT - 1024, b"d" * 1024)
        discard: Result = rig.start(op, SHORT - 1024 - 3 * GRANULE, 3 * GRANULE + 1024)
        Resize(rig, NEW, content=b"s")

        rig.server.answer(len(rig.server.pending) - 1)
        rig.serve()

        assert discard.value == 0
        # A part of a block is no longer discarded: that is a hint.
        old = b"d" if op == DISCARD else b"\0"
        assert rig.read(SHORT - 1024, 2048) == old * 1024 + b"s" * 1024
        assert rig.server.image[SHORT : SHORT + 512] == b"s" * 512
