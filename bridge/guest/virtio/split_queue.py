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

from bridge.datapath.cells import (
    EVENT_IDX,
    IN_FLIGHT,
    INDIRECT,
    NEXT_AVAIL,
    NEXT_USED,
    PUBLISHED,
    SIGNAL_ANYWAY,
    Queue,
    cells,
)
from bridge.datapath.fence import WEAK_ORDER, fence
from bridge.datapath.usual import publish, usual_chain
from bridge.guest.virtio.chain import (
    MAX_CHAIN_BYTES,
    MAX_INDIRECT_ENTRIES,
    MAX_QUEUE_SIZE,
    Chain,
    Descriptor,
    QueueBroken,
    request_chain,
    resolve,
)
from bridge.guest.virtio.long_chains import LONG_CHAIN_VIEWS, LongChains
from bridge.guest.virtio.memory import BadAddress, GuestMemory
from bridge.guest.virtio.queue import RingAreas
from bridge.spec.virtqueue import (
    DESC_INDIRECT,
    DESC_NEXT,
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    USED_NO_NOTIFY,
)

_unpack_descriptor = DESCRIPTOR.unpack_from


def ring_sizes_bytes(size: int) -> tuple[int, int, int]:
    """Bytes of the descriptor table, the available ring and the used ring of a queue."""
    return DESCRIPTOR_BYTES * size, 6 + 2 * size, 6 + 8 * size


