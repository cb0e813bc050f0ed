"""The virtio-blk engine against the rules `chain` (framing), `used_length` and `request`."""

from __future__ import annotations

import itertools
import struct
from errno import EIO, ENOSPC, EOPNOTSUPP

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.datapath.lanes import TURN_BYTES
from bridge.datapath.request import (
    DISCARD,
    FLUSH,
    FUA,
    MAY_UNMAP,
    OP_NAMES,
    READ,
    WRITE,
    WRITE_ZEROES,
)
from bridge.guest.virtio.blk_config import MAX_DISCARD_SEGMENTS, DiskGeometry
from bridge.peers.split_driver import Buffer
from bridge.spec.virtio_blk import (
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_WRITE_ZEROES,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from tests.guest.virtio.mock import DEVICE_WRITES, UNWRITTEN, BlkGuest, FakeDisk, FakeHits
from tests.turns import deliver

CAPACITY_SECTORS = 2048
SEGMENT = struct.Struct("<QII")


def segments(*parts: tuple[int, int, int]) -> bytes:
    """(sector, sectors, flags) each."""
    return b"".join(SEGMENT.pack(*part) for part in parts)


# The ordinary way


@pytest.mark.parametrize("indirect", [False, True])
def test_read_brings_the_disks_bytes(indirect: bool) -> None:
    guest = BlkGuest()
    status, used_bytes, data = guest.request(T_IN, 3, room=1024, indirect=indirect)
    assert (status, used_bytes) == (S_OK, 1025)
    assert data == bytes(guest.disk.data[3 * 512 : 5 * 512])


@pytest.mark.parametrize("indirect", [False, True])
def test_write_takes_the_guests_bytes(indirect: bool) -> None:
    guest = BlkGuest()
    assert guest.request(T_OUT, 3, out=b"w" * 1024, indirect=indirect) == (S_OK, 1, b"")
    assert guest.disk.data[3 * 512 : 5 * 512] == b"w" * 1024


def test_flush_reaches_the_disk() -> None:
    guest = BlkGuest()
    assert guest.request(T_FLUSH) == (S_OK, 1, b"")
    assert [request.op for request in guest.disk.requests] == [FLUSH]


def test_get_id_is_the_serial_padded_with_nul() -> None:
    guest = BlkGuest(serial="vol-1")
    assert guest.request(T_GET_ID, room=20) == (S_OK, 21, b"vol-1" + bytes(15))


def test_requests_finish_in_any_order() -> None:
    guest = BlkGuest()
    guest.disk.hold = True
    tokens, places = [], []
    for sector in range(4):
        header = guest.alloc(guest.header(T_IN, sector))
        place = guest.alloc(512)
        buffers = [(header, 16, 0), (place, 512, DEVICE_WRITES)]
        tokens.append(guest.put(*buffers, (guest.alloc(1), 1, DEVICE_WRITES)))
        places.append(place)
    assert guest.run() == []
    guest.disk.held.reverse()
    guest.disk.release()
    assert guest.driver.poll() == [(token, 513) for token in reversed(tokens)]
    for sector, place in enumerate(places):
        assert guest.read(place, 512) == bytes(guest.disk.data[sector * 512 :][:512])


# `chain`: framing


def cuts(length: int, *, pieces: int) -> list[int]:
    """`length` in so many pieces, the first ones small."""
    return [1] * (pieces - 1) + [length - pieces + 1]


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("header_pieces", [1, 2, 16])
@pytest.mark.parametrize("data_pieces", [1, 3])
@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_chain_framing_does_not_matter(
    indirect: bool, header_pieces: int, data_pieces: int, joined: bool, type_: int
) -> None:
    """B11, B12, B29, B37, B45, B49, B96-B98; CVE-2022-2132: a header in many descriptors.

    `joined`: the header's last piece and OUT data, or IN data and the status, share a descriptor.
    """
    guest = BlkGuest()
    content = bytes(range(256)) * 4
    header = guest.header(type_, 5)
    buffers: list[Buffer] = []
    writes = type_ == T_OUT
    front = header + content if writes else header
    lengths = cuts(16, pieces=header_pieces)
    if writes:
        if joined:
            lengths[-1] += 100
            lengths += cuts(len(content) - 100, pieces=data_pieces)
        else:
            lengths += cuts(len(content), pieces=data_pieces)
    start = guest.alloc(front)
    for length in lengths:
        buffers.append((start, length, 0))
        start += length
    back = 1 if writes else len(content) + 1
    place = guest.alloc(back)
    status_at = place + back - 1
    lengths = [] if writes else cuts(len(content), pieces=data_pieces)
    if joined and lengths:
        lengths[-1] += 1
    else:
        lengths.append(1)
    at = place
    for length in lengths:
        buffers.append((at, length, DEVICE_WRITES))
        at += length
    token = guest.put(*buffers, indirect=indirect)
    assert guest.run() == [(token, 1 if writes else len(content) + 1)]
    assert guest.read(status_at, 1) == bytes([S_OK])
    on_disk = bytes(guest.disk.data[5 * 512 :][: len(content)])
    assert (content if writes else guest.read(place, len(content))) == on_disk


def test_chain_status_descriptor_longer_than_a_byte_gets_its_last_one() -> None:
    """CH#6586 wrote four bytes. Exactly one is written, after data that nothing was put in."""
    guest = BlkGuest()
    status = guest.alloc(8)
    token = guest.put((guest.alloc(guest.header(T_FLUSH)), 16, 0), (status, 8, DEVICE_WRITES))
    assert guest.run() == [(token, 0)]
    assert guest.read(status, 8) == bytes([UNWRITTEN] * 7 + [S_OK])


def test_chain_without_status_is_given_back_unused() -> None:
    """`malformed`; OpenVMM#4045, CH#8401: neither wedged nor leaked."""
    guest = BlkGuest()
    token = guest.put((guest.alloc(guest.header(T_FLUSH)), 16, 0))
    assert guest.run() == [(token, 0)]
    assert guest.disk.requests == []
    assert guest.faults == {"a request without a status byte": 1}


@pytest.mark.parametrize("length", [1, 15])
def test_chain_short_header_is_ioerr(length: int) -> None:
    guest = BlkGuest()
    status = guest.alloc(1)
    guest.put((guest.alloc(guest.header(T_FLUSH)), length, 0), (status, 1, DEVICE_WRITES))
    assert [used for _, used in guest.run()] == [1]
    assert guest.read(status, 1) == bytes([S_IOERR])


def test_chain_no_header_is_ioerr() -> None:
    guest = BlkGuest()
    status = guest.alloc(1)
    guest.put((status, 1, DEVICE_WRITES))
    guest.run()
    assert guest.read(status, 1) == bytes([S_IOERR])


def test_chain_readable_buffers_and_descriptors_are_never_written() -> None:
    guest = BlkGuest()
    data = guest.alloc(b"a" * 512)
    header = guest.alloc(guest.header(T_OUT))
    guest.put((header, 16, 0), (data, 512, 0), (guest.alloc(1), 1, DEVICE_WRITES))
    table = bytes(guest.areas[0])
    guest.run()
    assert bytes(guest.areas[0]) == table
    assert guest.read(data, 512) == b"a" * 512
    assert guest.read(header, 16) == guest.header(T_OUT)


# `request`: every row


@pytest.mark.parametrize("type_", [2, 3, 6, 7, 10, 12, 14, 15, 17, 26, 99, 0xFFFFFFFF])
def test_request_unknown_type_is_unsupp(type_: int) -> None:
    """B3, B4, B62; one kind of fault however many numbers a guest tries."""
    guest = BlkGuest()
    assert guest.request(type_, out=b"x" * 512)[0] == S_UNSUPP
    assert guest.disk.requests == []
    assert list(guest.faults) == ["an unknown request type"]


@pytest.mark.parametrize("type_", [T_IN | 1 << 31, T_OUT | 1 << 31, 5])
def test_request_legacy_barrier_and_flush_out_are_unsupp(type_: int) -> None:
    """B5, B89."""
    assert BlkGuest().request(type_, out=b"x" * 512)[0] == S_UNSUPP


@pytest.mark.parametrize(
    ("sector", "sectors"),
    [
        (CAPACITY_SECTORS, 1),
        (CAPACITY_SECTORS - 1, 2),
        (CAPACITY_SECTORS + 1, 1),
        ((1 << 64) - 1, 1),
        ((1 << 64) - 1, 2),
        ((1 << 55), 1),
        ((1 << 55) - 1, 8),
    ],
)
@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_request_beyond_the_capacity_is_ioerr_without_io(
    type_: int, sector: int, sectors: int
) -> None:
    """B1, B2, B18, B28, B46, B55, B66, B79, B81, B91; OpenVMM#4046, CH#8388: sector << 9."""
    guest = BlkGuest()
    data = {"out": b"x" * 512 * sectors} if type_ == T_OUT else {"room": 512 * sectors}
    status, used_bytes, read = guest.request(type_, sector, **data)  # type: ignore[arg-type]
    assert status == S_IOERR
    assert used_bytes == (1 if type_ == T_OUT else 0)
    assert set(read) <= {UNWRITTEN}
    assert guest.disk.requests == []


def test_request_the_last_sector_is_there() -> None:
    guest = BlkGuest()
    assert guest.request(T_IN, CAPACITY_SECTORS - 1, room=512)[0] == S_OK


def test_request_sectors_are_512_bytes_whatever_the_block_size() -> None:
    """qemu e44362ce."""
    guest = BlkGuest(geometry=DiskGeometry(1 << 20, block_size_bytes=4096))
    assert guest.request(T_IN, 8, room=4096)[2] == bytes(guest.disk.data[4096:8192])


@pytest.mark.parametrize(("sector", "length"), [(1, 4096), (0, 512), (8, 6144)])
@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_request_half_a_block_of_4096_is_ioerr(type_: int, sector: int, length: int) -> None:
    guest = BlkGuest(geometry=DiskGeometry(1 << 20, block_size_bytes=4096))
    data = {"out": b"x" * length} if type_ == T_OUT else {"room": length}
    assert guest.request(type_, sector, **data)[0] == S_IOERR  # type: ignore[arg-type]
    assert guest.disk.requests == []


@pytest.mark.parametrize("length", [1, 511, 513, 1000])
@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_request_no_whole_sectors_is_ioerr(type_: int, length: int) -> None:
    """B6, B78, B99."""
    guest = BlkGuest()
    data = {"out": b"x" * length} if type_ == T_OUT else {"room": length}
    assert guest.request(type_, 0, **data)[0] == S_IOERR  # type: ignore[arg-type]
    assert guest.disk.requests == []


@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_request_no_data_is_answered(type_: int) -> None:
    """B27, B34."""
    guest = BlkGuest()
    assert guest.request(type_, 0) == (S_OK, 1, b"")
    assert guest.disk.requests == []


@pytest.mark.parametrize("type_", [T_OUT, T_DISCARD, T_WRITE_ZEROES])
@pytest.mark.parametrize("acked", [False, True])
def test_request_write_to_a_read_only_disk_is_ioerr(type_: int, acked: bool) -> None:
    """B57: even if the guest did not accept RO."""
    disk = FakeDisk()
    guest = BlkGuest(
        disk=disk,
        geometry=DiskGeometry(1 << 20, read_only=True),
        features=None if acked else F_FLUSH | F_DISCARD | F_WRITE_ZEROES,
    )
    out = b"x" * 512 if type_ == T_OUT else segments((0, 8, 0))
    assert guest.request(type_, 0, out=out)[0] == S_IOERR
    assert disk.requests == []


@pytest.mark.parametrize(("type_", "room"), [(T_IN, 512), (T_FLUSH, 0), (T_GET_ID, 20)])
def test_request_read_only_disk_still_answers(type_: int, room: int) -> None:
    """CH#7546."""
    guest = BlkGuest(geometry=DiskGeometry(1 << 20, read_only=True))
    assert guest.request(type_, 0, room=room)[0] == S_OK


@pytest.mark.parametrize(("sector", "out", "room"), [(9, b"", 0), (0, b"x" * 9, 0), (0, b"", 9)])
def test_request_flush_with_sector_or_data_is_a_flush(sector: int, out: bytes, room: int) -> None:
    """B7, B8, B94. Data before the status was not written, so the used length has none of it."""
    guest = BlkGuest()
    status, used_bytes, data = guest.request(T_FLUSH, sector, out=out, room=room)
    assert (status, used_bytes) == (S_OK, 0 if room else 1)
    assert set(data) <= {UNWRITTEN}


def test_request_flush_that_the_server_cannot_do_is_unsupp() -> None:
    guest = BlkGuest(geometry=DiskGeometry(1 << 20, can_flush=False))
    assert guest.request(T_FLUSH)[0] == S_UNSUPP
    assert guest.disk.requests == []


@pytest.mark.parametrize(
    ("room", "used_bytes"), [(0, 1), (1, 2), (19, 20), (20, 21), (21, 20), (4096, 20)]
)
def test_request_get_id_never_overruns_and_never_claims_too_much(
    room: int, used_bytes: int
) -> None:
    """B9, B24, B49; 20 characters have no terminator."""
    guest = BlkGuest(serial="01234567890123456789and more")
    status, used, data = guest.request(T_GET_ID, room=room)
    assert (status, used) == (S_OK, used_bytes)
    assert data == b"01234567890123456789"[:room].ljust(room, bytes([UNWRITTEN]))


def test_request_get_id_over_several_descriptors() -> None:
    guest = BlkGuest(serial="0123456789")
    places = [guest.alloc(length) for length in (7, 6, 7)]
    token = guest.put(
        (guest.alloc(guest.header(T_GET_ID)), 16, 0),
        *((place, length, DEVICE_WRITES) for place, length in zip(places, (7, 6, 7), strict=True)),
        (guest.alloc(1), 1, DEVICE_WRITES),
    )
    assert guest.run() == [(token, 21)]
    assert b"".join(map(guest.read, places, (7, 6, 7))) == b"0123456789" + bytes(10)


def test_request_write_with_writable_data_is_ioerr() -> None:
    """B35, B70-B73, B93."""
    guest = BlkGuest()
    status, used_bytes, data = guest.request(T_OUT, 0, out=b"x" * 512, room=512)
    assert (status, used_bytes, set(data)) == (S_IOERR, 0, {UNWRITTEN})
    assert guest.disk.requests == []


def test_request_read_with_readable_data_is_ioerr() -> None:
    guest = BlkGuest()
    assert guest.request(T_IN, 0, out=b"x" * 512, room=512)[:2] == (S_IOERR, 0)
    assert guest.request(T_IN, 0, out=b"x" * 512)[0] == S_IOERR
    assert guest.disk.requests == []


ONE = (8, 8, 0)


@pytest.mark.parametrize("type_", [T_DISCARD, T_WRITE_ZEROES])
@pytest.mark.parametrize(
    ("rule", "data", "status"),
    [
        ("one", segments(ONE), S_OK),
        ("B15 empty", b"", S_IOERR),
        ("B63 17 bytes", segments(ONE) + b"x", S_IOERR),
        ("B64 15 bytes", segments(ONE)[:15], S_IOERR),
        ("B13 as many as offered", segments(*[ONE] * MAX_DISCARD_SEGMENTS), S_OK),
        ("B16 one too many", segments(*[ONE] * (MAX_DISCARD_SEGMENTS + 1)), S_UNSUPP),
        ("very many", segments(*[ONE] * 1000), S_IOERR),
        ("qtest 0xffffffff sectors", segments((0, 0xFFFFFFFF, 0)), S_IOERR),
        ("past the end", segments((CAPACITY_SECTORS - 1, 2, 0)), S_IOERR),
        ("wrap", segments(((1 << 64) - 1, 1, 0)), S_IOERR),
        ("wrap in bytes", segments((1 << 55, 1, 0)), S_IOERR),
        ("B17, B67, B74 unknown flag", segments((8, 8, 2)), S_UNSUPP),
        ("high flag", segments((8, 8, 1 << 31)), S_UNSUPP),
        ("B43, B56, B83 second is bad", segments(ONE, (CAPACITY_SECTORS, 1, 0)), S_IOERR),
        ("second has a bad flag", segments(ONE, (8, 8, 4)), S_UNSUPP),
        ("B47, B84 no sectors", segments((8, 0, 0)), S_OK),
        ("B39 misaligned", segments((3, 1, 0)), S_OK),
    ],
)
def test_request_discard_and_write_zeroes(type_: int, rule: str, data: bytes, status: int) -> None:
    guest = BlkGuest()
    assert guest.request(type_, out=data)[0] == status, rule
    if status != S_OK:
        assert guest.disk.requests == []  # all are validated before any is executed


def test_request_discard_with_unmap_is_unsupp() -> None:
    """B14, B75."""
    assert BlkGuest().request(T_DISCARD, out=segments((8, 8, 1)))[0] == S_UNSUPP


def test_request_write_zeroes_with_unmap_says_so() -> None:
    guest = BlkGuest()
    assert guest.request(T_WRITE_ZEROES, out=segments((8, 8, 1)))[0] == S_OK
    [request] = guest.disk.requests
    assert (request.op, request.offset, request.length) == (WRITE_ZEROES, 4096, 4096)
    assert request.flags == MAY_UNMAP
    assert guest.request(T_IN, 8, room=4096)[2] == bytes(4096)


def test_request_dwz_segments_keep_their_own_flags_and_finish_together() -> None:
    guest = BlkGuest()
    guest.disk.hold = True
    status = guest.alloc(1)
    data = segments((0, 1, 1), (8, 2, 0), (16, 0, 0))
    token = guest.put(
        (guest.alloc(guest.header(T_WRITE_ZEROES)), 16, 0),
        (guest.alloc(data), len(data), 0),
        (status, 1, DEVICE_WRITES),
    )
    assert guest.run() == []
    assert [(each.offset, each.length, each.flags) for each in guest.disk.held] == [
        (0, 512, MAY_UNMAP),
        (4096, 1024, 0),
    ]
    guest.disk.release(1, error=ENOSPC)
    assert guest.driver.poll() == []
    guest.disk.release()
    assert guest.driver.poll() == [(token, 1)]
    assert guest.read(status, 1) == bytes([S_IOERR])


def fail_a_flush_after_the_first_part(guest: BlkGuest) -> None:
    """The disk does the first part of what it holds, then a flush fails, then it does the rest."""
    first, *others = guest.disk.held
    guest.disk.held = [first]
    guest.disk.release()
    guest.epoch += 1
    guest.disk.held = others
    guest.disk.release()


def test_request_dwz_segments_that_a_failed_flush_may_have_dropped_are_done_once_more() -> None:
    """The guest hears of all segments at once: that flush told it of none of them."""
    guest = BlkGuest()
    guest.disk.hold = True
    data = segments((0, 1, 0), (8, 1, 0), (16, 1, 0))
    token = guest.put(
        (guest.alloc(guest.header(T_WRITE_ZEROES)), 16, 0),
        (guest.alloc(data), len(data), 0),
        (guest.alloc(1), 1, DEVICE_WRITES),
    )
    guest.run()
    fail_a_flush_after_the_first_part(guest)
    assert guest.driver.poll() == []
    assert [each.offset for each in guest.disk.held] == [0, 8 * 512, 16 * 512]
    guest.disk.release()
    assert guest.driver.poll() == [(token, 1)]


def guest_with_a_write_in_pieces() -> tuple[BlkGuest, int]:
    """A guest that waits for a write of 3 MiB, whose three pieces the disk holds; its token."""
    guest = BlkGuest(disk=FakeDisk(8 << 20))
    guest.disk.hold = True
    length = 3 << 20
    token = guest.put(
        (guest.alloc(guest.header(T_OUT)), 16, 0),
        (guest.alloc(length), length, 0),
        (guest.alloc(1), 1, DEVICE_WRITES),
    )
    guest.run()
    return guest, token


def test_large_write_that_a_failed_flush_may_have_dropped_in_part_is_done_once_more() -> None:
    """Its pieces are acknowledged one by one; the guest hears of all of them at once."""
    guest, token = guest_with_a_write_in_pieces()
    fail_a_flush_after_the_first_part(guest)
    assert guest.driver.poll() == []
    again = [(each.offset, each.length) for each in guest.disk.held]
    guest.disk.release()
    assert again == [(at << 20, 1 << 20) for at in range(3)]
    assert guest.driver.poll() == [(token, 1)]


def test_piece_that_was_answered_just_before_the_failed_flush_is_done_once_more() -> None:
    """Both answers came in one turn, and the job hears of its piece after the flush has failed."""
    guest, token = guest_with_a_write_in_pieces()
    pieces, guest.disk.held = guest.disk.held, []
    for piece in pieces:
        guest.disk.execute(piece)
    guest.epoch += 1
    deliver()
    assert guest.driver.poll() == []
    assert [each.offset >> 20 for each in guest.disk.held] == [0, 1, 2]
    guest.disk.release()
    assert guest.driver.poll() == [(token, 1)]


def test_pieces_begun_after_the_failed_flush_are_done_only_once() -> None:
    guest = BlkGuest(disk=FakeDisk(16 << 20))
    guest.disk.hold = True
    data = guest.alloc(1 << 20)
    token = guest.put(
        (guest.alloc(guest.header(T_OUT)), 16, 0),
        *[(data, 1 << 20, 0)] * 12,
        (guest.alloc(1), 1, DEVICE_WRITES),
    )
    guest.engine.start(guest.ring, guest.queue.pop())
    begun = TURN_BYTES >> 20
    assert [each.offset >> 20 for each in guest.disk.held] == list(range(begun))
    guest.epoch += 1
    deliver()
    assert len(guest.disk.held) == 12
    guest.disk.release()
    assert guest.driver.poll() == []
    assert [each.offset >> 20 for each in guest.disk.held] == list(range(begun))
    guest.disk.release()
    assert guest.driver.poll() == [(token, 1)]


@pytest.mark.parametrize("type_", [T_DISCARD, T_WRITE_ZEROES])
def test_request_dwz_not_negotiated_is_unsupp(type_: int) -> None:
    """B19-B21."""
    guest = BlkGuest(features=F_FLUSH)
    assert guest.request(type_, out=segments(ONE))[0] == S_UNSUPP
    assert guest.disk.requests == []


def test_request_dwz_of_half_a_4096_block_is_ioerr() -> None:
    guest = BlkGuest(geometry=DiskGeometry(1 << 20, block_size_bytes=4096))
    assert guest.request(T_WRITE_ZEROES, out=segments((8, 4, 0)))[0] == S_IOERR
    assert guest.request(T_WRITE_ZEROES, out=segments((8, 8, 0)))[0] == S_OK


@pytest.mark.parametrize("priority", [1, 0xFFFFFFFF])
def test_request_priority_is_ignored(priority: int) -> None:
    """B77, B92."""
    guest = BlkGuest()
    header = guest.alloc(struct.pack("<IIQ", T_FLUSH, priority, 0))
    status = guest.alloc(1)
    guest.put((header, 16, 0), (status, 1, DEVICE_WRITES))
    guest.run()
    assert guest.read(status, 1) == bytes([S_OK])


# `used_length`: used lengths; the disk's errors


@pytest.mark.parametrize(
    ("type_", "out", "room", "used_bytes"),
    [
        (T_IN, b"", 512, 0),  # CVE-2024-8612: nothing was written but the status
        (T_OUT, b"x" * 512, 0, 1),
        (T_FLUSH, b"", 0, 1),
        (T_DISCARD, segments(ONE), 0, 1),
        (T_WRITE_ZEROES, segments(ONE), 0, 1),
    ],
)
@pytest.mark.parametrize(
    ("error", "status"), [(EIO, S_IOERR), (ENOSPC, S_IOERR), (EOPNOTSUPP, S_UNSUPP)]
)
def test_used_length_failed_request_claims_no_data(
    type_: int, out: bytes, room: int, used_bytes: int, error: int, status: int
) -> None:
    guest = BlkGuest()
    guest.disk.error = error
    assert guest.request(type_, out=out, room=room)[:2] == (status, used_bytes)


def test_flush_that_failed_says_so_and_the_next_one_is_sent() -> None:
    guest = BlkGuest()
    guest.disk.error = EIO
    assert guest.request(T_FLUSH)[0] == S_IOERR
    guest.disk.error = 0
    assert guest.request(T_FLUSH)[0] == S_OK
    assert len(guest.disk.requests) == 2


# Durability (virtio 1.3 §5.2.6.2): which writes carry FUA


WRITES = [
    (T_OUT, b"x" * 512, WRITE),
    (T_DISCARD, segments(ONE), DISCARD),
    (T_WRITE_ZEROES, segments(ONE), WRITE_ZEROES),
    (T_WRITE_ZEROES, segments(ONE, (32, 8, 1)), WRITE_ZEROES),
]
BASE = F_DISCARD | F_WRITE_ZEROES


@pytest.mark.parametrize(("type_", "out", "op"), WRITES)
@pytest.mark.parametrize(
    ("features", "writeback", "durable"),
    [
        (BASE, None, True),  # knows neither FLUSH nor CONFIG_WCE: write through
        (BASE | F_FLUSH, None, False),
        (BASE | F_FLUSH | F_CONFIG_WCE, None, False),
        (BASE | F_FLUSH | F_CONFIG_WCE, 0, True),
        (BASE | F_FLUSH | F_CONFIG_WCE, 1, False),
        (BASE | F_CONFIG_WCE, None, True),  # CONFIG_WCE without FLUSH starts with 0
        (BASE | F_CONFIG_WCE, 1, False),
    ],
)
def test_writes_are_durable_when_the_driver_cannot_make_them_so(
    type_: int, out: bytes, op: int, features: int, writeback: int | None, durable: bool
) -> None:
    guest = BlkGuest(features=features)
    if writeback is not None:
        guest.config.write(32, bytes([writeback]))
        guest.engine.writeback_changed()
    assert guest.request(type_, out=out)[0] == S_OK
    assert {request.op for request in guest.disk.requests} == {op}
    assert all(bool(request.flags & FUA) is durable for request in guest.disk.requests)


def test_reads_never_carry_fua() -> None:
    guest = BlkGuest(features=0)
    guest.request(T_IN, 0, room=512)
    assert [(request.op, request.flags) for request in guest.disk.requests] == [(READ, 0)]


# Hits: what needs no request


@pytest.mark.parametrize("indirect", [False, True])
def test_hit_is_answered_without_a_request(indirect: bool) -> None:
    disk = FakeDisk()
    guest = BlkGuest(disk=disk, hits=FakeHits(disk, 4096))
    assert guest.request(T_OUT, 1, out=b"w" * 512, indirect=indirect)[:2] == (S_OK, 1)
    assert guest.request(T_IN, 1, room=512, indirect=indirect) == (S_OK, 513, b"w" * 512)
    assert disk.requests == []


def test_refused_hit_becomes_a_request() -> None:
    disk = FakeDisk()
    hits = FakeHits(disk, 4096)
    guest = BlkGuest(disk=disk, hits=hits)
    assert guest.request(T_OUT, 7, out=b"w" * 1024)[:2] == (S_OK, 1)
    assert guest.request(T_IN, 7, room=1024) == (S_OK, 1025, b"w" * 1024)
    assert hits.asked == [(WRITE, 3584), (READ, 3584)]
    assert [(request.op, request.offset) for request in disk.requests] == hits.asked


def test_write_that_has_to_be_durable_is_not_a_hit() -> None:
    disk = FakeDisk()
    hits = FakeHits(disk, 4096)
    guest = BlkGuest(disk=disk, hits=hits, features=0)
    guest.request(T_OUT, 0, out=b"w" * 512)
    assert hits.asked == []
    assert [request.flags for request in disk.requests] == [FUA]


@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_hits_are_asked_for_nothing_that_is_refused(type_: int) -> None:
    """Past the end, of half a block, without data, write to a read-only disk."""
    disk = FakeDisk()
    hits = FakeHits(disk, len(disk.data))
    guest = BlkGuest(disk=disk, hits=hits, geometry=DiskGeometry(len(disk.data), read_only=True))
    guest.request(T_OUT, 0, out=b"w" * 512)
    guest = BlkGuest(disk=disk, hits=hits)
    for sector, length in ((CAPACITY_SECTORS, 512), ((1 << 64) - 1, 512), (0, 100), (0, 0)):
        data = {"out": bytes(length)} if type_ == T_OUT else {"room": length}
        guest.request(type_, sector, **data)  # type: ignore[arg-type]
    assert hits.asked == []


# Everything at once


@given(
    type_=st.sampled_from([0, 1, 4, 8, 11, 13, 2, 0x80000000]),
    sector=st.sampled_from([0, 1, 7, 2040, 2047, 2048, (1 << 55) - 1, (1 << 64) - 1]),
    out=st.lists(st.integers(0, 700), max_size=5),
    back=st.lists(st.integers(0, 700), max_size=5),
    block=st.sampled_from([512, 4096]),
    read_only=st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_any_request_is_answered_once_and_within_bounds(
    type_: int, sector: int, out: list[int], back: list[int], block: int, read_only: bool
) -> None:
    guest = BlkGuest(geometry=DiskGeometry(1 << 20, block_size_bytes=block, read_only=read_only))
    before = bytes(guest.disk.data)
    header = guest.header(type_, sector)
    buffers: list[Buffer] = [(guest.alloc(header), 16, 0)]
    buffers += [(guest.alloc(bytes(n)), n, 0) for n in out]
    places = [(guest.alloc(n), n) for n in back]
    buffers += [(address, n, DEVICE_WRITES) for address, n in places]
    token = guest.put(*buffers)
    [(done, used_bytes)] = guest.run()
    assert done == token
    content = b"".join(itertools.starmap(guest.read, places))
    assert used_bytes <= len(content)
    if content:
        assert content[-1] in (S_OK, S_IOERR, S_UNSUPP)
    for request in guest.disk.requests:
        assert OP_NAMES[request.op]
        assert not read_only or request.op in (READ, FLUSH)
    if type_ not in (1, 11, 13):
        assert guest.disk.data == before
