"""Discard and write-zeroes, ordered against everything else on the same range.

While one is in progress on a range, nothing else changes that range: writes to it and reads of
absent blocks wait, its dirty blocks are not sent, fetches in flight are overtaken. It waits for
the write-outs in flight there, then goes to the server, and when the server did it (not before:
a failed discard must lose nothing) the cached blocks of the range are dropped, dirty or not.
Reads of cached blocks go on meanwhile and return the old content.

Write-zeroes is complete only when durable (FUA, or a flush in the epoch in which it was done):
the cache keeps nothing that it could send again after the server lost power.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from errno import ECANCELED
from typing import Final, Protocol, Self, cast

from bridge.cache.busy_ranges import BusyRanges
from bridge.cache.common import Common
from bridge.cache.fetch import Fetcher
from bridge.cache.flush import Flusher
from bridge.cache.wait import WriteOutWait
from bridge.cache.writeback import Writeback
from bridge.datapath.cells import CHANGES
from bridge.datapath.request import DISCARD, FLUSH, FUA, MAY_UNMAP, Request
from bridge.datapath.turn import Outcome

_TRIES: Final = 64
"""So many waiting requests are tried again before the rest is left to the next discard."""


class WaitsForRange(Protocol):
    """What has to wait until a discard of some of its blocks has ended."""

    def range_freed(self) -> None:
        """Try again."""


class RequestOutcome(Outcome):
    """The end of what is done for `request`."""

    __slots__ = ("request",)

    def __init__(self, request: Request, done: Callable[[Self], None]) -> None:
        super().__init__(done)
        self.request = request


class RangeOperation(WriteOutWait):
    """One discard or write-zeroes in progress; it waits for the write-outs before it."""

    __slots__ = (
        *(
            "_range_operations",
            "end",
            "epoch",
            "first",
            "flags",
            "op",
            "outcome",
            "end_byte",
            "waiting",
        ),
    )

    def __init__(
        self,
        range_operations: RangeOperations,
        op: int,
        first: int,
        end: int,
        end_byte: int,
        flags: int,
        outcome: RequestOutcome,
    ) -> None:
        """`op` on the blocks `first` … `end`, up to the byte `end_byte`; the request's `flags`."""
        super().__init__(fua=False)
        self._range_operations = range_operations
        self.op = op
        self.first = first
        self.end = end
        self.end_byte = end_byte
        """Where it ends in bytes: within the last block if that was the disk's, which may have
        grown since."""
        self.flags = flags
        self.outcome = outcome
        self.epoch = 0
        """The one in which it was sent, then the one in which it was done."""
        self.waiting: deque[WaitsForRange] = deque()
        """What is to be tried again when this one has ended."""

    def range_freed(self) -> None:
        """See WaitsForRange."""
        self._range_operations.begin(self)

    def join_written_out(self) -> None:
        """See WriteOutWait."""
        self._range_operations.written_out.append(self)


