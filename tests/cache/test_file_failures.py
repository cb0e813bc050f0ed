"""A cache file that is slow (its blocks left the page cache), or fails."""

from __future__ import annotations

import errno
import gc
from weakref import ref

from bridge.cache.file.cache_file import MappedImage
from bridge.datapath.request import DISCARD, FLUSH, READ, WRITE

from .fakes import BLOCK, EIO, GRANULE, LaterCold, Rig


class _ColdImage(MappedImage):
    """Nothing is in the page cache until a thread read it."""

    warm = False

    def resident(self, position: int, length: int) -> bool:
        return self.warm


def _cold_rig(
    cached: int = 2, *, granules: int = 64, slots: int = 64, **options: int
) -> tuple[Rig, LaterCold]:
    """A cache that holds the first granules of the disk, none of them in the page cache."""
    first, cold = Rig(granules=granules, slots=slots), LaterCold()
    image = _ColdImage(first.image._whole.obj, first.image.header)
    rig = Rig(granules=granules, slots=slots, image=image, cold=cold, **options)
    rig.prefetch(0, cached * GRANULE)
    rig.cache.index.forget_residency()
    return rig, cold


def test_read_of_a_cold_block_does_not_hold_up_others() -> None:
    rig, cold = _cold_rig()
    rig.cache.index.ready[rig.cache.index.find(1)] = 0xFFFF

    slow = rig.start(READ, 0, BLOCK)
    hot = rig.start(READ, GRANULE, BLOCK)
    early = slow.error
    cold.finish()

    assert (early, hot.error, slow.error) == (None, 0, 0)


def test_cold_block_that_cannot_be_read_comes_from_the_server_when_clean() -> None:
    rig, cold = _cold_rig()
    rig.server.image[:BLOCK] = b"s" * BLOCK
    result = rig.start(READ, 0, BLOCK)

    cold.finish(error=EIO)
    rig.end_turn()
    rig.serve()

    assert result.value == 0
    assert bytes(result.request.buffers[0]) == b"s" * BLOCK


def test_cold_dirty_block_that_cannot_be_read_fails_the_read() -> None:
    """The server's bytes are old: an error is right, a fallback would be silent corruption."""
    rig, cold = _cold_rig()
    rig.write(0, b"a" * BLOCK)
    rig.cache.index.forget_residency()
    result = rig.start(READ, 0, BLOCK)

    cold.finish(error=EIO)
    rig.end_turn()

    assert result.value == EIO
    assert rig.server.ops(READ) == [(0, 2 * GRANULE)]


def test_dirty_block_that_went_cold_is_read_by_a_thread_before_it_is_sent() -> None:
    rig, cold = _cold_rig()
    rig.write(0, b"a" * BLOCK)
    rig.cache.index.forget_residency()
    flush = rig.start(FLUSH)
    early = rig.server.ops(WRITE)

    cold.finish()
    rig.end_turn()
    rig.serve()

    assert (early, flush.value) == ([], 0)
    assert rig.server.image[:BLOCK] == b"a" * BLOCK


def test_dirty_block_that_cannot_be_read_back_fails_the_flush() -> None:
    rig, cold = _cold_rig()
    rig.write(0, b"a" * BLOCK)
    rig.cache.index.forget_residency()
    flush = rig.start(FLUSH)

    cold.finish(error=EIO)
    rig.end_turn()

    assert flush.value == EIO
    assert rig.cache.index.dirty_blocks == 1


def test_write_of_part_of_a_cold_block_waits_for_the_thread() -> None:
    rig, cold = _cold_rig()
    result = rig.start(WRITE, 512, data=b"a" * 512)
    early = result.error

    cold.finish()
    rig.end_turn()

    assert (early, result.error) == (None, 0)


def test_two_reads_of_a_cold_granule_that_cannot_be_read_come_from_the_server() -> None:
    """The first one drops the granule; the second finds it elsewhere, or nowhere."""
    rig, cold = _cold_rig()
    rig.server.image[:GRANULE] = b"s" * GRANULE
    first = rig.start(READ, 0, GRANULE)
    second = rig.start(READ, 0, GRANULE)

    for _ in range(2):
        cold.finish(error=EIO)
        rig.end_turn()
    rig.serve()

    assert (first.value, second.value) == (0, 0)
    for result in (first, second):
        assert bytes(result.request.buffers[0]) == b"s" * GRANULE


def test_cold_block_that_cannot_be_read_and_was_discarded_comes_from_the_server() -> None:
    rig, cold = _cold_rig()
    read = rig.start(READ, 0, BLOCK)
    discard = rig.start(DISCARD, 0, GRANULE)
    rig.serve()

    cold.finish(error=EIO)
    rig.end_turn()
    rig.serve()

    assert (read.value, discard.value) == (0, 0)


