"""Another host wrote the image, or it is another one: what may be believed of a cache."""

from __future__ import annotations

import errno
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.cache.file.cache_file import MappedImage
from bridge.datapath.request import DISCARD, FLUSH, FUA, READ, WRITE, WRITE_ZEROES

from .fakes import BLOCK, GRANULE, FakeServer, Rig


def test_foreign_write_seen_by_generation_drops_the_clean_part_only() -> None:
    rig = Rig()
    rig.cache.foreign.note_export(5, 4, b"")
    rig.prefetch(0, GRANULE)
    rig.write(GRANULE, b"a" * BLOCK)

    kept = rig.cache.foreign.note_export(6, 5, b"")
    dropped = rig.cache.foreign.note_export(9, 8, b"")

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
    rig.cache.foreign.note_export(57, 57, b"a" * 16)
    rig.prefetch(0, GRANULE)

    assert "another volume" in rig.cache.foreign.foreign_change(generation, written, identity)
    assert rig.cache.foreign.note_export(generation, written, identity) == 16
    assert not rig.cache.foreign.foreign_change(generation + 1, generation, identity)


def test_identity_is_learnt_of_a_server_that_begins_to_give_one() -> None:
    rig = Rig()
    rig.cache.foreign.note_export(57, 57, b"")
    rig.prefetch(0, GRANULE)

    assert rig.cache.foreign.note_export(58, 57, b"a" * 16) == 0
    assert rig.cache.foreign.foreign_change(59, 57, b"b" * 16)


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


def test_sample_that_is_asked_for_while_one_is_compared_begins_when_that_one_ends() -> None:
    """After each of many reconnects: the reads of the first one are all that is sent again."""
    rig = Rig()
    rig.prefetch(0, 8 * GRANULE)
    first: list[int] = []
    later: list[int] = []

    rig.check_sample(first.append)
    reads = len(rig.server.pending)
    for _ in range(3):
        rig.check_sample(later.append)
    assert len(rig.server.pending) == reads
    for _ in range(reads):
        rig.server.answer()
    rig.server.image[:] = b"z" * len(rig.server.image)
    assert (first, later) == ([0], [])
    rig.serve()

    assert len(later) == 3
    assert min(later) > 0
    assert rig.cache.index.valid_blocks == 0


def test_sample_of_which_nothing_is_answered_is_followed_by_none() -> None:
    rig = Rig()
    rig.prefetch(0, GRANULE)
    results: list[int] = []
    rig.check_sample(results.append)
    rig.check_sample(results.append)
    while rig.server.pending:
        rig.server.answer(error=errno.EIO)
    assert results == [-1, -1]
    rig.check_sample(results.append)
    rig.serve()
    assert results == [-1, -1, 0]


@pytest.mark.parametrize("used", [1, 4, 16])
def test_sample_finds_cached_blocks_in_a_large_cache_that_is_nearly_empty(used: int) -> None:
    rig = Rig(granules=2048, slots=2048)
    rig.prefetch(0, used * GRANULE)
    rig.server.image[: used * GRANULE] = b"z" * (used * GRANULE)
    results: list[int] = []

    rig.check_sample(results.append)
    rig.serve()

    assert results[0] >= used
    assert rig.cache.index.valid_blocks == 0


def before_writing(rig: Rig) -> int:
    """What is found before the dirty data of an earlier run is sent."""
    results: list[int] = []
    rig.check_before_writing(results.append)
    rig.serve()
    (found,) = results
    return found


def again(rig: Rig) -> Rig:
    """The next process, on the same file and the same server."""
    after = Rig(image=rig.image, size=rig.server.size_bytes)
    after.server.image[:] = rig.server.image
    return after


def with_clean_and_dirty_blocks() -> Rig:
    rig = Rig()
    rig.write(0, b"c" * 8 * BLOCK)
    assert rig.flush() == 0
    rig.write(9 * GRANULE, b"d" * BLOCK)
    return rig


def test_change_before_dirty_data_is_sent_is_found_as_often_as_one_looks() -> None:
    """A start that is refused must not drop what the refusal was for."""
    rig = with_clean_and_dirty_blocks()
    rig.server.image[:] = b"z" * len(rig.server.image)

    found = [before_writing(rig := again(rig)) for _ in range(3)]

    assert found == [8, 8, 8]
    assert rig.read(9 * GRANULE, BLOCK) == b"d" * BLOCK


