"""Memory that a front-end shares with a back-end: memfds, mapped here and described there."""

from __future__ import annotations

import fcntl
import mmap
import os

from bridge.guest.vhost_user.messages import RegionPayload

USER_OFFSET = 0x7F00_0000_0000
"""Front-end addresses differ from guest addresses, so that a mix-up of the two is noticed."""


class SharedRegion:
    """One memfd of `size_bytes`, mapped; guest-physical from `guest_address` on."""

    def __init__(
        self, *, guest_address: int, size_bytes: int, user_address: int | None = None
    ) -> None:
        self.guest_address = guest_address
        self.user_address = guest_address + USER_OFFSET if user_address is None else user_address
        self.size_bytes = size_bytes
        self.fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.fd, size_bytes)
        fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
        self._map = mmap.mmap(self.fd, size_bytes)
        self.view = memoryview(self._map)

    @property
    def region(self) -> RegionPayload:
        """The region as a message describes it."""
        return RegionPayload(self.guest_address, self.size_bytes, self.user_address, 0)

    def close(self) -> None:
        """Give the file back; the mapping goes with the last view of it."""
        self.view.release()
        os.close(self.fd)


class SharedMemory:
    """Several regions, and a simple allocator that hands out pieces of them for good."""

    def __init__(self) -> None:
        self.regions: list[SharedRegion] = []
        self._used: list[int] = []

    def add(
        self, size_bytes: int, *, guest_address: int, user_address: int | None = None
    ) -> SharedRegion:
        """Make one region more, of whole pages of bytes, at these addresses."""
        size_bytes = -(-size_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
        region = SharedRegion(
            guest_address=guest_address, size_bytes=size_bytes, user_address=user_address
        )
        self.regions.append(region)
        self._used.append(0)
        return region

    def allocate(self, size_bytes: int, *, align: int = 64) -> int:
        """The guest address of `size_bytes` that were not handed out before. Raises MemoryError."""
        for position, region in enumerate(self.regions):
            start = -(-self._used[position] // align) * align
            if start + size_bytes <= region.size_bytes:
                self._used[position] = start + size_bytes
                return region.guest_address + start
        raise MemoryError(f"no {size_bytes} bytes of guest memory left")

    def view(self, guest_address: int, size_bytes: int) -> memoryview:
        """These bytes of one region. Raises ValueError for addresses outside."""
        region = self._region(guest_address, size_bytes)
        start = guest_address - region.guest_address
        return region.view[start : start + size_bytes]

    def user_address(self, guest_address: int) -> int:
        """The front-end address of the byte at a guest address. Raises ValueError."""
        region = self._region(guest_address, 1)
        return region.user_address + guest_address - region.guest_address

    def _region(self, guest_address: int, size_bytes: int) -> SharedRegion:
        for region in self.regions:
            start = guest_address - region.guest_address
            if start >= 0 and start + size_bytes <= region.size_bytes:
                return region
        raise ValueError(f"{size_bytes} bytes at {guest_address:#x} are not in guest memory")

    def close(self) -> None:
        """Give every region back."""
        while self.regions:
            self.regions.pop().close()