def test_cold_read_that_fails_gets_what_was_written_to_its_granule_since() -> None:
    """After a discard the granule has another slot: a dirty one, never to be dropped."""
    rig, cold = _cold_rig()
    read = rig.start(READ, 0, BLOCK)
    rig.start(DISCARD, 0, GRANULE)
    rig.serve()
    rig.write(0, b"n" * BLOCK)

    cold.finish(error=EIO)
    rig.end_turn()

    assert bytes(read.request.buffers[0]) == b"n" * BLOCK
    assert rig.cache.index.dirty_blocks == 1


def _cold_dirty_rig(granules: int) -> tuple[Rig, LaterCold]:
    """A cache with a dirty block in each granule, none of them in memory."""
    first = Rig(granules=granules, slots=granules)
    for granule in range(granules):
        first.start(WRITE, granule * GRANULE, data=b"a" * BLOCK)
    image = _ColdImage(first.image._whole.obj, first.image.header)
    cold = LaterCold()
    return Rig(granules=granules, slots=granules, image=image, cold=cold), cold


def test_flush_of_a_cold_dirty_set_reads_it_back_in_bounded_steps() -> None:
    rig, cold = _cold_dirty_rig(256)

    flush = rig.start(FLUSH)
    most = 0
    while cold.jobs or rig.server.pending:
        most = max(most, len(cold.jobs))
        while cold.jobs:
            cold.finish()
        rig.end_turn()
        rig.serve()

    assert flush.value == 0
    assert most <= rig.options.writeback_loads < rig.options.writeback_requests
    assert rig.cache.index.dirty_blocks == 0


def test_flush_of_a_cold_dirty_set_that_cannot_be_read_back_fails_at_once() -> None:
    """Each failed read makes room for the next one; nothing waits for a timer."""
    rig, cold = _cold_dirty_rig(100)
    flush = rig.start(FLUSH)

    while cold.jobs:
        cold.finish(error=EIO)
        rig.end_turn()

    assert flush.value == EIO
    assert rig.cache.index.dirty_blocks == 100


def test_requests_that_wait_for_the_caches_disk_can_be_given_up() -> None:
    """The guest's memory is its own again: a late answer of the disk goes nowhere."""
    rig, cold = _cold_rig()
    rig.server.image[:] = b"s" * len(rig.server.image)
    read = rig.start(READ, 0, BLOCK)
    write = rig.start(WRITE, GRANULE + 512, data=b"w" * 512)

    rig.refuse(EIO)
    rig.refuse(0)
    ended = (read.error, write.error)
    read.request.buffers[0][:] = b"w" * BLOCK
    while cold.jobs:
        cold.finish()
        rig.end_turn()

    assert ended == (EIO, EIO)
    assert bytes(read.request.buffers[0]) == b"w" * BLOCK
    assert rig.cache.index.dirty_blocks == 0
    rig.image.warm = True  # type: ignore[attr-defined]
    assert rig.read(GRANULE + 512, 512) == bytes(512)


class _FailingImage(MappedImage):
    """A cache file whose stores fail."""

    fails = False

    def put(self, position: int, source: object) -> None:
        if self.fails:
            raise OSError(errno.ENOSPC, "full")
        super().put(position, source)


def _failing_rig() -> Rig:
    first = Rig()
    rig = Rig(image=_FailingImage(first.image._whole.obj, first.image.header))
    rig.server.image[:BLOCK] = b"s" * BLOCK
    rig.image.fails = True  # type: ignore[attr-defined]
    return rig


def test_failing_cache_file_does_not_fail_reads() -> None:
    rig = _failing_rig()

    assert rig.read(0, BLOCK) == b"s" * BLOCK
    assert rig.read(0, BLOCK) == b"s" * BLOCK
    assert rig.cache.index.used == 0


def test_failing_cache_file_fails_writes_and_keeps_what_was_there() -> None:
    rig = _failing_rig()

    assert rig.write(0, b"a" * BLOCK) == errno.ENOSPC
    assert rig.write(0, b"a" * GRANULE + b"a" * BLOCK) == errno.ENOSPC
    assert rig.read(0, BLOCK) == b"s" * BLOCK
    assert rig.cache.index.used == 0


def test_failing_cache_file_fails_a_write_of_part_of_a_block_and_asks_the_server_once() -> None:
    """The rest of the block has to be in the cache first. It is not fetched again and again."""
    rig = _failing_rig()

    assert rig.write(512, b"a" * 512) == errno.ENOSPC
    assert len(rig.server.ops(READ)) == 1
    assert rig.read(0, BLOCK) == b"s" * BLOCK


