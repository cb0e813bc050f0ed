"""From a front-end's description of a ring to the virtqueue in guest memory."""

from __future__ import annotations

import itertools

from bridge.errors import ProtocolError
from bridge.vhost_user.device import RingSetup
from bridge.virtio.blk_config import F_EVENT_IDX, F_INDIRECT, F_RING_PACKED
from bridge.virtio.inflight import InflightRegion, TrackedSplitQueue
from bridge.virtio.memory import GuestMemory
from bridge.virtio.queue import VirtQueue
from bridge.virtio.split_queue import SplitQueue, ring_sizes_bytes

_SPLIT_ALIGNMENT_BYTES = (16, 2, 4)
"""Of descriptor table, available ring and used ring (virtio 1.3 §2.7)."""


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
        raise ProtocolError(f"ring size {setup.size} is no power of two up to {max_size}")
    descriptors, available, used = ring_areas(memory, setup, packed=packed)
    event_idx = bool(features & F_EVENT_IDX)
    indirect = bool(features & F_INDIRECT)
    if inflight is None:
        return SplitQueue(
            memory,
            size=setup.size,
            descriptors=descriptors,
            available=available,
            used=used,
            base=setup.base,
            event_idx=event_idx,
            indirect=indirect,
        )
    return TrackedSplitQueue(
        memory,
        size=setup.size,
        descriptors=descriptors,
        available=available,
        used=used,
        base=setup.base,
        event_idx=event_idx,
        indirect=indirect,
        region=inflight.queue(index),
        n_entries=inflight.queue_size,
    )


def ring_areas(
    memory: GuestMemory, setup: RingSetup, *, packed: bool
) -> tuple[memoryview, memoryview, memoryview]:
    """The ring's three areas. Raises ProtocolError when one is misaligned or not wholly inside
    one memory region, or two overlap."""
    lengths = ring_sizes_bytes(setup.size)
    addresses = (setup.desc_user_address, setup.avail_user_address, setup.used_user_address)
    for address, alignment in zip(addresses, _SPLIT_ALIGNMENT_BYTES, strict=True):
        if address % alignment:
            raise ProtocolError(f"ring address {address:#x} is not aligned to {alignment}")
    areas = sorted(zip(addresses, lengths, strict=True))
    for (low, length), (high, _) in itertools.pairwise(areas):
        if low + length > high:
            raise ProtocolError(f"ring areas at {low:#x} and {high:#x} overlap")
    descriptors, available, used = map(memory.user_view, addresses, lengths)
    return descriptors, available, used


def written_areas(memory: GuestMemory, setup: RingSetup, *, packed: bool) -> list[tuple[int, int]]:
    """Guest address and length of what the device writes of the ring itself, for the dirty log;
    nothing when the front-end does not want the ring logged."""
    if setup.log_guest_address is None:
        return []
    return [(setup.log_guest_address, ring_sizes_bytes(setup.size)[2])]
