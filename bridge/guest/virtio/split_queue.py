"""The device's side of a split virtqueue (virtio 1.3 §2.7).

`pop` takes every chain the driver has made available, `push` notes a finished one, `publish`
makes all that was pushed visible with one store of `used.idx` and says whether the driver wants
to be told. Ring fields are accessed through native-endian `cast` views, whose 16-bit loads and
stores are single instructions (byte-swapping formats tear).

Notification suppression (§2.7.7, §2.7.10). While the loop is awake, the driver is not asked for
kicks: with EVENT_IDX simply by leaving `avail_event` behind, otherwise by NO_NOTIFY. `arm` asks
for the next kick and then looks again, because the driver may have added a chain just before.
"""

from __future__ import annotations

import struct

from bridge.guest.virtio.chain import (
    HEADER_BYTES,
    MAX_INDIRECT_ENTRIES,
    Chain,
    Descriptor,
    QueueBroken,
    request_chain,
    resolve,
    unpack_header,
)
from bridge.guest.virtio.fence import WEAK_ORDER, fence
from bridge.guest.virtio.long_chains import LongChains
from bridge.guest.virtio.memory import BadAddress, GuestMemory, Region
from bridge.guest.virtio.queue import RingAreas
from bridge.spec.virtqueue import (
    AVAIL_NO_INTERRUPT,
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    USED_NO_NOTIFY,
)

_unpack_descriptor = DESCRIPTOR.unpack_from
_unpack_three = struct.Struct("=QIHHQIHHQIHH").unpack_from


def ring_sizes_bytes(size: int) -> tuple[int, int, int]:
    """Bytes of the descriptor table, the available ring and the used ring of a queue."""
    return DESCRIPTOR_BYTES * size, 6 + 2 * size, 6 + 8 * size