def test_failing_cache_file_does_not_lose_dirty_data() -> None:
    rig = _failing_rig()
    rig.image.fails = False  # type: ignore[attr-defined]
    rig.write(0, b"a" * BLOCK)
    rig.image.fails = True  # type: ignore[attr-defined]

    assert rig.write(BLOCK, b"b" * BLOCK) == errno.ENOSPC
    assert rig.flush() == 0
    assert rig.server.image[:BLOCK] == b"a" * BLOCK


def test_cold_reads_have_private_copies_within_a_budget_and_the_rest_follows() -> None:
    """One read of all that is cached would copy all of it."""
    first, cold = Rig(granules=16, slots=16), LaterCold()
    image = _ColdImage(first.image._whole.obj, first.image.header)
    rig = Rig(granules=16, slots=16, image=image, cold=cold, cold_bytes=2 * GRANULE)
    rig.server.image[:] = bytes(range(256)) * (len(rig.server.image) // 256)
    rig.prefetch(0, 16 * GRANULE)
    rig.cache.index.forget_residency()

    whole = rig.start(READ, 0, 16 * GRANULE)
    other = rig.start(READ, GRANULE, BLOCK)
    most = len(cold.jobs)
    while cold.jobs:
        cold.finish()
        most = max(most, len(cold.jobs))

    assert most == 2
    assert (whole.error, other.error) == (0, 0)
    assert whole.request.buffers[0] == rig.server.image


def test_request_that_was_given_up_is_not_kept_by_the_job_of_a_stuck_disk() -> None:
    """It knows its chain: the guest's memory could not be let go of."""
    rig, cold = _cold_rig()
    read = rig.start(READ, 0, BLOCK)
    write = rig.start(WRITE, GRANULE + 512, data=b"w" * 512)
    requests = [ref(read.request), ref(write.request)]

    rig.refuse(EIO)
    del read, write
    gc.collect()

    assert cold.jobs
    assert [request() for request in requests] == [None, None]


def test_part_of_a_read_that_waits_for_a_discard_goes_nowhere_when_it_was_given_up() -> None:
    """The guest's memory is its own again, also when other blocks come from the page cache."""
    rig, _ = _cold_rig()
    rig.start(DISCARD, 2 * GRANULE, BLOCK)
    write = rig.start(WRITE, 2 * GRANULE, data=b"n" * BLOCK)
    read = rig.start(READ, 2 * GRANULE - BLOCK, 2 * BLOCK)
    rig.refuse(EIO)
    read.request.buffers[0][:] = b"w" * (2 * BLOCK)
    rig.serve()

    assert (write.error, read.error) == (0, EIO)
    assert bytes(read.request.buffers[0]) == b"w" * (2 * BLOCK)


def test_cold_reads_that_wait_for_memory_fail_when_the_cache_refuses() -> None:
    rig, cold = _cold_rig(16, granules=16, slots=16, cold_bytes=GRANULE)
    reads = [rig.start(READ, number * GRANULE, GRANULE) for number in range(4)]

    rig.refuse(EIO)
    early = [read.error for read in reads]
    rig.refuse(0)
    while cold.jobs:
        cold.finish()

    assert early == [EIO] * 4
    assert rig.cache._reads._cold_bytes == 0


def test_cold_blocks_that_are_written_partly_share_one_buffer() -> None:
    rig, cold = _cold_rig()
    seen: list[int] = []
    rig.image.read_wait = (  # type: ignore[method-assign]
        lambda buffers, position: seen.append(id(buffers[0].obj))
    )
    rig.start(WRITE, 512, data=b"a" * 512)
    rig.start(WRITE, GRANULE + 512, data=b"b" * 512)
    while cold.jobs:
        cold.finish()

    assert len(seen) == 2
    assert len(set(seen)) == 1


def test_cold_read_that_is_larger_than_the_budget_is_done_alone() -> None:
    rig, cold = _cold_rig(16, granules=16, slots=16, cold_bytes=BLOCK)

    reads = [rig.start(READ, number * GRANULE, GRANULE) for number in range(4)]
    while cold.jobs:
        assert len(cold.jobs) == 1
        cold.finish()

    assert [read.error for read in reads] == [0] * 4


def test_turn_ends_while_a_write_waits_for_slots_that_slow_reads_hold() -> None:
    """A flush makes no room, since nothing is dirty: none is begun for it."""
    rig, cold = _cold_rig(granules=8, slots=2)
    assert rig.flush() == 0
    reads = [rig.start(READ, granule * GRANULE, BLOCK) for granule in range(2)]

    write = rig.start(WRITE, 3 * GRANULE, data=b"w" * BLOCK)

    assert write.error is None
    assert rig.cache.waiting["room"] == 1
    for _ in reads:
        cold.finish()
    assert [read.value for read in reads] == [0, 0]
    assert write.value == 0
