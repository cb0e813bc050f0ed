"""What a front-end's memory messages make of the guest's memory."""

from __future__ import annotations

from collections.abc import Iterable

from bridge.errors import ProtocolError
from bridge.guest.vhost_user.device_interface import MemoryRegion
from bridge.guest.virtio.memory import GuestMemory, Region, map_region


def mapped(regions: Iterable[MemoryRegion]) -> GuestMemory:
    """Memory of these regions, and no others. Raises ProtocolError."""
    return GuestMemory([_map(region) for region in regions])


def with_added(memory: GuestMemory, region: MemoryRegion, *, in_use: bool) -> GuestMemory:
    """`memory` and one more region, or one that is told of again: that may be another file only as
    long as the memory is not `in_use`. Raises ProtocolError."""
    added = _map(region)
    former = memory.region_at(added.guest_address)
    if former is None or not former.has_the_addresses_of(added):
        return memory.with_region(added)
    if in_use and not former.is_the_same_as(added):
        raise ProtocolError(
            f"the memory region at {added.guest_address:#x} changes while rings run"
        )
    return memory.with_region_again(added)


def _map(region: MemoryRegion) -> Region:
    return map_region(
        region.fd,
        guest_address=region.guest_address,
        user_address=region.user_address,
        size_bytes=region.size_bytes,
        mmap_offset_bytes=region.mmap_offset_bytes,
    )
