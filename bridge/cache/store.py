"""Guest writes into the cache, and when each of them is complete.

A write lands in the cache in every mode; what differs is when it completes: in write-back mode
at once, in write-through mode after the server's reply, with FUA when it is durable there. So
whatever completed is in the cache as dirty until a flush covered it, and is sent again if the
server loses it.

Store order, for a kill -9 between any two stores: a present block is marked dirty first and gets
its data after; an absent block gets its data first and becomes valid (and dirty) after.

What can stand in the way: a write that covers part of an absent block needs that block from the
server first; at the hard dirty limit writes wait in order; a discard of the range comes first.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from errno import ECANCELED, EIO

from bridge.request import FUA, Request

from .backend import Backend, Stats
from .buffers import gather
from .cold import Cold
from .exclusive import Exclusives
from .fetch import Fetcher
from .file import MappedImage
from .flush import Flusher
from .index import Index
from .layout import BITS, DIRTY_SHIFT
from .options import WRITEBACK, Options
from .slots import Slots
from .ticket import Ticket
from .writeback import Writeback


class _WriteOp(Ticket):
    """A write that could not complete at once."""

    __slots__ = ("fetches", "position", "request", "store")

    def __init__(self, request: Request, store: Store, position: int) -> None:
        super().__init__(fua=bool(request.flags & FUA))
        self.request = request
        self.store = store
        self.position = position
        """Bytes that are in the cache already."""
        self.fetches = 0

    def fetched(self, first: int, end: int, view: memoryview, error: int) -> None:
        """The rest of a partly written block came; it is in the cache if there was room."""
        self.error = self.error or error
        self.fetches -= 1
        if self.fetches:
            return
        if self.error:
            self.request.finish(self.error)
        else:
            self.store.fetched(self)

    def settled(self) -> None:
        """Everything written was replied to."""
        if not self.error and self.fua and self.unstable:
            self.store.flusher.request(self)
        else:
            self.request.finish(self.error)

    def flushed(self, error: int) -> None:
        """The flush that makes this write durable ended."""
        self.request.finish(error)


class Store:
    """The slow path of WRITE."""

    def __init__(
        self,
        index: Index,
        image: MappedImage,
        slots: Slots,
        fetcher: Fetcher,
        exclusives: Exclusives,
        writeback: Writeback,
        flusher: Flusher,
        backend: Backend,
        cold: Cold,
        options: Options,
        stats: Stats,
        call_at_turn_end: Callable[[Callable[[], None]], None],
    ) -> None:
        self._index = index
        self._image = image
        self._slots = slots
        self._fetcher = fetcher
        self._exclusives = exclusives
        self._writeback = writeback
        self.flusher = flusher
        self._backend = backend
        self._cold = cold
        self._stats = stats
        self._call_at_turn_end = call_at_turn_end
        self._through = options.mode != WRITEBACK
        self._ready = index.ready
        self._open = index.open
        self._queued = writeback.queued
        self._options = options
        self.set_limits()
        self._waiting: deque[_WriteOp] = deque()
        self._loading: set[_WriteOp] = set()
        """Writes that wait until a thread has read a part of the cache file."""
        self._refused = 0
        self._waking = False
        self._pressed = False
        self._lacks_blocks = False
        """The obstacle is that blocks have to be fetched first."""
        self._obstacle: Callable[[_WriteOp], None] = self._wait_for_room

    def set_limits(self) -> None:
        """Take the limits from the sizes of cache and disk, at the start and when that grows."""
        index = self._index
        limits = self._options.dirty_limits(slots=index.slots, granules=index.geometry.granules)
        self._hard_slots = limits.hard
        self._flush_slots = limits.flush

    def write(self, request: Request) -> None:
        """Do a WRITE whose range lies within the disk."""
        self._stats.writes += 1
        if not self._waiting:
            if not (self._through or request.flags or self._exclusives.active):
                try:
                    done = self._write_whole(request)
                except OSError as error:
                    request.finish(self._file_failed(request.offset, error))
                    return
                if done:
                    request.error = 0
                    request.done(request)
                    return
            position = self._store(request, 0)
            if position == request.length and not (self._through or request.flags & FUA):
                request.finish(0)
                return
            op = _WriteOp(request, self, position)
            if position == request.length:
                self._stored(op)
            else:
                self._obstacle(op)
        else:
            self._wait_for_room(_WriteOp(request, self, 0))

    def open_blocks(self, slot: int, bits: int) -> bool:
        """Make these blocks of `slot` open, so that a write to them is a copy; False if they are
        not all `ready` or the write has to wait.

        It is the caller's write that they are dirty for: the dirty mark comes before its data.
        """
        index = self._index
        if (
            bits & ~self._ready[slot]
            or self._through
            or self._waiting
            or self._exclusives.active
            or (index.dirty_slots >= self._hard_slots and not index.dirty(slot))
        ):
            return False
        index.mark_dirty(slot, bits)
        self._open[slot] |= bits
        self._written(slot)
        return True

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
        word = index.state[slot]
        if not word >> DIRTY_SHIFT & BITS and index.dirty_slots >= self._hard_slots:
            return False
        slot = slot or self._slots.obtain(granule)
        if not slot:
            return False
        index.mark_dirty(slot, bits)
        target = (slot << index.granule_shift) + within
        ready = index.ready[slot]
        if ready & bits == bits:
            index.data[target : target + length] = request.buffers[0]
        else:
            index.put(target, request.buffers[0])
        self._now_dirty(slot, granule, bits, bits & ~word)
        return True

    def advance(self, op: _WriteOp) -> None:
        """Go on with a write whose obstacle may be gone."""
        if op.request.is_abandoned:
            op.request.finish(ECANCELED)
            return
        op.position = self._store(op.request, op.position)
        if op.position == op.request.length:
            self._stored(op)
        else:
            self._obstacle(op)

    def fetched(self, op: _WriteOp) -> None:
        """The blocks that `op` covers only partly were fetched."""
        if op.request.is_abandoned:
            op.request.finish(ECANCELED)
            return
        position = op.position
        op.position = self._store(op.request, op.position)
        if op.position == op.request.length:
            self._stored(op)
        elif op.position == position and self._lacks_blocks:
            # They found no room in the cache: asking the server again would not help.
            self._wait_for_room(op)
        else:
            self._obstacle(op)

    def wake(self) -> None:
        """There may be room for writes that wait, or none to be had any more."""
        if self._waking:
            return
        if self._backend.gone:
            self._fail_waiting(EIO)
        self._waking = True
        waiting = self._waiting
        while waiting and self._index.dirty_slots < self._hard_slots:
            op = waiting.popleft()
            if op.request.is_abandoned:
                op.request.finish(ECANCELED)
                continue
            op.position = self._store(op.request, op.position)
            if op.position == op.request.length:
                self._stored(op)
            elif self._obstacle == self._wait_for_room:
                waiting.appendleft(op)
                break
            else:
                self._obstacle(op)
        self._waking = False
        if waiting and self._index.dirty_slots >= self._hard_slots:
            self._press()

    def refuse(self, errno: int) -> None:
        """Writes that wait for room or for the cache's disk fail with `errno`, and so do those
        that would have to wait for room from here on; 0: no longer."""
        self._refused = errno
        if errno:
            self._fail_waiting(errno)
            loading, self._loading = self._loading, set()
            for op in loading:
                op.request.finish(errno)

    def _fail_waiting(self, errno: int) -> None:
        while self._waiting:
            self._waiting.popleft().request.finish(errno)

    @property
    def waiting(self) -> int:
        """Writes that wait at the hard dirty limit."""
        return len(self._waiting)

    def _stored(self, op: _WriteOp) -> None:
        """All of the write is in the cache: complete it when its time has come."""
        if op.fua and not self._backend.can_fua:
            self.flusher.request(op)
        elif op.fua or self._through:
            index, request = self._index, op.request
            first = request.offset >> index.granule_shift
            last = request.offset + request.length - 1 >> index.granule_shift
            slots = [slot for each in range(first, last + 1) if (slot := index.find(each))]
            op.pending = 1
            self._writeback.want(slots, op)
            op.release()
        else:
            op.request.finish(0)

    def _store(self, request: Request, position: int) -> int:
        """Store from byte `position` on; returns how far that went. If not to the end,
        `_obstacle` deals with why."""
        index = self._index
        granule_bytes = index.granule_bytes
        length = request.length
        while position < length:
            at = request.offset + position
            within = at & granule_bytes - 1
            size = min(length - position, granule_bytes - within)
            try:
                stored = self._store_piece(request, position, at, within, size)
            except OSError as error:
                self._lacks_blocks = False
                self._obstacle = _fail_with(self._file_failed(at, error))
                return position
            if not stored:
                return position
            position += size
        return position

    def _store_piece(
        self, request: Request, position: int, at: int, within: int, size: int
    ) -> bool:
        """Store `size` bytes that lie in one granule; False (nothing changed) if that has to
        wait."""
        index = self._index
        shift = index.block_shift
        granule = at >> index.granule_shift
        end = within + size
        first, last = within >> shift, end - 1 >> shift
        bits = (2 << last) - (1 << first)
        base_block = granule << index.granule_shift - shift
        if self._exclusives.active and self._held(base_block + first, base_block + last + 1):
            return False
        self._lacks_blocks = False
        slot = index.find(granule)
        word = index.state[slot] if slot else 0
        valid = word & BITS
        dirty = word >> DIRTY_SHIFT & BITS
        partial = self._partial(at, within, end, first, last)
        if not dirty and index.dirty_slots >= self._hard_slots:
            self._obstacle = self._wait_for_room
            return False
        if partial & ~valid:
            self._lacks_blocks = True
            self._obstacle = lambda op: self._fetch_partial(op, base_block, partial & ~valid)
            return False
        if partial & ~index.ready[slot] and not self._image.resident(
            (slot << index.granule_shift) + within, size
        ):
            self._obstacle = lambda op: self._load(op, slot, partial)
            return False
        if not slot:
            slot = self._slots.obtain(granule)
            if not slot:
                self._obstacle = self._wait_for_room
                return False
        target = (slot << index.granule_shift) + within
        index.mark_dirty(slot, bits)
        self._put(request, position, size, slot, target, bits)
        self._now_dirty(slot, granule, bits, bits & ~valid)
        return True

    def _put(
        self, request: Request, position: int, size: int, slot: int, target: int, bits: int
    ) -> None:
        """The data of the blocks `bits`, all of one granule."""
        index = self._index
        if index.ready[slot] & bits == bits:
            gather(request.buffers, position, index.data, target, size)
        elif len(request.buffers) == 1:
            index.put(target, request.buffers[0][position : position + size])
        else:
            joined = bytearray(size)
            gather(request.buffers, position, joined, 0, size)
            index.put(target, joined)

    def _now_dirty(self, slot: int, granule: int, bits: int, absent: int) -> None:
        """The data of `bits` is there; the `absent` ones become valid."""
        index = self._index
        if absent:
            index.set_valid(slot, absent, absent)
            if self._fetcher.fetching:
                self._fetcher.overtaken(granule, absent)
        index.ready[slot] |= bits
        if not self._through:
            index.open[slot] |= bits
        self._written(slot)

    def _written(self, slot: int) -> None:
        """Something in `slot` is dirty now: it is to be sent some time, and flushed."""
        flusher = self.flusher
        flusher.writes += 1
        if flusher.due is None:
            flusher.arm()
        if self._queued[slot]:
            return
        writeback = self._writeback
        writeback.enqueue(slot)
        if not self._pressed and (
            self._index.dirty_slots > self._flush_slots or writeback.over_background()
        ):
            self._press()

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
            self.flusher.writes += 1
            self.flusher.arm()
        return error.errno or EIO

    # What can stand in the way.

    def _held(self, first: int, end: int) -> bool:
        before = self._exclusives.overlapping(first, end)
        if before is None:
            return False
        waiting = before.waiting
        self._obstacle = lambda op: waiting.append(lambda: self.advance(op))
        return True

    def _wait_for_room(self, op: _WriteOp) -> None:
        if self._refused or self._backend.gone:
            op.request.finish(self._refused or EIO)
            return
        self._stats.writes_waited += 1
        self._waiting.append(op)
        self._press()

    def _fetch_partial(self, op: _WriteOp, base_block: int, bits: int) -> None:
        """Fetch the blocks that the write covers only partly."""
        op.error = 0
        op.fetches = 1
        while bits:
            block = base_block + (bits & -bits).bit_length() - 1
            op.fetches += self._fetcher.need(block, block + 1, op)
            bits &= bits - 1
        op.fetches -= 1

    def _load(self, op: _WriteOp, slot: int, bits: int) -> None:
        """Bring blocks that are written partly back into the page cache, then go on."""
        index = self._index

        def done(error: int) -> None:
            if op not in self._loading:
                return  # refused meanwhile
            self._loading.remove(op)
            if error:
                self._stats.file_errors += 1
                op.request.finish(error)
                return
            index.ready[slot] |= bits & index.valid(slot)
            self.advance(op)

        self._loading.add(op)
        self._slots.load(self._image, self._cold, slot, done)

    def _press(self) -> None:
        """Much is dirty: see to it at the end of this turn."""
        if not self._pressed:
            self._pressed = True
            self._call_at_turn_end(self._pressure)

    def _pressure(self) -> None:
        self._pressed = False
        if self._waiting or self._index.dirty_slots > self._flush_slots:
            self.flusher.press()
        else:
            self._writeback.tick_now()


def _fail_with(errno: int) -> Callable[[_WriteOp], None]:
    """An obstacle that nothing removes."""

    def fail(op: _WriteOp) -> None:
        op.request.finish(errno)

    return fail
