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

from bridge.cache.awaited import AwaitedSlots
from bridge.cache.busy_ranges import BusyRanges
from bridge.cache.common import Common
from bridge.cache.dirty_ring import DirtyRing
from bridge.cache.file.layout import BITS, DIRTY_SHIFT
from bridge.cache.in_flight import InFlight, WriteOut
from bridge.cache.pace import Pace
from bridge.cache.runs import copy_of, lowest_run, run_on
from bridge.cache.wait import WriteOutWait
from bridge.datapath.request import FUA, WRITE
from bridge.datapath.turn import Outcome

_BATCH_SLOTS = 1024
"""Slots taken from the ring at once: sorting them is a matter of 1 ms."""


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
        self.ring = DirtyRing(index.slots, index.cells)
        self.pace = Pace(common, self.ring)
        self._batch: list[int] = []
        self._batch_at = 0
        self._refused: dict[int, int] = {}
        """Slots of the batch of which something came back with an error: not sent again with it.
        (Where there is no connection any more, the error comes back at once.)"""
        self._urgent: list[int] = []
        """Slots that a request waits for; they join the batch."""
        self._awaited = AwaitedSlots(index.slots)
        self._deferred: set[int] = set()
        """Slots with blocks that were written to while in flight, until the reply."""
        self._loading: set[int] = set()
        """Slots whose data a thread brings back into memory, to be sent then."""
        self._held: list[int] = []
        """Slots that a discard keeps from being sent."""
        self._in_flight = InFlight()
        self._look = False
        """Something changed that may let more be sent."""
        self._turn_number = 0
        self._turn_left = 0
        """How many write-outs may begin in the turn of that number."""
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
            self._awaited.want(slot, wait)
            self._urgent.append(slot)
        self._look = True

    def want_all(self, wait: WriteOutWait) -> None:
        """`wait` is the barrier: it waits for all that is dirty or in flight now.

        It holds one extra token until the ring was gone through.
        """
        self.barrier = wait
        self.barrier_at = self.ring.tail
        wait.pending += 1
        for write_out in self._in_flight.each():
            write_out.attach(wait)
        # What was taken from the ring already and has not been sent counts as well.
        self._awaited.begin_flush(wait)
        for slots in (self._batch[self._batch_at :], self._held, self._urgent):
            self._awaited.mark(slots)
        self._awaited.mark(self._loading)
        self._awaited.mark(self._deferred)
        self.write_out_to(self.ring.tail)

    def write_out_to(self, position: int) -> None:
        """Write out what stands in the ring before `position`."""
        self.ring.write_out_to(position)
        self._look = True

    def wait_for_range(self, first: int, end: int, wait: WriteOutWait) -> None:
        """`wait` waits for the write-outs in flight within the bytes `first` … `end`."""
        for write_out in self._in_flight.each():
            if write_out.offset < end and first < write_out.offset + write_out.length:
                write_out.attach(wait)

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
        return len(self._awaited)

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
        self._send_what_may()
        if self.barrier is not None and self.ring.head >= self.barrier_at:
            barrier, self.barrier = self.barrier, None
            barrier.release()
        return True

    def _refill(self, slots: list[int]) -> None:
        self._batch = sorted(set(slots), key=self._index.granule_of.__getitem__)
        self._batch_at = 0
        self._refused.clear()

    def _take_batch(self) -> None:
        first = self.ring.head
        slots = self.ring.take(_BATCH_SLOTS)
        if self.barrier is not None:
            self._awaited.mark(slots[: max(0, self.barrier_at - first)])
        self._refill(slots)

    def _send_what_may(self) -> None:
        """Go on with the batch, and the next one, while more may be in flight."""
        index, in_flight = self._index, self._in_flight
        ready, sent, inflight = index.ready, index.sent, index.inflight
        holding = bool(self._busy_ranges)
        most = self._options.writeback_requests
        unawaited_most = self.pace.requests_allowed(awaited=False)
        most_bytes = self._options.writeback_bytes
        while in_flight.size_bytes < most_bytes and in_flight.count + len(self._loading) < (
            most if self.barrier is not None or self._awaited else unawaited_most
        ):
            if self._batch_at == len(self._batch):
                if not self.ring.has_goal:
                    return
                self._take_batch()
            slot = self._batch[self._batch_at]
            bits = index.state[slot] >> DIRTY_SHIFT & BITS & ~sent[slot] & ~inflight[slot]
            if holding or self._refused or bits & ~ready[slot]:
                if len(self._loading) >= self._options.writeback_loads:
                    return  # One that ends looks again.
                if self._set_aside(slot, bits):
                    self._batch_at += 1
                    continue
            if bits:
                if not self._has_turn_left():
                    return
                bits ^= self._send_run(slot, bits)
            if not bits:
                self._batch_at += 1
                self._all_sent(slot)

    def _has_turn_left(self) -> bool:
        """One more may be sent in this turn; else the next one goes on."""
        turn = self._common.turn
        if self._turn_number != turn.number:
            self._turn_number = turn.number
            self._turn_left = self._options.writeback_turn_requests
        if not self._turn_left:
            turn.next_turn(self._look_again)
            return False
        self._turn_left -= 1
        return True

    def _look_again(self) -> None:
        self._look = True

    def _set_aside(self, slot: int, bits: int) -> bool:
        """Something keeps `slot` from being sent with this batch."""
        if self._busy_ranges.hold(self._index.granule_of[slot]):
            self._held.append(slot)
        elif slot in self._refused:
            for wait in self._awaited.of(slot):
                wait.error = wait.error or self._refused[slot]
            self._all_sent(slot)
        elif self._is_cold(slot, bits):
            self._load(slot)
        else:
            return False
        return True

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
        for wait in self._awaited.take(slot):
            wait.error = wait.error or error
            wait.release()

    def _send_run(self, slot: int, bits: int) -> int:
        """Send a private copy of the lowest run of `bits`, and of what follows that on the disk in
        the next slots of the batch. Returns the blocks of `slot` that were sent."""
        index = self._index
        low = bits & -bits
        run = lowest_run(bits)
        parts = [(slot, run)]
        if run >> index.blocks - 1:
            parts = run_on(
                index,
                self._batch,
                self._batch_at,
                run,
                max_blocks=self._run_blocks,
                is_apart=self._is_apart,
            )
        offset = (index.granule_of[slot] << index.granule_shift) + (
            low.bit_length() - 1 << index.block_shift
        )
        self._send(offset, parts)
        return run

    def _send(self, offset: int, parts: list[tuple[int, int]]) -> None:
        index, in_flight = self._index, self._in_flight
        copy = memoryview(copy_of(index, parts))
        # The disk may end within its last block.
        if (left := index.geometry.disk_bytes - offset) < len(copy):
            copy = copy[:left]
        fua = self._awaited.want_fua(parts) and self._upstream.can_fua
        write_out = WriteOut(WRITE, offset, len(copy), [copy], self._replied, FUA if fua else 0)
        write_out.parts = parts
        write_out.epoch = self._durability.epoch
        write_out.waits = []
        in_flight.add(write_out)
        for slot, bits in parts:
            index.send(slot, bits)
        stats = self._common.stats
        stats.writebacks += 1
        stats.writeback_bytes += len(copy)
        self._upstream.submit(write_out)

    def _all_sent(self, slot: int) -> None:
        """No block of `slot` can be sent now: what waits for it waits for the replies."""
        index = self._index
        inflight = index.inflight[slot]
        if inflight & ~index.sent[slot]:
            # Rewritten. Also when no request waits: the slot has left the ring, and must not be
            # forgotten.
            self._deferred.add(slot)
            return
        if not (waits := self._awaited.take(slot)):
            return
        write_outs = self._in_flight.of(slot, inflight)
        for wait in waits:
            for write_out in write_outs:
                write_out.attach(wait)
            if index.written(slot):
                wait.unstable = True
            wait.release()

    # Replies.

    def _replied(self, write_out: WriteOut) -> None:
        error = write_out.error
        self._in_flight.remove(write_out)
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
            # With an error not while it waits for another reply: where what is sent is refused at
            # once, it would be sent, refused and deferred again without end until that comes.
            is_rewritten = bool(self._index.inflight[slot] & ~self._index.sent[slot])
            if slot in self._deferred and not (error and is_rewritten):
                self._deferred.remove(slot)
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
