"""virtio-blk's feature bits and configuration space (virtio 1.3 §5.2.3 and §5.2.4)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bridge.errors import ProtocolError
from bridge.spec.virtio_blk import (
    CONFIG,
    F_BLK_SIZE,
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_SEG_MAX,
    F_TOPOLOGY,
    F_WRITE_ZEROES,
    WRITEBACK_OFFSET,
)
from bridge.spec.virtqueue import F_EVENT_IDX, F_INDIRECT, F_RING_PACKED, F_VERSION_1
from bridge.units import SECTOR_BYTES

SEG_MAX = 126
"""Two less than QEMU's default queue size of 128, which a chain without indirect must fit."""

MAX_DISCARD_SECTORS = 0xFFFFFFFF
MAX_DISCARD_SEGMENTS = 32
DEFAULT_DISCARD_ALIGNMENT_SECTORS = 128


@dataclass(frozen=True)
class DiskGeometry:
    """What the disk below can do, as the guest gets to see it."""

    size_bytes: int
    read_only: bool = False
    can_flush: bool = True
    can_discard: bool = True
    can_write_zeroes: bool = True
    block_size_bytes: int = 512
    min_io_bytes: int = 512
    """The server's minimum block: smaller writes cost it a read-modify-write."""
    optimal_io_bytes: int = 0
    """The server's preferred block, 0 when it names none."""

    @property
    def capacity_sectors(self) -> int:
        """Whole sectors, and whole logical blocks; a tail that is neither is not exposed."""
        block = self.block_size_bytes
        return self.size_bytes // block * block // SECTOR_BYTES


class BlkConfig:
    """The configuration space of one disk, and the `writeback` byte that a guest may set."""

    def __init__(
        self, geometry: DiskGeometry, *, num_queues: int, withheld_features: int = 0
    ) -> None:
        """`withheld_features`: bits that are not offered although they could be. CONFIG_WCE goes
        with FLUSH, without which it may not be offered (virtio 1.3 §5.2.5.2)."""
        if withheld_features & F_FLUSH:
            withheld_features |= F_CONFIG_WCE
        self.geometry = geometry
        self._num_queues = num_queues
        self._withheld = withheld_features
        self._features = 0
        self._guest_writeback: bool | None = None

    @property
    def writeback(self) -> bool:
        """Whether the disk has a volatile write cache: what the guest wrote last, if anything.

        Otherwise it has one, unless the driver could not flush it (virtio 1.3 §5.2.5.2).
        """
        if self._guest_writeback is not None:
            return self._guest_writeback
        if self._features & F_CONFIG_WCE and not self._features & F_FLUSH:
            return False
        return self.geometry.can_flush and not self._withheld & F_FLUSH

    def features(self) -> int:
        """The feature bits that virtio-blk and the rings offer for this disk."""
        return self._all_features() & ~self._withheld

    def _all_features(self) -> int:
        geometry = self.geometry
        bits = F_VERSION_1 | F_INDIRECT | F_EVENT_IDX | F_RING_PACKED
        bits |= F_SEG_MAX | F_BLK_SIZE | F_TOPOLOGY | F_MQ
        if geometry.can_flush:
            bits |= F_FLUSH | F_CONFIG_WCE
        if geometry.read_only:
            return bits | F_RO
        if geometry.can_discard:
            bits |= F_DISCARD
        if geometry.can_write_zeroes:
            bits |= F_WRITE_ZEROES
        return bits

    def pack(self) -> bytes:
        """The 60 bytes of `struct virtio_blk_config` up to `write_zeroes_may_unmap`."""
        geometry = self.geometry
        block = geometry.block_size_bytes
        physical = max(block, min(geometry.min_io_bytes, 1 << 20))
        exponent = (physical // block).bit_length() - 1
        optimal_blocks = geometry.optimal_io_bytes // block
        # Not the preferred block: Linux' fstrim passes over free space shorter than this.
        alignment_sectors = max(physical // SECTOR_BYTES, DEFAULT_DISCARD_ALIGNMENT_SECTORS)
        writable = not geometry.read_only
        discard = writable and geometry.can_discard
        zeroes = writable and geometry.can_write_zeroes
        return CONFIG.pack(
            geometry.capacity_sectors,
            0,  # size_max: not offered
            SEG_MAX,
            0,
            0,
            0,  # geometry: not offered
            block,
            exponent,
            0,  # alignment_offset
            min(physical // block, 0xFFFF),
            optimal_blocks,
            int(self.writeback),
            0,
            self._num_queues,
            MAX_DISCARD_SECTORS if discard else 0,
            MAX_DISCARD_SEGMENTS if discard else 0,
            alignment_sectors if discard else 0,
            MAX_DISCARD_SECTORS if zeroes else 0,
            MAX_DISCARD_SEGMENTS if zeroes else 0,
            int(zeroes),
        )

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes of the space from `offset`, zero-filled past its end."""
        return self.pack()[offset : offset + size].ljust(size, b"\0")

    def write(self, offset: int, data: bytes) -> None:
        """A guest's write: only `writeback`, and only 0 or 1. Raises ProtocolError otherwise."""
        if offset != WRITEBACK_OFFSET or len(data) != 1 or data[0] > 1:
            raise ProtocolError(
                f"guest wrote {data.hex()} to configuration offset {offset}: only the writeback "
                f"byte at {WRITEBACK_OFFSET} may be written, with 0 or 1"
            )
        if not self.features() & F_CONFIG_WCE:
            raise ProtocolError("guest wrote writeback, which was not offered")
        self._guest_writeback = bool(data[0])

    @property
    def writeback_refused(self) -> bool:
        """The guest has written 0 to `writeback`."""
        return self._guest_writeback is False

    def refuse_writeback(self) -> None:
        """The guest has written 0 to `writeback`, to a process before this one."""
        if self.features() & F_CONFIG_WCE:
            self._guest_writeback = False

    def resize(self, size_bytes: int) -> None:
        """The disk below has another size."""
        self.geometry = replace(self.geometry, size_bytes=size_bytes)

    def negotiated(self, features: int) -> None:
        """Take note of the features the driver accepted."""
        self._features = features

    def reset(self) -> None:
        """A new driver starts: values that the former one wrote do not count."""
        self._guest_writeback = None
        self._features = 0
