"""virtio-blk requests: from a descriptor chain to an operation on the disk and its status.

virtio 1.3 §5.2.6. A request is a readable header (type, priority, sector), data, and a status
byte, which is the last byte of the chain's writable part; nothing is assumed about where one
descriptor ends and the next begins (§2.7.4.1). Every request gets exactly one status, and the
used length never claims a byte that was not written (§2.7.8.2).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from errno import EIO, EOPNOTSUPP
from typing import Final

from bridge.datapath.cells import (
    BLOCK_MASK,
    CAN_FLUSH,
    CAPACITY_BYTES,
    DISK_CELLS,
    MAY_WRITE,
    Cells,
    cells,
    sequence_of,
)
from bridge.datapath.lanes import SMALL_BYTES, WHOLE_BYTES, Job, Lane
from bridge.datapath.request import (
    DISCARD,
    FLUSH,
    FUA,
    N_OPS,
    READ,
    REPEATED,
    WRITE,
    WRITE_ZEROES,
    Hits,
    Request,
    Target,
)
from bridge.datapath.rows import Usual
from bridge.datapath.turn import Turn
from bridge.guest.virtio.blk_config import BlkConfig
from bridge.guest.virtio.blk_ranges import ranges_of_untrusted
from bridge.guest.virtio.blk_request import BlkRequest, UsedRing, data_pieces, range_pieces
from bridge.guest.virtio.chain import Chain
from bridge.spec.virtio_blk import (
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_WRITE_ZEROES,
    ID_BYTES,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from bridge.units import SECTOR_BYTES

MAX_REQUEST_BYTES: Final = 1 << 30
"""A longer IN or OUT is refused. EDK2's driver sends up to so much in one request, others far less
(`seg_max` segments); the specification would allow 4 GiB."""


def one_epoch() -> int:
    """The server never drops what it has acknowledged, or a layer below sees to that."""
    return 0


class BlkEngine:
    """Executes virtio-blk requests on a `Target`. One engine serves every queue of a disk."""

    def __init__(
        self,
        config: BlkConfig,
        target: Target,
        *,
        hits: Hits | None = None,
        usual: Usual | None = None,
        serial: str,
        fault: Callable[[str], None],
        turn: Turn,
        epoch: Callable[[], int] = one_epoch,
    ) -> None:
        """`hits`: what can be asked before `target`; `usual`: what the rings may ask before they
        pop a chain. `serial`: what GET_ID answers, at most 20
        bytes. `fault(problem)` is told what a guest did wrong, "kind" or "kind: details", so that
        it is counted and logged once per kind. `turn`: the one of `target`. `epoch()`: see
        `lanes.Job`."""
        self.config = config
        self._submit = target.submit
        self._turn = turn
        self._reads, self._writes, self._range_lane = (Lane(target.submit, turn) for _ in range(3))
        self._large_done = self._finish_large
        self._epoch = epoch
        self._read_hit = hits.read_hit if hits is not None else _no_hit
        self._write_hit = hits.write_hit if hits is not None else _no_hit
        self._done = self._finish  # bound once
        self.usual = usual
        self.limits: Cells[int] = cells(DISK_CELLS)
        """Of the disk, for what is usual: see there."""
        self._unanswered: dict[BlkRequest, int] = {}
        """What the target has and did not finish, and when it was popped, in a number that grows:
        the one way to find the requests of a ring again that has to stop without them. (Those that
        are rows are adopted first.)"""
        self._popped_at = 0
        self.requests = [0] * N_OPS
        """By operation, how many came this way: without what went the usual one, and without those
        that were refused. The same for the bytes that they are about."""
        self.request_bytes = [0] * N_OPS
        self.errors: Counter[tuple[int, int]] = Counter()
        """By operation and errno, how many requests were answered with an error of the disk's."""
        self._serial = serial.encode()[:ID_BYTES].ljust(ID_BYTES, b"\0")
        self._fault = fault
        self._features = 0
        self._write_flags = 0
        self._flush_flags = 0
        self.geometry_changed()

    def geometry_changed(self) -> None:
        """The disk below has another size."""
        geometry = self.config.geometry
        self._capacity_bytes = geometry.capacity_sectors * SECTOR_BYTES
        self._read_only = geometry.read_only
        self._block_mask = geometry.block_size_bytes - 1
        self.limits[CAPACITY_BYTES] = self._capacity_bytes
        self.limits[BLOCK_MASK] = self._block_mask
        self.limits[MAY_WRITE] = not (self._read_only or self._write_flags)
        self.limits[CAN_FLUSH] = geometry.can_flush

    def negotiated(self, features: int) -> None:
        """The driver accepted `features`."""
        self._features = features
        self.config.negotiated(features)
        self.writeback_changed()

    def writeback_changed(self) -> None:
        """Decide whether a completed write has to be durable (virtio 1.3 §5.2.6.2).

        It has to with CONFIG_WCE and `writeback` 0, and when the driver knows neither FLUSH nor
        CONFIG_WCE: such a driver cannot ask for durability later.
        """
        if self._features & F_CONFIG_WCE:
            durable = not self.config.writeback
        else:
            durable = not self._features & F_FLUSH
        self._write_flags = FUA if durable else 0
        self.limits[MAY_WRITE] = not (self._read_only or self._write_flags)

    def start(self, ring: UsedRing, chains: Sequence[Chain]) -> None:
        """Execute the requests in `chains`; `ring.complete` is called as each is finished."""
        # One loop over the batch: what it needs of `self` is looked up once.
        submit = self._submit
        read_hit = self._read_hit
        write_hit = self._write_hit
        done = self._done
        unanswered = self._unanswered
        if self.usual is not None:
            self._popped_at = self.usual.sequence
        popped_at = self._popped_at
        capacity_bytes = self._capacity_bytes
        block_mask = self._block_mask
        write_flags = self._write_flags
        small_bytes = SMALL_BYTES
        reads = read_bytes = writes = write_bytes = 0
        for chain in chains:
            _, type_, sector, readable, writable, _, _, _ = chain
            if type_ == T_IN:
                buffers = writable
                wrong_way = readable
            elif type_ == T_OUT and not self._read_only:
                buffers = readable
                wrong_way = writable
            else:
                self._start_other(ring, chain)
                continue
            length = len(buffers[0]) if len(buffers) == 1 else sum(map(len, buffers))
            # Python's integers do not wrap: the guest's 64 bits mean what they say.
            offset = sector * SECTOR_BYTES
            if (
                offset + length > capacity_bytes
                or (offset | length) & block_mask
                or wrong_way
                or not length
            ):
                self._refuse_data(ring, chain, offset, length)
            elif length > small_bytes:
                self._start_large(ring, chain, offset, length)
            elif type_ == T_IN:
                reads += 1
                read_bytes += length
                if read_hit(offset, length, buffers):
                    ring.complete(chain, S_OK, length + 1)
                else:
                    request = BlkRequest(
                        ring, chain, READ, offset, length, buffers, done, 0, length + 1
                    )
                    unanswered[request] = popped_at
                    submit(request)
            else:
                writes += 1
                write_bytes += length
                if not write_flags and write_hit(offset, length, buffers):
                    ring.complete(chain, S_OK, 1)
                    continue
                request = BlkRequest(
                    ring, chain, WRITE, offset, length, buffers, done, write_flags, 1
                )
                unanswered[request] = popped_at
                submit(request)
        if reads:
            self._count(READ, read_bytes, reads)
        if writes:
            self._count(WRITE, write_bytes, writes)

    def _count(self, op: int, length: int, requests: int = 1) -> None:
        self.requests[op] += requests
        self.request_bytes[op] += length

    def start_late(self, ring: UsedRing, chains: Sequence[Chain]) -> None:
        """The same for chains begun before and left in an in-flight region, or left in the ring:
        it is not known what their driver had seen of other requests when it sent them."""
        self._flush_flags = REPEATED
        self.start(ring, chains)
        self._flush_flags = 0

    def _start_large(self, ring: UsedRing, chain: Chain, offset: int, length: int) -> None:
        """An IN or OUT that is worth asking first whether it may be begun now."""
        if length > MAX_REQUEST_BYTES:
            self._refuse(ring, chain, S_IOERR, f"a request of more than {MAX_REQUEST_BYTES} bytes")
            return
        _, type_, _, readable, writable, *_ = chain
        if type_ == T_IN:
            op, lane, buffers = READ, self._reads, writable
            hit, flags, used_bytes = self._read_hit, 0, length + 1
        else:
            op, lane, buffers = WRITE, self._writes, readable
            flags, used_bytes = self._write_flags, 1
            hit = self._write_hit if not flags else _no_hit
        self._count(op, length)
        at_once = length <= WHOLE_BYTES and lane.is_free
        if at_once and hit(offset, length, buffers):
            lane.copied(length)
            ring.complete(chain, S_OK, used_bytes)
            return
        request = BlkRequest(
            ring, chain, op, offset, length, buffers, self._done, flags, used_bytes
        )
        self._unanswered[request] = self._popped_at
        if at_once and lane.begin_whole(length):
            request.owner = lane
            request.done = self._large_done
            self._submit(request)
        else:
            self._enter(lane, request, data_pieces(request))

    def _enter(
        self, lane: Lane, request: BlkRequest, pieces: Iterator[tuple[int, Request]]
    ) -> None:
        """Have `lane` do `request` in `pieces`."""
        epoch = self._epoch if request.op != READ else None
        job = request.owner = Job(lane, request, pieces, epoch)
        lane.enter(job)

    def _finish_large(self, request: BlkRequest) -> None:
        lane = request.owner
        assert isinstance(lane, Lane)
        lane.ended(request.length)
        self._finish(request)

    def _refuse_data(self, ring: UsedRing, chain: Chain, offset: int, length: int) -> None:
        """Answer an IN or OUT that reaches no disk (virtio 1.3 §5.2.6.2)."""
        _, type_, _, readable, writable, *_ = chain
        if writable if type_ == T_OUT else readable:
            problem = "data that points the wrong way"
        elif (offset | length) & self._block_mask:
            problem = "data that is not a whole number of blocks"
        elif offset + length > self._capacity_bytes:
            problem = "a request past the end of the disk"
        else:
            # No data: there is nothing to do and nothing wrong.
            ring.complete(chain, S_OK, 1)
            return
        self._refuse(ring, chain, S_IOERR, problem)

    def _start_other(self, ring: UsedRing, chain: Chain) -> None:
        """Every request except reads and writes that are allowed."""
        type_ = chain[1]
        fault = chain[-1]
        if fault is not None:
            self._refuse(ring, chain, S_IOERR, fault)
        elif type_ == T_FLUSH:
            self._flush(ring, chain)
        elif type_ == T_GET_ID:
            self._get_id(ring, chain)
        elif self._read_only and type_ in (T_OUT, T_DISCARD, T_WRITE_ZEROES):
            self._refuse(ring, chain, S_IOERR, "a write to a read-only disk")
        elif type_ == T_DISCARD and self._features & F_DISCARD:
            self._ranges(ring, chain, DISCARD)
        elif type_ == T_WRITE_ZEROES and self._features & F_WRITE_ZEROES:
            self._ranges(ring, chain, WRITE_ZEROES)
        else:
            # A guest may send any number here: not one kind of fault for each.
            known = type_ in (T_DISCARD, T_WRITE_ZEROES)
            what = "a request that was not negotiated" if known else "an unknown request type"
            self._refuse(ring, chain, S_UNSUPP, what)

    def _request(self, ring: UsedRing, chain: Chain, op: int = READ) -> BlkRequest:
        """A request without data; its used length counts the status if no data precedes it."""
        request = BlkRequest(ring, chain, op, 0, 0, [], self._done, 0, _status_bytes(chain))
        self._unanswered[request] = self._popped_at
        return request

    def _flush(self, ring: UsedRing, chain: Chain) -> None:
        """FLUSH: the sector and any data are the driver's mistake, and harmless."""
        if self.config.geometry.can_flush:
            self._count(FLUSH, 0)
            request = self._request(ring, chain, FLUSH)
            request.flags = self._flush_flags
            self._submit(request)
        else:
            self._refuse(ring, chain, S_UNSUPP, "a flush that was not offered")

    def _get_id(self, ring: UsedRing, chain: Chain) -> None:
        """GET_ID: the serial, NUL-padded to 20 bytes, or as much as there is room for."""
        writable = chain[4]
        rest = self._serial
        for view in writable:
            part = rest[: len(view)]
            view[: len(part)] = part
            rest = rest[len(part) :]
        room = sum(map(len, writable))
        # The status follows the data; between a short serial and it nothing was written.
        ring.complete(chain, S_OK, room + 1 if room <= ID_BYTES else ID_BYTES)

    def _ranges(self, ring: UsedRing, chain: Chain, op: int) -> None:
        """DISCARD and WRITE_ZEROES: every segment is checked before any is executed."""
        status, problem, parts = ranges_of_untrusted(
            chain[3], op, capacity_bytes=self._capacity_bytes, block_mask=self._block_mask
        )
        if status != S_OK:
            self._refuse(ring, chain, status, problem)
            return
        self._count(op, sum(length for _, length, _ in parts))
        request = self._request(ring, chain, op)
        request.flags = self._write_flags
        if not parts:
            self._turn.finish(request)
            return
        self._enter(self._range_lane, request, range_pieces(request, parts))

    def _refuse(self, ring: UsedRing, chain: Chain, status: int, problem: str) -> None:
        """Answer a request that reached no disk. The data before the status was not written."""
        self._fault(problem)
        has_status = chain[5] is not None
        ring.complete(chain, status, _status_bytes(chain) if has_status else 0)

    def adopt(
        self,
        ring: UsedRing,
        head: int,
        cookie: int,
        row: tuple[int, ...],
        buffers: list[memoryview],
        status_view: memoryview,
    ) -> BlkRequest:
        """The request that `start` would have made of a chain of `ring`, had it not been sent as
        `row` (see `cells.ROW`), with data in `buffers` and its status in `status_view`."""
        offset, _, status_at, length, _, _, _, _, op, *_ = row
        sector = offset // SECTOR_BYTES
        chain: Chain
        if op == FLUSH:
            chain = head, T_FLUSH, 0, [], [], status_view, status_at, None
        elif op == READ:
            chain = head, T_IN, sector, [], buffers, status_view, status_at, None
        else:
            chain = head, T_OUT, sector, buffers, [], status_view, status_at, None
        used_bytes = length + 1 if op == READ else 1
        request = BlkRequest(ring, chain, op, offset, length, buffers, self._done, 0, used_bytes)
        self._unanswered[request] = sequence_of(cookie)
        return request

    def submit_again(self, request: Request) -> None:
        """A request that `adopt` has made has to be done anew: with others in one command it
        failed."""
        self._submit(request)
        self._turn.want()

    def unanswered(self, ring: UsedRing) -> list[BlkRequest]:
        """The requests of `ring` that the target has and did not finish, oldest first."""
        if self.usual is not None:
            self.usual.adopt_all()
        found = [request for request in self._unanswered if request.ring is ring]
        return sorted(found, key=self._unanswered.__getitem__)

    def fail(self, requests: Sequence[BlkRequest]) -> None:
        """Tell the guest that `requests` failed. `abandon` has to follow."""
        for request in requests:
            self.errors[request.op, EIO] += 1
            used_bytes = 0 if request.op == READ else request.used_bytes
            request.ring.complete(request.chain, S_IOERR, used_bytes)

    def abandon(self, requests: Sequence[BlkRequest]) -> None:
        """The guest hears no more of `requests`, and their buffers are not touched any more by
        what goes through them (see `Request.abandon`)."""
        reads = [request.length for request in requests if request.op == READ]
        # One for all, as long as the longest piece: what lands there is never read.
        scratch = memoryview(bytearray(min(max(reads, default=0), WHOLE_BYTES)))
        for request in requests:
            del self._unanswered[request]
            request.abandon(_ignore_end, scratch)
            if isinstance(request.owner, Job):
                request.owner.abandon(scratch)
            elif isinstance(request.owner, Lane):
                request.done = _abandoned_whole
            del request.chain, request.ring  # views of the guest's memory, which may go away now

    def _finish(self, request: BlkRequest) -> None:
        """The disk is done with `request`: tell the guest."""
        del self._unanswered[request]
        error = request.error
        if not error:
            request.ring.complete(request.chain, S_OK, request.used_bytes)
            return
        self.errors[request.op, error] += 1
        status = S_UNSUPP if error == EOPNOTSUPP else S_IOERR
        # A read that failed has not filled the data before the status.
        used_bytes = 0 if request.op == READ else request.used_bytes
        request.ring.complete(request.chain, status, used_bytes)


def _status_bytes(chain: Chain) -> int:
    """The used length of a chain of which only the status is written: 0 if data precedes that."""
    return 0 if chain[4] else 1


def _abandoned_whole(request: Request) -> None:
    """The end of an abandoned request that was begun in one piece."""
    lane = request.owner
    assert isinstance(lane, Lane)
    lane.ended(request.length)


def _ignore_end(request: Request) -> None:
    """The end of an abandoned request."""


def _no_hit(offset: int, length: int, buffers: list[memoryview]) -> bool:
    """Nothing is at hand."""
    return False