class SplitQueue(Queue):
    """One split virtqueue of `size` entries (a power of two), popped from index `base` on.

    Its state is flat (`cells.Queue`), for the usual case of a turn.
    """

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
        super().__init__(size)
        self.size = size
        state = self.cells
        state[EVENT_IDX] = event_idx
        state[INDIRECT] = indirect
        self.use_memory(memory, areas)
        state[NEXT_AVAIL] = base & 0xFFFF
        # The used index is the driver's to keep across a stop; it is not in the base
        # (vhost-user "VHOST_USER_SET_VRING_BASE").
        state[NEXT_USED] = state[PUBLISHED] = self.used[1]
        # After a (re)start the driver's used_event says nothing about what it has seen.
        state[SIGNAL_ANYWAY] = 1
        self.long = LongChains()
        self.disarm()

    @property
    def next_avail(self) -> int:
        """The index of the next chain to pop."""
        return self.cells[NEXT_AVAIL]

    @property
    def in_flight(self) -> int:
        """Chains popped and not yet pushed."""
        return self.cells[IN_FLIGHT]

    def use_memory(self, memory: GuestMemory, areas: RingAreas) -> None:
        """See VirtQueue. There are no rows."""
        assert not any(self.cookies)
        self.native = None
        self.descriptors, available, used = areas
        self._memory = memory
        regions = sorted(memory.regions, key=lambda region: -region.size_bytes)
        regions = regions or [memory.largest_region()]
        self.regions = cells(2 * len(regions))
        for number, region in enumerate(regions):
            self.regions[2 * number] = region.guest_address
            self.regions[2 * number + 1] = region.size_bytes
        self.views = [region.view for region in regions]
        self._region = regions[0]
        self.avail = available.cast("H")
        self.used = used.cast("H")
        self.elements = used[4 : 4 + 8 * self.size].cast("I")

    def recovered(self) -> list[Chain]:
        """See VirtQueue. Nothing was kept track of."""
        return []

    def close(self, *, told: bool) -> int:
        """See VirtQueue. The base is the next available index."""
        return self.next_avail

    def base_was_reported(self) -> None:
        """See VirtQueue. It is nowhere else."""

    def pop(self, most: int = MAX_QUEUE_SIZE) -> list[Chain]:
        """The chains that are available now, at most so many, oldest first.

        Raises QueueBroken when the driver has made more available than the ring is long, or
        names a descriptor that does not exist; chains before that are returned first.
        """
        state = self.cells
        index = state[NEXT_AVAIL]
        count = (self.avail[1] - index) & 0xFFFF
        if not count or (self.long.views and self.long.too_many):
            return []
        in_flight = state[IN_FLIGHT]
        if count + in_flight + (state[NEXT_USED] - state[PUBLISHED] & 0xFFFF) > self.size:
            # Also an index that went backwards. What is in flight counts, or a driver that
            # never waits for completions could make us hold any number of requests; and so does
            # what it has not been shown as used yet.
            raise QueueBroken(
                f"{count} available and {in_flight} in flight in a ring of {self.size}"
            )
        if WEAK_ORDER:
            fence()  # the ring's entries are read after its index
        count = min(count, most)
        chains: list[Chain] = []
        avail = self.avail
        mask = self.size - 1
        for slot in range(index, index + count):
            head = avail[2 + (slot & mask)]
            if head > mask:
                if not chains:
                    raise QueueBroken(f"available ring names descriptor {head} of {self.size}")
                count = len(chains)  # those before it are good; the next pop says what is wrong
                break
            chains.append(self._usual(head, mask) or self._walk(head))
            if self.long.views and self.long.too_many:
                count = len(chains)
                break
        state[NEXT_AVAIL] = (index + count) & 0xFFFF
        state[IN_FLIGHT] = in_flight + count
        return chains

    def _usual(self, head: int, mask: int) -> Chain | None:
        """The chain at `head` if it is the usual one, of data; None: walk it. `_walk` comes to the
        same result, half a microsecond later."""
        usual = usual_chain(self, head, mask, self.regions[0], self.regions[1])
        if usual is None:
            return None
        type_, sector, data_region, data_at, length, status_region, status_at, segments = usual
        views = self.views
        if segments:
            if length >= MAX_CHAIN_BYTES - 17:  # With header and status.
                return None
            if (n_views := len(segments) + 2) > LONG_CHAIN_VIEWS:
                self.long.popped(head, n_views)
            buffers = [views[region][at : at + n_bytes] for region, at, n_bytes in segments]
        else:
            buffers = [views[data_region][data_at : data_at + length]]
        if type_:
            return head, type_, sector, buffers, [], views[status_region], status_at, None
        return head, type_, sector, [], buffers, views[status_region], status_at, None

    def _walk(self, head: int) -> Chain:
        """Resolve the chain that starts at `head`; what is wrong with it is in its fault."""
        descriptors = self._collect(head)
        if isinstance(descriptors, str):
            return request_chain(head, [], [], descriptors)
        return resolve(head, descriptors, self._memory, self._region, self.long)

    def _collect(self, head: int) -> list[Descriptor] | str:
        """A copy of the chain's descriptors, or what is wrong with it.

        An indirect table takes the place of the descriptor that names it, and ends the chain
        (virtio 1.3 §2.7.5.3.1); direct ones may come before it.
        """
        table: memoryview | bytes = self.descriptors
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
        if not self.cells[INDIRECT]:
            return "an indirect descriptor was not negotiated"
        if table is not self.descriptors:
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
        state = self.cells
        index = state[NEXT_USED]
        slot = (index & self.size - 1) << 1
        self.elements[slot] = head
        self.elements[slot + 1] = length
        state[NEXT_USED] = index + 1 & 0xFFFF
        state[IN_FLIGHT] -= 1
        if self.long.views:
            self.long.pushed(head)

    publish = publish

    def arm(self) -> bool:
        """Ask for a kick with the next chain; True if one is there already."""
        next_avail = self.cells[NEXT_AVAIL]
        if self.cells[EVENT_IDX]:
            self.used[2 + 4 * self.size] = next_avail
        else:
            self.used[0] = 0
        fence()
        return self.avail[1] != next_avail and not self.long.too_many

    def disarm(self) -> None:
        """Kicks are not needed for now."""
        self.used[0] = 0 if self.cells[EVENT_IDX] else USED_NO_NOTIFY
