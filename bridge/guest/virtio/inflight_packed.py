"""The in-flight region of a packed virtqueue (vhost-user "Inflight I/O tracking").

A used descriptor overwrites available ones, so the ring cannot be read again after a death: the
region keeps a copy of every descriptor that was popped, in entries that come from a free list. A
chain's entries hang together by `next`; the first holds the counter and the in-flight mark.

`free_head`, `used_idx` and the wrap counter exist twice. The second set (`old_…`) is the state
that is true for certain; what differs from it is a change that was under way. The next process
finds out from the ring whether the driver can see it, and completes it or takes it back:

    pop:     counter, inflight = 1, the copies, free_head; old_free_head makes it true
    answer:  the chain's entries go to the free list; used_idx and the wrap counter;
             the flags in the ring (the driver can see it); inflight = 0; old_… makes it true

Answers are not batched here: were the flags of several descriptors half written, no
back-end could take back those that the driver has not come to yet.
"""

from __future__ import annotations

import itertools
from typing import Final

from bridge.datapath.fence import WEAK_ORDER, fence
from bridge.errors import ProtocolError
from bridge.guest.virtio.chain import Chain, Descriptor
from bridge.guest.virtio.memory import GuestMemory
from bridge.guest.virtio.packed_queue import PackedQueue
from bridge.guest.virtio.queue import RingAreas

_VERSION: Final = 1

# Of the header, as u16 and u8 values.
_VERSION_AT: Final = 4
_N_ENTRIES_AT: Final = 5
_FREE_HEAD_AT: Final = 6
_OLD_FREE_HEAD_AT: Final = 7
_USED_IDX_AT: Final = 8
_OLD_USED_IDX_AT: Final = 9
_USED_WRAP_AT: Final = 20
_OLD_USED_WRAP_AT: Final = 21


