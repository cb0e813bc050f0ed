"""Guest memory: the regions that a front-end shares, and the views into them.

Descriptors carry guest-physical addresses, vhost-user ring messages carry the front-end's own
("user") addresses; both are looked up here. Two regions that touch in the guest's address space
need not touch in ours, so a range may come back as several views.

Regions live as long as something refers to their views: a request that is still in flight keeps
its memory mapped after the region was taken away. Nothing is unmapped explicitly (`mmap.close`
would raise BufferError while a view exists); dropping the last reference does it.
"""

from __future__ import annotations

import mmap
import os
from bisect import bisect_right
from typing import Final

from bridge.errors import NoMemory, ProtocolError
from bridge.guest.virtio.seals import keep_length

_ADDRESS_SPACE_BYTES: Final = 1 << 64


class BadAddress(Exception):
    """A guest address range that no region covers."""


class Region:
    """A piece of guest memory, mapped: `view` is its bytes.

    `source` says which bytes of which file: device, inode and offset. `is_sealed`: no process
    can make that file shorter.
    """

    __slots__ = ("guest_address", "is_sealed", "size_bytes", "source", "user_address", "view")

    def __init__(
        self,
        guest_address: int,
        user_address: int,
        view: memoryview,
        source: tuple[int, int, int] | None = None,
        *,
        is_sealed: bool = True,
    ) -> None:
        self.guest_address = guest_address
        self.user_address = user_address
        self.view = view
        self.size_bytes = len(view)
        self.source = source
        self.is_sealed = is_sealed

    def has_the_addresses_of(self, other: Region) -> bool:
        """The same place in both address spaces."""
        return (self.guest_address, self.user_address, self.size_bytes) == (
            other.guest_address,
            other.user_address,
            other.size_bytes,
        )

    def is_the_same_as(self, other: Region) -> bool:
        """The same bytes of the same file at the same addresses."""
        return (
            self.source is not None
            and self.source == other.source
            and self.has_the_addresses_of(other)
        )


