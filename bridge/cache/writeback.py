"""Dirty blocks on their way to the server.

Dirty slots stand in a ring in the order in which they became dirty; a slot is in it at most
once. A *batch* is what is taken from the ring at once and sent in disk order, adjacent blocks
coalesced into one WRITE, several in flight, each from a private copy, so that a guest may go on
writing to the blocks meanwhile. A block that is in flight is never sent a second time before
the reply: two writes of it could pass each other on different connections.

A *ticket* (a guest write that must reach the server, a flush) says it *wants* slots: it is
settled when everything that was dirty in them has been replied to. A wanted block whose older
content is in flight is deferred until that reply.

A failed write leaves its blocks dirty and back in the ring; background write-out then pauses,
for longer each time.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from operator import itemgetter

from bridge.request import FUA, WRITE, Request

from .backend import Backend, Stats
from .blocks import zeroed
from .index import Index
from .options import Options
from .slots import Slots
from .ticket import Ticket


class WriteOut:
    """One WRITE in flight: blocks of one or more slots, one contiguous range of the disk."""

    __slots__ = ("end", "epoch", "fua", "offset", "parts", "tickets")

    def __init__(
        self, offset: int, end: int, parts: list[tuple[int, int]], *, fua: bool, epoch: int
    ) -> None:
        self.offset = offset
        self.end = end
        self.parts = parts
        """(slot, bits) in disk order."""
        self.fua = fua
        self.epoch = epoch
        """`Writeback.epoch` when it was sent."""
        self.tickets: list[Ticket] = []


class Writeback:
    """The ring of dirty slots and the write-outs in flight."""

    def __init__(
        self,
        index: Index,
        slots: Slots,
        backend: Backend,
        options: Options,
        stats: Stats,
        clock: Callable[[], float],
        call_at_turn_end: Callable[[Callable[[], None]], None],
        resident: Callable[[int, int], bool],
        load: Callable[[int, Callable[[int], None]], None],
    ) -> None:
        """`resident(position, length)` asks whether that data is in memory, `load(slot, done)`
        has a thread bring it there."""
        self._resident = resident
        self._load = load
        self._index = index
        self._slots = slots
        self._backend = backend
        self._options = options
        self._stats = stats
        self._clock = clock
        self._call_at_turn_end = call_at_turn_end
        self._per_granule_shift = index.granule_shift - index.block_shift
        self._run_blocks = max(1, options.writeback_run_bytes >> index.block_shift)
        self.set_limits()
        self._ring = zeroed("I", index.slots + 1)
        self._ring_size = index.slots + 1
        self.queued = bytearray(index.slots + 1)
        """1 for a slot that stands in the ring."""
        self.head = 0
        self.tail = 0
        """Free-running positions in the ring; `head == tail`: nothing is dirty and unsent."""
        self._marks: deque[tuple[float, int]] = deque()
        """(time, position): what stands before the position was dirty at that time."""
        self._goal = 0
        """Write out everything before this position of the ring."""
        self._batch: list[int] = []
        self._batch_at = 0
        self._refused: dict[int, int] = {}
        """Slots of the batch of which something came back with an error: not sent again with it.
        (Where there is no connection any more, the error comes back at once.)"""
        self._urgent: list[int] = []
        self._urgent_scheduled = False
        self._wanted: dict[int, list[Ticket]] = {}
        self._deferred: dict[int, list[Ticket]] = {}
        self._thawing: set[int] = set()
        """Slots whose data a thread brings back into memory, to be sent then."""
        self._flying: list[WriteOut] = []
        self._bytes_in_flight = 0
        self._pumping = False
        self.barrier: Ticket | None = None
        """The flush in progress, which wants every slot before `barrier_at`."""
        self.barrier_at = 0
        self.written: list[int] = []
        """Slots with *written* blocks since the last flush was sent."""
        self._is_written = bytearray(index.slots + 1)
        self.epoch = 0
        """Raised when the server could not make something durable. A flush is good only for what
        was acknowledged in the epoch in which it ends."""
        self.unflushed = True
        """The server may hold something that finished after the last flush was sent. True at
        the start: the process before this one may have left that."""
        self.paused_until = 0.0
        self._pause_s = options.retry_s
        self.is_held: Callable[[int], bool] | None = None
        """Says whether a discard keeps a granule from being sent; None: there is no discard."""
        self._held: list[int] = []
        self.landed: Callable[[], None] = _nothing
        """Called after replies changed what is dirty."""
        self.woken: Callable[[], None] = _nothing
        """Called when a deadline appeared where there was none."""

    # What the other parts of the cache say.

    def enqueue(self, slot: int) -> None:
        """`slot` has dirty blocks that are to be sent some time."""
        if self.queued[slot]:
            return
        self.queued[slot] = 1
        idle = self.tail <= max(self.head, self._goal)
        now = self._clock()
        if not self._marks or now - self._marks[-1][0] >= 1.0:
            # One mark a second bounds their number; the age is right to a second.
            self._marks.append((now, self.tail + 1))
        else:
            self._marks[-1] = (self._marks[-1][0], self.tail + 1)
        self._ring[self.tail % self._ring_size] = slot
        self.tail += 1
        if idle:
            self.woken()

    def want(self, slots: Iterable[int], ticket: Ticket) -> None:
        """Send the dirty blocks of `slots` at the end of this turn, for `ticket`."""
        for slot in slots:
            ticket.pending += 1
            self._wanted.setdefault(slot, []).append(ticket)
            self._urgent.append(slot)
        self._schedule_urgent()

    def want_all(self, ticket: Ticket) -> None:
        """`ticket` is the barrier: it waits for all that is dirty or in flight now.

        It holds one extra token until the ring was gone through.
        """
        self.barrier = ticket
        self.barrier_at = self.tail
        ticket.pending += 1
        for flying in self._flying:
            self._attach(flying, ticket)
        # What was taken from the ring already and has not been sent counts as well.
        for slot in {
            *self._batch[self._batch_at :],
            *self._held,
            *self._urgent,
            *self._thawing,
        }:
            ticket.pending += 1
            self._wanted.setdefault(slot, []).append(ticket)
        for tickets in self._deferred.values():
            ticket.pending += 1
            tickets.append(ticket)
        self.write_out_to(self.tail)

    def write_out_to(self, position: int) -> None:
        """Write out what stands in the ring before `position`."""
        self._goal = max(self._goal, position)
        self._pump()

    def wait_for_flying(self, first: int, end: int, ticket: Ticket) -> None:
        """`ticket` waits for the write-outs in flight within the bytes `first` … `end`."""
        for flying in self._flying:
            if flying.offset < end and first < flying.end:
                self._attach(flying, ticket)

    def unhold(self) -> None:
        """A discard ended: look again at what it kept from being sent."""
        self._urgent += self._held
        self._held = []
        if self._urgent:
            self._schedule_urgent()

    def lost(self) -> None:
        """The server is a new one: what was only written is dirty again."""
        index = self._index
        for slot in self.written:
            self._is_written[slot] = 0
            self.send_again(slot, index.written_lost(slot))
        self.written = []

    def could_not_flush(self) -> None:
        """The server failed to make something durable: a FLUSH, or a request with FUA.

        Whatever it had only acknowledged may be gone with that, whoever's write it was: a Linux
        server whose fsync fails drops what was to be written, and says so once. That goes for
        what is in flight, too, if it is acknowledged later.
        """
        self.epoch += 1
        self.unflushed = True
        self.lost()

    def send_again(self, slot: int, bits: int) -> None:
        """What the server had of `slot` may be lost: these blocks are dirty again."""
        if bits:
            self._stats.resent_blocks += bits.bit_count()
            self.enqueue(slot)

    def take_written(self) -> list[int]:
        """The slots with written blocks, which a flush covers from here on."""
        slots, self.written = self.written, []
        for slot in slots:
            self._is_written[slot] = 0
        self.unflushed = False
        return slots

    # Time.

    def set_limits(self) -> None:
        """Take the limits from the sizes of cache and disk, at the start and when that grows."""
        index = self._index
        self._limits = self._options.dirty_limits(
            slots=index.slots, granules=index.geometry.granules
        )

    def next_deadline(self) -> float | None:
        """When `tick()` has something to do."""
        if self.tail <= max(self.head, self._goal):
            return None
        if self._marks and not self.over_background():
            return max(self._marks[0][0] + self._options.writeback_age_s, self.paused_until)
        return self.paused_until

    def tick(self, now: float) -> None:
        """Start writing out what is old enough, or all when too much is dirty."""
        if now < self.paused_until or self.head >= self.tail:
            return
        if not self._marks:
            self.write_out_to(self.tail)
            return
        if self.over_background():
            # The oldest go; what was written last may still grow into a longer run.
            self.write_out_to(self.tail - self._limits.background * 3 // 4)
        goal = 0
        while self._marks and self._marks[0][0] + self._options.writeback_age_s <= now:
            goal = self._marks.popleft()[1]
        if goal:
            self.write_out_to(goal)

    def tick_now(self) -> None:
        """Much became dirty: do not wait for the timer."""
        self.tick(self._clock())

    def over_background(self) -> bool:
        """More stands in the ring than should wait for its age."""
        return self.tail - max(self.head, self._goal) > self._limits.background

    # Sending.

    def _schedule_urgent(self) -> None:
        if not self._urgent_scheduled:
            self._urgent_scheduled = True
            self._call_at_turn_end(self._turn_end)

    def _turn_end(self) -> None:
        self._urgent_scheduled = False
        # The urgent ones join what is being sent, in disk order.
        self._refill(self._batch[self._batch_at :] + self._urgent)
        self._urgent = []
        self._pump()

    def _refill(self, slots: list[int]) -> None:
        granule_of = self._index.granule_of
        pairs = sorted({(granule_of[slot], slot) for slot in slots})
        self._batch = list(map(itemgetter(1), pairs))
        self._batch_at = 0
        self._refused.clear()

    def _pump(self) -> None:
        """Send as much as may be in flight."""
        if self._pumping:
            return
        self._pumping = True
        while (
            len(self._flying) + len(self._thawing) < self._requests_allowed()
            and self._bytes_in_flight < self._options.writeback_bytes
        ):
            if self._batch_at < len(self._batch):
                self._send_next()
            elif self.head < min(self._goal, self.tail):
                self._take_batch()
            else:
                break
        self._pumping = False
        if self.barrier is not None and self.head >= self.barrier_at:
            barrier, self.barrier = self.barrier, None
            barrier.release()

    def _requests_allowed(self) -> int:
        """How many write-outs may be in flight: all while somebody waits for one, few otherwise."""
        options, limits = self._options, self._limits
        if self.barrier is not None or self._wanted:
            return options.writeback_requests
        above = self._index.dirty_slots - limits.background
        if above <= 0:
            return options.background_requests
        more = options.writeback_requests * above // max(1, limits.flush - limits.background)
        return min(options.writeback_requests, options.background_requests + more)

    def _take_batch(self) -> None:
        """Take slots from the ring, at most so many that sorting is a matter of 1 ms."""
        goal = min(self._goal, self.tail, self.head + 1024)
        slots = []
        for position in range(self.head, goal):
            slot = self._ring[position % self._ring_size]
            self.queued[slot] = 0
            slots.append(slot)
            if self.barrier is not None and position < self.barrier_at:
                self.barrier.pending += 1
                self._wanted.setdefault(slot, []).append(self.barrier)
        self.head = goal
        while self._marks and self._marks[0][1] <= goal:
            self._marks.popleft()
        self._refill(slots)

    def _send_next(self) -> None:
        """Send the next run of the batch, or be done with its next slot."""
        index, batch = self._index, self._batch
        slot = batch[self._batch_at]
        if self.is_held is not None and self.is_held(index.granule_of[slot]):
            self._held.append(slot)
            self._batch_at += 1
            return
        if slot in self._refused:
            for ticket in self._wanted.get(slot, ()):
                ticket.error = ticket.error or self._refused[slot]
            self._batch_at += 1
            self._done_with(slot)
            return
        bits = index.to_send(slot)
        if not bits:
            self._batch_at += 1
            self._done_with(slot)
            return
        if self._is_cold(slot, bits):
            self._thaw(slot)
            return
        shift, per_granule = index.block_shift, self._per_granule_shift
        granule = index.granule_of[slot]
        first = (bits & -bits).bit_length() - 1
        count = _ones(bits >> first)
        offset = (granule << index.granule_shift) + (first << shift)
        parts = [(slot, (1 << first + count) - (1 << first))]
        at = self._batch_at
        # On into the next granule, while this run reaches its end and the next begins with it.
        while first + count == 1 << per_granule and at + 1 < len(batch):
            following = batch[at + 1]
            granule += 1
            if index.granule_of[following] != granule or following in self._refused:
                break
            more = _ones(index.to_send(following))
            if not more or (self.is_held is not None and self.is_held(granule)):
                break
            if self._is_cold(following, (1 << more) - 1):
                break
            if sum(part.bit_count() for _, part in parts) + more > self._run_blocks:
                break
            at += 1
            parts.append((following, (1 << more) - 1))
            first, count = 0, more
        self._send(offset, parts)

    def _is_cold(self, slot: int, bits: int) -> bool:
        """These blocks are on the disk only: copying them would stop the loop."""
        index = self._index
        return bool(bits & ~index.ready[slot]) and not self._resident(
            slot << index.granule_shift, index.granule_bytes
        )

    def _thaw(self, slot: int) -> None:
        """Send the next slot of the batch when a thread has brought its data into memory."""
        self._batch_at += 1
        if slot in self._thawing:
            return
        self._thawing.add(slot)

        def done(error: int) -> None:
            self._thawing.discard(slot)
            if error:
                self._unreadable(slot, error)
            else:
                self._index.found_resident(slot, self._index.to_send(slot))
                self._urgent.append(slot)
            self._schedule_urgent()  # in either case there is a place free

        self._load(slot, done)

    def _unreadable(self, slot: int, error: int) -> None:
        """The cache file does not give dirty data back: those who want it fail, it stays dirty."""
        self._stats.file_errors += 1
        self._failed()
        if self._index.dirty(slot):
            self.enqueue(slot)
        for ticket in self._wanted.pop(slot, []):
            ticket.error = ticket.error or error
            ticket.release()

    def _send(self, offset: int, parts: list[tuple[int, int]]) -> None:
        """Send a private copy of these blocks."""
        index = self._index
        shift = index.block_shift
        length = sum(bits.bit_count() for _, bits in parts) << shift
        tickets = [ticket for slot, _ in parts for ticket in self._wanted.get(slot, ())]
        # The disk may end within its last block.
        end = min(offset + length, index.geometry.disk_bytes)
        fua = self._backend.can_fua and any(ticket.fua for ticket in tickets)
        flying = WriteOut(offset, end, parts, fua=fua, epoch=self.epoch)
        pieces = []
        for slot, bits in parts:
            base = (slot << index.granule_shift) + ((bits & -bits).bit_length() - 1 << shift)
            pieces.append(index.data[base : base + (bits.bit_count() << shift)])
            index.send(slot, bits)
        for ticket in tickets:
            self._attach(flying, ticket)
        self._flying.append(flying)
        self._bytes_in_flight += length
        self._stats.writebacks += 1
        self._stats.writeback_bytes += length
        view = memoryview(b"".join(pieces))[: end - offset]
        flags = FUA if fua else 0
        self._backend.submit(
            Request(WRITE, offset, end - offset, [view], self._replied, flags, owner=flying)
        )

    def _done_with(self, slot: int) -> None:
        """Nothing of `slot` can be sent now: settle, attach or defer those who want it."""
        tickets = self._wanted.pop(slot, [])
        index = self._index
        if index.rewritten(slot):
            # Also when nobody asks: the slot has left the ring, and must not be forgotten.
            self._deferred.setdefault(slot, []).extend(tickets)
            return
        if index.sending(slot):
            for flying in self._flying:
                if any(part == slot for part, _ in flying.parts):
                    for ticket in tickets:
                        self._attach(flying, ticket)
        for ticket in tickets:
            if index.written(slot):
                ticket.unstable = True
            ticket.release()

    def _attach(self, flying: WriteOut, ticket: Ticket) -> None:
        flying.tickets.append(ticket)
        ticket.pending += 1
        if not flying.fua:
            ticket.unstable = True

    # Replies.

    def _replied(self, request: Request) -> None:
        flying: WriteOut = request.owner
        self._flying.remove(flying)
        self._bytes_in_flight -= sum(bits.bit_count() for _, bits in flying.parts) << (
            self._index.block_shift
        )
        stable = flying.fua or not self._backend.can_flush
        # Only what this connection generation received is covered by a flush of it.
        kept = stable or (
            request.generation == self._backend.generation and flying.epoch == self.epoch
        )
        if request.error:
            if flying.fua:
                self.could_not_flush()
            self._failed()
        else:
            self._pause_s = self._options.retry_s
            if not stable:
                self.unflushed = True
        for slot, bits in flying.parts:
            if request.error:
                self._refused[slot] = request.error
            if request.error or not kept:
                self._index.reply_lost(slot, bits)
                self.enqueue(slot)
            else:
                self._arrived(slot, bits, stable)
            deferred = self._deferred.pop(slot, None)
            if deferred is not None:
                if deferred:
                    self._wanted.setdefault(slot, []).extend(deferred)
                self._urgent.append(slot)
                self._schedule_urgent()
        for ticket in flying.tickets:
            ticket.error = ticket.error or request.error
            ticket.lost = ticket.lost or not kept
            ticket.release()
        self.landed()
        self._pump()

    def _arrived(self, slot: int, bits: int, stable: bool) -> None:
        """The server has these blocks, as they were when they were sent."""
        if stable:
            if self._index.reply_stable(slot, bits):
                self._slots.cleaned(slot)
        elif self._index.reply_volatile(slot, bits) and not self._is_written[slot]:
            self._is_written[slot] = 1
            self.written.append(slot)

    def _failed(self) -> None:
        self._stats.writeback_errors += 1
        self.paused_until = self._clock() + self._pause_s
        self._pause_s = min(self._pause_s * 2, self._options.retry_max_s)
        if self.barrier is None:
            # Stop the background write-out; what a flush or a write asks for is tried.
            self._goal = min(self._goal, self.head)
            self.woken()


def _ones(bits: int) -> int:
    """How many of the lowest bits are set without a gap."""
    return (~bits & bits + 1).bit_length() - 1


def _nothing() -> None:
    """Nobody wants to know."""
