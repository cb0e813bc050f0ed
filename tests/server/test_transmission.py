"""The transmission phase, without sockets, by the rules of docs/rules/nbd.md that tests are named
after. `block_sizes` and `flush_order` are with the handshake's and the client's tests.
"""

from __future__ import annotations

import errno
import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.datapath.request import (
    BLOCK_STATUS,
    DISCARD,
    FLUSH,
    FUA,
    MAY_UNMAP,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
)
from bridge.errors import ProtocolError
from bridge.server.chunks import StatusRequest
from bridge.server.transmission import Transmission
from bridge.spec import nbd as p
from tests.server.helpers import cut, pattern
from tests.server.wire import (
    DONE,
    Asked,
    chunk,
    data_payload,
    error_payload,
    extended,
    feed,
    hole_payload,
    machine,
    simple,
    status_ext_payload,
    status_payload,
)
from tests.turns import deliver

DATA = p.REPLY_TYPE_OFFSET_DATA
HOLE = p.REPLY_TYPE_OFFSET_HOLE
NONE = p.REPLY_TYPE_NONE
ERROR = p.REPLY_TYPE_ERROR
ERROR_OFFSET = p.REPLY_TYPE_ERROR_OFFSET
STATUS = p.REPLY_TYPE_BLOCK_STATUS
STATUS_EXT = p.REPLY_TYPE_BLOCK_STATUS_EXT


def whole_answer(kind: str, asked: Asked, data: bytes) -> bytes:
    """The usual answer to a read."""
    payload = data_payload(asked.request.offset, data)
    if kind == "simple":
        return simple(asked, 0, data)
    return (chunk if kind == "structured" else extended)(asked, DONE, DATA, payload)


