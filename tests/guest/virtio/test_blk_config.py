"""Feature bits and configuration space (`request` "Config", `features`)."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import ProtocolError
from bridge.guest.virtio.blk_config import BlkConfig, DiskGeometry
from bridge.spec.virtio_blk import (
    F_BLK_SIZE,
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_SEG_MAX,
    F_TOPOLOGY,
    F_WRITE_ZEROES,
    FEATURE_BITS,
)
from bridge.spec.virtqueue import F_EVENT_IDX, F_INDIRECT, F_VERSION_1

DISK = DiskGeometry(1 << 30)


def field(config: BlkConfig, format_: str, offset: int) -> int:
    value = struct.unpack_from("<" + format_, config.read(0, 60), offset)[0]
    assert isinstance(value, int)
    return value


def test_features_of_the_reference_device_are_offered() -> None:
    """0x6200 writable, 0x220 read-only on the first page, and more on top."""
    assert BlkConfig(DISK, num_queues=1).features() & 0x6200 == 0x6200
    read_only = BlkConfig(DiskGeometry(1 << 30, read_only=True), num_queues=1).features()
    assert read_only & 0x220 == 0x220
    assert not read_only & (F_DISCARD | F_WRITE_ZEROES)


def test_features_always_have_version_1() -> None:
    everything = 0
    for bit in FEATURE_BITS.values():
        everything |= bit
    config = BlkConfig(DISK, num_queues=1, withheld_features=everything)
    assert config.features() == F_VERSION_1


@pytest.mark.parametrize("name", sorted(FEATURE_BITS))
def test_feature_withheld_is_not_offered_and_the_others_are(name: str) -> None:
    full = BlkConfig(DISK, num_queues=4).features()
    config = BlkConfig(DISK, num_queues=4, withheld_features=FEATURE_BITS[name])
    gone = full & ~config.features()
    assert gone == full & (FEATURE_BITS[name] | (F_CONFIG_WCE if name == "flush" else 0))


def test_size_max_is_never_offered() -> None:
    """QSD offered it with the value 0, and Linux took the minimum."""
    assert not BlkConfig(DISK, num_queues=1).features() & 1 << 1


def test_server_without_flush_means_no_flush_and_no_write_cache() -> None:
    config = BlkConfig(DiskGeometry(1 << 30, can_flush=False), num_queues=1)
    assert not config.features() & (F_FLUSH | F_CONFIG_WCE)
    assert field(config, "B", 32) == 0
    with pytest.raises(ProtocolError):
        config.write(32, b"\1")


@pytest.mark.parametrize(
    ("geometry", "missing"),
    [
        (DiskGeometry(1 << 30, can_discard=False), F_DISCARD),
        (DiskGeometry(1 << 30, can_write_zeroes=False), F_WRITE_ZEROES),
    ],
)
def test_what_the_server_cannot_do_is_not_offered(geometry: DiskGeometry, missing: int) -> None:
    config = BlkConfig(geometry, num_queues=1)
    both = F_DISCARD | F_WRITE_ZEROES
    assert config.features() & both == both & ~missing


def test_config_layout_is_that_of_the_specification() -> None:
    """virtio 1.3 §5.2.4, by offset."""
    config = BlkConfig(DISK, num_queues=4)
    assert field(config, "Q", 0) == 1 << 21  # capacity
    assert field(config, "I", 8) == 0  # size_max
    assert field(config, "I", 12) == 126  # seg_max
    assert field(config, "I", 20) == 512  # blk_size
    assert field(config, "B", 32) == 1  # writeback
    assert field(config, "B", 33) == 0  # unused0
    assert field(config, "H", 34) == 4  # num_queues
    assert field(config, "I", 36) == 0xFFFFFFFF  # max_discard_sectors
    assert field(config, "I", 40) == 32  # max_discard_seg
    assert field(config, "I", 44) == 128  # discard_sector_alignment
    assert field(config, "I", 48) == 0xFFFFFFFF  # max_write_zeroes_sectors
    assert field(config, "I", 52) == 32  # max_write_zeroes_seg
    assert field(config, "B", 56) == 1  # write_zeroes_may_unmap
    assert config.read(57, 3) == bytes(3)  # unused1


def test_capacity_has_no_tail() -> None:
    assert field(BlkConfig(DiskGeometry(1 << 20 | 511), num_queues=1), "Q", 0) == 2048
    blocks = DiskGeometry((1 << 20) + 4095, block_size_bytes=4096)
    assert field(BlkConfig(blocks, num_queues=1), "Q", 0) == 2048


def test_topology_is_the_servers_block_sizes() -> None:
    geometry = DiskGeometry(1 << 30, min_io_bytes=4096, optimal_io_bytes=1 << 22)
    config = BlkConfig(geometry, num_queues=1)
    assert field(config, "B", 24) == 3  # physical block: 2^3 logical ones
    assert field(config, "B", 25) == 0
    assert field(config, "H", 26) == 8  # min_io_size in logical blocks
    assert field(config, "I", 28) == 8192  # opt_io_size
    assert field(config, "I", 44) == 128  # discard alignment in sectors


def test_discard_alignment_is_at_least_the_servers_minimum_block() -> None:
    """And no more than needed: fstrim passes over free space that is shorter."""
    geometry = DiskGeometry(1 << 30, min_io_bytes=1 << 17, optimal_io_bytes=1 << 25)
    assert field(BlkConfig(geometry, num_queues=1), "I", 44) == 256


def test_topology_of_4096_byte_blocks() -> None:
    geometry = DiskGeometry(1 << 30, block_size_bytes=4096, min_io_bytes=512)
    config = BlkConfig(geometry, num_queues=1)
    assert field(config, "I", 20) == 4096
    assert (field(config, "B", 24), field(config, "H", 26)) == (0, 1)


@given(offset=st.integers(0, 300), size=st.integers(0, 256))
def test_config_reads_any_range_and_zero_past_the_end(offset: int, size: int) -> None:
    config = BlkConfig(DISK, num_queues=1)
    assert config.read(offset, size) == (config.pack() + bytes(600))[offset : offset + size]


@pytest.mark.parametrize(
    ("offset", "data"),
    [(32, b"\2"), (32, b"\0\0"), (32, b""), (31, b"\0"), (33, b"\0"), (0, bytes(8)), (4096, b"\1")],
)
def test_config_write_elsewhere_or_of_nonsense_is_refused(offset: int, data: bytes) -> None:
    config = BlkConfig(DISK, num_queues=1)
    with pytest.raises(ProtocolError):
        config.write(offset, data)
    assert config.writeback


def test_writeback_is_the_guests_to_set() -> None:
    config = BlkConfig(DISK, num_queues=1)
    config.negotiated(config.features())
    config.write(32, b"\0")
    assert field(config, "B", 32) == 0
    config.write(32, b"\1")
    assert field(config, "B", 32) == 1


def test_writeback_survives_a_new_negotiation_but_not_a_reset() -> None:
    """A guest that runs on while its front-end reconnects believes in its write-through."""
    config = BlkConfig(DISK, num_queues=1)
    config.write(32, b"\0")
    config.negotiated(0)
    config.negotiated(config.features())
    assert not config.writeback
    config.reset()
    assert config.writeback


def test_writeback_starts_at_0_with_config_wce_but_no_flush() -> None:
    """virtio 1.3 §5.2.5.2; CH#7949."""
    config = BlkConfig(DISK, num_queues=1)
    config.negotiated(F_CONFIG_WCE | F_VERSION_1)
    assert field(config, "B", 32) == 0
    config.negotiated(F_CONFIG_WCE | F_VERSION_1 | F_FLUSH)
    assert field(config, "B", 32) == 1


def test_resize_changes_the_capacity() -> None:
    config = BlkConfig(DISK, num_queues=1)
    config.resize(1 << 31)
    assert field(config, "Q", 0) == 1 << 22


def test_ring_features_are_offered() -> None:
    wanted = F_INDIRECT | F_EVENT_IDX | F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_MQ
    assert BlkConfig(DISK, num_queues=1).features() & (wanted | F_RO) == wanted
