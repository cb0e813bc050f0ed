"""Dirty blocks on their way to the server.

Dirty slots stand in a ring in the order in which they became dirty. A *batch* is what is taken
from the ring at once and sent in disk order, adjacent blocks coalesced into one WRITE, several in
flight, each from a private copy, so that a guest may go on writing to the blocks meanwhile. A
block that is in flight is never sent a second time before the reply: two writes of it could pass
each other on different connections.

A `WriteOutWait` (a guest's write that must reach the server, a flush) *wants* slots: it is settled
when everything that was dirty in them has been replied to. A wanted block whose older content is
in flight is deferred until that reply.

A failed write leaves its blocks dirty and back in the ring; background write-out then pauses,
for longer each time.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter

from bridge.cache.busy_ranges import BusyRanges
from bridge.cache.common import Common
from bridge.cache.dirty_ring import DirtyRing
from bridge.cache.pace import Pace
from bridge.cache.runs import copy_of, first_run
from bridge.cache.wait import WriteOutWait
from bridge.datapath.request import FUA, WRITE, Request
from bridge.datapath.turn import Outcome

_BATCH_SLOTS = 1024
"""Slots taken from the ring at once: sorting them is a matter of 1 ms."""


class WriteOut(Request):
    """One WRITE in flight: blocks of one or more slots, one contiguous range of the disk."""

    __slots__ = ("end", "epoch", "parts", "waits")

    parts: list[tuple[int, int]]
    """(slot, bits) in disk order."""
    end: int
    epoch: int
    """The one in which it was sent."""
    waits: list[WriteOutWait]


class Writeback:
    """The ring of dirty slots and the write-outs in flight."""

    def __init__(self, common: Common, busy_ranges: BusyRanges) -> None:
        """`busy_ranges` keep blocks of their ranges from being sent."""
        self._common = common
        self._index = index = common.index
        self._slots = common.slots
        self._upstream = common.upstream
        self._options = options = common.options
        self._busy_ranges = busy_ranges
        self._durability = common.durability
        self._run_blocks = max(1, options.writeback_run_bytes >> index.block_shift)
        self.ring = DirtyRing(index.slots)
        self.pace = Pace(common, self.ring)
        self._batch: list[int] = []
        self._batch_at = 0
        self._refused: dict[int, int] = {}
        """Slots of the batch of which something came back with an error: not sent again with it.
        (Where there is no connection any more, the error comes back at once.)"""
        self._urgent: list[int] = []
        """Slots that a request waits for; they join the batch."""
        self._wanted: dict[int, list[WriteOutWait]] = {}
        self._deferred: dict[int, list[WriteOutWait]] = {}
        """Slots with blocks that were written to while in flight, until the reply."""
        self._loading: set[int] = set()
        """Slots whose data a thread brings back into memory, to be sent then."""
        self._held: list[int] = []
        """Slots that a discard keeps from being sent."""
        self._in_flight: dict[WriteOut, None] = {}
        self._bytes_in_flight = 0
        self._look = False
        """Something changed that may let more be sent."""
        self.barrier: WriteOutWait | None = None
        """The flush in progress, which wants every slot before `barrier_at`."""
        self.barrier_at = 0
        self.written: list[int] = []
        """Slots with WRITTEN blocks since the last flush was sent."""
        self._is_written = bytearray(index.slots + 1)

    # What the other parts of the cache say.

    def enqueue(self, slot: int) -> None:
        """`slot` has dirty blocks that are to be sent some time."""
        if not self.ring.queued[slot]:
            self.ring.put(slot, self._common.clock())

    def want(self, slots: Iterable[int], wait: WriteOutWait) -> None:
        """Send the dirty blocks of `slots` in this turn, for `wait`."""
        for slot in slots:
            wait.pending += 1
            self._wanted.setdefault(slot, []).append(wait)
            self._urgent.append(slot)
        self._look = True

    def want_all(self, wait: WriteOutWait) -> None:
        """`wait` is the barrier: it waits for all that is dirty or in flight now.

        It holds one extra token until the ring was gone through.
        """
        self.barrier = wait
        self.barrier_at = self.ring.tail
        wait.pending += 1
        for write_out in self._in_flight:
            _attach(write_out, wait)
        # What was taken from the ring already and has not been sent counts as well.
        for slot in {
            *self._batch[self._batch_at :],
            *self._held,
            *self._urgent,
            *self._loading,
        }:
            wait.pending += 1
            self._wanted.setdefault(slot, []).append(wait)
        for waits in self._deferred.values():
            wait.pending += 1
            waits.append(wait)
        self.write_out_to(self.ring.tail)

    def write_out_to(self, position: int) -> None:
        """Write out what stands in the ring before `position`."""
        self.ring.write_out_to(position)
        self._look = True

    def wait_for_range(self, first: int, end: int, wait: WriteOutWait) -> None:
        """`wait` waits for the write-outs in flight within the bytes `first` … `end`."""
        for write_out in self._in_flight:
            if write_out.offset < end and first < write_out.end:
                _attach(write_out, wait)

    def range_freed(self) -> None:
        """Look again at what discards kept from being sent."""
        self._urgent += self._held
        self._held = []
        self._look = True

    def lost(self) -> None:
        """The server is a new one: what was only written is dirty again."""
        for slot in self.written:
            self._is_written[slot] = 0
            self.send_again(slot, self._index.written_lost(slot))
        self.written = []

    def flush_failed(self) -> None:
        """The server failed to make something durable: a FLUSH, or a request with FUA.

        Whatever it had only acknowledged may be gone with that (see `durability`). That goes for
        what is in flight, too, if it is acknowledged later.
        """
        self._durability.failed()
        self.lost()

    def send_again(self, slot: int, bits: int) -> None:
        """What the server had of `slot` may be lost: these blocks are dirty again."""
        if bits:
            self._common.stats.resent_blocks += bits.bit_count()
            self.enqueue(slot)

    def take_written(self) -> list[int]:
        """The slots with written blocks, which a flush covers from here on."""
        slots, self.written = self.written, []
        for slot in slots:
            self._is_written[slot] = 0
        return slots

    @property
    def waiting(self) -> int:
        """How many slots requests wait for."""
        return len(self._wanted) + len(self._deferred)

    # Time.

    def tick(self, now: float) -> None:
        """Start writing out what is old enough, or more when too much is dirty."""
        if goal := self.pace.goal(now):
            self.write_out_to(goal)

    def tick_now(self) -> None:
        """Much became dirty: do not wait for the timer."""
        self.tick(self._common.clock())

    # Sending.

    def advance(self) -> bool:
        """See `Stage`: send as much as may be in flight."""
        if not self._look:
            return False
        self._look = False
        if self._urgent:
            # The urgent ones join what is being sent, in disk order.
            self._refill(self._batch[self._batch_at :] + self._urgent)
            self._urgent = []
        while (
            len(self._in_flight) + len(self._loading) < self._requests_allowed
            and self._bytes_in_flight < self._options.writeback_bytes
        ):
            if self._batch_at < len(self._batch):
                self._send_next()
            elif self.ring.has_goal:
                self._take_batch()
            else:
                break
        if self.barrier is not None and self.ring.head >= self.barrier_at:
            barrier, self.barrier = self.barrier, None
            barrier.release()
        return True

    def _refill(self, slots: list[int]) -> None:
        granule_of = self._index.granule_of
        pairs = sorted({(granule_of[slot], slot) for slot in slots})
        self._batch = list(map(itemgetter(1), pairs))
        self._batch_at = 0
        self._refused.clear()

    @property
    def _requests_allowed(self) -> int:
        awaited = self.barrier is not None or bool(self._wanted)
        return self.pace.requests_allowed(awaited=awaited)

    def _take_batch(self) -> None:
        first = self.ring.head
        slots = self.ring.take(_BATCH_SLOTS)
        if self.barrier is not None:
            for slot in slots[: max(0, self.barrier_at - first)]:
                self.barrier.pending += 1
                self._wanted.setdefault(slot, []).append(self.barrier)
        self._refill(slots)

    def _send_next(self) -> None:
        """Send the next run of the batch, or be done with its next slot."""
        index = self._index
        slot = self._batch[self._batch_at]
        if self._busy_ranges.hold(index.granule_of[slot]):
            self._held.append(slot)
            self._batch_at += 1
            return
        if slot in self._refused:
            for wait in self._wanted.get(slot, ()):
                wait.error = wait.error or self._refused[slot]
            self._batch_at += 1
            self._nothing_to_send(slot)
            return
        bits = index.to_send(slot)
        if not bits:
            self._batch_at += 1
            self._nothing_to_send(slot)
            return
        if self._is_cold(slot, bits):
            self._batch_at += 1
            self._load(slot)
            return
        self._send(
            *first_run(
                index,
                self._batch,
                self._batch_at,
                bits,
                max_blocks=self._run_blocks,
                is_apart=self._is_apart,
            )
        )

    def _is_apart(self, slot: int, bits: int) -> bool:
        """These blocks cannot go with those before them."""
        return (
            slot in self._refused
            or self._busy_ranges.hold(self._index.granule_of[slot])
            or self._is_cold(slot, bits)
        )

    def _is_cold(self, slot: int, bits: int) -> bool:
        """These blocks are on the disk only: copying them would stop the loop."""
        index = self._index
        return bool(bits & ~index.ready[slot]) and not self._common.image.resident(
            slot << index.granule_shift, index.granule_bytes
        )

    def _load(self, slot: int) -> None:
        """Send `slot` when a thread has brought its data into memory."""
        if slot in self._loading:
            return
        self._loading.add(slot)

        def loaded(outcome: Outcome) -> None:
            self._loading.discard(slot)
            if outcome.error:
                self._unreadable(slot, outcome.error)
            else:
                self._index.found_resident(slot, self._index.to_send(slot))
                self._urgent.append(slot)
            self._look = True  # in either case there is a place free

        self._slots.load(self._common.image, self._common.cold, slot, loaded)

    def _unreadable(self, slot: int, error: int) -> None:
        """The cache file does not give dirty data back: what waits for it fails, it stays dirty."""
        self._common.stats.file_errors += 1
        self._failed()
        if self._index.dirty(slot):
            self.enqueue(slot)
        for wait in self._wanted.pop(slot, []):
            wait.error = wait.error or error
            wait.release()

    def _send(self, offset: int, parts: list[tuple[int, int]]) -> None:
        """Send a private copy of these blocks."""
        index = self._index
        waits = []
        copy = copy_of(index, parts)
        for slot, bits in parts:
            if slot in self._wanted:
                waits += self._wanted[slot]
            index.send(slot, bits)
        self._bytes_in_flight += len(copy)
        # The disk may end within its last block.
        length = min(len(copy), index.geometry.disk_bytes - offset)
        fua = self._upstream.can_fua and any(wait.fua for wait in waits)
        write_out = WriteOut(
            WRITE, offset, length, [memoryview(copy)[:length]], self._replied, FUA if fua else 0
        )
        write_out.end = offset + length
        write_out.parts = parts
        write_out.epoch = self._durability.epoch
        write_out.waits = []
        for wait in waits:
            _attach(write_out, wait)
        self._in_flight[write_out] = None
        stats = self._common.stats
        stats.writebacks += 1
        stats.writeback_bytes += len(copy)
        self._upstream.submit(write_out)

    def _nothing_to_send(self, slot: int) -> None:
        """No block of `slot` can be sent now: resolve, attach or defer what waits for it."""
        waits = self._wanted.pop(slot, [])
        index = self._index
        if index.rewritten(slot):
            # Also when no request waits: the slot has left the ring, and must not be forgotten.
            self._deferred.setdefault(slot, []).extend(waits)
            return
        if not waits:
            return
        if index.sending(slot):
            for write_out in self._in_flight:
                if any(part == slot for part, _ in write_out.parts):
                    for wait in waits:
                        _attach(write_out, wait)
        for wait in waits:
            if index.written(slot):
                wait.unstable = True
            wait.release()

    # Replies.

    def _replied(self, write_out: WriteOut) -> None:
        error = write_out.error
        del self._in_flight[write_out]
        self._bytes_in_flight -= sum(bits.bit_count() for _, bits in write_out.parts) << (
            self._index.block_shift
        )
        fua = bool(write_out.flags & FUA)
        stable = fua or not self._upstream.can_flush
        durability = self._durability
        done_in = durability.done_in(sent_in=write_out.epoch, generation=write_out.generation)
        # What was done in another epoch no flush of this one covers.
        kept = stable or done_in == durability.epoch
        if error:
            if fua:
                self.flush_failed()
            self._failed()
        else:
            self.pace.succeeded()
            if not stable:
                durability.acknowledged()
        for slot, bits in write_out.parts:
            if error:
                self._refused[slot] = error
            if error or not kept:
                self._index.reply_lost(slot, bits)
                self.enqueue(slot)
            else:
                self._arrived(slot, bits, stable)
            deferred = self._deferred.pop(slot, None)
            if deferred is not None:
                if deferred:
                    self._wanted.setdefault(slot, []).extend(deferred)
                self._urgent.append(slot)
        for wait in write_out.waits:
            wait.error = wait.error or error
            wait.lost = wait.lost or not kept
            wait.release()
        self._look = True

    def _arrived(self, slot: int, bits: int, stable: bool) -> None:
        """The server has these blocks, as they were when they were sent."""
        if stable:
            if self._index.reply_stable(slot, bits):
                self._slots.cleaned(slot)
        elif self._index.reply_volatile(slot, bits) and not self._is_written[slot]:
            self._is_written[slot] = 1
            self.written.append(slot)

    def _failed(self) -> None:
        self._common.stats.writeback_errors += 1
        self.pace.failed()
        if self.barrier is None:
            # Stop the background write-out; what a flush or a write asks for is tried.
            self.ring.stop()


def _attach(write_out: WriteOut, wait: WriteOutWait) -> None:
    write_out.waits.append(wait)
    wait.pending += 1
    if not write_out.flags & FUA:
        wait.unstable = True
