"""The cache: a `Target` over another one, whose hits can be served on the spot.

`Cache` joins the parts; what each of them guarantees is said there. The fast path is here:
`read_hit` of blocks that are all `ready`, `write_hit` of blocks that are all `open`, within one
granule. Both are one look-up, one bit test and one copy. Everything else goes to `reads`, `store`,
`flush` or `exclusive`.

The cache is a stage of the loop's turn: what waits stands in one of the parts' queues, and
`advance` lets go on what can. It has no task and no clock: its owner calls `tick()` at
`next_deadline()`, which is asked for after every turn.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from bridge.cache.cache_options import Options
from bridge.cache.cold import Cold, InlineCold
from bridge.cache.common import Common
from bridge.cache.discards import Discards
from bridge.cache.eviction import UP, Evictor
from bridge.cache.exclusive import Exclusives
from bridge.cache.fetch import Fetcher
from bridge.cache.file.cache_file import MappedImage
from bridge.cache.file.layout import BITS
from bridge.cache.file.opening import damaged_index
from bridge.cache.flush import Flusher
from bridge.cache.index import Index
from bridge.cache.range_requests import Ranges
from bridge.cache.readahead import Readahead
from bridge.cache.reads import Reads
from bridge.cache.resize import Resizer
from bridge.cache.sample import Sample, check_sample, compare
from bridge.cache.slots import Slots
from bridge.cache.store import Store
from bridge.cache.upstream import Backend, Stats
from bridge.cache.writeback import Writeback
from bridge.datapath.cells import Resident
from bridge.datapath.durability import Kept
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

_THOROUGH_COUNT = 256
"""Blocks compared before dirty data goes out: a small cache wholly, and a few seconds at worst."""


class Cache:
    """One disk's cache over `backend`, in `image`.

    `clock` returns seconds of a monotonic clock; `turn` is the loop's, which calls `advance`
    (`turn.add_stage`); `cold` runs reads that would block.
    Raises ConfigError when the index of `image` is damaged, unless `skip_damaged`: see
    `Index.load`.
    """

    def __init__(
        self,
        image: MappedImage,
        backend: Backend,
        options: Options,
        *,
        clock: Callable[[], float],
        turn: Turn,
        cold: Cold | None = None,
        skip_damaged: bool = False,
    ) -> None:
        index = Index(image)
        evictor = Evictor(index.slots)
        slots = Slots(index, evictor)
        common = self._common = Common(
            index=index,
            slots=slots,
            image=image,
            backend=backend,
            options=options,
            stats=Stats(),
            durability=Kept(backend),
            turn=turn,
            cold=cold or InlineCold(turn),
            clock=clock,
        )
        self.options = options
        self.stats = common.stats
        self.index = index
        self.size_bytes = index.geometry.disk_bytes
        self._image = image
        self._backend = backend
        self._turn = turn
        self._evictor = evictor
        self._slots = slots
        discards = self._discards = Discards(common)
        self._fetcher = Fetcher(common)
        self._writeback = Writeback(common, discards)
        self._flusher = Flusher(common, self._writeback, discards)
        self._exclusives = Exclusives(
            common, discards, self._fetcher, self._writeback, self._flusher
        )
        self._readahead = Readahead(index, self._fetcher, slots.forgive, options, self.stats)
        self._reads = Reads(common, self._fetcher, discards, self._readahead)
        self._store = Store(common, self._fetcher, discards, self._writeback, self._flusher)
        self._resizer = Resizer(common, self._fetcher, self._grown)
        self._ranges = Ranges(common, self._exclusives, self.submit)
        self._frozen = False
        self._residency_due = clock() + options.residency_s
        # What the fast path touches, flat.
        self._shift = index.granule_shift
        self._block_shift = index.block_shift
        self._block_up = index.block_bytes - 1
        self._within = index.granule_bytes - 1
        self._bucket_mask = index.bucket_mask
        self._head = index.head
        self._granule_of = index.granule_of
        self._ready = index.ready
        self._open = index.open
        self._data = index.data
        self._open_blocks = self._store.open_blocks
        self._touched = evictor.touched
        self.resident = _resident(index, evictor, self._store)
        """What the usual case of a turn serves by itself."""
        self._adopt(self._load(skip_damaged=skip_damaged))

    def _load(self, *, skip_damaged: bool) -> list[int]:
        try:
            return self.index.load(skip_damaged=skip_damaged)
        except ValueError as error:
            fault = str(error)
        # Not inside `except`: the traceback of that error has views of the file, which would
        # keep it mapped and locked.
        raise damaged_index(getattr(self._image, "path", ""), fault)

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

    def read_hit(self, offset: int, length: int, buffers: list[memoryview], /) -> bool:
        """See `request.Hits`: blocks of one granule that are all `ready`.

        For what is not usual: packed rings, buffers in several pieces, requests above 64 KiB. What
        is usual `usual.take_hits` serves, in the same way.
        """
        granule = offset >> self._shift
        slot = self._head[granule & self._bucket_mask]
        if self._granule_of[slot] != granule:
            return False
        # A range that leaves the granule has bits that no granule has.
        within = offset & self._within
        shift = self._block_shift
        bits = (1 << (within + length + self._block_up >> shift)) - (1 << (within >> shift))
        if bits & ~self._ready[slot]:
            return False
        at = (slot << self._shift) + within
        data = self._data
        if len(buffers) == 1:
            buffers[0][:] = data[at : at + length]
        else:
            for buffer in buffers:
                end = at + len(buffer)
                buffer[:] = data[at:end]
                at = end
        self._touched[slot] = UP[self._touched[slot]]
        self.stats.read_hits += 1
        return True

    def write_hit(self, offset: int, length: int, buffers: list[memoryview], /) -> bool:
        """See `request.Hits`: blocks of one granule that are all `open`, or can be at once."""
        # The look-up is that of `read_hit`: a call for it would cost as much as it does.
        granule = offset >> self._shift
        slot = self._head[granule & self._bucket_mask]
        if self._granule_of[slot] != granule:
            return False
        within = offset & self._within
        shift = self._block_shift
        bits = (1 << (within + length + self._block_up >> shift)) - (1 << (within >> shift))
        if bits & ~self._open[slot] and not self._open_blocks(slot, bits):
            return False
        at = (slot << self._shift) + within
        data = self._data
        if len(buffers) == 1:
            data[at : at + length] = buffers[0]
        else:
            for buffer in buffers:
                end = at + len(buffer)
                data[at:end] = buffer
                at = end
        self._touched[slot] = UP[self._touched[slot]]
        self.stats.write_hits += 1
        return True

    def count_hits(self, reads: int, writes: int) -> None:
        """So many were served out of `resident`."""
        self.stats.read_hits += reads
        self.stats.write_hits += writes

    def let_go_of_file(self) -> None:
        """The cache file is about to be closed: compiled code keeps no view of it, and serves
        nothing out of it any more."""
        self.resident.native = False

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
            self._store.write(request)
        elif op == PREFETCH:
            self._reads.prefetch(request)
        elif op == DISCARD:
            self._ranges.discard(request)
        elif op == WRITE_ZEROES:
            self._ranges.write_zeroes(request)
        elif op == BLOCK_STATUS:
            self._backend.submit(request)
        else:
            self._turn.finish(request, errno.EOPNOTSUPP)

    def advance(self) -> bool:
        """See `Stage`: every part does what it can do now. Fetches last, so that those of one turn
        are merged."""
        moved = self._exclusives.advance()
        moved |= self._store.advance()
        moved |= self._flusher.advance()
        moved |= self._writeback.advance()
        return moved | self._fetcher.advance()

    @property
    def waiting(self) -> dict[str, int]:
        """How much waits in the cache, by what it waits for. Requests, but for fetches (runs of
        blocks that are not asked for yet), write-out (slots) and discards."""
        return {
            **self._store.waiting,
            "fetch": self._fetcher.waiting,
            "cold read": self._reads.waiting,
            "write-out": self._writeback.waiting,
            "flush": self._flusher.waiting,
            "discard": self._exclusives.active,
        }

    def refuse(self, errno: int) -> None:
        """Fail with `errno` all requests that wait for room or for the cache's disk, and those that
        would have to. What waits for the server's answer is not touched. 0: they may wait again."""
        self._turn.want()
        self._store.refuse(errno)
        self._reads.refuse(errno)

    @property
    def flush_interval_s(self) -> float:
        """See `Options`; may be changed, and counts from the next write after a flush."""
        return self._flusher.interval_s

    @flush_interval_s.setter
    def flush_interval_s(self, interval_s: float) -> None:
        self._flusher.interval_s = interval_s

    @property
    def is_write_back(self) -> bool:
        """A write is complete once it is in the cache; else, once the server has it."""
        return not self._store.through

    def set_write_back(self, write_back: bool) -> None:
        """Change that, between two turns: for writes that are not complete as well. Dirty blocks
        stay dirty until they are written out."""
        self._store.through = not write_back
        # A write to an open block is no more than a copy.
        self.index.forget_residency()

    def freeze(self, frozen: bool) -> None:
        """Begin nothing by itself (write-out by age, flush by time), or do it again. What the
        backend gets then has to be refused by itself."""
        self._frozen = frozen

    def backend_reconnected(self) -> None:
        """The connection was replaced: call this after `backend.generation` was raised and
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
        self._store.set_limits()
        self._writeback.set_limits()

    def next_deadline(self) -> float | None:
        """When `tick()` has something to do, on the clock of the constructor; None: not before
        something else happens."""
        if self._frozen:
            return None
        due = self._flusher.due if not self._flusher.running else None
        other = self._writeback.next_deadline()
        if due is None or (other is not None and other < due):
            due = other
        if self._image.may_go_cold and (due is None or self._residency_due < due):
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

    def foreign_change(self, generation: int, written: int, identity: bytes) -> str:
        """Why the export is not what this cache left behind, "" if it is.

        The server counts its writable sessions: ours is `generation`, the last one that wrote was
        `written`. `identity` is the volume's, b"" where the server gives none.
        """
        header = self._image.header
        known = header.export_generation
        renamed = identity and header.export_identity and identity != header.export_identity
        if renamed or generation < known:
            return "the export is another volume now, of the same name"
        if written > known:
            return "somebody else wrote the export since"
        return ""

    def note_export(self, generation: int, written: int, identity: bytes) -> int:
        """Take the server's counters over: call it before serving, and after each reconnect
        before anything is sent again.

        Drops every clean block if there was a `foreign_change`; returns how many. The number is
        stored before this session can write anything.
        """
        dropped = self.drop_clean() if self.foreign_change(generation, written, identity) else 0
        header = self._image.header
        if (generation, identity) != (header.export_generation, header.export_identity):
            self._image.save_header(export_generation=generation, export_identity=identity)
        return dropped

    def check_sample(self, done: Callable[[int], None], *, count: int = 64) -> None:
        """Compare about `count` clean cached blocks with the server; if any differs drop all clean
        blocks. `done(differences)`, -1 if the server did not answer."""
        check_sample(
            self,
            self._backend,
            done,
            count,
            witness=self._witness,
            discarded=self._image.header.discarded,
        )

    def check_before_writing(self, done: Callable[[int], None]) -> None:
        """Before dirty data of an earlier run goes to the server: the same, and more thoroughly.

        Nothing is dropped, so that the next try finds the same. What differs is remembered
        in the file: the next sample, which is another one, has it too.
        """

        self._compare(self._backend.submit, done, _THOROUGH_COUNT)

    def check_server(
        self, submit: Callable[[Request], None], done: Callable[[int], None], *, count: int = 64
    ) -> None:
        """The same for the server that has just come back, to which `submit` leads: before anything
        goes there, and while the guest waits. What is being discarded proves nothing."""
        self._compare(submit, done, count, only_zeroes=False)

    def _compare(
        self,
        submit: Callable[[Request], None],
        done: Callable[[int], None],
        count: int,
        *,
        only_zeroes: bool = True,
    ) -> None:
        def compared(sample: Sample) -> None:
            if not sample.unknown:
                self._remember(sample.witness + 1 if sample.differing else 0)
            done(-1 if sample.unknown else sample.differing)

        compare(
            self.index,
            submit,
            compared,
            count,
            beside_dirty=True,
            witness=self._witness,
            discarded=self._image.header.discarded,
            only_zeroes=only_zeroes,
        )

    @property
    def _witness(self) -> int | None:
        witness = self._image.header.witness
        return witness - 1 if witness else None

    def _remember(self, witness: int) -> None:
        if witness != self._image.header.witness:
            self._image.save_header(witness=witness)

    def drop_clean(self) -> int:
        """Forget every clean block (another client changed the image); returns how many blocks.

        Fetches in flight are not filled in either. Dirty blocks stay.
        """
        self._turn.want()
        index = self.index
        self._remember(0)
        self._discards.nothing_older(self._common.durability.epoch)
        before = index.valid_blocks
        for granule in list(self._fetcher.fetching):
            self._fetcher.overtaken(granule, BITS)
        for slot in index.used_slots():
            clean = index.valid(slot) & ~index.dirty(slot)
            if clean:
                self._slots.drop(slot, clean)
        return before - index.valid_blocks


def _resident(index: Index, evictor: Evictor, store: Store) -> Resident:
    """The flat state of these parts, for `datapath.usual`."""
    resident = Resident()
    resident.granule_shift = index.granule_shift
    resident.block_shift = index.block_shift
    resident.bucket_mask = index.bucket_mask
    resident.head = index.head
    resident.granule_of = index.granule_of
    resident.ready = index.ready
    resident.open = index.open
    resident.data = index.data
    resident.touched = evictor.touched
    resident.up = UP
    resident.open_blocks = store.open_blocks
    resident.native = None
    return resident