class SplitQueue:
    """One split virtqueue of `size` entries (a power of two), popped from index `base` on."""

    keeps_in_flight = False

    def __init__(
        self,
        memory: GuestMemory,
        areas: RingAreas,
        *,
        size: int,
        base: int,
        event_idx: bool,
        indirect: bool,
    ) -> None:
        self.size = size
        self._mask = size - 1
        self._event_idx = event_idx
        self._indirect = indirect
        self.use_memory(memory, areas)
        self.next_avail = base & 0xFFFF
        # The used index is the driver's to keep across a stop; it is not in the base
        # (vhost-user "VHOST_USER_SET_VRING_BASE").
        self._next_used: int = self._used[1]
        self._published: int = self._next_used
        # After a (re)start the driver's used_event says nothing about what it has seen.
        self._signal_anyway = True
        self.in_flight = 0
        """Chains popped and not yet pushed."""
        self.long = LongChains()
        self.disarm()

    def use_memory(self, memory: GuestMemory, areas: RingAreas) -> None:
        """See VirtQueue."""
        self._descriptors, available, used = areas
        self._memory = memory
        self._data_in(memory.largest_region())
        self._headers_in(memory.largest_region())
        self._avail = available.cast("H")
        self._used = used.cast("H")
        self._used_elements = used[4 : 4 + 8 * self.size].cast("I")

    def _data_in(self, region: Region) -> None:
        """Look for data in `region` first."""
        self._data_region = region
        self._region_address = region.guest_address
        self._region_size = region.size_bytes
        self._region_view = region.view

    def _headers_in(self, region: Region) -> None:
        """Look for headers, status bytes and indirect tables in `region` first."""
        self._header_address = region.guest_address
        self._header_size = region.size_bytes
        self._header_view = region.view

    def _learn(self, header: int, data: int) -> None:
        """A usual chain was elsewhere in memory: look there first from now on."""
        if (region := self._memory.region_at(header)) is not None:
            self._headers_in(region)
        if (region := self._memory.region_at(data)) is not None:
            self._data_in(region)

    def recovered(self) -> list[Chain]:
        """See VirtQueue. Nothing was kept track of."""
        return []

    def close(self, *, told: bool) -> int:
        """See VirtQueue. The base is the next available index."""
        return self.next_avail

    def was_told(self) -> None:
        """See VirtQueue. It is nowhere else."""

    def pop(self) -> list[Chain]:
        """Every chain that is available now, oldest first.

        Raises QueueBroken when the driver has made more available than the ring is long, or
        names a descriptor that does not exist; chains before that are returned first.
        """
        index = self.next_avail
        count = (self._avail[1] - index) & 0xFFFF
        if not count or (self.long.views and self.long.too_many):
            return []
        if count + self.in_flight > self.size:
            # Also an index that went backwards. What is in flight counts, or a driver that
            # never waits for completions could make us hold any number of requests.
            raise QueueBroken(
                f"{count} available and {self.in_flight} in flight in a ring of {self.size}"
            )
        if WEAK_ORDER:
            fence()  # the ring's entries are read after its index
        chains: list[Chain] = []
        avail = self._avail
        mask = self._mask
        for slot in range(index, index + count):
            head = avail[2 + (slot & mask)]
            if head > mask:
                if not chains:
                    raise QueueBroken(f"available ring names descriptor {head} of {self.size}")
                count = len(chains)  # those before it are good; the next pop says what is wrong
                break
            chains.append(self._usual_chain(head) or self._walk(head))
            if self.long.views and self.long.too_many:
                count = len(chains)
                break
        self.next_avail = (index + count) & 0xFFFF
        self.in_flight += count
        return chains

    def _usual_chain(self, head: int) -> Chain | None:
        """The chain at `head` if it is the usual one in the usual place; None: walk it.

        That is a header of 16 bytes, one buffer and one status byte, in three descriptors (of an
        indirect table in a row): what Linux and libblkio send for data in one piece. Header and
        status (and table) are in one region, the data in one that may be another, as with
        libblkio. `_walk` comes to the same result, half a microsecond later.
        """
        address, length, flags, following = _unpack_descriptor(self._descriptors, head << 4)
        base = self._header_address
        view = self._header_view
        size = self._header_size
        if flags == DESC_INDIRECT:
            offset = address - base
            if length != 48 or not 0 <= offset <= size - 48 or not self._indirect:
                if length == 48:
                    self._learn(address, self._region_address)
                return None
            # One unpack: the driver may change the table under us.
            address, length, flags, following, data, data_bytes, way, last, end, room, tail, _ = (
                _unpack_three(view, offset)
            )
            if following != 1 or last != 2:
                return None
        else:
            mask = self._mask
            if flags != DESC_NEXT or following > mask:
                return None
            data, data_bytes, way, last = _unpack_descriptor(self._descriptors, following << 4)
            if last > mask:
                return None
            end, room, tail, _ = _unpack_descriptor(self._descriptors, last << 4)
        if flags != DESC_NEXT or length != HEADER_BYTES or tail != DESC_WRITE or room != 1:
            return None
        header_at = address - base
        status_at = end - base
        data_at = data - self._region_address
        if (
            not data_bytes
            or not 0 <= header_at <= size - HEADER_BYTES
            or not 0 <= data_at <= self._region_size - data_bytes
            or not 0 <= status_at < size
        ):
            self._learn(address, data)
            return None
        buffers = [self._region_view[data_at : data_at + data_bytes]]
        type_, sector = unpack_header(view, header_at)
        if way == DESC_NEXT | DESC_WRITE:
            return head, type_, sector, [], buffers, view, status_at, None
        if way == DESC_NEXT:
            return head, type_, sector, buffers, [], view, status_at, None
        return None

    def _walk(self, head: int) -> Chain:
        """Resolve the chain that starts at `head`; what is wrong with it is in its fault."""
        descriptors = self._collect(head)
        if isinstance(descriptors, str):
            return request_chain(head, [], [], descriptors)
        return resolve(head, descriptors, self._memory, self._data_region, self.long)

    def _collect(self, head: int) -> list[Descriptor] | str:
        """A copy of the chain's descriptors, or what is wrong with it.

        An indirect table takes the place of the descriptor that names it, and ends the chain
        (virtio 1.3 §2.7.5.3.1); direct ones may come before it.
        """
        table: memoryview | bytes = self._descriptors
        limit = self.size
        index = head
        seen = 0
        descriptors: list[Descriptor] = []
        while True:
            address, length, flags, following = _unpack_descriptor(table, index << 4)
            if flags & DESC_INDIRECT:
                indirect = self._read_indirect(table, address, length, flags)
                if isinstance(indirect, str):
                    return indirect
                table = indirect
                limit = len(table) >> 4
                index = seen = 0
                continue
            seen += 1
            descriptors.append((address, length, 0, flags))
            if not flags & DESC_NEXT:
                return descriptors
            index = following
            if index >= limit:
                return f"a bad next: descriptor {index} of a table of {limit}"
            if seen >= limit:
                return f"a chain without an end: longer than its table of {limit}"

    def _read_indirect(
        self, table: memoryview | bytes, address: int, length: int, flags: int
    ) -> bytes | str:
        """A private copy of an indirect table, or what is wrong with it (virtio 1.3 §2.7.5.3)."""
        if not self._indirect:
            return "an indirect descriptor was not negotiated"
        if table is not self._descriptors:
            return "an indirect descriptor inside an indirect table"
        if flags & DESC_NEXT:
            return "an indirect descriptor with a next one"
        if not length or length % DESCRIPTOR_BYTES:
            return f"an indirect table of a bad length: {length} bytes"
        if length > MAX_INDIRECT_ENTRIES * DESCRIPTOR_BYTES:
            return f"an indirect table of more than {MAX_INDIRECT_ENTRIES} entries"
        try:
            # Copied once: the driver may change it under us.
            return b"".join(self._memory.views(address, length))
        except BadAddress as error:
            return str(error)

    def push(self, head: int, length: int) -> None:
        """Give chain `head` back, `length` bytes of it written; seen after `publish`."""
        index = self._next_used
        slot = (index & self._mask) << 1
        self._used_elements[slot] = head
        self._used_elements[slot + 1] = length
        self._next_used = (index + 1) & 0xFFFF
        self.in_flight -= 1
        if self.long.views:
            self.long.pushed(head)

    def publish(self) -> bool:
        """Show the driver all that was pushed; True if it wants to be called."""
        old = self._published
        new = self._next_used
        if old == new:
            return False
        self._published = new
        if WEAK_ORDER:
            fence()  # the elements are in place before the index
        self._used[1] = new
        fence()  # the index is out before the driver's wish is read
        if self._signal_anyway:
            self._signal_anyway = False
            return True
        if self._event_idx:
            # virtio 1.3 §2.7.7.2: call when used_event is among the entries just published.
            used_event = self._avail[2 + self.size]
            return ((new - used_event - 1) & 0xFFFF) < ((new - old) & 0xFFFF)
        return not self._avail[0] & AVAIL_NO_INTERRUPT

    def arm(self) -> bool:
        """Ask for a kick with the next chain; True if one is there already."""
        if self._event_idx:
            self._used[2 + 4 * self.size] = self.next_avail
        else:
            self._used[0] = 0
        fence()
        return self._avail[1] != self.next_avail and not self.long.too_many

    def disarm(self) -> None:
        """Kicks are not needed for now."""
        self._used[0] = 0 if self._event_idx else USED_NO_NOTIFY
