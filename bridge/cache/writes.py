"""Guest writes into the cache, and when each of them is complete.

A write lands in the cache in every mode; what differs is when it completes: in write-back mode
at once, in write-through mode after the server's reply, with FUA when it is durable there. So
a write that completed is in the cache as dirty until a flush covered it, and is sent again if the
server loses it.

Store order, for a kill -9 between any two stores: a present block is marked dirty first and gets
its data after; an absent block gets its data first and becomes valid (and dirty) after.

A write that cannot be stored at once waits for one of a few things (`WaitReason`), and is tried
again from where it stopped when that is over.
"""

from __future__ import annotations

from collections import deque
from errno import ECANCELED, EIO

from bridge.cache.busy_ranges import BusyRanges
from bridge.cache.cache_options import WRITEBACK
from bridge.cache.common import Common
from bridge.cache.fetch import Fetcher
from bridge.cache.file.layout import BITS, DIRTY_SHIFT
from bridge.cache.flush import Flusher
from bridge.cache.waiting_writes import NO_SLOT, TOO_DIRTY, Wait, WaitReason, WriteOp
from bridge.cache.writeback import Writeback
from bridge.datapath.buffers import gather
from bridge.datapath.cells import CHANGES, DIRTY_SLOTS, FLUSH_SLOTS, HARD_SLOTS
from bridge.datapath.request import FUA, WRITE, Request
from bridge.datapath.turn import Outcome


