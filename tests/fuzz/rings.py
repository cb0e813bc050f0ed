"""A hostile guest, many times: rings of nonsense that is close to sense.

    python -m tests.fuzz.rings --cases 1000000 [--seed 7]

A case is one number: it decides the kind and size of the ring, what lies in its tables, its
indexes and its in-flight region, and how the disk behaves. Whatever that is, for every case:

- nothing but `QueueBroken` leaves the queue and nothing at all leaves the engine; a region that
  cannot be is refused with `ProtocolError`;
- the requests in flight never exceed the ring's size, and all of them end;
- no request goes beyond the disk, or to a read-only one;
- memory that no descriptor offers for writing is not written;
- another queue of the same disk serves its next request as if nothing were wrong.

A failure names its case; `--seed N --cases 1` runs that one alone.
"""

from __future__ import annotations

import argparse
import mmap
import random
import resource
import struct
import sys
import time
from collections import Counter
from typing import Any

from bridge.datapath.request import FLUSH, READ, WRITE, Request
from bridge.errors import ProtocolError
from bridge.guest.virtio.blk import BlkEngine
from bridge.guest.virtio.blk_config import BlkConfig, DiskGeometry
from bridge.guest.virtio.chain import QueueBroken
from bridge.guest.virtio.inflight import TrackedSplitQueue, queue_region_bytes
from bridge.guest.virtio.inflight_packed import TrackedPackedQueue
from bridge.guest.virtio.memory import GuestMemory, Region
from bridge.guest.virtio.packed_queue import PackedQueue
from bridge.guest.virtio.queue import RingAreas, VirtQueue
from bridge.guest.virtio.split_queue import SplitQueue, ring_sizes_bytes
from bridge.peers.split_driver import SplitDriver
from bridge.spec.virtqueue import DESC_WRITE as DEVICE_WRITES
from tests import turns
from tests.guest.virtio.mock import UnpublishedRing

_REGION_BYTES = 0x10000
_DISK_BYTES = 0x8000
_SLOWEST_ALLOWED_S = 1.0
_GROWTH_ALLOWED_KIB = 64 << 10

# Guest addresses: the ring's areas, tables and buffers in the first region, a second one behind
# it, a hole, and a third one.
_TABLES = 0x2000
_HEADERS = 0x6000
_CANARY = 0xF000
_CANARY_BYTES = 256

