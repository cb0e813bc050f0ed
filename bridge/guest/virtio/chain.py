"""What a virtqueue hands out: descriptor chains, resolved to views of guest memory.

A chain is a plain tuple (an object per chain costs more than walking it). Every virtio-blk
request starts with a 16-byte header that we read and ends with a status byte that we write
(virtio 1.3 §5.2.6), so the queue takes both off while it has the addresses at hand:

    head            what the queue wants back in `push`
    type            the request's type, NO_TYPE when there is a fault
    sector          the request's sector
    readable        views of the data that the driver wrote for us, in chain order
    writable        views of the data that we may write, in chain order
    status_view     the memory that holds the status byte, None when the chain has none
    status_at       where in it
    fault           None, or what is wrong with the chain: "kind" or "kind: details", where the
                    kind is one of a few (a guest can produce any number of details)

Without a fault it is guaranteed that every view lies in guest memory and none is empty, that the
readable ones came before the writable ones (virtio 1.3 §2.7.4.2), that the lengths add up to
less than 2^32 and that the number of descriptors was within the limit of the table walked; and
there is a status byte. Nothing is assumed about where one descriptor ends and the next begins
(§2.7.4.1). With a fault `readable` and `writable` say nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Final

from bridge.guest.virtio.long_chains import LONG_CHAIN_VIEWS, LongChains
from bridge.guest.virtio.memory import BadAddress, GuestMemory, Region
from bridge.spec.virtqueue import DESC_INDIRECT, DESC_WRITE

Descriptor = tuple[int, int, int, int]
"""Address, length, buffer id (packed rings), flags."""

Chain = tuple[int, int, int, list[memoryview], list[memoryview], memoryview | None, int, str | None]

MAX_INDIRECT_ENTRIES = 1024
"""Windows' driver sends tables of 515 whatever seg_max says; crosvm and QEMU accept 1024."""

MAX_QUEUE_SIZE = 1024
"""What QEMU's front-end allows at most; the specification's own limit is 32768."""

MAX_CHAIN_BYTES: Final = 1 << 32
"""A chain's buffers together have fewer bytes (virtio 1.3 §2.7.4.2)."""

NO_TYPE: Final = -1

HEADER_BYTES: Final = 16
unpack_header = struct.Struct("<I4xQ").unpack_from
"""Type and sector; the priority in between is not used."""


class QueueBroken(Exception):
    """The driver broke the ring itself: the queue can only be stopped (virtio 1.3 §2.1.2)."""


def resolve(
    head: int,
    descriptors: Sequence[Descriptor],
    memory: GuestMemory,
    region: Region,
    long_chains: LongChains,
) -> Chain:
    """The chain of these descriptors, of either kind of ring: the one place that checks them.

    They are private copies; an indirect one has no business among them. `region` is looked in
    first: most descriptors lie in one. What is wrong with the chain is in its fault.
    """
    readable, writable, total_bytes, fault = _views(descriptors, memory, region)
    if total_bytes >= MAX_CHAIN_BYTES:
        fault = f"a chain of more than 2^32 bytes: {total_bytes}"
    if (n_views := len(readable) + len(writable)) > LONG_CHAIN_VIEWS:
        long_chains.popped(head, n_views)
    return request_chain(head, readable, writable, fault)


def _views(
    descriptors: Sequence[Descriptor], memory: GuestMemory, region: Region
) -> tuple[list[memoryview], list[memoryview], int, str | None]:
    """What the device reads, what it writes (nothing if the end of that is not known), how many
    bytes that is, and what is wrong with it."""
    readable: list[memoryview] = []
    writable: list[memoryview] = []
    fault = None
    end_known = True
    total_bytes = 0
    region_address = region.guest_address
    region_size = region.size_bytes
    region_view = region.view
    for address, length, _, flags in descriptors:
        if flags & DESC_INDIRECT:
            # virtio 1.3 §2.8.19: neither in a list with others nor in a table.
            return [], [], 0, "an indirect descriptor among others"
        total_bytes += length
        if not length:
            continue
        offset = address - region_address
        if offset >= 0 and offset + length <= region_size:
            views = [region_view[offset : offset + length]]
        else:
            try:
                views = memory.views(address, length)
            except BadAddress as error:
                fault = str(error)
                end_known = end_known and not flags & DESC_WRITE
                continue
        if flags & DESC_WRITE:
            writable += views
            end_known = True
        elif writable:
            fault = "a readable descriptor follows a writable one"
        else:
            readable += views
    return readable, writable if end_known else [], total_bytes, fault


def request_chain(
    head: int, readable: list[memoryview], writable: list[memoryview], fault: str | None
) -> Chain:
    """Take header and status off a walked chain, wherever its descriptors have them.

    The status is the last byte of the writable part; an empty `writable` means that it is not
    known where that is.
    """
    if not writable:
        return head, NO_TYPE, 0, [], [], None, 0, fault or "a request without a status byte"
    status_view = writable[-1]
    status_at = len(status_view) - 1
    if status_at:
        writable[-1] = status_view[:status_at]
    else:
        del writable[-1]
    if fault is None:
        if readable and len(readable[0]) == HEADER_BYTES:
            type_, sector = unpack_header(readable[0])
            del readable[0]
            return head, type_, sector, readable, writable, status_view, status_at, None
        header = _take(readable, HEADER_BYTES)
        if header is not None:
            type_, sector = unpack_header(header)
            return head, type_, sector, readable, writable, status_view, status_at, None
        fault = "a request without a whole header"
    return head, NO_TYPE, 0, [], writable, status_view, status_at, fault


def _take(views: list[memoryview], count: int) -> bytes | None:
    """The first `count` bytes of `views`, which keeps the rest; None if there are fewer."""
    taken = b""
    while len(taken) < count:
        if not views:
            return None
        wanted = count - len(taken)
        first = views[0]
        taken += first[:wanted]
        if len(first) > wanted:
            views[0] = first[wanted:]
        else:
            del views[0]
    return taken
