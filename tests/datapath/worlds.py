"""The four functions of the usual case, by two engines, on copies of the same state.

A `World` is all that the functions see, without anything around it: two rings in guest memory, with
in-flight regions or without, the tables of rows, a channel with its staging buffer, and a cache
with all that is behind it, to which other things happen meanwhile (`world_cache`).
`Pair` has one for each engine and does the same to both: chains of all kinds, most of them usual,
many of them broken in one place or more, garbage anywhere in the guest's memory, indexes that
jump, replies that are right, wrong, cut off, mixed up. After every call every byte is compared:
guest memory, rings, in-flight regions, rows, cookies, cells, the cache, the output, and what was
returned.

    python -m tests.datapath.worlds 10000000        so many calls, from a seed that it prints
"""

from __future__ import annotations

import random
import struct
import sys
import time
from itertools import pairwise
from typing import Any

from bridge.cache.file.layout import Geometry
from bridge.datapath.cells import (
    ALIGN_MASK,
    ALONE,
    ARMED,
    BEFORE,
    BLOCK_MASK,
    CAN_FLUSH,
    CAPACITY_BYTES,
    CHANGES,
    CHANNEL_CELLS,
    DISK_CELLS,
    EVENT_IDX,
    FLUSH_ROW,
    FLUSHED,
    FLUSHES,
    IN_FLIGHT,
    INDIRECT,
    MAX_READ_BYTES,
    MAX_SPANS,
    MAX_WRITE_BYTES,
    MAY_FLUSH,
    MAY_WRITE,
    MERGED,
    NEXT_AVAIL,
    NEXT_USED,
    NOT_ROWS,
    PUBLISHED,
    ROW,
    ROW_BYTES,
    ROWS,
    SEEN,
    SEGMENTS,
    SIGNAL_ANYWAY,
    SIZE_BYTES,
    STOPPED,
    TOUCHED,
    WHOLE_READ_BYTES,
    WHOLE_WRITE_BYTES,
    Channel,
    Queue,
    Route,
    cells,
)
from bridge.datapath.engine import Engine, choose
from bridge.datapath.engine_names import COMPILED, PURE
from bridge.datapath.rows import Rows
from bridge.datapath.spans import note_span
from tests.datapath.world_cache import DISK_BYTES, GRANULE_SHIFT, WorldCache, event

GUEST = 0x7000_0000
HIGH = (1 << 64) - 0x9000
"""Of a region at the end of the address space."""
MAIN_BYTES, HIGH_BYTES, TINY_BYTES = 0x1D000, 0x9000, 0x230
TABLES_AT, TABLE_BYTES = 0x18000, 0x900
"""Where in the main region long indirect tables are: after all else."""
TINY = 0x200
RING_BYTES = 0x2000
"""Per ring, at the start of the main region; headers, tables and data come after."""
STUFF_AT = 2 * RING_BYTES
STAGING_BYTES = 0x14000


_SEGMENTS_AT, _FOLLOWING_AT = 7, 10
"""In a row: see `ROW`."""


class _Owner:
    def publish_later(self) -> None: ...