def map_region(
    fd: int,
    *,
    guest_address: int,
    user_address: int,
    size_bytes: int,
    mmap_offset_bytes: int,
) -> Region:
    """Map `size_bytes` of `fd` at `mmap_offset_bytes` as guest memory; `fd` stays the caller's.

    Raises ProtocolError for a range that overflows or that the file does not have (touching it
    would be a SIGBUS), and for a file that cannot be mapped.
    """
    if size_bytes <= 0:
        raise ProtocolError(f"memory region at {guest_address:#x} has size {size_bytes}")
    if max(guest_address, user_address, mmap_offset_bytes) + size_bytes > _ADDRESS_SPACE_BYTES:
        raise ProtocolError(
            f"memory region at {guest_address:#x} of {size_bytes} bytes wraps around 2^64"
        )
    try:
        is_sealed = keep_length(fd)
        status = os.fstat(fd)
        if status.st_size < mmap_offset_bytes + size_bytes:
            raise ProtocolError(
                f"memory region at {guest_address:#x} wants bytes up to "
                f"{mmap_offset_bytes + size_bytes} of a file of {status.st_size}"
            )
        # Huge pages want their own alignment; st_blksize is the page size of a memory file.
        alignment = max(mmap.ALLOCATIONGRANULARITY, status.st_blksize)
        start = mmap_offset_bytes // alignment * alignment
        end = -(-(mmap_offset_bytes + size_bytes) // alignment) * alignment
        mapping = mmap.mmap(fd, min(end, status.st_size) - start, offset=start)
    except (OSError, ValueError, OverflowError) as error:
        raise ProtocolError(
            f"memory region at {guest_address:#x} of {size_bytes} bytes cannot be mapped: {error}"
        ) from error
    skip = mmap_offset_bytes - start
    view = memoryview(mapping)[skip : skip + size_bytes]
    source = (status.st_dev, status.st_ino, mmap_offset_bytes)
    return Region(guest_address, user_address, view, source, is_sealed=is_sealed)


class GuestMemory:
    """The regions of one guest, none overlapping another."""

    def __init__(self, regions: list[Region]) -> None:
        """Raises ProtocolError when two regions overlap in the guest's address space."""
        self.regions = sorted(regions, key=lambda region: region.guest_address)
        self._starts = [region.guest_address for region in self.regions]
        for low, high in zip(self.regions, self.regions[1:], strict=False):
            if low.guest_address + low.size_bytes > high.guest_address:
                raise ProtocolError(
                    f"memory regions at {low.guest_address:#x} ({low.size_bytes} bytes) and "
                    f"{high.guest_address:#x} overlap"
                )

    def missing_of(self, other: GuestMemory) -> list[Region]:
        """The regions of `other` that are not here."""
        return [
            theirs
            for theirs in other.regions
            if not any(mine is theirs or mine.is_the_same_as(theirs) for mine in self.regions)
        ]

    def has_all_of(self, other: GuestMemory) -> bool:
        """Every region of `other` is here, too: nothing that is in use went away."""
        return not self.missing_of(other)

    def with_region(self, region: Region) -> GuestMemory:
        """The same memory with one region more."""
        return GuestMemory([*self.regions, region])

    def with_region_again(self, region: Region) -> GuestMemory:
        """The same memory with this mapping in the place of the one at the same addresses."""
        others = [each for each in self.regions if not each.has_the_addresses_of(region)]
        return GuestMemory([*others, region])

    def without_region(
        self, *, guest_address: int, user_address: int, size_bytes: int
    ) -> GuestMemory:
        """The same memory with one region less. Raises ProtocolError if there is none such."""
        wanted = (guest_address, user_address, size_bytes)
        kept = [
            region
            for region in self.regions
            if (region.guest_address, region.user_address, region.size_bytes) != wanted
        ]
        if len(kept) == len(self.regions):
            raise ProtocolError(
                f"no memory region at {guest_address:#x} (user {user_address:#x}) of "
                f"{size_bytes} bytes to remove"
            )
        return GuestMemory(kept)

    def largest_region(self) -> Region:
        """The region where most addresses are: the virtqueue's fast path tries it first."""
        if not self.regions:
            return Region(0, 0, memoryview(b""))
        return max(self.regions, key=lambda region: region.size_bytes)

    def region_at(self, address: int) -> Region | None:
        """The region that has `address` in it."""
        position = bisect_right(self._starts, address) - 1
        if position >= 0:
            region = self.regions[position]
            if address - region.guest_address < region.size_bytes:
                return region
        return None

    def views(self, address: int, length: int) -> list[memoryview]:
        """The bytes of the guest range, in order, one view per region it touches.

        Raises BadAddress if any byte of it is outside every region or past 2^64.
        """
        position = bisect_right(self._starts, address) - 1
        if position >= 0:
            region = self.regions[position]
            offset = address - region.guest_address
            if offset + length <= region.size_bytes:
                return [region.view[offset : offset + length]]
        return self._views_over_regions(position, address, length)

    def _views_over_regions(self, position: int, address: int, length: int) -> list[memoryview]:
        """A range that does not end in the region where it begins."""
        views = []
        end = address + length
        for region in self.regions[max(position, 0) :]:
            offset = address - region.guest_address
            if not 0 <= offset < region.size_bytes:
                break
            take = min(length, region.size_bytes - offset)
            views.append(region.view[offset : offset + take])
            address += take
            length -= take
            if not length:
                return views
        raise BadAddress(
            f"a bad address: {address:#x} (range up to {end:#x}) is in no memory region"
        )

    def user_view(self, user_address: int, length: int) -> memoryview:
        """The bytes of a range given in the front-end's own addresses, as one view.

        Raises ProtocolError if it is not wholly inside one region.
        """
        for region in self.regions:
            offset = user_address - region.user_address
            if offset >= 0 and offset + length <= region.size_bytes:
                return region.view[offset : offset + length]
        if not self.regions:
            raise NoMemory("the front-end has shared no memory")
        raise ProtocolError(
            f"ring at user address {user_address:#x} of {length} bytes is in no memory region"
        )

    def guest_address_of(self, user_address: int) -> int:
        """The guest-physical address of a front-end address. Raises ProtocolError if unknown."""
        for region in self.regions:
            offset = user_address - region.user_address
            if 0 <= offset < region.size_bytes:
                return region.guest_address + offset
        raise ProtocolError(f"user address {user_address:#x} is in no memory region")