class Writes:
    """The slow path of WRITE."""

    def __init__(
        self,
        common: Common,
        fetcher: Fetcher,
        busy_ranges: BusyRanges,
        writeback: Writeback,
        flusher: Flusher,
    ) -> None:
        self._common = common
        self._index = common.index
        self._image = common.image
        self._slots = common.slots
        self._upstream = common.upstream
        self._stats = common.stats
        self._fetcher = fetcher
        self._busy_ranges = busy_ranges
        self._writeback = writeback
        self._flusher = flusher
        self._through = common.options.mode != WRITEBACK
        self._ready = common.index.ready
        self._cells = common.index.cells
        self._ring = writeback.ring
        self._queued = writeback.ring.queued
        self._for_room: deque[WriteOp] = deque()
        self._for_load: set[WriteOp] = set()
        self.fetched: list[WriteOp] = []
        """Writes whose partly covered blocks have come, or could not be had."""
        self._evicted: deque[WriteOp] = deque()
        """Writes whose blocks have come, and were gone before they could be used: evicted for what
        others had fetched. They fetch them again one after the other, or that would go on."""
        self._fetches_again: WriteOp | None = None
        self.written_out: list[WriteOp] = []
        """Writes that had to reach the server, all of whose blocks were replied to."""
        self._refused = 0
        self._pressed = False
        """Much became dirty: to be looked at in this turn."""

    @property
    def waiting(self) -> dict[str, int]:
        """How many writes wait here, and why."""
        return {
            WaitReason.ROOM.value: len(self._for_room),
            WaitReason.LOAD.value: len(self._for_load),
        }

    def write(self, request: Request) -> None:
        """Do a WRITE whose range lies within the disk."""
        self._stats.writes += 1
        if self._for_room:
            self._wait(WriteOp(request, self, 0), TOO_DIRTY)
            return
        if not (self._through or request.flags or self._busy_ranges):
            try:
                done = self._write_whole(request)
            except OSError as error:
                self._common.turn.finish(request, self._file_failed(request.offset, error))
                return
            if done:
                self._common.turn.finish(request)
                return
        done_bytes, wait = self._store(request, 0)
        if wait is None and not (self._through or request.flags & FUA):
            self._common.turn.finish(request)
            return
        self._stored(WriteOp(request, self, done_bytes), wait)

    @property
    def through(self) -> bool:
        """A write is complete once the server has it. May be changed between two turns: see
        `Cache.set_write_back`."""
        return self._through

    @through.setter
    def through(self, through: bool) -> None:
        self._through = through

    def open_blocks(self, slot: int, bits: int) -> bool:
        """Make these blocks of `slot` open, so that a write to them is a copy; False if they are
        not all `ready` or the write has to wait.

        It is the caller's write that they are dirty for: the dirty mark comes before its data.
        Compiled code does the same by itself (`open_plain` in `datapath/native/core.c`), where
        `may_open`: a change here is one there.
        """
        index, cells = self._index, self._cells
        if (
            bits & ~self._ready[slot]
            or self._through
            or self._for_room
            or self._busy_ranges
            or (cells[DIRTY_SLOTS] >= cells[HARD_SLOTS] and not index.dirty(slot))
        ):
            return False
        index.write_open(slot, bits)
        self._written(slot)
        return True

    def may_open(self) -> bool:
        """Until anything is called, or time has gone by, `open_blocks` of blocks that are `ready`
        does no more than to change what is flat; unless much is dirty, which can be seen there."""
        return (
            not (self._through or self._for_room or self._busy_ranges)
            and self._flusher.is_armed
            and self._ring.is_marked(self._common.clock())
        )

    def store_at_once(self, offset: int, length: int, buffers: list[memoryview]) -> bool:
        """Store a write that need not be durable; False if it has to wait, for whatever that is. It
        is stored up to there, and is to be done once more by `write`.

        The buffers are only lent.
        """
        beyond = offset + length > self._index.geometry.disk_bytes
        if beyond or self._for_room or self._through:
            return False
        request = Request(WRITE, offset, length, buffers, _nobody_waits)
        try:
            if not self._busy_ranges and self._write_whole(request):
                return True
        except OSError as error:
            self._file_failed(offset, error)
            return False
        _, wait = self._store(request, 0)
        return wait is None

    # What waits.

    def advance(self) -> bool:
        """See `Stage`."""
        moved = False
        if self.fetched:
            fetched, self.fetched = self.fetched, []
            for op in fetched:
                self._after_fetch(op)
            moved = True
        while self._evicted and self._fetches_again is None:
            self._fetch_again(self._evicted.popleft())
            moved = True
        if self.written_out:
            written_out, self.written_out[:] = list(self.written_out), []
            for op in written_out:
                self._after_write_out(op)
            moved = True
        if self._for_room:
            moved |= self._let_in()
        if self._pressed:
            self._pressed = False
            if self._cells[DIRTY_SLOTS] > self._cells[FLUSH_SLOTS]:
                self._flusher.press()
            else:
                self._writeback.tick_now()
            moved = True
        if self._for_room:
            moved |= self._flusher.press()
        return moved

    def go_on(self, op: WriteOp) -> None:
        """Try again from where `op` stopped: its wait may be gone."""
        if op.request.is_abandoned:
            self._common.turn.finish(op.request, ECANCELED)
            return
        op.done_bytes, wait = self._store(op.request, op.done_bytes)
        self._stored(op, wait)

    def _fetch_again(self, op: WriteOp) -> None:
        self.go_on(op)
        if op.fetches:
            self._fetches_again = op

    def _after_fetch(self, op: WriteOp) -> None:
        if op is self._fetches_again:
            self._fetches_again = None
        if op.error or op.request.is_abandoned:
            self._common.turn.finish(op.request, op.error or ECANCELED)
            return
        before = op.done_bytes
        op.done_bytes, wait = self._store(op.request, before)
        if wait is not None and wait.why is WaitReason.FETCH and op.done_bytes == before:
            # What was fetched is not in the cache.
            if op.not_kept:
                wait = Wait(WaitReason.FAILED, error=op.not_kept)
            elif not self._slots.available:
                wait = NO_SLOT  # Asking the server again would not help before.
            else:
                self._evicted.append(op)
                return
        self._stored(op, wait)

    def _after_write_out(self, op: WriteOp) -> None:
        if not op.error and op.fua and op.unstable:
            self._flusher.request(op.request)
        else:
            self._common.turn.finish(op.request, op.error)

    def _let_in(self) -> bool:
        """Let the writes go on that wait for room, in order; False if there is none."""
        if self._upstream.gone:
            self._fail_for_room(EIO)
            return True
        waiting, moved = self._for_room, False
        while waiting and self._has_room(waiting[0]):
            moved = True
            op = waiting.popleft()
            if op.request.is_abandoned:
                self._common.turn.finish(op.request, ECANCELED)
                continue
            op.done_bytes, wait = self._store(op.request, op.done_bytes)
            if wait is not None and wait.why is WaitReason.ROOM:
                # Now it needs something else. What it needs was looked for just now and is not
                # there, so that this does not repeat itself.
                op.needs_slot = wait is NO_SLOT
                waiting.appendleft(op)
            else:
                self._stored(op, wait)
        return moved

    def _has_room(self, op: WriteOp) -> bool:
        """What `op` waits for may be there by now."""
        return self._cells[DIRTY_SLOTS] < self._cells[HARD_SLOTS] and (
            not op.needs_slot or self._slots.available
        )

    def refuse(self, errno: int) -> None:
        """Writes that wait for room or for the cache's disk fail with `errno`, and so do those
        that would have to wait for room from here on; 0: no longer."""
        self._refused = errno
        if errno:
            self._fail_for_room(errno)
            loading, self._for_load = self._for_load, set()
            for op in loading:
                self._common.turn.finish(op.request, errno)
                del op.request  # The job knows `op`: it must not keep the guest's memory alive.

    def _fail_for_room(self, errno: int) -> None:
        while self._for_room:
            self._common.turn.finish(self._for_room.popleft().request, errno)

    def _stored(self, op: WriteOp, wait: Wait | None) -> None:
        """The write is in the cache up to its `wait`; without one it completes in its time."""
        if wait is not None:
            self._wait(op, wait)
        elif op.fua and not self._upstream.can_fua:
            self._flusher.request(op.request)
        elif op.fua or self._through:
            index, request = self._index, op.request
            first = request.offset >> index.granule_shift
            last = request.offset + request.length - 1 >> index.granule_shift
            slots = [slot for each in range(first, last + 1) if (slot := index.find(each))]
            op.pending = 1
            self._writeback.want(slots, op)
            op.release()
        else:
            self._common.turn.finish(op.request)

    def _wait(self, op: WriteOp, wait: Wait) -> None:
        """Put `op` where it is found when `wait` is gone."""
        why = wait.why
        if why is WaitReason.FAILED:
            self._common.turn.finish(op.request, wait.error)
        elif why is WaitReason.FETCH:
            self._fetch_partial(op, wait)
        elif why is WaitReason.LOAD:
            self._load(op, wait)
        elif why is WaitReason.DISCARD:
            shift = self._index.block_shift
            first = wait.offset >> shift
            bits = wait.bits
            before = self._busy_ranges.overlapping(first, first + bits.bit_length())
            assert before is not None
            before.waiting.append(op)
        elif self._refused or self._upstream.gone:
            self._common.turn.finish(op.request, self._refused or EIO)
        else:
            self._stats.writes_waited += 1
            op.needs_slot = wait is NO_SLOT
            self._for_room.append(op)

    def _fetch_partial(self, op: WriteOp, wait: Wait) -> None:
        """Fetch the blocks that the write covers only partly."""
        op.error = op.not_kept = 0
        op.fetches = 1
        base_block = wait.offset >> self._index.block_shift
        bits = wait.bits
        while bits:
            block = base_block + (bits & -bits).bit_length() - 1
            op.fetches += self._fetcher.need(block, block + 1, op)
            bits &= bits - 1
        op.fetches -= 1

    def _load(self, op: WriteOp, wait: Wait) -> None:
        """Bring blocks that are written partly back into the page cache, then go on."""

        def loaded(outcome: Outcome) -> None:
            if op not in self._for_load:
                return  # refused meanwhile
            self._for_load.remove(op)
            if outcome.error:
                self._stats.file_errors += 1
                self._common.turn.finish(op.request, outcome.error)
                return
            self._index.found_resident(wait.slot, wait.bits)
            self.go_on(op)

        self._for_load.add(op)
        self._slots.load(self._image, self._common.cold, wait.slot, loaded)

    # Storing.

    def _store(self, request: Request, done_bytes: int) -> tuple[int, Wait | None]:
        """Store from byte `done_bytes` on: how far that went and, if not to the end, why."""
        index = self._index
        granule_bytes = index.granule_bytes
        length = request.length
        while done_bytes < length:
            at = request.offset + done_bytes
            within = at & granule_bytes - 1
            size = min(length - done_bytes, granule_bytes - within)
            try:
                wait = self._store_piece(request, done_bytes, at, within, size)
            except OSError as error:
                return done_bytes, Wait(WaitReason.FAILED, error=self._file_failed(at, error))
            if wait is not None:
                return done_bytes, wait
            done_bytes += size
        return done_bytes, None

    def _store_piece(
        self, request: Request, done_bytes: int, at: int, within: int, size: int
    ) -> Wait | None:
        """Store `size` bytes that lie in one granule, or say what stands in the way (nothing
        changed then)."""
        index = self._index
        shift = index.block_shift
        granule = at >> index.granule_shift
        end = within + size
        first, last = within >> shift, end - 1 >> shift
        bits = (2 << last) - (1 << first)
        granule_at = granule << index.granule_shift
        if self._busy_ranges:
            block = at >> shift
            if self._busy_ranges.overlapping(block, block + last - first + 1) is not None:
                return Wait(WaitReason.DISCARD, block << shift, bits=bits >> first)
        slot = index.find(granule)
        word = index.state[slot] if slot else 0
        valid = word & BITS
        dirty = word >> DIRTY_SHIFT & BITS
        partial = self._partial(at, within, end, first, last)
        if not dirty and self._cells[DIRTY_SLOTS] >= self._cells[HARD_SLOTS]:
            return TOO_DIRTY
        if partial & ~valid:
            return Wait(WaitReason.FETCH, granule_at, bits=partial & ~valid)
        if partial & ~index.ready[slot] and not self._image.resident(
            (slot << index.granule_shift) + within, size
        ):
            return Wait(WaitReason.LOAD, granule_at, slot, partial)
        if not slot:
            slot = self._slots.obtain(granule)
            if not slot:
                return NO_SLOT
        target = (slot << index.granule_shift) + within
        index.write(slot, bits)
        self._put(request, done_bytes, size, slot, target, bits)
        self._now_dirty(slot, granule, bits, bits & ~valid)
        return None

    def _write_whole(self, request: Request) -> bool:
        """The common case in one go: whole blocks of one granule, one buffer. False: it is not
        that case, nothing was done. (Half the time of the general way.)"""
        index = self._index
        offset, length = request.offset, request.length
        within = offset & index.granule_bytes - 1
        if (
            (offset | length) & index.block_bytes - 1
            or within + length > index.granule_bytes
            or len(request.buffers) != 1
        ):
            return False
        shift = index.block_shift
        bits = (1 << (within + length >> shift)) - (1 << (within >> shift))
        granule = offset >> index.granule_shift
        slot = index.head[granule & index.bucket_mask]
        if index.granule_of[slot] != granule:
            slot = index.find(granule)
        word, cells = index.state[slot], self._cells
        if not word >> DIRTY_SHIFT & BITS and cells[DIRTY_SLOTS] >= cells[HARD_SLOTS]:
            return False
        slot = slot or self._slots.obtain(granule)
        if not slot:
            return False
        index.write(slot, bits)
        target = (slot << index.granule_shift) + within
        ready = index.ready[slot]
        if ready & bits == bits:
            index.data[target : target + length] = request.buffers[0]
        else:
            index.put(target, request.buffers[0])
        self._now_dirty(slot, granule, bits, bits & ~word)
        return True

    def _put(
        self, request: Request, done_bytes: int, size: int, slot: int, target: int, bits: int
    ) -> None:
        """The data of the blocks `bits`, all of one granule."""
        index = self._index
        if index.ready[slot] & bits == bits:
            gather(request.buffers, done_bytes, index.data, target, size)
        elif len(request.buffers) == 1:
            index.put(target, request.buffers[0][done_bytes : done_bytes + size])
        else:
            joined = bytearray(size)
            gather(request.buffers, done_bytes, joined, 0, size)
            index.put(target, joined)

    def _now_dirty(self, slot: int, granule: int, bits: int, absent: int) -> None:
        """The data of `bits` is there; the `absent` ones become valid."""
        self._index.stored(slot, bits, absent, keep_open=not self._through)
        if absent and self._fetcher.fetching:
            self._fetcher.overtaken(granule, absent)
        self._written(slot)

    def _written(self, slot: int) -> None:
        """Something in `slot` is dirty now: it is to be sent some time, and flushed."""
        flusher, cells = self._flusher, self._cells
        cells[CHANGES] += 1
        if flusher.due is None:
            flusher.arm()
        if self._queued[slot]:
            return
        self._ring.put(slot, self._common.clock())
        if cells[DIRTY_SLOTS] > cells[FLUSH_SLOTS] or self._writeback.pace.over_background():
            self._pressed = self._common.turn.wanted = True

    def _partial(self, at: int, within: int, end: int, first: int, last: int) -> int:
        """Blocks of which this write covers only a part."""
        block = self._index.block_bytes
        partial = 0
        if within & block - 1:
            partial = 1 << first
        if end & block - 1 and at - within + end != self._index.geometry.disk_bytes:
            partial |= 1 << last
        return partial

    def _file_failed(self, offset: int, error: OSError) -> int:
        """The cache file refused a store at `offset` of the disk; returns the errno.

        An absent block stays absent. A present one stays dirty with part of the new content,
        which is what a failed write may leave.
        """
        self._stats.file_errors += 1
        index = self._index
        slot = index.find(offset >> index.granule_shift)
        if slot and not index.state[slot]:
            self._slots.drop(slot, BITS)
        elif slot and index.dirty(slot):
            self._writeback.enqueue(slot)
            self._cells[CHANGES] += 1
            self._flusher.arm()
        return error.errno or EIO


def _nobody_waits(request: Request) -> None:
    """The end of a write that has ended where it began."""
