"""From a front-end's description of a ring to the virtqueue in guest memory."""

from __future__ import annotations

import contextlib
import itertools

from bridge.errors import ProtocolError
from bridge.guest.vhost_user.device_interface import RingSetup
from bridge.guest.virtio.inflight import InflightRegion, TrackedSplitQueue
from bridge.guest.virtio.inflight_packed import TrackedPackedQueue
from bridge.guest.virtio.memory import GuestMemory
from bridge.guest.virtio.packed_queue import PackedQueue
from bridge.guest.virtio.queue import RingAreas, VirtQueue
from bridge.guest.virtio.split_queue import SplitQueue, ring_sizes_bytes
from bridge.spec.virtqueue import (
    DESCRIPTOR_BYTES,
    EVENT_AREA_BYTES,
    F_EVENT_IDX,
    F_INDIRECT,
    F_RING_PACKED,
)

_SPLIT_ALIGNMENT_BYTES = (16, 2, 4)
"""Of descriptor table, available ring and used ring (virtio 1.3 §2.7)."""
_PACKED_ALIGNMENT_BYTES = (16, 4, 4)
"""Of descriptor ring, driver and device event suppression (virtio 1.3 §2.8.10)."""


def make_queue(
    setup: RingSetup,
    index: int,
    *,
    memory: GuestMemory,
    features: int,
    max_size: int,
    inflight: InflightRegion | None,
) -> VirtQueue:
    """The virtqueue `index` as `setup` describes it. Raises ProtocolError if it cannot be one."""
    packed = bool(features & F_RING_PACKED)
    if not 0 < setup.size <= max_size or (setup.size & (setup.size - 1) and not packed):
        raise ProtocolError(f"ring size {setup.size} is not a power of two up to {max_size}")
    areas = ring_areas(memory, setup, packed=packed)
    event_idx = bool(features & F_EVENT_IDX)
    indirect = bool(features & F_INDIRECT)
    if inflight is None:
        plain = PackedQueue if packed else SplitQueue
        return plain(
            *(memory, areas),
            size=setup.size,
            base=setup.base,
            event_idx=event_idx,
            indirect=indirect,
        )
    if inflight.packed != packed:
        raise ProtocolError("the in-flight region is for the other kind of ring")
    tracked = TrackedPackedQueue if packed else TrackedSplitQueue
    return tracked(
        *(memory, areas),
        size=setup.size,
        base=setup.base,
        event_idx=event_idx,
        indirect=indirect,
        region=inflight.queue(index),
        n_entries=inflight.queue_size,
    )


def ring_areas(memory: GuestMemory, setup: RingSetup, *, packed: bool) -> RingAreas:
    """The ring's three areas. Raises ProtocolError when one is misaligned or not wholly inside
    one memory region, or two overlap."""
    lengths = _area_bytes(setup.size, packed=packed)
    alignments = _PACKED_ALIGNMENT_BYTES if packed else _SPLIT_ALIGNMENT_BYTES
    addresses = (setup.desc_user_address, setup.avail_user_address, setup.used_user_address)
    for address, alignment in zip(addresses, alignments, strict=True):
        if address % alignment:
            raise ProtocolError(f"ring address {address:#x} is not aligned to {alignment}")
    areas = sorted(zip(addresses, lengths, strict=True))
    for (low, length), (high, _) in itertools.pairwise(areas):
        if low + length > high:
            raise ProtocolError(f"ring areas at {low:#x} and {high:#x} overlap")
    descriptors, driver, device = map(memory.user_view, addresses, lengths)
    return descriptors, driver, device


def _area_bytes(size: int, *, packed: bool) -> tuple[int, int, int]:
    if packed:
        return DESCRIPTOR_BYTES * size, EVENT_AREA_BYTES, EVENT_AREA_BYTES
    return ring_sizes_bytes(size)


def written_areas(memory: GuestMemory, setup: RingSetup, *, packed: bool) -> list[tuple[int, int]]:
    """Guest address and length of what the device writes of the ring itself, for the dirty log;
    nothing when the front-end does not want the ring logged."""
    if setup.log_guest_address is None:
        return []
    descriptor_bytes, _, device_bytes = _area_bytes(setup.size, packed=packed)
    areas = [(setup.log_guest_address, device_bytes)]
    if packed:
        # The log's address is that of the device area; used descriptors go into the ring. A ring
        # whose memory was taken away writes to nothing that the guest still has.
        with contextlib.suppress(ProtocolError):
            areas.append((memory.guest_address_of(setup.desc_user_address), descriptor_bytes))
    return areas
