"""The device's side of a packed virtqueue (virtio 1.3 §2.8).

One ring of descriptors serves both ways. The driver makes a descriptor available by giving its
AVAIL flag the value of the ring's wrap counter and its USED flag the opposite one; the device
uses a chain by writing one descriptor, with both flags equal to its own wrap counter, where the
used index stands, and moving on by as many descriptors as the chain had. Both indexes go round
the ring, and the counters flip each time.

The flags are what the other side looks at: they are read before and written after everything
else of a descriptor. The driver takes used descriptors strictly in order, so of a batch the flags
of the first are written last: with them the whole batch becomes visible.
"""

from __future__ import annotations

from bridge.datapath.fence import WEAK_ORDER, fence
from bridge.errors import ProtocolError
from bridge.guest.virtio.chain import (
    MAX_INDIRECT_ENTRIES,
    MAX_QUEUE_SIZE,
    Chain,
    Descriptor,
    QueueBroken,
    request_chain,
    resolve,
)
from bridge.guest.virtio.long_chains import LongChains
from bridge.guest.virtio.memory import BadAddress, GuestMemory
from bridge.guest.virtio.queue import RingAreas
from bridge.spec.virtqueue import (
    DESC_AVAIL,
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_USED,
    DESC_WRITE,
    DESCRIPTOR,
    DESCRIPTOR_BYTES,
    EVENT_AT_DESCRIPTOR,
    EVENT_DISABLE,
    EVENT_ENABLE,
)

_unpack_descriptor = DESCRIPTOR.unpack_from


