"""The configuration space of a virtio-blk device as its driver reads it (virtio 1.3 §5.2.4).

The layout stands in `spec.virtio_blk`, too, for the device. That is meant: a driver that
took the device's own word for it would not notice a field in the wrong place.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

CONFIG_BYTES = 60
"""How much of the space is read."""
WRITEBACK_OFFSET = 32
"""Of the byte that turns the write cache on and off, from the start of the space."""

_CONFIG = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")


@dataclass(frozen=True, slots=True)
class DiskConfig:
    """The fields that are used; sectors are of 512 bytes."""

    capacity_sectors: int
    seg_max: int
    block_size_bytes: int
    writeback: int
    num_queues: int
    max_discard_sectors: int
    max_discard_segments: int
    discard_sector_alignment: int
    max_write_zeroes_sectors: int
    max_write_zeroes_segments: int
    write_zeroes_may_unmap: int

    @classmethod
    def unpack(cls, data: bytes) -> DiskConfig:
        """The fields, from `CONFIG_BYTES` of data or more. Raises struct.error if it is shorter."""
        fields = _CONFIG.unpack(data[:CONFIG_BYTES])
        return cls(
            capacity_sectors=fields[0],
            seg_max=fields[2],
            block_size_bytes=fields[6],
            writeback=fields[11],
            num_queues=fields[13],
            max_discard_sectors=fields[14],
            max_discard_segments=fields[15],
            discard_sector_alignment=fields[16],
            max_write_zeroes_sectors=fields[17],
            max_write_zeroes_segments=fields[18],
            write_zeroes_may_unmap=fields[19],
        )