@pytest.mark.parametrize("kind", ["simple", "structured", "extended"])
@pytest.mark.parametrize("step", [1, 7, 4096, 40_000, 1 << 30])
@pytest.mark.parametrize("length", [1, 512, 4096, 40_000, 70_000, 300_000])
def test_reads_received_in_any_pieces_are_whole(kind: str, step: int, length: int) -> None:
    step = max(step, length // 600)  # Byte by byte takes too long where it adds nothing.
    transmission = machine(kind)
    reads = [Asked(transmission, READ, i * length, length) for i in range(5)]
    stream = b"".join(whole_answer(kind, read, pattern(i, length)) for i, read in enumerate(reads))
    feed(transmission, stream, step)
    for i, read in enumerate(reads):
        assert (read.finished, read.error) == (1, 0)
        assert read.data == pattern(i, length)
    assert not transmission.pending


@pytest.mark.parametrize("kind", ["simple", "structured", "extended"])
@pytest.mark.parametrize("before", [0, 10, 1000, 100_000, 299_000])
def test_payload_of_an_abandoned_read_goes_nowhere_from_there_on(kind: str, before: int) -> None:
    """Its buffers are the guest's again, wherever in its reply the stream is."""
    transmission = machine(kind)
    reads = [Asked(transmission, READ, i * 300_000, 300_000) for i in range(3)]
    stream = b"".join(whole_answer(kind, read, pattern(i, 300_000)) for i, read in enumerate(reads))
    feed(transmission, stream[:before], 4096)
    abandoned = reads[0]
    there = bytes(abandoned.data)
    abandoned.request.abandon(abandoned.request.done, memoryview(bytearray(300_000)))
    assert transmission.abandon() == [abandoned.request]
    feed(transmission, stream[before:], 4096)
    assert abandoned.data == there
    assert [read.finished for read in reads] == [1, 1, 1]
    assert [read.data for read in reads[1:]] == [pattern(i, 300_000) for i in (1, 2)]


def test_payload_of_an_abandoned_write_is_sent_from_a_copy() -> None:
    """The rest of its frame has to come, and may not be what the guest puts there by then."""
    transmission = machine("simple")
    asked = Asked(transmission, WRITE, 0, 4096)
    whole = b"".join(transmission.output)
    asked.request.abandon(asked.request.done, memoryview(b""))
    transmission.abandon()
    asked.data[:] = b"!" * 4096
    assert b"".join(transmission.output) == whole


@given(st.lists(st.integers(1, 90_000), max_size=12), st.integers(1, 70_000))
def test_mixed_stream_split_anywhere_equals_whole(steps: list[int], rest: int) -> None:
    transmission = machine("structured")
    reads = [Asked(transmission, READ, 0, 65_000), Asked(transmission, READ, 0, 3000)]
    asked_write = Asked(transmission, WRITE, 0, 512)
    big, small = pattern(1, 65_000), pattern(2, 3000)
    stream = (
        chunk(reads[0], 0, DATA, data_payload(40_000, big[40_000:]))
        + simple(asked_write)
        + chunk(reads[1], 0, DATA, data_payload(0, small))
        + chunk(reads[0], 0, DATA, data_payload(0, big[:40_000]))
        + chunk(reads[1], DONE, NONE)
        + chunk(reads[0], DONE, NONE)
    )
    position = 0
    while position < len(stream):
        step = steps.pop() if steps else rest if rest > 100 else 1 << 20
        feed(transmission, stream[position : position + step])
        position += step
    assert [reads[0].data, reads[1].data] == [big, small]
    assert [asked.finished for asked in (*reads, asked_write)] == [1, 1, 1]


def test_long_payload_is_received_where_it_belongs() -> None:
    """No second copy: the buffers offered are the request's own."""
    transmission = machine("simple")
    read = Asked(transmission, READ, 0, 1 << 20)
    feed(transmission, simple(read) + b"a" * 100)
    buffers = transmission.next_buffers()
    assert len(buffers[0]) == (1 << 20) - 100
    assert buffers[0].obj is read.data
    assert len(buffers[1]) < 32768


def test_while_long_reads_are_pending_little_is_staged() -> None:
    transmission = machine("simple")
    assert len(transmission.next_buffer()) >= 1 << 17
    read = Asked(transmission, READ, 0, 1 << 20)
    assert len(transmission.next_buffer()) <= 16384
    feed(transmission, simple(read) + bytes(1 << 20))
    assert len(transmission.next_buffer()) >= 1 << 17


# The rules.


def test_cookies_are_unique_and_replies_come_in_any_order() -> None:
    transmission = machine("simple")
    writes = [Asked(transmission, WRITE, 0, 512) for _ in range(10)]
    assert len({write.cookie for write in writes}) == 10
    for write in reversed(writes):
        feed(transmission, simple(write))
        assert write.error == 0


@pytest.mark.parametrize("kind", ["simple", "structured", "extended"])
def test_cookies_unknown_cookie_is_fatal(kind: str) -> None:
    transmission = machine(kind)
    read = Asked(transmission, READ, 0, 512)
    answer = bytearray(whole_answer(kind, read, bytes(512)))
    answer[15] ^= 0x55
    with pytest.raises(ProtocolError, match="no command in flight has"):
        feed(transmission, bytes(answer))
    assert transmission.unanswered() == [read.request]


def test_cookies_second_answer_is_fatal() -> None:
    transmission = machine("simple")
    write = Asked(transmission, WRITE, 0, 512)
    with pytest.raises(ProtocolError, match="no command in flight has"):
        feed(transmission, simple(write) * 2)
    assert write.finished == 1


@pytest.mark.parametrize("op", [READ, BLOCK_STATUS])
def test_reply_kinds_simple_reply_to_a_command_with_payload_is_fatal(op: int) -> None:
    for error in (0, 5):
        transmission = machine("structured")
        asked = Asked(transmission, op, 0, 512)
        with pytest.raises(ProtocolError, match="simple reply"):
            feed(transmission, simple(asked, error) + bytes(512))


def test_reply_kinds_other_commands_may_get_simple_replies_or_chunks() -> None:
    transmission = machine("structured")
    ops = (WRITE, FLUSH, DISCARD, WRITE_ZEROES, PREFETCH)
    for answer in (simple, lambda asked: chunk(asked, DONE, NONE)):
        for op in ops:
            asked = Asked(transmission, op, 0, 512)
            feed(transmission, answer(asked))
            assert asked.error == 0


def test_reply_kinds_with_extended_headers_other_magics_are_fatal() -> None:
    for stream in (simple, lambda asked: chunk(asked, DONE, NONE)):
        transmission = machine("extended")
        asked = Asked(transmission, WRITE, 0, 512)
        with pytest.raises(ProtocolError, match="bad magic"):
            feed(transmission, stream(asked) + bytes(32))


def test_reply_kinds_structured_reply_not_negotiated_is_fatal() -> None:
    transmission = machine("simple")
    asked = Asked(transmission, READ, 0, 512)
    with pytest.raises(ProtocolError, match="bad magic"):
        feed(transmission, chunk(asked, DONE, DATA, data_payload(0, bytes(512))))


BROKEN = {
    "data outside": (DATA, data_payload(512, bytes(1024)), "server sent 1024 bytes at 512"),
    "data before": (DATA, data_payload(0, bytes(512)), "server sent 512 bytes at 0"),
    "data empty": (DATA, data_payload(512, b""), "data chunk of 8 bytes"),
    "data too short": (DATA, b"1234", "data chunk of 4 bytes"),
    "hole outside": (HOLE, hole_payload(1 << 40, 512), "request asked"),
    "hole empty": (HOLE, hole_payload(512, 0), "hole of no bytes"),
    "hole too long": (HOLE, hole_payload(512, 512) + b"x", "hole chunk of 13 bytes"),
    "error without error": (ERROR, error_payload(0), "without an error"),
    "error too short": (ERROR, b"12345", "error chunk of 5 bytes"),
    "error message too long": (ERROR, p.U32.pack(5) + p.U16.pack(9), "message of 9 bytes"),
    "error offset outside": (ERROR_OFFSET, error_payload(5, b"", 0), "error at 0"),
    "error offset missing": (ERROR_OFFSET, error_payload(5), "0 bytes of offset"),
    "status of a read": (STATUS, status_payload((512, 0)), "block status to another"),
    "unknown type": (77, b"", "unknown chunk type 77"),
    "extended status": (STATUS_EXT, status_ext_payload((512, 0)), "unknown chunk type 6"),
}


@pytest.mark.parametrize("name", list(BROKEN))
def test_chunks_broken_chunk_is_fatal(name: str) -> None:
    kind, payload, says = BROKEN[name]
    transmission = machine("structured")
    read = Asked(transmission, READ, 512, 512)
    with pytest.raises(ProtocolError, match=says):
        feed(transmission, chunk(read, 0, kind, payload))
    assert read.finished == 0
    assert transmission.unanswered() == [read.request]


def test_chunks_overlap_and_missing_bytes_are_fatal() -> None:
    transmission = machine("structured")
    read = Asked(transmission, READ, 0, 1024)
    with pytest.raises(ProtocolError, match="twice"):
        feed(
            transmission,
            chunk(read, 0, DATA, data_payload(0, bytes(600)))
            + chunk(read, DONE, HOLE, hole_payload(512, 512)),
        )
    transmission = machine("structured")
    read = Asked(transmission, READ, 0, 1024)
    with pytest.raises(ProtocolError, match="less than the 1024 bytes"):
        feed(transmission, chunk(read, DONE, DATA, data_payload(0, bytes(1023))))


def test_chunks_unknown_error_chunk_fails_the_request_only() -> None:
    transmission = machine("structured")
    read = Asked(transmission, READ, 0, 512)
    feed(transmission, chunk(read, DONE, 0x8123, error_payload(28, b"full") + b"more"))
    assert read.error == errno.ENOSPC
    read = Asked(transmission, READ, 0, 512)
    feed(transmission, chunk(read, DONE, DATA, data_payload(0, bytes(512))))
    assert read.error == 0


def test_read_errors_read_with_an_error_and_content_fails() -> None:
    transmission = machine("structured")
    read = Asked(transmission, READ, 0, 1024)
    feed(
        transmission,
        chunk(read, 0, ERROR_OFFSET, error_payload(5, b"bad sector", 512))
        + chunk(read, 0, DATA, data_payload(0, bytes(512)))
        + chunk(read, 0, ERROR, error_payload(12))
        + chunk(read, DONE, NONE),
    )
    assert (read.finished, read.error) == (1, errno.EIO)


def test_done_none_must_be_done_and_empty() -> None:
    for flags, payload in ((0, b""), (DONE, b"x")):
        transmission = machine("structured")
        write = Asked(transmission, WRITE, 0, 512)
        with pytest.raises(ProtocolError, match="empty chunk"):
            feed(transmission, chunk(write, flags, NONE, payload))


def test_done_chunk_after_done_is_fatal() -> None:
    transmission = machine("structured")
    read = Asked(transmission, READ, 0, 512)
    stream = chunk(read, DONE, DATA, data_payload(0, bytes(512)))
    with pytest.raises(ProtocolError, match="no command in flight has"):
        feed(transmission, stream + chunk(read, DONE, NONE) + bytes(8))
    assert read.finished == 1


def test_done_unknown_reply_flags_are_ignored() -> None:
    transmission = machine("structured")
    write = Asked(transmission, WRITE, 0, 512)
    feed(transmission, chunk(write, 0xFFFF, NONE))
    assert write.error == 0


def test_df_is_never_sent() -> None:
    """We take reads in any number of chunks, so there is nothing to gain by DF."""
    for kind in ("structured", "extended"):
        transmission = machine(kind)
        Asked(transmission, READ, 0, 512)
        header = bytes(transmission.output[0])
        assert int.from_bytes(header[4:6]) == 0


def test_never_sent_flush_and_disc_have_no_range_and_disc_is_last() -> None:
    transmission = machine("simple")
    Asked(transmission, FLUSH)
    transmission.disconnect()
    flush, disc = (p.REQUEST.unpack(bytes(each)) for each in transmission.output)
    assert flush[2] == p.CMD_FLUSH
    assert flush[4:] == (0, 0)
    assert disc[2] == p.CMD_DISC
    assert disc[4:] == (0, 0)


@pytest.mark.parametrize("kind", ["simple", "extended"])
def test_payload_only_writes_have_payload(kind: str) -> None:
    transmission = machine(kind)
    layout = p.EXTENDED_REQUEST if kind == "extended" else p.REQUEST
    for op in (READ, FLUSH, DISCARD, WRITE_ZEROES, PREFETCH):
        Asked(transmission, op, 0, 512)
    assert all(len(each) == layout.size for each in transmission.output)
    write = Asked(transmission, WRITE, 0, 512)
    header = layout.unpack(bytes(transmission.output[-2]))
    assert transmission.output[-1] == write.data
    assert bool(header[1] & p.CMD_FLAG_PAYLOAD_LEN) == (kind == "extended")


@pytest.mark.parametrize(
    ("op", "flags", "expected"),
    [
        (WRITE, FUA, p.CMD_FLAG_FUA),
        (DISCARD, FUA, p.CMD_FLAG_FUA),
        (WRITE_ZEROES, FUA, p.CMD_FLAG_FUA | p.CMD_FLAG_NO_HOLE),
        (WRITE_ZEROES, MAY_UNMAP, 0),
        (READ, FUA, 0),
        (FLUSH, FUA, 0),
    ],
)
def test_fua_only_where_it_is_allowed(op: int, flags: int, expected: int) -> None:
    transmission = machine("structured")
    Asked(transmission, op, 0, 0 if op == FLUSH else 512, flags)
    assert p.REQUEST.unpack(bytes(transmission.output[0]))[1] == expected


def test_trim_counts_as_no_write_zeroes_do() -> None:
    """A flush has nothing to vouch for after a trim: the range's content is undefined."""
    transmission = machine("simple")
    for op in (DISCARD, WRITE_ZEROES, WRITE):
        feed(transmission, simple(Asked(transmission, op, 0, 512)))
    feed(transmission, simple(Asked(transmission, WRITE, 0, 512, FUA)))
    assert transmission.unflushed == 2


def _status(kind: str, *extents: tuple[int, int], length: int = 65536) -> Asked:
    transmission = machine(kind)
    asked = Asked(transmission, BLOCK_STATUS, 0, length)
    if kind == "structured":
        feed(transmission, chunk(asked, DONE, STATUS, status_payload(*extents)))
    else:
        feed(transmission, extended(asked, DONE, STATUS_EXT, status_ext_payload(*extents)))
    return asked


@pytest.mark.parametrize("kind", ["structured", "extended"])
@pytest.mark.parametrize(
    ("extents", "expected"),
    [
        ([(65536, 0)], [(65536, 0)]),
        ([(512, 3)], [(512, 3)]),
        ([(512, 0), (512, 0), (64512, 3)], [(512, 0), (512, 0), (64512, 3)]),
        ([(1 << 31, 3)], [(65536, 3)]),
        ([(65000, 0), (4096, 0xFFFF)], [(65000, 0), (536, 0xFFFF)]),
    ],
)
def test_extents_are_cut_to_the_request(
    kind: str, extents: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    asked = _status(kind, *extents)
    assert asked.error == 0
    assert isinstance(asked.request, StatusRequest)
    assert asked.request.extents == expected


@pytest.mark.parametrize("kind", ["structured", "extended"])
@pytest.mark.parametrize(
    ("extents", "says"),
    [
        ([(0, 0)], "extent of no bytes"),
        ([(65536, 0), (1, 0)], "after the end"),
        ([], "block status of"),
    ],
)
def test_extents_impossible_extents_are_fatal(
    kind: str, extents: list[tuple[int, int]], says: str
) -> None:
    with pytest.raises(ProtocolError, match=says):
        _status(kind, *extents)


def test_extents_status_twice_or_never_or_foreign_is_fatal() -> None:
    for stream, says in (
        (lambda a: chunk(a, 0, STATUS, status_payload((512, 0))) * 2, "twice"),
        (lambda a: chunk(a, DONE, NONE), "without any"),
        (lambda a: chunk(a, DONE, STATUS, status_payload((512, 0), context=9)), "not selected"),
    ):
        transmission = machine("structured")
        asked = Asked(transmission, BLOCK_STATUS, 0, 65536)
        with pytest.raises(ProtocolError, match=says):
            feed(transmission, stream(asked))


def test_block_status_of_many_extents_needs_no_staging_space() -> None:
    transmission = machine("structured")
    n_extents = 200_000
    asked = Asked(transmission, BLOCK_STATUS, 0, n_extents * 512)
    payload = status_payload(*((512, i % 2) for i in range(n_extents)))
    feed(transmission, chunk(asked, DONE, STATUS, payload), 100_000)
    assert isinstance(asked.request, StatusRequest)
    assert len(asked.request.extents) == n_extents


@pytest.mark.parametrize("kind", ["simple", "structured"])
def test_shutdown_is_not_an_answer(kind: str) -> None:
    transmission = machine(kind)
    write = Asked(transmission, WRITE, 0, 512)
    feed(transmission, simple(write, 108))
    assert write.finished == 0
    assert transmission.refused == [write.request]
    assert transmission.unanswered() == [write.request]


@pytest.mark.parametrize(
    ("wire", "expected"),
    [
        (1, errno.EPERM),
        (5, errno.EIO),
        (12, errno.ENOMEM),
        (22, errno.EINVAL),
        (28, errno.ENOSPC),
        (75, errno.EOVERFLOW),
        (95, errno.EOPNOTSUPP),
        (110, errno.EINVAL),
        (0xFFFFFFFF, errno.EINVAL),
    ],
)
def test_errnos_any_errno_fails_the_request_and_nothing_else(wire: int, expected: int) -> None:
    transmission = machine("simple")
    write, other = Asked(transmission, WRITE, 0, 512), Asked(transmission, WRITE, 0, 512)
    feed(transmission, simple(write, wire) + simple(other))
    assert (write.error, other.error) == (expected, 0)


@pytest.mark.parametrize("kind", [NONE, HOLE, STATUS, ERROR, 77, 0x8123])
def test_violations_huge_length_is_refused_without_allocating(kind: int) -> None:
    transmission = machine("structured")
    asked = Asked(transmission, BLOCK_STATUS, 0, 512)
    header = p.CHUNK.pack(p.STRUCTURED_REPLY_MAGIC, DONE, kind, asked.cookie, 0xFFFFFFFF)
    tracemalloc.start()
    with pytest.raises(ProtocolError, match="4294967295"):
        feed(transmission, header)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()


def test_violations_huge_extended_length_is_refused() -> None:
    transmission = machine("extended")
    asked = Asked(transmission, READ, 0, 512)
    header = p.EXTENDED_CHUNK.pack(
        p.EXTENDED_REPLY_MAGIC, DONE, DATA, asked.cookie, 0, (1 << 64) - 1
    )
    with pytest.raises(ProtocolError, match="server sent"):
        feed(transmission, header + bytes(64))


def test_violations_reply_to_another_offset_is_fatal() -> None:
    transmission = machine("extended")
    asked = Asked(transmission, WRITE, 4096, 512)
    with pytest.raises(ProtocolError, match="server answered for offset 0"):
        feed(transmission, extended(asked, DONE, NONE, offset=0))


def test_violations_read_in_endlessly_many_pieces_is_refused() -> None:
    transmission = machine("structured")
    read = Asked(transmission, READ, 0, 1 << 20)
    stream = b"".join(chunk(read, 0, DATA, data_payload(2 * i, b"x")) for i in range(5000))
    with pytest.raises(ProtocolError, match="more than 4096 pieces"):
        feed(transmission, stream)


def test_cve_2023_5871_flags_of_64_bits_in_extended_status_are_kept_not_asserted() -> None:
    """libnbd aborted on an extent whose flags do not fit 32 bits."""
    asked = _status("extended", (512, 1 << 40))
    assert isinstance(asked.request, StatusRequest)
    assert asked.request.extents == [(512, 1 << 40)]


def test_block_status_dos_2023_07_extent_beyond_2_to_the_63_is_cut() -> None:
    """libnbd's length arithmetic ended in an assertion."""
    asked = _status("extended", ((1 << 64) - 1, 0))
    assert isinstance(asked.request, StatusRequest)
    assert asked.request.extents == [(65536, 0)]


def test_cve_2022_0485_error_of_a_read_is_never_ignored() -> None:
    """nbdcopy wrote what a failed read had left in its buffer."""
    for kind, answer in (
        ("simple", lambda asked: simple(asked, 5)),
        ("structured", lambda asked: chunk(asked, DONE, ERROR, error_payload(5))),
        ("extended", lambda asked: extended(asked, DONE, ERROR, error_payload(5))),
    ):
        transmission = machine(kind)
        read = Asked(transmission, READ, 0, 512)
        feed(transmission, answer(read))
        assert read.error == errno.EIO


def test_write_answered_before_its_payload_is_sent_is_finished_later() -> None:
    """A buffer may be given back only when it will not be read any more."""
    transmission = machine("simple")
    write = Asked(transmission, WRITE, 0, 512)
    transmission.sending = True
    feed(transmission, simple(write))
    assert write.finished == 0
    assert transmission.early == [write.request]


def test_write_answered_early_counts_as_not_flushed_when_it_is_told_of() -> None:
    """Else a flush submitted before that, which fails, would pass for having told of it."""
    transmission = machine("simple")
    writes = [Asked(transmission, WRITE, 0, 512, flags) for flags in (0, 0, FUA)]
    transmission.sending = True
    feed(transmission, simple(writes[0]) + simple(writes[1], 5) + simple(writes[2]))
    assert len(transmission.early) == 3
    assert transmission.unflushed == 0
    transmission.early = []
    assert transmission.unflushed == 1


def test_answer_may_start_the_next_request() -> None:
    """A completion submits, as a guest's queue does."""
    transmission = machine("structured")
    started: list[Asked] = []

    class Chain(Asked):
        def _done(self, request: object) -> None:
            super()._done(self.request)
            started.append(Asked(transmission, READ, 0, 512))

    reads = [Chain(transmission, READ, 0, 512) for _ in range(3)]
    feed(
        transmission,
        b"".join(chunk(r, DONE, DATA, data_payload(0, bytes(512))) for r in reads),
    )
    assert len(started) == len(transmission.pending) == 3


def test_generation_is_that_of_the_connection() -> None:
    export_machine = machine("simple")
    export_machine.generation = 7
    write = Asked(export_machine, WRITE, 0, 512)
    feed(export_machine, simple(write))
    assert write.request.generation == 7
    assert isinstance(export_machine, Transmission)


@pytest.mark.parametrize("kind", ["structured", "extended"])
@pytest.mark.parametrize("pieces", [1, 3])
def test_long_read_that_has_come_as_a_whole_no_longer_counts_as_one(kind: str, pieces: int) -> None:
    # While long reads are pending little is received at a time. Compiled turns receive by the whole
    # staging buffer all the same.
    transmission = machine(kind)
    [staging] = transmission.next_buffers()
    asked = Asked(transmission, READ, 0, 40_000)
    asked.request.buffers = cut(asked.data, pieces)
    assert transmission.long_reads == 1
    stream = whole_answer(kind, asked, pattern(1, 40_000))
    staging[: len(stream)] = stream

    transmission.bytes_received(len(stream))
    deliver()

    assert (asked.error, bytes(asked.data)) == (0, pattern(1, 40_000))
    assert transmission.long_reads == 0
    assert len(transmission.next_buffers()[0]) == len(staging)


@pytest.mark.parametrize("kind", ["simple", "structured", "extended"])
def test_read_into_more_buffers_than_the_system_takes_at_once_is_whole(kind: str) -> None:
    transmission = machine(kind)
    asked = Asked(transmission, READ, 0, 120_000)
    asked.request.buffers = cut(asked.data, 3000)
    stream = whole_answer(kind, asked, pattern(3, 120_000))
    head = len(stream) - 120_000
    feed(transmission, stream[:head])
    assert 1 < len(transmission.next_buffers()) <= 1001

    feed(transmission, stream[head:])

    assert (asked.error, bytes(asked.data)) == (0, pattern(3, 120_000))


@pytest.mark.parametrize("kind", ["structured", "extended"])
def test_piece_that_comes_last_joins_those_on_both_sides(kind: str) -> None:
    transmission = machine(kind)
    asked = Asked(transmission, READ, 4096, 3000)
    make = chunk if kind == "structured" else extended
    for at, flags in ((0, 0), (2000, 0), (1000, DONE)):
        feed(transmission, make(asked, flags, DATA, data_payload(4096 + at, pattern(at, 1000))))

    assert asked.error == 0
    assert asked.data == pattern(0, 1000) + pattern(1000, 1000) + pattern(2000, 1000)


@pytest.mark.parametrize("kind", ["structured", "extended"])
def test_hole_in_answer_to_a_write_is_refused(kind: str) -> None:
    transmission = machine(kind)
    asked = Asked(transmission, WRITE, 0, 4096)
    make = chunk if kind == "structured" else extended

    with pytest.raises(ProtocolError, match="a hole to a command that reads nothing"):
        feed(transmission, make(asked, DONE, HOLE, hole_payload(0, 4096)))


def test_change_that_the_server_leaves_to_the_next_connection_wants_a_turn() -> None:
    """A flush that has succeeded may have waited for it: it cannot have failed now."""
    transmission = machine("simple")
    change = Asked(transmission, WRITE, 0, 512, flags=FUA)
    reply = simple(change, 108)
    transmission.next_buffer()[: len(reply)] = reply
    transmission.bytes_received(len(reply))
    assert transmission.refused == [change.request]
    assert transmission._turn.wanted