class World:
    """See the module's text."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.rng = rng = random.Random(seed)
        main_at, high_at, tiny_at = 0, MAIN_BYTES, MAIN_BYTES + HIGH_BYTES
        tracked_at = tiny_at + TINY_BYTES + 64 & ~63
        file_at = tracked_at + 0x1000
        block_bytes = rng.choice([512, 512, 2048])
        slots = rng.choice([7, 24, 32])
        geometry = Geometry(DISK_BYTES, block_bytes, 1 << GRANULE_SHIFT, slots)
        staging_at = file_at + geometry.file_bytes
        self.arena = bytearray(rng.randbytes(file_at) + bytes(geometry.file_bytes + STAGING_BYTES))
        arena = memoryview(self.arena)
        self.main = arena[main_at : main_at + MAIN_BYTES]
        self.high = arena[high_at : high_at + HIGH_BYTES]
        self.tiny = arena[tiny_at : tiny_at + TINY_BYTES]
        self.rows = Rows(engine)
        self.queues = [
            self._queue(
                number, arena[tracked_at + 0x800 * number : tracked_at + 0x800 * number + 0x800]
            )
            for number in range(2)
        ]
        odd = rng.random() < 0.3
        self.disk = cells(DISK_CELLS)
        self.disk[CAPACITY_BYTES] = rng.choice([DISK_BYTES, 0x1A00, 0]) if odd else DISK_BYTES
        self.disk[BLOCK_MASK] = rng.choice([511, 4095]) if odd else 511
        self.disk[MAY_WRITE] = not odd or rng.random() < 0.8
        self.disk[CAN_FLUSH] = not odd or rng.random() < 0.8
        self.behind = WorldCache(rng, arena[file_at:staging_at], geometry)
        self.cache = self.behind.resident
        self.route = Route()
        self.route.cells[MAX_READ_BYTES] = rng.choice([0x7FFF, 4096, 0]) if odd else 0x7FFF
        self.route.cells[MAX_WRITE_BYTES] = rng.choice([0x10000, 4096, 0]) if odd else 0x10000
        for cell in (WHOLE_READ_BYTES, WHOLE_WRITE_BYTES):
            self.route.cells[cell] = rng.choice([1 << 21, 12288, 0]) if odd else 1 << 21
        self.route.cells[SIZE_BYTES] = rng.choice([DISK_BYTES, 0x1900]) if odd else DISK_BYTES
        self.route.cells[ALIGN_MASK] = rng.choice([0, 511, 4095]) if odd else 0
        self.channel = self._channel(arena[staging_at:], seed)

    def _queue(self, number: int, tracked: memoryview) -> Queue:
        rng = self.rng
        size = rng.choice([1, 2, 8, 32, 64, 64, 64])
        queue = Queue(size)
        ring = self.main[RING_BYTES * number : RING_BYTES * (number + 1)]
        queue.descriptors = ring[: 16 * size]
        queue.avail = ring[0x800 : 0x806 + 2 * size].cast("H")
        queue.used = ring[0x1000 : 0x1006 + 8 * size].cast("H")
        queue.elements = ring[0x1004 : 0x1004 + 8 * size].cast("I")
        queue.regions = cells(6)
        for index, each in enumerate(
            [GUEST, MAIN_BYTES, HIGH, HIGH_BYTES - rng.choice([0, 1]), TINY, TINY_BYTES]
        ):
            queue.regions[index] = each
        queue.views = [self.main, self.high, self.tiny]
        if rng.random() < 0.6:
            queue.tracked = tracked
            queue.tracked_halves = tracked.cast("H")
            queue.tracked_words = tracked.cast("Q")
        state = queue.cells
        state[EVENT_IDX], state[INDIRECT] = rng.random() < 0.7, rng.random() < 0.8
        state[NEXT_AVAIL] = queue.avail[1] = rng.choice([0, 0xFFF0, rng.randrange(1 << 16)])
        state[NEXT_USED] = state[PUBLISHED] = queue.used[1] = rng.choice([0, 0xFFFE])
        state[SIGNAL_ANYWAY] = 1
        owner: Any = _Owner()
        assert self.rows.enter(queue, owner)
        return queue

    def _channel(self, staging: memoryview, seed: int) -> Channel:
        channel = Channel()
        channel.native = None
        channel.cells = cells(CHANNEL_CELLS)
        channel.staging = staging
        channel.structured = self.rng.random() < 0.5
        channel.output = []
        channel.held = []
        channel.has_payload = channel.sending = channel.is_closed = False
        channel.spans = self.route.spans if self.rng.random() < 0.3 else None
        # Changes of the general path, which stay; with the last number hardly any room is left.
        own_rng = random.Random(f"changes {seed}")
        for key in range(own_rng.choice([0, 0, 1, 5, MAX_SPANS - 2])):
            start = 512 * own_rng.randrange(DISK_BYTES // 512)
            note_span(self.route.spans, key, start, start + 4096)
        owner: Any = None
        channel.number = self.rows.join(channel, owner)
        return channel

    def small(self) -> list[Any]:
        """All that is not in the arena."""
        channel = self.channel
        found: list[Any] = [self.disk, channel.cells, self.behind.state()]
        found += [self.rows.cells, [self.rows.queues.index(each) for each in self.rows.touched]]
        found += [channel.has_payload, b"".join(channel.output), len(channel.output)]
        found += [channel.held, self.route.spans]
        for queue in self.queues:
            found += [queue.cells, queue.rows, queue.cookies, queue.pushed]
        return found


class Pair:
    """The same in two worlds, driven by one seed."""

    def __init__(self, seed: int, engines: tuple[Engine, Engine]) -> None:
        self.seed = seed
        self.rng = random.Random(seed)
        self.worlds = [World(engine, seed) for engine in engines]
        self.commands: list[tuple[int, int, int, int]] = []
        """Type, cookie, offset and length of what has no answer."""
        self.served = dict.fromkeys(
            (
                *("take_hits", "take_commands", "several segments", "merged", "answers"),
                *("flushed", "publish", "opened"),
            ),
            0,
        )
        self.calls = 0
        self.ends = 0, 0
        """Type and end (a sector) of the last chain."""
        self.hostile = self.rng.random() < 0.6
        """Chains are broken, and garbage is written."""

    def run(self, calls: int) -> None:
        """Take so many steps. Raises AssertionError, which names the seed."""
        for self.calls in range(calls):
            what = self.rng.choice(
                ["hits"] * 2 + ["commands", "answers"] * 3 + ["publish", "events"]
            )
            queue = self.rng.randrange(2)
            getattr(self, f"_{what}")(queue)
            one, other = self.worlds
            if what == "commands" and any(
                mine.segments[:] != theirs.segments[:]
                for mine, theirs in zip(one.queues, other.queues, strict=True)
            ):
                self._fail("other segments")
            if one.arena != other.arena:
                at = next(
                    at
                    for at, pair in enumerate(zip(one.arena, other.arena, strict=True))
                    if pair[0] != pair[1]
                )
                self._fail(f"byte {at:#x} is {one.arena[at]:#x}, {other.arena[at]:#x}")
            if one.small() != other.small():
                for index, pair in enumerate(zip(one.small(), other.small(), strict=True)):
                    if pair[0] != pair[1]:
                        self._fail(f"{what}, part {index}: {pair[0]!r:.300}, {pair[1]!r:.300}")
            for world in self.worlds:
                for each in world.rows.touched:
                    each.cells[TOUCHED] = 0
                world.rows.touched.clear()

    def _fail(self, problem: str) -> None:
        raise AssertionError(f"seed {self.seed}, call {self.calls}: {problem}")

    def _call(self, name: str, results: list[Any]) -> Any:
        if results[0] != results[1]:
            self._fail(f"{name} returns {results[0]} and {results[1]}")
        return results[0]

    def _hits(self, queue: int) -> None:
        self._fill(queue)
        results = []
        changes = self.worlds[0].cache.cells[CHANGES]
        for world in self.worlds:
            world.queues[queue].cells[STOPPED] = 0
            results.append(world.engine.take_hits(world.queues[queue], world.disk, world.cache))
        self.served["take_hits"] += sum(self._call("take_hits", results))
        self.served["opened"] += self.worlds[0].cache.cells[CHANGES] - changes
        self._skip(queue)
        if self.rng.random() < 0.8:
            for world in self.worlds:
                world.behind.end_turn()

    def _events(self, _: int) -> None:
        """Something happens to the cache."""
        for each in [event(self.rng) for _ in range(self.rng.choice([1, 1, 3]))]:
            for world in self.worlds:
                world.behind.disturb(each)

    def _commands(self, queue: int) -> None:
        self._fill(queue)
        results = []
        newest = max(self.worlds[0].queues[queue].cookies)
        looked = [self.rng.random() < each for each in (0.9, 0.3, 0.5)]
        seen = self.rng.randrange(1 << 20)
        alone = self.rng.choice([0, 1, 3, 5]) if self.rng.random() < 0.1 else None
        merged = self.worlds[0].rows.cells[MERGED]
        for world in self.worlds:
            world.queues[queue].cells[STOPPED] = 0
            flat = world.channel.cells
            flat[MAY_FLUSH], flat[NOT_ROWS], flat[ARMED] = looked
            flat[SEEN], flat[BEFORE], flat[FLUSHES] = seen, seen // 2, 0
            if alone is not None:
                world.rows.cells[ALONE] = alone
            arguments = world.queues[queue], world.disk, world.route, world.channel, world.rows
            results.append(world.engine.take_commands(*arguments))
        self.served["take_commands"] += sum(self._call("take_commands", results))
        self.served["merged"] += self.worlds[0].rows.cells[MERGED] - merged
        ring = self.worlds[0].queues[queue]
        self.served["several segments"] += sum(
            ROW.unpack_from(ring.rows, ROW_BYTES * head)[_SEGMENTS_AT] > 1
            for head, cookie in enumerate(ring.cookies)
            if cookie > newest
        )
        self._skip(queue)
        for piece in [*self.worlds[0].channel.output, *self.worlds[0].channel.held]:
            if isinstance(piece, bytes):
                _, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", piece)
                self.commands.append((kind, cookie, offset, length))
        one, other = self.worlds
        if one.small() != other.small():
            return  # `run` says how.
        for world in self.worlds:
            world.channel.output = []
            world.channel.held = []
            world.channel.has_payload = False

    def _publish(self, queue: int) -> None:
        results = [world.engine.publish(world.queues[queue]) for world in self.worlds]
        self.served["publish"] += self._call("publish", results)

    def _skip(self, queue: int) -> None:
        """What the general path would have popped, and answered at once."""
        if not self.worlds[0].queues[queue].cells[STOPPED]:
            return
        for world in self.worlds:
            ring = world.queues[queue]
            ring.cells[NEXT_AVAIL] = ring.avail[1]

    def _fill(self, number: int) -> None:
        """Make some chains available."""
        rng = self.rng
        ring = self.worlds[0].queues[number]
        size = len(ring.avail) - 3
        room = (
            size - ring.cells[IN_FLIGHT] - (ring.cells[NEXT_USED] - ring.cells[PUBLISHED] & 0xFFFF)
        )
        count = rng.choice([0, 1, 2, max(0, room)])
        if not self.hostile or rng.random() < 0.9:
            count = min(count, room)
        free = [head for head in range(size) if not ring.cookies[head]]
        for index in range(max(0, count)):
            # A head, and where a chain of the table goes on: all different, as drivers have it.
            chain, header = self._chain(index)
            n_links = len(chain)
            heads = [rng.randrange(size) for _ in range(n_links)]
            if free and not (self.hostile and rng.random() < 0.05):
                heads[0] = free.pop(rng.randrange(len(free)))
            enough = len(free) >= n_links - 1
            if enough:
                heads[1:] = [free.pop() for _ in range(n_links - 1)]
            bad_head = rng.randrange(1 << 16) if self.hostile and rng.random() < 0.02 else None
            indirect = rng.random() < 0.5 or not enough
            if rng.random() < 0.98:
                indirect = indirect and ring.cells[INDIRECT] == 1
            table_at = STUFF_AT + 64 * (index & 63)
            if n_links > 4:
                table_at = TABLES_AT + TABLE_BYTES * (index & 7)
            for world in self.worlds:
                ring = world.queues[number]
                self._put(world, ring, chain, header, indirect, table_at, heads)
                at = ring.cells[NEXT_AVAIL] + index & size - 1
                ring.avail[2 + at] = heads[0] if bad_head is None else bad_head
        jump = rng.randrange(1 << 16) if self.hostile and rng.random() < 0.03 else None
        garbage = None
        if self.hostile and rng.random() < 0.2:
            garbage = rng.randrange(MAIN_BYTES - 64), rng.randbytes(rng.choice([1, 2, 16, 64]))
        for world in self.worlds:
            ring = world.queues[number]
            ring.avail[1] = ring.cells[NEXT_AVAIL] + max(0, count) & 0xFFFF
            if garbage is not None:
                world.main[garbage[0] : garbage[0] + len(garbage[1])] = garbage[1]
            if jump is not None:
                ring.avail[1] = jump

    def _put(
        self,
        world: World,
        ring: Queue,
        chain: list[tuple[int, int, int, int]],
        header: tuple[int, bytes],
        indirect: bool,
        table_at: int,
        heads: list[int],
    ) -> None:
        at, content = header
        world.main[at : at + 16] = content
        if indirect:
            packed = b"".join(struct.pack("=QIHH", *each) for each in chain)
            world.main[table_at : table_at + len(packed)] = packed
            chain = [(GUEST + table_at, self._indirect_bytes, 4, 0)]
        else:
            chain = [
                (*each[:3], heads[each[3]] if each[3] < len(heads) else each[3]) for each in chain
            ]
        for head, each in zip(heads, chain, strict=False):
            ring.descriptors[16 * head : 16 * head + 16] = struct.pack("=QIHH", *each)

    def _chain(self, index: int) -> tuple[list[tuple[int, int, int, int]], tuple[int, bytes]]:
        """Descriptors, and where their header is and what it says."""
        rng = self.rng
        header_at = STUFF_AT + 0x1000 + 16 * (index & 63)
        type_ = rng.randrange(2) if rng.random() < 0.98 else 4
        cache = self.worlds[0].cache
        granule = cache.granule_of[rng.randrange(1, len(cache.granule_of))]
        length = rng.choice([512, 1024, 4096, 4096, 4096, 4096, 4096, 8192, 0x9000])
        at = rng.randrange(1 << GRANULE_SHIFT - 9)
        if length >= 4096:
            at &= ~7 if rng.random() < 0.9 else ~0
        sector = (granule << GRANULE_SHIFT - 9) + at
        if rng.random() < 0.4:
            type_, sector = self.ends  # Where the last one ended: see `ROW`.
        self.ends = type_ & 1, sector + length // 512
        where = rng.choice([GUEST + STUFF_AT + 0x2000, GUEST + STUFF_AT + 0x2000, HIGH])
        if length == 512 and rng.random() < 0.5:
            where = TINY
        room = {HIGH: HIGH_BYTES, TINY: TINY_BYTES}.get(where, TABLES_AT - STUFF_AT - 0x2000)
        data = where + rng.randrange(max(1, room - length + 1))
        status = GUEST + STUFF_AT + 0x1800 + rng.randrange(256)
        way = 1 if type_ == 1 else 3
        chain = [(GUEST + header_at, 16, 1, 1)]
        flushes = rng.random() < 0.07
        if flushes:
            type_ = 4 if rng.random() < 0.95 else type_
        for address, n_bytes in [] if flushes else self._segments(data, length):
            chain.append((address, n_bytes, way, len(chain) + 1))
        chain.append((status, 1, 2, 0))
        self._indirect_bytes = 16 * len(chain)
        if self.hostile and rng.random() < 0.08:
            sector = rng.choice(
                [sector, 1 << 55, (1 << 64) - 1, DISK_BYTES // 512, DISK_BYTES // 512 - 1]
            )
            for _ in range(rng.choice([0, 1, 1, 3])):
                at = rng.randrange(len(chain))
                chain[at] = self._broken(chain[at])
            if rng.random() < 0.1:
                self._indirect_bytes = rng.choice(
                    [0, 16, 32, 47, 48, 49, 64, 0x820, 0x830, 0xFFFFFFFF]
                )
        return chain, (header_at, struct.pack("<IIQ", type_, rng.randrange(9), sector))

    def _segments(self, data: int, length: int) -> list[tuple[int, int]]:
        """`length` bytes of data: in one segment, or in several, which overlap now and then."""
        rng = self.rng
        if rng.random() < 0.6:
            return [(data, length)]
        count = rng.choice([1, 1, 2, 3, 6, 30, 126, 127, 128])
        cuts = [0, *sorted(rng.sample(range(1, length), min(count, length - 1))), length]
        found = []
        for start, end in pairwise(cuts):
            address, n_bytes = data + start, end - start
            if rng.random() < 0.1:
                base, size = rng.choice([(HIGH, HIGH_BYTES - 1), (TINY, TINY_BYTES)])
                if n_bytes <= size:
                    address = base + rng.randrange(size - n_bytes + 1)
            found.append((address, n_bytes))
        return found

    def _broken(self, descriptor: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        rng = self.rng
        edges = [GUEST, GUEST + MAIN_BYTES, HIGH, 1 << 64, TINY, TINY + TINY_BYTES]
        address, length, flags, following = descriptor
        what = rng.randrange(4)
        if what == 0:
            address = (
                rng.choice(edges) + rng.choice([-length, -length + 1, -1, 0, 1]) & (1 << 64) - 1
            )
        elif what == 1:
            length = rng.choice([0, 1, 15, 17, 513, 0x10000, 0x10001, 0x7FFFFFFF, 0xFFFFFFFF])
        elif what == 2:
            flags = rng.randrange(8)
        else:
            following = rng.choice([0, 1, 2, 3, 64, 0xFFFF])
        return address, length, flags, following

    def _answers(self, _: int) -> None:
        """Replies to some of what is in flight, most of them right."""
        rng = self.rng
        start = rng.randrange(64)
        content = b"".join(
            self._reply() for _ in range(min(rng.choice([1, 2, 5, 20]), len(self.commands)))
        )
        if self.hostile and rng.random() < 0.05:
            content += rng.randbytes(40)
        if rng.random() < 0.2 and content:
            content = content[: rng.randrange(len(content))]
        content = content[: STAGING_BYTES - start]
        results = []
        for world in self.worlds:
            world.channel.staging[start : start + len(content)] = content
            results.append(
                world.engine.answers(world.channel, world.rows, start, start + len(content))
            )
        after, _ = self._call("answers", results)
        self.served["answers"] += after > start
        self.served["flushed"] += self.worlds[0].channel.cells[FLUSHED]
        for world in self.worlds:
            world.channel.cells[FLUSHED] = 0
        cookies = {each for queue in self.worlds[0].queues for each in queue.cookies}
        self.commands = [each for each in self.commands if each[1] in cookies]
        self._forget()

    def _forget(self) -> None:
        """Sometimes what is in flight is answered by the general path."""
        if self.rng.random() < 0.8 or not self.commands:
            return
        _, cookie, _, _ = self.commands.pop(self.rng.randrange(len(self.commands)))
        for world in self.worlds:
            if world.channel.cells[FLUSH_ROW] == cookie:
                world.channel.cells[FLUSH_ROW] = 0
            for queue in world.queues:
                following = 1 + queue.cookies.index(cookie) if cookie in queue.cookies else 0
                while following:  # for each request of the command
                    head = following - 1
                    row = ROW.unpack_from(queue.rows, ROW_BYTES * head)
                    queue.cookies[head] = 0
                    queue.cells[IN_FLIGHT] -= 1
                    world.channel.cells[ROWS] -= 1
                    if row[_SEGMENTS_AT] > 1:
                        world.channel.cells[SEGMENTS] -= row[_SEGMENTS_AT]
                    following = row[_FOLLOWING_AT]

    def _reply(self) -> bytes:
        rng = self.rng
        kind, cookie, offset, length = rng.choice(self.commands)
        odd = rng.random() if self.hostile else 1.0
        if odd < 0.01:
            cookie ^= 1 << rng.randrange(64)
        elif odd < 0.02:  # Of another row, which may have no command of its own.
            cookies = [each for queue in self.worlds[0].queues for each in queue.cookies if each]
            cookie = rng.choice(cookies or [cookie])
        error = rng.choice([1, 5, 0x10001]) if 0.02 < odd < 0.04 else 0
        magic = rng.randrange(1 << 32) if 0.04 < odd < 0.06 else 0x67446698
        if kind in (1, 3):
            return struct.pack(">IIQ", magic, error, cookie)
        payload = bytes([rng.randrange(256)]) * length
        if self.worlds[0].channel.structured:
            stated = length + 8 + (rng.choice([-8, -1, 1]) if 0.06 < odd < 0.08 else 0)
            where = offset + 512 if 0.08 < odd < 0.1 else offset
            flags = 0 if 0.1 < odd < 0.12 else 1
            head = (0x668E33EF, flags, 1, cookie, stated, where)
            return struct.pack(">IHHQIQ", *head) + payload
        return struct.pack(">IIQ", magic, error, cookie) + payload


def main() -> None:
    """See the module's text."""
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else random.SystemRandom().randrange(1 << 30)
    engines = choose(PURE), choose(COMPILED)
    print(f"{calls} calls, seed {seed}", flush=True)
    served: dict[str, int] = {}
    began_s = time.monotonic()
    done = 0
    while done < calls:
        pair = Pair(seed, engines)
        pair.run(500)
        done += 500
        seed += 1
        for name, count in pair.served.items():
            served[name] = served.get(name, 0) + count
        if done % 100_000 == 0:
            print(f"{done} calls, {time.monotonic() - began_s:.0f} s, {served}", flush=True)
    print(f"no difference in {done} calls; {served}")


if __name__ == "__main__":
    main()