class RangeOperations:
    """All discards and write-zeroes of one cache. Ranges are `first` … `end` in blocks."""

    def __init__(
        self,
        common: Common,
        busy_ranges: BusyRanges,
        fetcher: Fetcher,
        writeback: Writeback,
        flusher: Flusher,
    ) -> None:
        self._common = common
        self._index = common.index
        self._upstream = common.upstream
        self._busy_ranges = busy_ranges
        self._durability = common.durability
        self._fetcher = fetcher
        self._writeback = writeback
        self._flusher = flusher
        self._shift = common.index.granule_shift - common.index.block_shift
        self.written_out: list[RangeOperation] = []
        """Those whose range no longer has a write-out in flight."""
        self._ended: list[RangeOperation] = []
        """Those that have ended, and that something waited for."""

    @property
    def active(self) -> int:
        """How many are in progress."""
        return len(self._busy_ranges)

    def start(
        self, op: int, first: int, end: int, end_byte: int, flags: int, outcome: RequestOutcome
    ) -> None:
        """Discard or zero the blocks `first` … `end`, up to the byte `end_byte`; then finish
        `outcome`.

        The last one may be cut short by the end of the disk. If the disk has grown by the time it
        is this one's turn, that block is left out.
        """
        self.begin(RangeOperation(self, op, first, end, end_byte, flags, outcome))

    def begin(self, each: RangeOperation) -> None:
        """Start `each`, after any other one on its range."""
        if each.outcome.request.is_abandoned:
            # The guest has gone on: what it has written there meanwhile is newer.
            self._common.turn.finish(each.outcome, ECANCELED)
            return
        before = self._busy_ranges.overlapping(each.first, each.end)
        if before is not None:
            before.waiting.append(each)
            return
        shift = self._index.block_shift
        if each.end_byte < each.end << shift and each.end_byte != self._index.geometry.disk_bytes:
            each.end = each.end_byte >> shift
            each.end_byte = each.end << shift
            if each.first >= each.end:
                self._common.turn.finish(each.outcome)
                return
        self._busy_ranges.add(each)
        for slot in self._slots_of(each):
            self._index.shut(slot)
        self._fetcher.overtaken_range(each.first, each.end)
        each.pending = 1
        self._writeback.wait_for_range(each.first << shift, each.end << shift, each)
        each.release()

    def advance(self) -> bool:
        """See `Stage`."""
        if not self.written_out and not self._ended:
            return False
        written_out, self.written_out[:] = list(self.written_out), []
        for each in written_out:
            self._send(each)
        ended, self._ended = self._ended, []
        for each in ended:
            self._try_again(each)
        return True

    def _try_again(self, ended: RangeOperation) -> None:
        """What waited for `ended` goes on, or waits for another one.

        If one of the first few is in the way of the others (a guest may discard the same blocks
        thousands of times), they are left to that one all together, not each looked at each time.
        """
        waiting = ended.waiting
        tries = 0
        while waiting:
            waiting.popleft().range_freed()
            tries += 1
            if tries % _TRIES == 0:
                before = self._busy_ranges.overlapping(ended.first, ended.end)
                if before is not None:
                    # The few go before the many: in this way nothing is copied for each of those.
                    waiting.extendleft(reversed(before.waiting))
                    before.waiting = waiting
                    return

    def _slots_of(self, each: RangeOperation) -> list[int]:
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

    def _send(self, each: RangeOperation) -> None:
        """Nothing is in flight on the range: to the server."""
        offset = each.first << self._index.block_shift
        length = each.end_byte - offset
        flags = each.flags & MAY_UNMAP
        if each.op != DISCARD and self._upstream.can_fua:
            flags |= FUA
        elif each.op == DISCARD:
            flags = each.flags & FUA if self._upstream.can_fua else 0
        each.epoch = self._durability.epoch
        self._busy_ranges.note(each.first, each.end, each.epoch)
        # The request comes first: what is not sent yet is not to be once that is abandoned.
        owner = each.outcome.request, each
        self._upstream.submit(Request(each.op, offset, length, [], self._replied, flags, owner))

    def _replied(self, request: Request) -> None:
        _, each = cast("tuple[Request, RangeOperation]", request.owner)
        if not request.flags & FUA:
            self._durability.acknowledged()
        elif request.error not in (0, ECANCELED):
            self._writeback.flush_failed()
        if request.error or request.flags & FUA or not self._upstream.can_flush:
            self._end(each, request.error)
        elif each.op == DISCARD and not each.flags & FUA:
            self._end(each, 0)
        else:
            each.epoch = self._durability.done_in(sent_in=each.epoch, generation=request.generation)
            self._upstream.submit(Request(FLUSH, 0, 0, [], self._flushed, owner=each))

    def _flushed(self, request: Request) -> None:
        each = request.owner
        assert isinstance(each, RangeOperation)
        if request.error:
            self._writeback.flush_failed()
        lost = each.epoch != self._durability.epoch
        if lost and not request.error:
            self._send(each)
        else:
            self._end(each, request.error)

    def _end(self, each: RangeOperation, error: int) -> None:
        self._drop(each, error)
        # Reads of absent blocks waited, but a fetch may have been asked for before that.
        self._fetcher.overtaken_range(each.first, each.end)
        self._busy_ranges.remove(each)
        self._index.cells[CHANGES] += 1
        self._flusher.arm()
        self._writeback.range_freed()
        if each.waiting:
            self._ended.append(each)
        self._common.turn.finish(each.outcome, error)

    def _drop(self, each: RangeOperation, error: int) -> None:
        """Forget the range. After an error it is unknown what the server did: dirty blocks
        stay, clean ones may differ from what the server has now."""
        index = self._index
        per_granule = 1 << self._shift
        for slot in self._slots_of(each):
            base = index.granule_of[slot] << self._shift
            clip_start = max(each.first - base, 0)
            clip_end = min(each.end - base, per_granule)
            bits = (1 << clip_end) - (1 << clip_start)
            if error:
                bits &= ~index.dirty(slot)
            self._common.slots.drop(slot, bits)