_ADDRESSES = [
    *range(_HEADERS, _HEADERS + 16 * 64, 64),
    *range(_TABLES, _TABLES + 0x1000, 256),
    *(0, 0x8, 0x1000, 0x8000, 0xA001, 0xFFFF, 0x10000, 0x12345, 0x1FFFF, 0x20000, 0x3FFFF),
    *(0x40000, 0x4FF00, 0x4FFFF, 0x50000, 1 << 32, 1 << 63, (1 << 64) - 16, (1 << 64) - 1),
]
_LENGTHS = [0, 1, 2, 15, 16, 17, 32, 48, 48, 64, 512, 512, 513, 1024, 4096, 4097, 0x10000]
_LENGTHS += [16 * 515, 16 * 1024, 16 * 1025, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
_FLAGS = [0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 5, 6, 7]
_TYPES = [0, 0, 0, 1, 1, 1, 4, 8, 11, 13, 13, 2, 5, 14, 0x80000000, 0xFFFFFFFF]
_SECTORS = [0, 0, 1, 7, 56, 63, 64, 65, 1 << 32, (1 << 55) - 1, 1 << 55, (1 << 64) - 1]


class _Disk:
    """A target that checks what it gets; it answers at once, later, or with an error."""

    def __init__(self) -> None:
        self.data = bytearray(_DISK_BYTES)
        self.held: list[Request] = []
        self.read_only = False
        self.hold = False
        self.error = 0

    def submit(self, request: Request) -> None:
        assert request.offset >= 0
        assert request.offset + request.length <= _DISK_BYTES, request
        assert not self.read_only or request.op in (READ, FLUSH), request
        assert sum(map(len, request.buffers)) == request.length or request.op not in (READ, WRITE)
        if self.hold:
            self.held.append(request)
        else:
            self._finish(request)

    def release(self) -> None:
        self.hold = False
        held, self.held = self.held, []
        for request in held:
            self._finish(request)

    def _finish(self, request: Request) -> None:
        at = request.offset
        if not self.error:
            for view in request.buffers:
                if request.op == READ:
                    view[:] = self.data[at : at + len(view)]
                elif request.op == WRITE:
                    self.data[at : at + len(view)] = view
                at += len(view)
        turns.turn().finish(request, self.error)


class Campaign:
    """Memory, disk and engine; `run(seed)` is one case."""

    def __init__(self) -> None:
        self._shared = memoryview(mmap.mmap(-1, 3 * _REGION_BYTES))
        low, high = self._shared[_REGION_BYTES : 2 * _REGION_BYTES], self._shared[:_REGION_BYTES]
        self._low = low
        self._memory = GuestMemory(
            [
                Region(0, 0, low),
                Region(_REGION_BYTES, 1 << 20, high),
                Region(0x40000, 1 << 21, self._shared[2 * _REGION_BYTES :]),
            ]
        )
        self._nothing = bytes(len(self._shared))
        self._disk = _Disk()
        self.outcomes: Counter[str] = Counter()
        self._rng = random.Random()

    def _start(self, read_only: bool, block: int) -> BlkEngine:
        """A process, with nothing in it of the one before; its engine."""
        turns.forget()
        self._disk = _Disk()
        self._good = _GoodQueue(self._engine(False, 512))
        return self._engine(read_only, block)

    def _engine(self, read_only: bool, block: int) -> BlkEngine:
        geometry = DiskGeometry(_DISK_BYTES, read_only=read_only, block_size_bytes=block)
        config = BlkConfig(geometry, num_queues=2)
        engine = BlkEngine(config, self._disk, serial="fuzz", fault=self._fault, turn=turns.turn())
        engine.negotiated(config.features())
        return engine

    def _fault(self, problem: str) -> None:
        self.outcomes[problem.partition(":")[0]] += 1

    def run(self, seed: int) -> None:
        """One case. Raises whatever must not be raised."""
        self._rng.seed(seed)
        self.play(self._rng)

    def play(self, rng: random.Random) -> None:
        """The case that these choices make. Raises whatever must not be raised."""
        self._shared[:] = self._nothing
        packed = rng.random() < 0.4
        tracked = rng.random() < 0.4
        size = rng.choice([1, 2, 4, 4, 8, 8, 16] + ([3, 5, 7] if packed else []))
        self._fill_tables(rng)
        areas = self._packed_ring(rng, size) if packed else self._split_ring(rng, size)
        region = memoryview(bytearray(queue_region_bytes(size, packed=packed)))
        base = self._base(rng, size, packed=packed)
        may_write_canary = self._canary_is_offered(areas[0])
        canary = bytes(self._low[_CANARY : _CANARY + _CANARY_BYTES])
        read_only = rng.random() < 0.2
        error = rng.choice([0, 0, 0, 5, 28, 95])
        hold = rng.random() < 0.3
        block = rng.choice([512, 512, 4096])
        for life in range(2 if tracked else 1):
            try:
                queue = self._queue(rng, areas, size, base, region if tracked else None, packed)
            except ProtocolError:
                self.outcomes["region refused"] += 1
                break
            engine = self._start(read_only, block)
            disk = self._disk
            disk.read_only, disk.error, disk.hold = read_only, error, hold
            self._serve(rng, engine, queue, size, last=life or not tracked)
            disk.read_only = disk.hold = False
            disk.error = 0
            self._good.check()
            if rng.random() < 0.3:
                at = rng.randrange(12, len(region))
                region[at] = rng.choice([0, 1, size, 255])
        if not may_write_canary:
            assert bytes(self._low[_CANARY : _CANARY + _CANARY_BYTES]) == canary, "canary"

    def _serve(
        self, rng: random.Random, engine: BlkEngine, queue: VirtQueue, size: int, *, last: Any
    ) -> None:
        """Turns of a ring, until it breaks or the guest has nothing more."""
        ring = UnpublishedRing(queue)
        engine.start(ring, queue.recovered())
        turns.deliver()
        for _ in range(4):
            try:
                chains = queue.pop()
            except QueueBroken:
                self.outcomes["queue broken"] += 1
                break
            assert len(chains) <= size
            engine.start(ring, chains)
            turns.deliver()
            assert 0 <= queue.in_flight <= size, queue.in_flight
            self.outcomes["requests"] += len(chains)
            queue.publish()
            if not queue.arm() and rng.random() < 0.7:
                break
            queue.disarm()
        if not last and rng.random() < 0.5:
            self._disk.held.clear()  # The process dies with requests in flight.
            return
        self._disk.release()
        turns.deliver()
        queue.publish()
        assert queue.in_flight == 0, "a request was never answered"
        queue.close(told=rng.random() < 0.5)

    def _queue(
        self,
        rng: random.Random,
        areas: RingAreas,
        size: int,
        base: int,
        region: memoryview | None,
        packed: bool,
    ) -> VirtQueue:
        event_idx = rng.random() < 0.5
        indirect = rng.random() < 0.9
        if region is None:
            plain = PackedQueue if packed else SplitQueue
            return plain(
                *(self._memory, areas),
                size=size,
                base=base,
                event_idx=event_idx,
                indirect=indirect,
            )
        kept = TrackedPackedQueue if packed else TrackedSplitQueue
        return kept(
            *(self._memory, areas),
            size=size,
            base=base,
            event_idx=event_idx,
            indirect=indirect,
            region=region,
            n_entries=size,
        )

    # What lies in memory

    def _descriptor(self, rng: random.Random, following: int) -> bytes:
        address = rng.choice(_ADDRESSES)
        length = rng.choice(_LENGTHS)
        flags = rng.choice(_FLAGS) if rng.random() < 0.97 else rng.randrange(65536)
        if rng.random() < 0.1:
            following = rng.choice([0, 1, 7, 8, 16, 65535, following ^ 1])
        return struct.pack("<QIHH", address, length, flags, following)

    def _fill_tables(self, rng: random.Random) -> None:
        """Indirect tables and request headers; half of the tables hold an ordinary request."""
        low = self._low
        for at in range(_TABLES, _TABLES + 8 * 256, 256):
            if rng.random() < 0.5:
                low[at : at + 48] = self._ordinary(rng)
            else:
                for entry in range(4):
                    start = at + 16 * entry
                    low[start : start + 16] = self._descriptor(rng, entry + 1)
        for at in range(_HEADERS, _HEADERS + 8 * 64, 64):
            header = struct.pack("<IIQ", rng.choice(_TYPES), 0, rng.choice(_SECTORS))
            segment = struct.pack(
                "<QII",
                rng.choice(_SECTORS),
                rng.choice([0, 1, 8, 64, 65]),
                rng.choice([0, 0, 1, 2]),
            )
            low[at : at + 32] = header + segment

    def _ordinary(self, rng: random.Random, first: int = 0) -> bytes:
        """Header, data, status: with one thing wrong now and then."""
        header = _HEADERS + 64 * rng.randrange(8)
        way = rng.choice([1, 3])
        data, length = rng.choice(
            [(0x8000, 512), (0xFE00, 1024), (header + 16, 16), (0x40000, 4096)]
        )
        table = bytearray(
            struct.pack("<QIHH", header, 16, 1, first + 1)
            + struct.pack("<QIHH", data, length, way, first + 2)
            + struct.pack("<QIHH", 0xA000, 1, 2, 0)
        )
        if rng.random() < 0.3:
            table[rng.randrange(48)] ^= 1 << rng.randrange(8)
        return bytes(table)

    def _ring_descriptors(self, rng: random.Random, size: int) -> bytes:
        table = b""
        while len(table) < 16 * size:
            slot = len(table) // 16
            if size - slot >= 3 and rng.random() < 0.5:
                table += self._ordinary(rng, slot)
            elif rng.random() < 0.4:
                at = _TABLES + 256 * rng.randrange(8)
                table += struct.pack("<QIHH", at, rng.choice([48, 48, 64, 16, 17]), 4, 0)
            else:
                table += self._descriptor(rng, slot + 1)
        return table[: 16 * size]

    def _split_ring(self, rng: random.Random, size: int) -> RingAreas:
        lengths = ring_sizes_bytes(size)
        offsets = (0, 0x400, 0x800)
        descriptors, available, used = (
            self._low[at : at + length] for at, length in zip(offsets, lengths, strict=True)
        )
        descriptors[:] = self._ring_descriptors(rng, size)
        start = rng.choice([0, 0, 1, 65530, rng.randrange(65536)])
        count = rng.choice([0, 1, size, size, size + 1, rng.randrange(65536)])
        heads = [rng.randrange(size) for _ in range(size)]
        if rng.random() < 0.1:
            heads[rng.randrange(size)] = rng.choice([size, size + 1, 65535])
        available[:] = struct.pack(
            f"<HH{size}HH",
            rng.choice([0, 1]),
            (start + count) & 0xFFFF,
            *heads,
            rng.randrange(65536),
        )
        used[:] = bytes(lengths[2])
        used[2:4] = struct.pack("<H", start)
        return descriptors, available, used

    def _packed_ring(self, rng: random.Random, size: int) -> RingAreas:
        areas = (self._low[: 16 * size], self._low[0x400:0x404], self._low[0x800:0x804])
        table = bytearray(self._ring_descriptors(rng, size))
        wrap = rng.random() < 0.8
        for slot in range(size):
            if rng.random() < 0.9:
                table[16 * slot + 14] |= 0x80 if wrap else 0
                table[16 * slot + 15] |= 0 if wrap else 0x80
        areas[0][:] = table
        areas[1][:] = struct.pack("<HH", rng.randrange(65536), rng.choice([0, 1, 2, 3]))
        return areas

    def _base(self, rng: random.Random, size: int, *, packed: bool) -> int:
        if not packed:
            used_idx = struct.unpack_from("<H", self._low, 0x802)[0]
            assert isinstance(used_idx, int)
            return used_idx if rng.random() < 0.9 else rng.randrange(65536)
        index = rng.randrange(size) if rng.random() < 0.3 else 0
        wraps = 0x80008000 if rng.random() < 0.9 else rng.choice([0, 0x8000, 0x80000000])
        return index | index << 16 | wraps

    def _canary_is_offered(self, ring: memoryview) -> bool:
        """Whether any descriptor might make the canary, or a table, writable."""
        tables = bytes(ring) + bytes(self._low[_TABLES : _TABLES + 8 * 256])
        for address, length, _, flags in struct.iter_unpack(
            "<QIHH", tables + bytes(-len(tables) % 16)
        ):
            if not length:
                continue
            writable = flags & DEVICE_WRITES
            if writable and address < _CANARY + _CANARY_BYTES and address + length > _CANARY:
                return True
            # Tables elsewhere, or written to while they are walked, could say anything.
            if writable and address < _HEADERS and address + length > 0:
                return True
            if flags & 4 and not _TABLES <= address <= _TABLES + 8 * 256 - length:
                return True
        # A packed indirect table needs no flags, and its entries may be written anywhere.
        return False


class _GoodQueue:
    """Another queue of the disk, whose guest behaves."""

    def __init__(self, engine: BlkEngine) -> None:
        guest = memoryview(bytearray(0x4000))
        self._guest = guest
        self._driver = SplitDriver(guest, size=4)
        table, available, used = ring_sizes_bytes(4)
        at, of = self._driver.avail_offset, self._driver.used_offset
        self._queue = SplitQueue(
            GuestMemory([Region(0, 0, guest)]),
            (guest[:table], guest[at : at + available], guest[of : of + used]),
            size=4,
            base=0,
            event_idx=True,
            indirect=True,
        )
        self._ring = UnpublishedRing(self._queue)
        self._engine = engine

    def check(self) -> None:
        """One read, served."""
        guest = self._guest
        guest[0x1000:0x1010] = struct.pack("<IIQ", 0, 0, 1)
        guest[0x1010] = 0xEE
        buffers = [(0x1000, 16, 0), (0x2000, 512, DEVICE_WRITES), (0x1010, 1, DEVICE_WRITES)]
        self._driver.add(1, buffers)
        self._driver.publish()
        self._engine.start(self._ring, self._queue.pop())
        turns.deliver()
        self._queue.publish()
        assert self._driver.poll() == [(1, 513)], "the good queue"
        assert guest[0x1010] == 0, "the good queue"


def main() -> None:
    """Run a campaign and say what came of it."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.rings", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0, help="the first case")
    arguments = parser.parse_args()
    campaign = Campaign()
    slowest_s, slowest = 0.0, 0
    started_s = time.perf_counter()
    grown_from_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for seed in range(arguments.seed, arguments.seed + arguments.cases):
        case_s = time.process_time()  # what else the machine does is not the case's fault
        try:
            campaign.run(seed)
        except BaseException:
            print(f"case {seed} failed (run it with --seed {seed} --cases 1)", file=sys.stderr)
            raise
        case_s = time.process_time() - case_s
        if case_s > slowest_s:
            slowest_s, slowest = case_s, seed
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown_from_kib
    spent_s = time.perf_counter() - started_s
    for outcome, count in campaign.outcomes.most_common():
        print(f"{count:12,}  {outcome}")
    print(
        f"{arguments.cases:,} cases in {spent_s:.0f} s, the slowest ({slowest}) "
        f"{slowest_s * 1000:.1f} ms, memory grew by {grown_kib} KiB"
    )
    if slowest_s > _SLOWEST_ALLOWED_S or grown_kib > _GROWTH_ALLOWED_KIB:
        raise SystemExit("too slow, or too much memory")


if __name__ == "__main__":
    main()
