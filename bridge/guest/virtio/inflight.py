"""The in-flight region: which requests were popped and not answered, for a process that follows.

vhost-user "Inflight I/O tracking". The region is memory that the front-end keeps while we die:
the next process finds there what has to be executed again, in the order in which it was popped.
What makes it right is the order of the stores (they are seen in program order after a death):

    pop:      counter, then inflight = 1
    answer:   next = last batch's head, last batch's head = this one
              the ring's used index (the driver may see the answers from here on)
              inflight = 0 for each of the batch, then used_idx = the ring's

A process that dies in between leaves `used_idx` different from the ring's used index; the entries
of the list from the last batch's head, as many as the difference, are answered.

Beside the requests the region keeps what else must not die with us, in the first queue's `features`
field, a u64 that the layout has no use for, stored whole:

    bit 63    the guest turned its write cache off: it believes that every completed write is
              durable, and no front-end tells the next process
    bit 62    the guest's next flush has to fail, for a loss that it has not heard of
    bit 61    a ring has run with the region since it was made, or since the device was reset
    bits 0-55 the server instance that has writes of the guest's that are not flushed (a number
              that stands for it); 0: there are none, or the server has no name

The front-end can write here, too: everything that is read at the start is checked, and nothing
is read back later.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import Final

from bridge.datapath.cells import COUNTER, IN_FLIGHT, LAST_HEAD, NEXT_AVAIL, NEXT_USED, PUSHED
from bridge.errors import ProtocolError
from bridge.guest.virtio.chain import MAX_QUEUE_SIZE, Chain
from bridge.guest.virtio.memory import GuestMemory
from bridge.guest.virtio.queue import RingAreas
from bridge.guest.virtio.seals import keep_length
from bridge.guest.virtio.split_queue import SplitQueue

_VERSION: Final = 1
_ALIGNMENT_BYTES: Final = 64

_SPLIT_HEADER_BYTES: Final = 16
_SPLIT_ENTRY_BYTES: Final = 16
_PACKED_HEADER_BYTES: Final = 32
_PACKED_ENTRY_BYTES: Final = 32

_WRITE_THROUGH: Final = 1 << 63
_LOSS_UNTOLD: Final = 1 << 62
_USED: Final = 1 << 61
_UNFLUSHED_ON: Final = (1 << 56) - 1

_SEALS: Final = fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL


def queue_region_bytes(queue_size: int, *, packed: bool) -> int:
    """What one queue takes of the region, rounded up so that the next one is aligned."""
    if packed:
        length = _PACKED_HEADER_BYTES + _PACKED_ENTRY_BYTES * queue_size
    else:
        length = _SPLIT_HEADER_BYTES + _SPLIT_ENTRY_BYTES * queue_size
    return -(-length // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


def queue_size_by_region(size_bytes: int, num_queues: int, *, packed: bool) -> int:
    """The power of two that a region of exactly `size_bytes` was made for; 0 if there is none.

    The back-end that made it may have left more room than the front-end asked for, and only its
    size, which the front-end hands on unchanged, tells.
    """
    header = _PACKED_HEADER_BYTES if packed else _SPLIT_HEADER_BYTES
    entry = _PACKED_ENTRY_BYTES if packed else _SPLIT_ENTRY_BYTES
    n_entries = (size_bytes // num_queues - header) // entry
    if n_entries <= 0:
        return 0
    queue_size = 1 << n_entries.bit_length() - 1
    needed_bytes = num_queues * queue_region_bytes(queue_size, packed=packed)
    return queue_size if needed_bytes == size_bytes else 0


class InflightRegion:
    """The mapped region of all queues."""

    def __init__(self, view: memoryview, *, num_queues: int, queue_size: int, packed: bool) -> None:
        self.num_queues = num_queues
        self.queue_size = queue_size
        self.packed = packed
        self._view = view
        self._features = view[:8].cast("Q")

    @classmethod
    def create(
        cls, *, num_queues: int, queue_size: int, packed: bool
    ) -> tuple[InflightRegion, int, int]:
        """A fresh region, the descriptor of its memory (the caller closes it), and its size.

        The memory is sealed: the front-end cannot shorten it under the mapping. Raises
        ProtocolError when there is no memory for it.
        """
        size = num_queues * queue_region_bytes(queue_size, packed=packed)
        try:
            fd = os.memfd_create("inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        except OSError as error:
            raise ProtocolError(f"no memory for an in-flight region: {error}") from error
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            region = cls.map(
                fd, 0, size, num_queues=num_queues, queue_size=queue_size, packed=packed
            )
        except BaseException:
            os.close(fd)
            raise
        return region, fd, size

    @classmethod
    def map(
        cls, fd: int, offset: int, size: int, *, num_queues: int, queue_size: int, packed: bool
    ) -> InflightRegion:
        """The region that the front-end kept; `fd` stays the caller's.

        Raises ProtocolError when the file or the range are too short for the numbers
        (CVE-2021-3839), or a queue's header contradicts them.
        """
        per_queue = queue_region_bytes(queue_size, packed=packed)
        needed = num_queues * per_queue
        if size < needed:
            raise ProtocolError(
                f"in-flight region of {size} bytes, {num_queues} queues of {queue_size} need "
                f"{needed}"
            )
        try:
            keep_length(fd)
            file_bytes = os.fstat(fd).st_size
            if offset + needed > file_bytes:
                raise ProtocolError(
                    f"in-flight region from {offset} to {offset + needed} in a file of "
                    f"{file_bytes} bytes"
                )
            start = offset // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
            mapping = mmap.mmap(fd, offset + needed - start, offset=start)
        except (OSError, ValueError, OverflowError) as error:
            raise ProtocolError(f"the in-flight region cannot be mapped: {error}") from error
        view = memoryview(mapping)[offset - start : offset - start + needed]
        region = cls(view, num_queues=num_queues, queue_size=queue_size, packed=packed)
        for index in range(num_queues):
            region._check(index)
        return region

    @property
    def write_through(self) -> bool:
        """The guest has its write cache turned off."""
        return bool(self._features[0] & _WRITE_THROUGH)

    @property
    def loss_unreported(self) -> bool:
        """The guest's next flush has to fail."""
        return bool(self._features[0] & _LOSS_UNTOLD)

    @property
    def unflushed_on(self) -> int:
        """Stands for the server instance that has unflushed writes; 0: none, or it has no name."""
        return self._features[0] & _UNFLUSHED_ON

    def remember(self, *, write_through: bool, loss_unreported: bool, unflushed_on: int) -> None:
        """Keep these for the process after this one."""
        self._features[0] = (
            (self._features[0] & _USED)
            | (_WRITE_THROUGH if write_through else 0)
            | (_LOSS_UNTOLD if loss_unreported else 0)
            | (unflushed_on & _UNFLUSHED_ON)
        )

    @property
    def was_used(self) -> bool:
        """Rings ran with it: the guest may have written."""
        versions = (self.queue(index)[8:10].cast("H")[0] for index in range(self.num_queues))
        return bool(self._features[0] & _USED) or any(versions)

    def note_use(self) -> None:
        """A ring runs with it. (Not to be seen in the ring's own part for long: a packed ring that
        stops with nothing in flight leaves that as if it were fresh.)"""
        self._features[0] |= _USED

    @property
    def in_flight(self) -> int:
        """How many requests are in flight, by all queues' marks."""
        if self.packed:
            header, entry = _PACKED_HEADER_BYTES, _PACKED_ENTRY_BYTES
        else:
            header, entry = _SPLIT_HEADER_BYTES, _SPLIT_ENTRY_BYTES
        count = 0
        for part in map(self.queue, range(self.num_queues)):
            if part[8:10].cast("H")[0]:
                marks = part[header : header + entry * self.queue_size : entry]
                count += sum(map(bool, marks))
        return count

    def clear(self) -> None:
        """Nothing is in flight, and nothing is remembered: as if the region were fresh."""
        self._features[0] = 0
        for index in range(self.num_queues):
            self.queue(index).cast("H")[4] = 0

    def queue(self, index: int) -> memoryview:
        """The part of queue `index`. Raises ProtocolError if there is none such."""
        if index >= self.num_queues:
            raise ProtocolError(f"queue {index} is not among the {self.num_queues} in flight")
        per_queue = queue_region_bytes(self.queue_size, packed=self.packed)
        return self._view[index * per_queue : (index + 1) * per_queue]

    def _check(self, index: int) -> None:
        version, n_entries = self.queue(index)[8:12].cast("H")
        if version not in (0, _VERSION) or (version and n_entries != self.queue_size):
            raise ProtocolError(
                f"in-flight region of queue {index}: version {version} for queues of "
                f"{n_entries}; expected version {_VERSION} for {self.queue_size}"
            )


