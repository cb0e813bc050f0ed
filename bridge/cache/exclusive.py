"""Discard and write-zeroes, ordered against everything else on the same range.

While one is in progress on a range, nothing else changes that range: writes to it and reads of
absent blocks wait, its dirty blocks are not sent, fetches in flight are overtaken. It waits for
the write-outs in flight there, then goes to the server, and when the server did it (not before:
a failed discard must lose nothing) the cached blocks of the range are dropped, dirty or not.
Reads of cached blocks go on meanwhile and return the old content.

Write-zeroes is complete only when durable (FUA, or a flush of the same generation and epoch):
nothing of it is kept that could be sent again after the server lost power.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from sortedcontainers import SortedDict

from bridge.request import DISCARD, FLUSH, FUA, MAY_UNMAP, Request

from .backend import Backend
from .fetch import Fetcher
from .flush import Flusher
from .index import Index
from .slots import Slots
from .ticket import Ticket
from .writeback import Writeback

_TRIES: Final = 64
"""So many that waited are tried again before the rest is left to whoever is in the way now."""


class Exclusive(Ticket):
    """One discard or write-zeroes in progress; a ticket for the write-outs before it."""

    __slots__ = (
        *("_ready", "done", "end", "epoch", "first", "flags", "generation", "op", "stop"),
        "waiting",
    )

    def __init__(
        self,
        op: int,
        first: int,
        end: int,
        stop: int,
        flags: int,
        done: Callable[[int], None],
        ready: Callable[[Exclusive], None],
    ) -> None:
        super().__init__(fua=False)
        self.op = op
        self.first = first
        self.end = end
        self.stop = stop
        """Where it ends in bytes: within the last block if that was the disk's, which may have
        grown since."""
        self.flags = flags
        self.done = done
        self.generation = 0
        self.epoch = 0
        self._ready = ready
        self.waiting: deque[Callable[[], None]] = deque()
        """What is to be tried again when this one has ended."""

    def settled(self) -> None:
        self._ready(self)


class Exclusives:
    """All discards and write-zeroes of one cache. Ranges are `first` … `end` in blocks."""

    def __init__(
        self,
        index: Index,
        slots: Slots,
        fetcher: Fetcher,
        writeback: Writeback,
        flusher: Flusher,
        backend: Backend,
    ) -> None:
        self._index = index
        self._slots = slots
        self._fetcher = fetcher
        self._writeback = writeback
        self._flusher = flusher
        self._backend = backend
        self._shift = index.granule_shift - index.block_shift
        self.active: SortedDict[int, Exclusive] = SortedDict()
        """By `first`. No two of them overlap."""
        self.ended: Callable[[], None] = _nothing
        """Called when one ended: dirty slots may have become free."""
        self.discarding: Callable[[int, int], None] = _nothing_there
        """Called with the blocks of one before the server is asked for it."""

    def start(
        self, op: int, first: int, end: int, stop: int, flags: int, done: Callable[[int], None]
    ) -> None:
        """Discard or zero the blocks `first` … `end`, up to the byte `stop`; `done(errno)` when
        that has happened.

        The last one may be cut short by the end of the disk. If the disk has grown by the time it
        is this one's turn, that block is left out.
        """
        self._begin(Exclusive(op, first, end, stop, flags, done, self._ready))

    def overlapping(self, first: int, end: int) -> Exclusive | None:
        """One that is in progress on any of the blocks `first` … `end`, or None."""
        at = self.active.bisect_left(end)
        if at:
            # The last one that begins before `end` is also the last to end.
            each = self.active.peekitem(at - 1)[1]
            if first < each.end:
                return each
        return None

    def _begin(self, each: Exclusive) -> None:
        before = self.overlapping(each.first, each.end)
        if before is not None:
            before.waiting.append(lambda: self._begin(each))
            return
        shift = self._index.block_shift
        if each.stop < each.end << shift and each.stop != self._index.geometry.disk_bytes:
            each.end = each.stop >> shift
            each.stop = each.end << shift
            if each.first >= each.end:
                each.done(0)
                return
        self.active[each.first] = each
        self._writeback.is_held = self._is_held
        for slot in self._slots_of(each):
            self._index.open[slot] = 0
        self._fetcher.overtaken_range(each.first, each.end)
        each.pending = 1
        self._writeback.wait_for_flying(each.first << shift, each.end << shift, each)
        each.release()

    def _is_held(self, granule: int) -> bool:
        first = granule << self._shift
        return self.overlapping(first, first + (1 << self._shift)) is not None

    def _slots_of(self, each: Exclusive) -> list[int]:
        """The slots with blocks of the range, by whichever way is shorter."""
        index = self._index
        first, end = each.first >> self._shift, (each.end - 1 >> self._shift) + 1
        if end - first <= index.slots:
            return [slot for granule in range(first, end) if (slot := index.find(granule))]
        return [
            slot
            for slot in range(1, index.slots + 1)
            if index.state[slot] and first <= index.granule_of[slot] < end
        ]

    def _ready(self, each: Exclusive) -> None:
        """Nothing is in flight on the range: to the server."""
        offset = each.first << self._index.block_shift
        length = each.stop - offset
        flags = each.flags & MAY_UNMAP
        if each.op != DISCARD and self._backend.can_fua:
            flags |= FUA
        elif each.op == DISCARD:
            flags = each.flags & FUA if self._backend.can_fua else 0
        each.generation = self._backend.generation
        each.epoch = self._writeback.epoch
        self.discarding(each.first, each.end)
        self._backend.submit(Request(each.op, offset, length, [], self._replied, flags, owner=each))

    def _replied(self, request: Request) -> None:
        each: Exclusive = request.owner
        if not request.flags & FUA:
            self._writeback.unflushed = True
        elif request.error:
            self._writeback.could_not_flush()
        if request.error or request.flags & FUA or not self._backend.can_flush:
            self._end(each, request.error)
        elif each.op == DISCARD and not each.flags & FUA:
            self._end(each, 0)
        else:
            each.generation = request.generation
            self._backend.submit(Request(FLUSH, 0, 0, [], self._flushed, owner=each))

    def _flushed(self, request: Request) -> None:
        each: Exclusive = request.owner
        if request.error:
            self._writeback.could_not_flush()
        lost = (
            not request.generation == each.generation == self._backend.generation
            or each.epoch != self._writeback.epoch
        )
        if lost and not request.error:
            self._ready(each)
        else:
            self._end(each, request.error)

    def _end(self, each: Exclusive, error: int) -> None:
        self._drop(each, error)
        # Reads of absent blocks waited, but a fetch may have been asked for before that.
        self._fetcher.overtaken_range(each.first, each.end)
        del self.active[each.first]
        if not self.active:
            self._writeback.is_held = None
        self._flusher.writes += 1
        self._flusher.arm()
        self._writeback.unhold()
        self._try_again(each)
        each.done(error)
        self.ended()

    def _try_again(self, ended: Exclusive) -> None:
        """What waited for `ended` goes on, or waits for another one.

        If one of the first few is in the way of the others (a guest may discard the same blocks
        thousands of times), they are left to that one all together, not each looked at each time.
        """
        waiting, ended.waiting = ended.waiting, deque()
        tries = 0
        while waiting:
            waiting.popleft()()
            tries += 1
            if tries % _TRIES == 0:
                before = self.overlapping(ended.first, ended.end)
                if before is not None:
                    before.waiting += waiting
                    return

    def _drop(self, each: Exclusive, error: int) -> None:
        """Forget the range. After an error nobody knows what the server did: what is dirty stays,
        what is clean may differ from what the server has now."""
        index = self._index
        per_granule = 1 << self._shift
        for slot in self._slots_of(each):
            base = index.granule_of[slot] << self._shift
            low = max(each.first - base, 0)
            high = min(each.end - base, per_granule)
            bits = (1 << high) - (1 << low)
            if error:
                bits &= ~index.dirty(slot)
            self._slots.drop(slot, bits)


def _nothing() -> None:
    """Nobody wants to know."""


def _nothing_there(first: int, end: int) -> None:
    """The same."""
