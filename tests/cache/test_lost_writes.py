"""A server that drops what it could not make durable, and says so once.

That is what Linux does: an fsync that fails drops the pages that were to be written, of every
writer, and the next fsync succeeds.
"""

from __future__ import annotations

import pytest

from bridge.datapath.request import FLUSH, FUA, WRITE, WRITE_ZEROES, Request
from tests.turns import finish

from .fakes import BLOCK, EIO, GRANULE, FakeServer, Rig


class _FsyncServer(FakeServer):
    """`image` is its page cache, `medium` what is durable; a FLUSH or FUA is an fsync."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.medium = bytearray(size_bytes)
        self.fsync_fails = False

    def answer(self, index: int = 0, error: int = 0) -> None:
        request: Request = self.pending[index]
        if request.op != FLUSH and not request.flags & FUA:
            super().answer(index, error)
        elif self.fsync_fails:
            self.fsync_fails = False
            self.image[:] = self.medium
            super().answer(index, EIO)
        else:
            super().answer(index, error)
            self.medium[:] = self.image


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Rig:
    """With one block that the server has acknowledged and not made durable."""
    monkeypatch.setattr("tests.cache.fakes.FakeServer", _FsyncServer)
    rig = Rig(zero_copy_bytes=0, writeback_age_s=1, fua_granules=0)
    rig.start(WRITE, 0, data=b"a" * BLOCK)
    rig.tick(2)
    rig.serve()
    return rig


def medium(rig: Rig, offset: int) -> bytes:
    return bytes(rig.server.medium[offset : offset + BLOCK])  # type: ignore[attr-defined]


def let_fsync_fail(rig: Rig) -> None:
    rig.server.fsync_fails = True  # type: ignore[attr-defined]


def test_flush_that_failed_has_what_was_acknowledged_sent_again(rig: Rig) -> None:
    let_fsync_fail(rig)

    assert rig.flush() == EIO
    assert rig.flush() == 0
    assert medium(rig, 0) == b"a" * BLOCK


@pytest.mark.parametrize("can_fua", [False, True])
def test_write_zeroes_that_cannot_be_made_durable_takes_nothing_with_it(
    rig: Rig, can_fua: bool
) -> None:
    rig.server.can_fua = can_fua
    let_fsync_fail(rig)
    zeroes = rig.start(WRITE_ZEROES, 10 * GRANULE, GRANULE)
    rig.serve()

    assert zeroes.value == EIO
    assert rig.flush() == 0
    assert medium(rig, 0) == b"a" * BLOCK


def test_write_with_fua_that_fails_takes_nothing_with_it(rig: Rig) -> None:
    let_fsync_fail(rig)

    assert rig.write(10 * GRANULE, b"b" * BLOCK, FUA) == EIO
    assert rig.flush() == 0
    assert medium(rig, 0) == b"a" * BLOCK


@pytest.mark.parametrize("answered", ["before", "after"])
def test_write_that_was_at_the_server_when_a_flush_failed_is_sent_again(
    rig: Rig, answered: str
) -> None:
    """It was executed before the fsync, and acknowledged before or after that failed."""
    flush = rig.start(FLUSH)
    rig.start(WRITE, 5 * GRANULE, data=b"b" * BLOCK)
    rig.tick(10)
    assert [request.op for request in rig.server.pending] == [FLUSH, WRITE]
    let_fsync_fail(rig)

    if answered == "before":
        rig.server.answer(1)
        rig.server.answer(0)
    else:
        rig.server.answer(0)
        write = rig.server.pending.pop(0)  # executed, and dropped, before the answer
        write.generation = rig.server.generation
        finish(write)
    rig.end_turn()

    assert flush.value == EIO
    rig.tick(60)  # the pause after an error is over
    assert rig.flush() == 0
    assert medium(rig, 5 * GRANULE) == b"b" * BLOCK
    assert medium(rig, 0) == b"a" * BLOCK


def test_flush_that_waits_for_a_write_from_before_a_failed_one_begins_anew(rig: Rig) -> None:
    """The acknowledgement that it waited for is worth nothing."""
    first = rig.start(FLUSH)
    rig.start(WRITE, 5 * GRANULE, data=b"b" * BLOCK)
    rig.tick(10)
    second = rig.start(FLUSH)
    let_fsync_fail(rig)
    rig.server.answer(0)
    write = rig.server.pending.pop(0)
    assert write.offset == 5 * GRANULE
    write.generation = rig.server.generation
    finish(write)
    rig.end_turn()
    rig.serve()

    assert (first.value, second.value) == (EIO, 0)
    assert medium(rig, 5 * GRANULE) == b"b" * BLOCK


def test_write_that_the_client_sends_again_after_a_failed_flush_is_not_sent_once_more(
    rig: Rig,
) -> None:
    """What failed was on the connection before, and the write was done on the new one."""
    rig.start(FLUSH)
    rig.start(WRITE, 5 * GRANULE, data=b"b" * BLOCK)
    rig.tick(10)
    assert [request.op for request in rig.server.pending] == [FLUSH, WRITE]
    let_fsync_fail(rig)
    rig.server.answer(0)
    rig.server.generation += 1
    rig.reconnected()

    rig.server.answer(0)  # sent again by the client
    rig.tick(60)
    assert rig.flush() == 0

    assert rig.server.ops(WRITE).count((5 * GRANULE, BLOCK)) == 1
    assert medium(rig, 5 * GRANULE) == b"b" * BLOCK
    assert medium(rig, 0) == b"a" * BLOCK
