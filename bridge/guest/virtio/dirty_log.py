"""The dirty log: which pages of guest memory the device wrote to, while a guest migrates.

vhost-user "Migration": one bit per 4096-byte page, `log[page / 8] |= 1 << (page % 8)`, set after
the page was written. The front-end reads and clears the bits while we run, and every vhost-user
back-end of the VM shares the one bitmap, so a plain read-modify-write could lose another
process's bit, which is a page of the guest's memory after the migration. So a bit is set with an
atomic OR. Python has none; libatomic, a part of every GCC's run-time, has. Where it is not
installed a byte of ones is stored instead: that marks up to seven pages too many (they are sent
once more), and loses nothing.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from typing import Final

from bridge.errors import ProtocolError
from bridge.guest.virtio.chain import Chain
from bridge.guest.virtio.memory import GuestMemory
from bridge.guest.virtio.seals import keep_length

PAGE_SHIFT: Final = 12
_BYTE_SHIFT: Final = PAGE_SHIFT + 3
_SEQUENTIALLY_CONSISTENT: Final = 5


def _load_fetch_or() -> Callable[[int, int, int], int] | None:
    """`__atomic_fetch_or_1(address, bits, order)`, None when there is no libatomic."""
    try:
        function = ctypes.CDLL("libatomic.so.1").__atomic_fetch_or_1
    except (OSError, AttributeError):
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_uint8, ctypes.c_int)
    function.restype = ctypes.c_uint8
    result: Callable[[int, int, int], int] = function
    return result


_fetch_or = _load_fetch_or()


def address_of(view: memoryview) -> int:
    """Where the (writable, not empty) view lies in this process's memory."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


class DirtyBitmap:
    """The bitmap that the front-end shares."""

    def __init__(
        self, view: memoryview, fetch_or: Callable[[int, int, int], int] | None = _fetch_or
    ) -> None:
        """`fetch_or` None: store whole bytes."""
        self._view = view
        self._address = address_of(view)
        self._fetch_or = fetch_or

    @classmethod
    def map(cls, fd: int, offset: int, size: int) -> DirtyBitmap:
        """Map the bitmap; `fd` stays the caller's. Raises ProtocolError if the file is too short
        (touching it would be a SIGBUS) or cannot be mapped."""
        try:
            keep_length(fd)
            file_bytes = os.fstat(fd).st_size
            if size <= 0 or offset + size > file_bytes:
                raise ProtocolError(
                    f"dirty log of {size} bytes from {offset} in a file of {file_bytes}"
                )
            start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            mapping = mmap.mmap(fd, offset + size - start, offset=start)
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolError(f"the dirty log cannot be mapped: {error}") from error
        return cls(memoryview(mapping)[offset - start : offset - start + size])

    def mark(self, guest_address: int, length: int) -> None:
        """Every page of this range was written to. Pages beyond the bitmap are not in it."""
        if length <= 0:
            return
        first = guest_address >> PAGE_SHIFT
        last = (guest_address + length - 1) >> PAGE_SHIFT
        byte = first >> 3
        last_byte = last >> 3
        if last_byte >= len(self._view):
            last_byte = len(self._view) - 1
            last = (last_byte << 3) + 7
        bits = 0xFF << (first & 7) & 0xFF
        if byte < last_byte:
            self._set(byte, bits)
            self._view[byte + 1 : last_byte] = b"\xff" * (last_byte - byte - 1)
            byte, bits = last_byte, 0xFF
        if byte == last_byte:
            self._set(byte, bits & 0xFF >> (7 - (last & 7)))

    def mark_all(self) -> None:
        """Every page there is."""
        self._view[:] = b"\xff" * len(self._view)

    def _set(self, byte: int, bits: int) -> None:
        if bits == 0xFF or self._fetch_or is None:
            self._view[byte] = 0xFF  # No other writer's bit is lost.
        else:
            self._fetch_or(self._address + byte, bits, _SEQUENTIALLY_CONSISTENT)


class DirtyLog:
    """Marks what one ring writes: data, status bytes, and the ring's own device area."""

    def __init__(
        self, bitmap: DirtyBitmap, memory: GuestMemory, ring_areas: list[tuple[int, int]]
    ) -> None:
        """`ring_areas`: guest address and length of what the device writes of the ring itself."""
        self._bitmap = bitmap
        self._ring_areas = ring_areas
        # Views carry no guest address; the data path needs none. Here they are found
        # by where they lie in our own memory.
        self._regions = [
            (address_of(region.view), region.size_bytes, region.guest_address)
            for region in memory.regions
        ]

    def mark_chain(self, chain: Chain) -> None:
        """`chain` is used: its status was written, and its writable data may be."""
        _, _, _, _, writable, status_view, status_at, _ = chain
        for view in writable:
            self._mark_memory(address_of(view), len(view))
        if status_view is not None:
            self._mark_memory(address_of(status_view) + status_at, 1)

    def mark_ring(self) -> None:
        """The ring itself was written to: all of it is marked, it is a few pages."""
        for guest_address, length in self._ring_areas:
            self._bitmap.mark(guest_address, length)

    def _mark_memory(self, address: int, length: int) -> None:
        for start, size_bytes, guest_address in self._regions:
            if start <= address < start + size_bytes:
                self._bitmap.mark(guest_address + address - start, length)
                return
        # Memory that was taken away meanwhile, perhaps to come back elsewhere.
        self._bitmap.mark_all()