def test_single_block_that_differed_is_looked_at_again_wherever_it_is() -> None:
    """Another sample would miss it: a start that is tried again and again must not get through."""
    rig = Rig(granules=2048, slots=2048)
    rig.prefetch(0, 2048 * GRANULE)
    rig.write(0, b"d" * BLOCK)
    at = 1500 * GRANULE + 7 * BLOCK
    rig.server.image[at] = 1
    rig.image.save_header(witness=at // BLOCK + 1)

    assert [before_writing(rig) for _ in range(5)] == [1] * 5
    rig.server.image[at] = 0
    assert before_writing(rig) == 0
    assert rig.image.header.witness == 0


def test_beginning_of_the_disk_is_always_compared() -> None:
    """A host that mounts a file system to write changes its superblock."""
    rig = Rig(granules=2048, slots=2048)
    rig.prefetch(0, 2048 * GRANULE)
    rig.write(9 * GRANULE, b"d" * BLOCK)
    rig.server.image[1024] = 1

    assert before_writing(rig) == 1


def test_server_that_lost_what_was_not_flushed_does_not_count_as_a_change() -> None:
    rig = with_clean_and_dirty_blocks()
    durable = bytes(rig.server.image)
    rig.write(BLOCK, b"e" * BLOCK)  # over a clean block
    rig.tick(10)  # written out by age, and not flushed
    rig.serve()
    assert rig.server.image[BLOCK] == ord("e")
    rig.server.image[:] = durable

    assert before_writing(again(rig)) == 0


def test_discard_that_the_server_lost_does_not_count_as_a_change() -> None:
    """Read as zeroes before a flush covered it, it looks like any clean block."""
    rig = Rig()
    rig.write(0, b"c" * GRANULE)
    assert rig.flush() == 0
    durable = bytes(rig.server.image)
    rig.start(DISCARD, 0, GRANULE)
    rig.serve()
    assert rig.read(0, GRANULE) == bytes(GRANULE)
    rig.write(9 * GRANULE, b"d" * BLOCK)
    rig.server.image[:] = durable

    assert before_writing(again(rig)) == 0


def test_discard_that_was_flushed_is_evidence_like_any_other_block() -> None:
    rig = Rig()
    rig.start(DISCARD, 0, GRANULE)
    rig.serve()
    assert rig.flush() == 0
    assert rig.read(0, GRANULE) == bytes(GRANULE)
    rig.write(9 * GRANULE, b"d" * BLOCK)
    rig.server.image[:GRANULE] = b"z" * GRANULE

    assert before_writing(again(rig)) == 16


def test_disk_that_has_grown_does_not_count_as_a_change() -> None:
    """Also where it ended within a block."""
    size = 64 * GRANULE - BLOCK + 1024
    rig = Rig(size=size)
    rig.prefetch(63 * GRANULE, size - 63 * GRANULE)
    rig.write(9 * GRANULE, b"d" * BLOCK)
    grown = again(rig)
    grown.server.grow(b"s" * GRANULE)

    assert before_writing(grown) == 0


def test_server_that_answers_no_read_leaves_it_unknown() -> None:
    rig = with_clean_and_dirty_blocks()
    rig.server.fails = 5

    assert before_writing(rig) == -1
    assert rig.image.header.witness == 0


def test_one_unreadable_block_does_not_keep_the_others_from_telling() -> None:
    rig = with_clean_and_dirty_blocks()
    results: list[int] = []
    rig.check_before_writing(results.append)
    rig.server.answer(error=5)
    rig.serve()

    assert results == [0]


def test_block_that_differed_is_not_forgotten_when_the_server_answers_for_others_only() -> None:
    rig = with_clean_and_dirty_blocks()
    rig.image.save_header(witness=3 + 1)
    results: list[int] = []
    rig.check_before_writing(results.append)
    assert rig.server.pending[0].offset == 3 * BLOCK
    rig.server.answer(error=5)
    rig.serve()

    assert results == [0]
    assert rig.image.header.witness == 3 + 1


class LosingServer(FakeServer):
    """What it has not flushed may be lost, sector by sector."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.durable = bytearray(size_bytes)

    def answer(self, index: int = 0, error: int = 0) -> None:
        request = self.pending[index]
        super().answer(index, error)
        if error:
            return
        if request.op == FLUSH:
            self.durable[:] = self.image
        elif request.flags & FUA:
            at, end = request.offset, request.offset + request.length
            self.durable[at:end] = self.image[at:end]

    def lose_power(self, dice: random.Random) -> None:
        for at in range(0, len(self.image), 512):
            if dice.random() < 0.5:
                self.image[at : at + 512] = self.durable[at : at + 512]
        self.durable[:] = self.image


def small_rig(image: MappedImage | None = None, server: FakeServer | None = None) -> Rig:
    return Rig(
        granules=8,
        slots=6,
        image=image,
        server=server,
        zero_copy_bytes=BLOCK,
        exclusive_run_bytes=GRANULE,
    )


def next_process(rig: Rig) -> Rig:
    """It was killed; of what was on its way the server may have executed some."""
    rig.server.pending.clear()
    return small_rig(rig.image, rig.server)


@pytest.mark.parametrize("fua", [True, False])
@given(seed=st.integers(0, 1 << 32), steps=st.integers(1, 60))
@settings(max_examples=60)
def test_no_loss_of_power_looks_like_a_change(seed: int, steps: int, fua: bool) -> None:
    """Whatever the guest did, and however often it happened, while the bridge ran or not."""
    dice = random.Random(seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.cache.fakes.FakeServer", LosingServer)
        rig = small_rig()
        server = rig.server
        assert isinstance(server, LosingServer)
        server.can_fua = fua
        for _ in range(steps):
            at = dice.randrange(8 * 16) * BLOCK
            length = min(dice.choice([1, 3, 16, 40]) * BLOCK, 8 * GRANULE - at)
            match dice.randrange(8):
                case 0 | 1 | 2:
                    rig.start(WRITE, at, data=bytes([dice.randrange(1, 256)]) * length)
                case 3:
                    rig.start(READ, at, length)
                case 4:
                    rig.start(dice.choice([DISCARD, WRITE_ZEROES]), at, length)
                case 5:
                    rig.start(FLUSH)
                case 6:
                    rig.tick(rig.now + dice.choice([1, 10, 100]))
                case 7:
                    server.lose_power(dice)
                    if dice.random() < 0.5:
                        server.generation += 1
                        rig.cache.upstream_reconnected()
                    else:
                        rig = next_process(rig)
            for _ in range(dice.randrange(6)):
                if server.pending:
                    server.answer()
                    rig.end_turn()
        server.lose_power(dice)
        rig = next_process(rig)
        assert before_writing(rig) == 0
