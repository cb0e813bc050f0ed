"""What a DISCARD or WRITE_ZEROES asks for: its segments, checked (virtio 1.3 §5.2.6)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bridge.datapath.request import DISCARD, MAY_UNMAP
from bridge.guest.virtio.blk_config import MAX_DISCARD_SEGMENTS
from bridge.spec.virtio_blk import S_IOERR, S_OK, S_UNSUPP, SEGMENT, SEGMENT_UNMAP
from bridge.units import SECTOR_BYTES

_MAX_RANGES_BYTES: Final = 4096
"""Far above what 32 segments need; a guest's 4 GiB of them are not joined."""


def ranges_of_untrusted(
    readable: Sequence[memoryview], op: int, *, capacity_bytes: int, block_mask: int
) -> tuple[int, str, list[tuple[int, int, int]]]:
    """Check `struct virtio_blk_discard_write_zeroes[]`, all of it before any is executed.

    `op` is DISCARD or WRITE_ZEROES; `block_mask` is the block's size in bytes, less one. Returns
    the status, what is wrong if that is not S_OK, and `(offset, length, flags)` of each range that
    is not empty: in bytes, and MAY_UNMAP or 0.
    """
    segments = b"".join(readable) if sum(map(len, readable)) <= _MAX_RANGES_BYTES else b""
    if not segments or len(segments) % SEGMENT.size:
        return S_IOERR, "a discard or write-zeroes without whole segments", []
    if len(segments) > MAX_DISCARD_SEGMENTS * SEGMENT.size:
        return S_UNSUPP, "more discard or write-zeroes segments than offered", []
    ranges = []
    for sector, count, flags in SEGMENT.iter_unpack(segments):
        offset = sector * SECTOR_BYTES
        length = count * SECTOR_BYTES
        if flags & ~SEGMENT_UNMAP or (flags and op == DISCARD):
            return S_UNSUPP, "an unknown discard or write-zeroes flag", []
        if offset + length > capacity_bytes:
            return S_IOERR, "a discard or write-zeroes past the end of the disk", []
        if (offset | length) & block_mask:
            return S_IOERR, "a discard or write-zeroes that is not a whole number of blocks", []
        if length:
            ranges.append((offset, length, MAY_UNMAP if flags else 0))
    return S_OK, "", ranges