class TrackedSplitQueue(SplitQueue):
    """A split virtqueue that keeps book in its part of an in-flight region."""

    keeps_in_flight = True

    # Indexes into the region as u16 and u64 values.
    _VERSION_AT: Final = 4
    _N_ENTRIES_AT: Final = 5
    _LAST_BATCH_HEAD_AT: Final = 6
    _USED_IDX_AT: Final = 7

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
        """`region`: this queue's part, made for `n_entries`.

        `base` counts only while the region is fresh: some front-ends name the available index
        instead, which would lose what was in flight. Raises ProtocolError when the region cannot
        be what a process left behind.
        """
        super().__init__(
            memory, areas, size=size, base=base, event_idx=event_idx, indirect=indirect
        )
        if size > n_entries:
            raise ProtocolError(f"queue of {size}, its in-flight region is for {n_entries}")
        self.tracked = region
        self.tracked_halves = region.cast("H")
        self.tracked_words = region.cast("Q")
        self.native = None
        self._lost: list[int] = []
        if self.tracked_halves[self._VERSION_AT]:
            self._recover()
        else:
            self._initialise(n_entries)

    def _initialise(self, n_entries: int) -> None:
        """A fresh region, perhaps beside a ring that has run before."""
        halves = self.tracked_halves
        for head in range(n_entries):
            self.tracked[16 + 16 * head] = 0
        halves[self._N_ENTRIES_AT] = n_entries
        halves[self._LAST_BATCH_HEAD_AT] = 0
        halves[self._USED_IDX_AT] = self.cells[NEXT_USED]
        halves[self._VERSION_AT] = _VERSION

    def _recover(self) -> None:
        """Finish the former process's last stores, and find the chains it had not answered."""
        self._finish_last_batch()
        self.tracked_halves[self._USED_IDX_AT] = self.cells[NEXT_USED]
        lost = sorted(
            (self.tracked_words[3 + 2 * head], head)
            for head in range(self.size)
            if self.tracked[16 + 16 * head]
        )
        # Numbered anew, in the same order: the number that was there last could be any.
        for counter, (_, head) in enumerate(lost):
            self.tracked_words[3 + 2 * head] = counter
        state = self.cells
        state[COUNTER] = state[IN_FLIGHT] = len(lost)
        state[NEXT_AVAIL] = state[NEXT_USED] + len(lost) & 0xFFFF
        self._lost = [head for _, head in lost]

    def _finish_last_batch(self) -> None:
        """Requests whose answers the driver can see are not in flight."""
        if not any(self.tracked[16 : 16 + 16 * self.size : 16]):
            return  # also when the region is about an older ring than this
        halves = self.tracked_halves
        used_idx = halves[self._USED_IDX_AT]
        next_used = self.cells[NEXT_USED]
        answered = (next_used - used_idx) & 0xFFFF
        if answered > self.size:
            raise ProtocolError(
                f"in-flight region with used index {used_idx}, the ring's is {next_used}"
            )
        head = halves[self._LAST_BATCH_HEAD_AT]
        for _ in range(answered):
            if head >= self.size:
                raise ProtocolError(f"in-flight region names descriptor {head} of {self.size}")
            self.tracked[16 + 16 * head] = 0
            head = halves[11 + 8 * head]

    def recovered(self) -> list[Chain]:
        """See VirtQueue. The descriptors are checked as if they were new: they may be."""
        lost, self._lost = self._lost, []
        return [self._walk(head) for head in lost]

    def pop(self, most: int = MAX_QUEUE_SIZE) -> list[Chain]:
        """See VirtQueue."""
        chains = super().pop(most)
        counter = self.cells[COUNTER]
        region = self.tracked
        words = self.tracked_words
        for chain in chains:
            head = chain[0]
            words[3 + 2 * head] = counter
            counter += 1
            region[16 + 16 * head] = 1
        self.cells[COUNTER] = counter
        return chains

    def push(self, head: int, length: int, /) -> None:
        """See VirtQueue. `usual.publish` does the rest."""
        state = self.cells
        halves = self.tracked_halves
        halves[11 + 8 * head] = state[LAST_HEAD]
        halves[self._LAST_BATCH_HEAD_AT] = state[LAST_HEAD] = head
        self.pushed[state[PUSHED]] = head
        state[PUSHED] += 1
        super().push(head, length)
