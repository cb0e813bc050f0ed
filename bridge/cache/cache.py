"""The cache: a `Target` over another one, whose hits can be served on the spot.

`Cache` joins the parts; what each of them guarantees is said there. The fast path is
`hits`; everything else goes to `reads`, `writes`, `flush` or `range_requests`. What its owner may
ask about changes that others made is `foreign`.

The cache is a stage of the loop's turn: what waits stands in one of the parts' queues, and
`advance` lets go on what can. It has no task and no clock: its owner calls `tick()` at
`next_deadline()`, which is asked for after every turn.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from bridge.cache.busy_ranges import BusyRanges
from bridge.cache.cache_options import Options
from bridge.cache.cold import Cold, InlineCold
from bridge.cache.common import Common
from bridge.cache.eviction import Evictor
from bridge.cache.fetch import Fetcher
from bridge.cache.file.cache_file import MappedImage
from bridge.cache.file.opening import damaged_index
from bridge.cache.flush import Flusher
from bridge.cache.foreign import ForeignChanges
from bridge.cache.hits import CacheHits
from bridge.cache.index import Index
from bridge.cache.range_operations import RangeOperations
from bridge.cache.range_requests import RangeRequests
from bridge.cache.readahead import Readahead
from bridge.cache.reads import Reads
from bridge.cache.resize import Resizer
from bridge.cache.slots import Slots
from bridge.cache.upstream import Stats, Upstream
from bridge.cache.writeback import Writeback
from bridge.cache.writes import Writes
from bridge.datapath.durability import ReplayingDurability
from bridge.datapath.request import (
    BLOCK_STATUS,
    DISCARD,
    FLUSH,
    PREFETCH,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bridge.datapath.turn import Outcome, Turn


class Cache:
    """One disk's cache over `upstream`, in `image`.

    `clock` returns seconds of a monotonic clock; `turn` is the loop's, which calls `advance`
    (`turn.add_stage`); `cold` runs reads that would block.
    Raises ConfigError when the index of `image` is damaged, unless `skip_damaged`: see
    `Index.load`.
    """

    def __init__(
        self,
        image: MappedImage,
        upstream: Upstream,
        options: Options,
        *,
        clock: Callable[[], float],
        turn: Turn,
        cold: Cold | None = None,
        skip_damaged: bool = False,
    ) -> None:
        index = self.index = Index(image)
        self._evictor = Evictor(index.slots)
        common = self._common = Common(
            index=index,
            slots=Slots(index, self._evictor),
            image=image,
            upstream=upstream,
            options=options,
            stats=Stats(),
            durability=ReplayingDurability(upstream),
            turn=turn,
            cold=cold or InlineCold(turn),
            clock=clock,
        )
        self.options = options
        self.stats = common.stats
        self.size_bytes = index.geometry.disk_bytes
        self._turn = turn
        self._frozen = False
        self._residency_due = clock() + options.residency_s
        self._join(common)
        self._adopt(self._load(skip_damaged=skip_damaged))

    def _join(self, common: Common) -> None:
        """Make the parts: each knows those before it."""
        index, options = common.index, common.options
        busy_ranges = self._busy_ranges = BusyRanges(common)
        fetcher = self._fetcher = Fetcher(common)
        writeback = self._writeback = Writeback(common, busy_ranges)
        flusher = self._flusher = Flusher(common, writeback, busy_ranges)
        self._range_operations = RangeOperations(common, busy_ranges, fetcher, writeback, flusher)
        self._readahead = Readahead(
            index, fetcher, common.slots.discount_scan_hits, options, self.stats
        )
        self._reads = Reads(common, fetcher, busy_ranges, self._readahead)
        self._writes = Writes(common, fetcher, busy_ranges, writeback, flusher)
        self._resizer = Resizer(common, fetcher, self._grown)
        self._range_requests = RangeRequests(common, self._range_operations, self.submit)
        self.foreign = ForeignChanges(common, busy_ranges, fetcher)
        """Whether the export changed without us, and what is dropped then."""
        ring = writeback.ring
        self.hits = CacheHits(index, self._evictor, self._writes, ring, self.stats)
        """What can be asked before `submit`."""
        self.read_hit = self.hits.read_hit
        self.write_hit = self.hits.write_hit

    def _load(self, *, skip_damaged: bool) -> list[int]:
        try:
            return self.index.load(skip_damaged=skip_damaged)
        except ValueError as error:
            fault = str(error)
        # Not inside `except`: the traceback of that error has views of the file, which would
        # keep it mapped and locked.
        raise damaged_index(getattr(self._common.image, "path", ""), fault)

    def _adopt(self, dirty: list[int]) -> None:
        """Take over the slots that were found in the file."""
        index = self.index
        self._evictor.adopt(index.used_slots())
        for slot in dirty:
            self._writeback.enqueue(slot)
        if dirty:
            self._flusher.arm()

    def submit(self, request: Request) -> None:
        """Start `request`; a hit is finished when this returns. Never raises, never blocks."""
        op = request.op
        if (
            self.read_hit(request.offset, request.length, request.buffers)
            if op == READ
            else op == WRITE
            and not request.flags
            and self.write_hit(request.offset, request.length, request.buffers)
        ):
            self._turn.finish(request)
        else:
            self.submit_slowly(request)

    def submit_slowly(self, request: Request) -> None:
        """The same as `submit`, for a request that was found to be no hit."""
        self._turn.wanted = True
        op, length = request.op, request.length
        if op == FLUSH:
            self._flusher.request(request)
        elif length <= 0 or request.offset < 0 or request.offset + length > self.size_bytes:
            self._turn.finish(request, 0 if length == 0 else errno.EINVAL)
        elif op == READ:
            self._reads.read(request)
        elif op == WRITE:
            self._writes.write(request)
        elif op == PREFETCH:
            self._reads.prefetch(request)
        elif op == DISCARD:
            self._range_requests.discard(request)
        elif op == WRITE_ZEROES:
            self._range_requests.write_zeroes(request)
        elif op == BLOCK_STATUS:
            self._common.upstream.submit(request)
        else:
            self._turn.finish(request, errno.EOPNOTSUPP)

    def advance(self) -> bool:
        """See `Stage`: every part does what it can do now. Fetches last, so that those of one turn
        are merged."""
        moved = self._range_operations.advance()
        moved |= self._writes.advance()
        moved |= self._flusher.advance()
        moved |= self._writeback.advance()
        return moved | self._fetcher.advance()

    @property
    def waiting(self) -> dict[str, int]:
        """How much waits in the cache, by what it waits for. Requests, but for fetches (runs of
        blocks that are not asked for yet), write-out (slots) and discards."""
        return {
            **self._writes.waiting,
            "fetch": self._fetcher.waiting,
            "cold read": self._reads.waiting,
            "write-out": self._writeback.waiting,
            "flush": self._flusher.waiting,
            "discard": self._range_operations.active,
        }

    def refuse(self, errno: int) -> None:
        """Fail with `errno` all requests that wait for room or for the cache's disk, and those that
        would have to. What waits for the server's answer is not touched. 0: they may wait again."""
        self._turn.want()
        self._writes.refuse(errno)
        self._reads.refuse(errno)

    @property
    def flush_interval_s(self) -> float:
        """See `Options`. May be changed: writes that are unflushed then wait no longer than the new
        interval, either."""
        return self._flusher.interval_s

    @flush_interval_s.setter
    def flush_interval_s(self, interval_s: float) -> None:
        self._flusher.set_interval(interval_s)
        self._turn.want()  # Only a loop that is awake looks at deadlines.

    @property
    def is_write_back(self) -> bool:
        """A write is complete once it is in the cache; else, once the server has it."""
        return not self._writes.through

    def set_write_back(self, write_back: bool) -> None:
        """Change that, between two turns: for writes that are not complete as well. Dirty blocks
        stay dirty until they are written out."""
        self._writes.through = not write_back
        # A write to an open block is no more than a copy.
        self.index.forget_residency()

    def freeze(self, frozen: bool) -> None:
        """Begin nothing by itself (write-out by age, flush by time), or do it again. What the
        upstream gets then has to be refused by itself."""
        self._frozen = frozen

    def upstream_reconnected(self) -> None:
        """The connection was replaced: call this after `upstream.generation` was raised and
        before unanswered requests are sent again."""
        self._turn.want()
        self._common.durability.reconnected()
        self._writeback.lost()
        if self.index.dirty_slots:
            self._flusher.arm()

    def resize(self, size_bytes: int, outcome: Outcome) -> None:
        """The disk behind has grown to `size_bytes`; `outcome` is finished when that is so here.

        Before that requests past the old size fail with EINVAL, and after an error as well:
        the last block could not be read, or no cache can be for a disk of that size (EFBIG).
        A size that is not larger changes nothing. The number of slots stays.
        """
        self._turn.want()
        self._resizer.resize(size_bytes, outcome)

    def _grown(self) -> None:
        self.size_bytes = self.index.geometry.disk_bytes
        self._writeback.pace.set_limits()

    def next_deadline(self) -> float | None:
        """When `tick()` has something to do, on the clock of the constructor; None: not before
        something else happens."""
        if self._frozen:
            return None
        due = self._flusher.due if not self._flusher.running else None
        other = self._writeback.pace.next_deadline()
        if due is None or (other is not None and other < due):
            due = other
        if self._common.image.may_go_cold and (due is None or self._residency_due < due):
            due = self._residency_due
        return due

    def tick(self, now: float) -> None:
        """Do what is due: the flush timer, write-out by age."""
        if self._frozen:
            return
        self._turn.want()
        self._flusher.tick(now)
        self._writeback.tick(now)
        if now >= self._residency_due:
            # Blocks that are used have stayed in the page cache; the others are asked about.
            self._residency_due = now + self.options.residency_s
            self.index.forget_residency()