class PackedQueue:
    """One packed virtqueue of `size` entries, any number up to 32768."""

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
        """`base`: both indexes and wrap counters, as in RingSetup.base.

        Raises ProtocolError when an index is outside the ring.
        """
        self.size = size
        self._event_idx = event_idx
        self._indirect = indirect
        self.use_memory(memory, areas)
        self._next_avail = base & 0x7FFF
        self._avail_wrap = base >> 15 & 1
        self._next_used = base >> 16 & 0x7FFF
        self._used_wrap = base >> 31 & 1
        if max(self._next_avail, self._next_used) >= size:
            raise ProtocolError(f"packed ring of {size} starts at {base:#x}")
        self._signalled = self._next_used
        # After a (re)start the driver's event structure says nothing about what it has seen.
        self._signal_anyway = True
        self._first: tuple[int, int] | None = None
        """Slot and flags of the first descriptor of a batch that is not visible yet."""
        self.in_flight = 0
        self._descriptors_in_flight = 0
        self.long = LongChains()
        self.disarm()

    def use_memory(self, memory: GuestMemory, areas: RingAreas) -> None:
        """See VirtQueue."""
        self._memory = memory
        self._data_region = memory.largest_region()
        self._descriptors, driver, device = areas
        self._halves = self._descriptors.cast("H")
        self._lengths = self._descriptors.cast("I")
        self._driver_event = driver.cast("H")
        self._device_event = device.cast("H")

    def recovered(self) -> list[Chain]:
        """See VirtQueue. Nothing was kept track of."""
        return []

    def _has_available(self) -> bool:
        flags = self._halves[8 * self._next_avail + 7]
        return (flags >> 7 & 1) == self._avail_wrap != (flags >> 15 & 1)

    def pop(self, most: int = MAX_QUEUE_SIZE) -> list[Chain]:
        """See VirtQueue. More descriptors than the ring has, or a chain without an end, break
        the queue: the driver then rewrites what we have not used, or its buffer id is unknown."""
        chains: list[Chain] = []
        while len(chains) < most and self._has_available() and not self.long.too_many:
            if WEAK_ORDER:
                fence()  # the descriptor is read after its flags
            try:
                descriptors = self._collect()
            except QueueBroken:
                if chains:
                    break  # those before it are good; the next pop says what is wrong
                raise
            head = self._take(descriptors)
            chains.append(self._chain(head, descriptors))
        return chains

    def _collect(self) -> list[Descriptor]:
        """A copy of the descriptors of the next chain."""
        index = self._next_avail
        room = self.size - self._descriptors_in_flight
        descriptors: list[Descriptor] = []
        while True:
            if len(descriptors) == room:
                raise QueueBroken(f"more descriptors available than the ring's {self.size}")
            descriptor = _unpack_descriptor(self._descriptors, index << 4)
            descriptors.append(descriptor)
            if not descriptor[3] & DESC_NEXT:
                return descriptors
            index += 1
            if index == self.size:
                index = 0

    def _take(self, descriptors: list[Descriptor]) -> int:
        """These were popped. What `push` wants to know of them: buffer id and count."""
        count = len(descriptors)
        self._next_avail += count
        if self._next_avail >= self.size:
            self._next_avail -= self.size
            self._avail_wrap ^= 1
        self.in_flight += 1
        self._descriptors_in_flight += count
        return count << 16 | descriptors[-1][2]

    def _chain(self, head: int, descriptors: list[Descriptor]) -> Chain:
        """Resolve the copied descriptors; what is wrong with them is in the chain's fault."""
        if descriptors[0][3] & DESC_INDIRECT and len(descriptors) == 1:
            address, length, _, _ = descriptors[0]
            table = self._read_indirect(address, length)
            if isinstance(table, str):
                return request_chain(head, [], [], table)
            descriptors = table
        return resolve(head, descriptors, self._memory, self._data_region, self.long)

    def _read_indirect(self, address: int, length: int) -> list[Descriptor] | str:
        """A private copy of an indirect table, or what is wrong with it (virtio 1.3 §2.8.7).

        Its entries are used in order; ids and every flag but WRITE are reserved there.
        """
        if not self._indirect:
            return "an indirect descriptor was not negotiated"
        if not length or length % DESCRIPTOR_BYTES:
            return f"an indirect table of a bad length: {length} bytes"
        if length > MAX_INDIRECT_ENTRIES * DESCRIPTOR_BYTES:
            return f"an indirect table of more than {MAX_INDIRECT_ENTRIES} entries"
        try:
            views = self._memory.views(address, length)
        except BadAddress as error:
            return str(error)
        # Copied once: the driver may change it under us.
        return list(DESCRIPTOR.iter_unpack(b"".join(views)))

    def push(self, head: int, length: int, /) -> None:
        """See VirtQueue."""
        if self.long.views:
            self.long.pushed(head)
        slot = self._next_used
        self._write_used(slot, head & 0xFFFF, length)
        flags = self._used_flags(length)
        if self._first is None:
            self._first = slot, flags
        else:
            self._halves[8 * slot + 7] = flags
        self._give_back(head >> 16)

    def _write_used(self, slot: int, buffer_id: int, length: int) -> None:
        """Everything of a used descriptor but the flags."""
        self._lengths[4 * slot + 2] = length
        self._halves[8 * slot + 6] = buffer_id

    def _used_flags(self, length: int) -> int:
        wrap = DESC_AVAIL | DESC_USED if self._used_wrap else 0
        return wrap | DESC_WRITE if length else wrap

    def _give_back(self, count: int) -> None:
        """A chain of `count` descriptors was used."""
        self._next_used += count
        if self._next_used >= self.size:
            self._next_used -= self.size
            self._used_wrap ^= 1
        self.in_flight -= 1
        self._descriptors_in_flight -= count

    def publish(self) -> bool:
        """See VirtQueue."""
        if self._first is None:
            return False
        slot, flags = self._first
        self._first = None
        if WEAK_ORDER:
            fence()  # the rest of the batch is in place
        self._halves[8 * slot + 7] = flags
        return self._wants_call()

    def _wants_call(self) -> bool:
        """Whether the driver is to be called for what became visible since the last time."""
        fence()  # it is visible before the driver's wish is read
        old, new = self._signalled, self._next_used
        self._signalled = new
        if self._signal_anyway:
            self._signal_anyway = False
            return True
        position, flags = self._driver_event[0], self._driver_event[1]
        if flags == EVENT_AT_DESCRIPTOR and self._event_idx:
            # virtio 1.3 §2.8.10.1: the position is in this lap of the ring or the one before.
            wanted = position & 0x7FFF
            if position >> 15 != self._used_wrap:
                wanted -= self.size
            if new <= old:
                old -= self.size
            return old <= wanted < new
        return flags != EVENT_DISABLE

    def arm(self) -> bool:
        """See VirtQueue."""
        if self._event_idx:
            self._device_event[0] = self._next_avail | self._avail_wrap << 15
            if WEAK_ORDER:
                fence()  # the position is in place before the wish
            self._device_event[1] = EVENT_AT_DESCRIPTOR
        else:
            self._device_event[1] = EVENT_ENABLE
        fence()
        return self._has_available() and not self.long.too_many

    def disarm(self) -> None:
        """See VirtQueue."""
        self._device_event[1] = EVENT_DISABLE

    def close(self, *, told: bool) -> int:
        """See VirtQueue."""
        return (
            self._next_avail
            | self._avail_wrap << 15
            | self._next_used << 16
            | self._used_wrap << 31
        )

    def base_was_reported(self) -> None:
        """See VirtQueue. It is nowhere else."""
