"""Wire formats: known bytes, and the table of shapes."""

from __future__ import annotations

import sys

import pytest

from bridge.errors import ProtocolError
from bridge.guest.vhost_user.messages import (
    ConfigAccess,
    InflightRange,
    LogRange,
    MessageHeader,
    MessageType,
    RegionPayload,
    VringAddress,
    VringFile,
    VringState,
    pack_memory_table,
    pack_message,
    pack_reply,
    pack_u64,
    unpack_memory_table,
)
from bridge.guest.vhost_user.shapes import SHAPES, check_shape

little = pytest.mark.skipif(sys.byteorder != "little", reason="the sample bytes are little-endian")


@little
def test_message_with_u64_gives_the_bytes_of_the_specification() -> None:
    assert pack_message(MessageType.SET_FEATURES, pack_u64(1 << 30)) == bytes.fromhex(
        "02000000 01000000 08000000 0000004000000000"
    )


@little
def test_reply_has_version_and_reply_flag() -> None:
    assert pack_reply(MessageType.GET_VRING_BASE, VringState(1, 7).pack()) == bytes.fromhex(
        "0b000000 05000000 08000000 01000000 07000000"
    )


@little
def test_vring_address_order_is_desc_used_avail_log() -> None:
    address = VringAddress(1, 1, desc=2, used=3, avail=4, log=5)

    assert address.pack() == bytes.fromhex(
        "01000000 010000000200000000000000 0300000000000000 0400000000000000 0500000000000000"
    )


@pytest.mark.parametrize(
    "payload",
    [
        VringState(3, 9),
        VringFile(3, True),
        VringFile(255, False),
        VringAddress(1, 0, 2, 3, 4, 5),
        ConfigAccess(32, 1, 0, b"x"),
        LogRange(4096, 8),
        InflightRange(4096, 0, 4, 128),
    ],
)
def test_payload_packed_and_unpacked_is_the_same(payload: VringState) -> None:
    assert type(payload).unpack(payload.pack()) == payload


def test_memory_table_packed_and_unpacked_is_the_same() -> None:
    regions = [RegionPayload(0, 4096, 1 << 40, 0), RegionPayload(1 << 32, 8192, 1 << 41, 4096)]

    assert unpack_memory_table(pack_memory_table(regions)) == regions


def test_single_region_has_40_bytes_and_comes_back() -> None:
    region = RegionPayload(0, 4096, 1 << 40, 12)

    packed = region.pack_single()

    assert len(packed) == 40
    assert RegionPayload.unpack_single(packed) == region


def test_vring_index_with_reserved_bits_uses_only_the_low_byte() -> None:
    assert VringFile.unpack(pack_u64(0xFFFF_FE02)) == VringFile(2, True)


@pytest.mark.parametrize(
    ("flags", "size", "reply"),
    [
        pytest.param(0, 0, False, id="version 0"),
        pytest.param(2, 0, False, id="version 2"),
        pytest.param(5, 0, False, id="reply to nothing"),
        pytest.param(1, 0, True, id="request instead of a reply"),
        pytest.param(1, 513, False, id="too large"),
        pytest.param(1, 0xFFFFFFFF, False, id="4 GiB"),
    ],
)
def test_header_that_breaks_rule_3_9_is_refused(flags: int, size: int, reply: bool) -> None:
    data = MessageHeader(MessageType.GET_FEATURES, flags, size).pack()

    with pytest.raises(ProtocolError):
        MessageHeader.unpack_untrusted(data, reply=reply)


def test_every_request_has_a_shape() -> None:
    assert set(SHAPES) == set(MessageType)


_GOOD: dict[MessageType, list[tuple[int, int]]] = {
    MessageType.SET_FEATURES: [(8, 0)],
    MessageType.SET_VRING_ADDR: [(40, 0)],
    MessageType.SET_VRING_NUM: [(8, 0)],
    MessageType.ADD_MEM_REG: [(40, 1)],
    MessageType.REM_MEM_REG: [(40, 0), (40, 1)],
    MessageType.SET_LOG_BASE: [(16, 1)],
    MessageType.GET_INFLIGHT_FD: [(20, 0), (24, 0)],
    MessageType.SET_INFLIGHT_FD: [(20, 1), (24, 1)],
    MessageType.SET_BACKEND_REQ_FD: [(0, 1)],
    MessageType.GET_FEATURES: [(0, 0)],
    MessageType.SET_STATUS: [(8, 0)],
}


@pytest.mark.parametrize("request_", list(_GOOD))
def test_shape_takes_exactly_the_sizes_and_counts_of_rule_3_9(request_: MessageType) -> None:
    allowed = _GOOD[request_]

    for size in range(64):
        for count in range(9):
            if (size, count) in allowed:
                check_shape(request_, bytes(size), count)
            else:
                with pytest.raises(ProtocolError):
                    check_shape(request_, bytes(size), count)


@pytest.mark.parametrize("count", range(9))
def test_memory_table_needs_as_many_fds_and_bytes_as_regions(count: int) -> None:
    payload = pack_memory_table([RegionPayload(n << 20, 1 << 20, n << 20, 0) for n in range(count)])

    check_shape(MessageType.SET_MEM_TABLE, payload, count)
    for wrong in (payload[:-1], payload + b"\0", payload[:4]):
        with pytest.raises(ProtocolError):
            check_shape(MessageType.SET_MEM_TABLE, wrong, count)
    with pytest.raises(ProtocolError):
        check_shape(MessageType.SET_MEM_TABLE, payload, count + 1)


def test_config_size_field_that_lies_about_the_length_is_refused() -> None:
    for access in (ConfigAccess(0, 61, 0, bytes(60)), ConfigAccess(0, 0xFFFFFFF4, 0, b"")):
        with pytest.raises(ProtocolError):
            check_shape(MessageType.GET_CONFIG, access.pack(), 0)
    with pytest.raises(ProtocolError):
        check_shape(MessageType.GET_CONFIG, b"", 0)


@pytest.mark.parametrize("has_fd", [True, False])
def test_vring_file_needs_a_descriptor_exactly_without_bit_8(has_fd: bool) -> None:
    payload = VringFile(0, has_fd).pack()

    check_shape(MessageType.SET_VRING_KICK, payload, int(has_fd))
    for wrong in {0, 1, 2} - {int(has_fd)}:
        with pytest.raises(ProtocolError):
            check_shape(MessageType.SET_VRING_KICK, payload, wrong)