class TrackedPackedQueue(PackedQueue):
    """A packed virtqueue that keeps book in its part of an in-flight region.

    What `push` gets is the number of the chain's first entry. The region is written, and read
    only at the start; the lists that it holds are kept here as well.
    """

    keeps_in_flight = True

    def __init__(
        self,
        memory: GuestMemory,
        areas: RingAreas,
        *,
        size: int,
        base: int,
        event_idx: bool,
        indirect: bool,
        region: memoryview,
        n_entries: int,
    ) -> None:
        """See TrackedSplitQueue. Raises ProtocolError when the region cannot be what a process
        left behind."""
        super().__init__(
            memory, areas, size=size, base=base, event_idx=event_idx, indirect=indirect
        )
        if size > n_entries:
            raise ProtocolError(f"queue of {size}, its in-flight region is for {n_entries}")
        self._n_entries = n_entries
        self._region = region
        self._h = region.cast("H")
        self._i = region.cast("I")
        self._q = region.cast("Q")
        self._counter = 0
        self._free_head = 0
        self._next = list(range(1, n_entries + 1))
        self._chains: dict[int, tuple[int, int, int]] = {}
        """Last entry, count and buffer id of the chains in flight, by their first entry."""
        self._lost: list[tuple[int, list[Descriptor]]] = []
        self._visible = False
        if self._h[_VERSION_AT]:
            self._recover()
        else:
            self._initialise()

    def _initialise(self) -> None:
        """A fresh region: every entry is free."""
        for entry, following in enumerate(self._next):
            self._region[32 + 32 * entry] = 0
            self._h[17 + 16 * entry] = following
        self._h[_FREE_HEAD_AT] = self._h[_OLD_FREE_HEAD_AT] = 0
        self._h[_USED_IDX_AT] = self._h[_OLD_USED_IDX_AT] = self._next_used
        self._region[_USED_WRAP_AT] = self._region[_OLD_USED_WRAP_AT] = self._used_wrap
        self._h[_N_ENTRIES_AT] = self._n_entries
        self._h[_VERSION_AT] = _VERSION

    # After a death

    def _recover(self) -> None:
        """Complete or take back the change under way; find the chains that were not answered."""
        n_entries = self._n_entries
        h, region = self._h, self._region
        used = h[_USED_IDX_AT], region[_USED_WRAP_AT]
        old = h[_OLD_USED_IDX_AT], region[_OLD_USED_WRAP_AT]
        free_head = h[_OLD_FREE_HEAD_AT]
        if used != old and not self._is_available(*old):
            free_head = h[_FREE_HEAD_AT]
            old = used
        self._next_used, self._used_wrap = self._position(*old)
        self._signalled = self._next_used
        self._next = [h[17 + 16 * entry] for entry in range(n_entries)]
        self._clear_free(free_head)
        self._rebuild_free(self._find_lost())
        h[_USED_IDX_AT] = h[_OLD_USED_IDX_AT] = self._next_used
        region[_USED_WRAP_AT] = region[_OLD_USED_WRAP_AT] = self._used_wrap
        ahead = self._next_used + self._descriptors_in_flight
        self._next_avail = ahead % self.size
        self._avail_wrap = self._used_wrap ^ (ahead >= self.size)

    def _position(self, index: int, wrap: int) -> tuple[int, int]:
        if index >= self.size or wrap > 1:
            raise ProtocolError(f"in-flight region with used index {index} of {self.size}")
        return index, wrap

    def _is_available(self, index: int, wrap: int) -> bool:
        """Whether the descriptor there is still as the driver made it available in that lap."""
        self._position(index, wrap)
        flags = self._halves[8 * index + 7]
        return (flags >> 7 & 1) == wrap != (flags >> 15 & 1)

    def _clear_free(self, entry: int) -> None:
        """Entries in the free list are not in flight, whatever they say."""
        for _ in range(self._n_entries):
            if entry >= self._n_entries:
                return
            self._region[32 + 32 * entry] = 0
            entry = self._next[entry]

    def _find_lost(self) -> set[int]:
        """The chains in flight, from their copies, in the order in which they were popped.

        The entries that they take.
        """
        heads = [entry for entry in range(self._n_entries) if self._region[32 + 32 * entry]]
        heads.sort(key=lambda entry: (self._q[5 + 4 * entry], entry))
        seen: set[int] = set()
        for head in heads:
            count = self._h[19 + 16 * head]
            descriptors: list[Descriptor] = []
            entry = last = head
            for _ in range(count):
                if entry >= self._n_entries or entry in seen or len(seen) >= self.size:
                    raise ProtocolError(f"in-flight region: entry {entry} is in two chains")
                seen.add(entry)
                last = entry
                descriptors.append(self._copy(entry))
                entry = self._next[entry]
            if not descriptors:
                raise ProtocolError(f"in-flight region: entry {head} has no descriptors")
            self._chains[head] = last, count, descriptors[-1][2]
            self._lost.append((head, descriptors))
            self._q[5 + 4 * head] = self._counter
            self._counter += 1
        self.in_flight = len(self._lost)
        self._descriptors_in_flight = len(seen)
        return seen

    def _rebuild_free(self, taken: set[int]) -> None:
        """Every entry that no chain takes is free: the list that was there could be any."""
        free = [entry for entry in range(self._n_entries) if entry not in taken]
        free.append(self._n_entries)
        for entry, following in itertools.pairwise(free):
            self._h[17 + 16 * entry] = self._next[entry] = following
        self._free_head = free[0]
        self._h[_FREE_HEAD_AT] = self._h[_OLD_FREE_HEAD_AT] = self._free_head

    def _copy(self, entry: int) -> Descriptor:
        """The descriptor kept in `entry`."""
        return (
            self._q[7 + 4 * entry],
            self._i[13 + 8 * entry],
            self._h[24 + 16 * entry],
            self._h[25 + 16 * entry],
        )

    def recovered(self) -> list[Chain]:
        """See VirtQueue. The descriptors are resolved as if they were new."""
        lost, self._lost = self._lost, []
        return [self._chain(head, descriptors) for head, descriptors in lost]

    # The data path

    def _take(self, descriptors: list[Descriptor]) -> int:
        buffer_id = super()._take(descriptors) & 0xFFFF
        h, q = self._h, self._q
        head = entry = last = self._free_head
        h[19 + 16 * head] = 0
        q[5 + 4 * head] = self._counter
        self._counter += 1
        self._region[32 + 32 * head] = 1
        for count, (address, length, id_, flags) in enumerate(descriptors, 1):
            h[19 + 16 * head] = count
            q[7 + 4 * entry] = address
            self._i[13 + 8 * entry] = length
            h[24 + 16 * entry] = id_
            h[25 + 16 * entry] = flags
            last = entry
            entry = self._next[entry]
        h[18 + 16 * head] = last
        h[_FREE_HEAD_AT] = self._free_head = entry
        h[_OLD_FREE_HEAD_AT] = entry
        self._chains[head] = last, len(descriptors), buffer_id
        return head

    def push(self, head: int, length: int, /) -> None:
        """See VirtQueue."""
        if self.long.views:
            self.long.pushed(head)
        last, count, buffer_id = self._chains.pop(head)
        h, region = self._h, self._region
        h[17 + 16 * last] = self._next[last] = self._free_head
        h[_FREE_HEAD_AT] = self._free_head = head
        slot = self._next_used
        flags = self._used_flags(length)
        self._write_used(slot, buffer_id, length)
        self._give_back(count)
        h[_USED_IDX_AT] = self._next_used
        region[_USED_WRAP_AT] = self._used_wrap
        if WEAK_ORDER:
            fence()
        self._halves[8 * slot + 7] = flags
        region[32 + 32 * head] = 0
        h[_OLD_FREE_HEAD_AT] = head
        h[_OLD_USED_IDX_AT] = self._next_used
        region[_OLD_USED_WRAP_AT] = self._used_wrap
        self._visible = True

    def close(self, *, told: bool) -> int:
        """See VirtQueue. While the base is not told, only the region knows the indexes."""
        if told:
            self.base_was_reported()
        return super().close(told=told)

    def base_was_reported(self) -> None:
        """See VirtQueue."""
        if not self.in_flight:
            self._h[_VERSION_AT] = 0

    def publish(self) -> bool:
        """See VirtQueue. All of it is visible already; only the call is left."""
        if not self._visible:
            return False
        self._visible = False
        return self._wants_call()
