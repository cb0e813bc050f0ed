"""Which chains are usual, and that whatever is not is left where it is."""

from __future__ import annotations

import struct
from collections.abc import Callable

import pytest

from bridge.datapath.cells import (
    BLOCK_MASK,
    CAPACITY_BYTES,
    DISK_CELLS,
    MAX_ROW_SEGMENTS,
    MAX_SEGMENTS,
    MAY_WRITE,
    SEGMENTS,
    STOP_FORM,
    STOP_MISS,
    STOP_RANGE,
    STOP_RING,
    STOP_ROOM,
    STOP_WRITE,
    STOPPED,
    Cells,
    cells,
)
from bridge.datapath.engine import Engine
from bridge.datapath.turn import Turn
from bridge.guest.virtio.split_queue import SplitQueue
from bridge.spec.virtqueue import DESC_INDIRECT, DESC_NEXT, DESC_WRITE
from tests.datapath.engines import BOTH, engine
from tests.datapath.loopback import Loopback, at_hand
from tests.guest.virtio.mock import MEMORY_BYTES, QueueRig

IMAGE_BYTES = 1 << 21
HIGH = 1 << 32
HALF = MEMORY_BYTES // 2
IN, OUT = 0, 1

Link = tuple[int, int, int]
"""Address, length, flags without NEXT."""


@pytest.fixture(params=BOTH)
def compiled_or_pure(request: pytest.FixtureRequest) -> Engine:
    return engine(request.param)


class Chains:
    """A ring, two regions of memory, and the disk as a cache that has all of it at hand."""

    def __init__(self, size: int = 256) -> None:
        self.rig = QueueRig(size=size, regions=[(0, 0, HALF), (HIGH, HALF, HALF)])
        assert isinstance(self.rig.queue, SplitQueue)
        self.queue = self.rig.queue
        self.image = bytearray(bytes(range(1, 252)) * (IMAGE_BYTES // 251 + 1))[:IMAGE_BYTES]
        self.cache = at_hand(self.image)
        self.disk: Cells[int] = cells(DISK_CELLS)
        self.disk[CAPACITY_BYTES], self.disk[BLOCK_MASK] = IMAGE_BYTES, 511
        self.disk[MAY_WRITE] = 1
        self.header = self.rig.alloc(16)
        self.status = self.rig.alloc(1)

    def chain(self, type_: int, sector: int, data: list[tuple[int, int]]) -> list[Link]:
        """Of data at these addresses, with these lengths."""
        self.rig.write(self.header, struct.pack("<IIQ", type_, 0, sector))
        way = 0 if type_ == OUT else DESC_WRITE
        links = [(address, length, way) for address, length in data]
        return [(self.header, 16, 0), *links, (self.status, 1, DESC_WRITE)]

    def table(self, links: list[Link]) -> bytes:
        """Their descriptors, in this order."""
        last = len(links) - 1
        return b"".join(
            struct.pack("<QIHH", address, length, flags | (DESC_NEXT if at < last else 0), at + 1)
            for at, (address, length, flags) in enumerate(links)
        )

    def put(self, links: list[Link], *, indirect: bool) -> None:
        """Make it available, with its descriptors in their order."""
        table = self.table(links)
        if indirect:
            self.rig.raw(0, self.rig.alloc(table), len(table), DESC_INDIRECT)
        else:
            self.rig.write(0, table)
        self.rig.put_head(0)

    def take(self, which: Engine) -> int:
        """How many were served out of the cache."""
        self.queue.cells[STOPPED] = 0
        return sum(which.take_hits(self.queue, self.disk, self.cache))

    def is_untouched(self, before: tuple[bytes, bytes, bytes, bytes]) -> bool:
        return before == self.all_of_it()

    def all_of_it(self) -> tuple[bytes, bytes, bytes, bytes]:
        state = self.queue.cells[:]
        state[STOPPED] = 0
        queue = self.queue
        return bytes(self.rig.shared), bytes(self.image), state.tobytes(), bytes(queue.cookies)


class _Owner:
    """A ring that was never asked for anything unusual."""

    def adopt(self, head: int, cookie: int, row: tuple[int, ...]) -> None:
        raise AssertionError("nothing unusual happened")

    def publish_later(self) -> None:
        """The test does."""


def spread(count: int, n_bytes: int) -> list[tuple[int, int]]:
    """`count` segments of `n_bytes` in turn in either region, each a little after the former."""
    return [((HIGH if at % 2 else 0x40000) + at * (n_bytes + 7), n_bytes) for at in range(count)]


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("count", [1, 2, 126, MAX_SEGMENTS])
def test_data_in_many_segments_of_several_regions_is_served_whole(
    compiled_or_pure: Engine, count: int, indirect: bool
) -> None:
    chains = Chains()
    data = spread(count, 1536)
    chains.put(chains.chain(IN, 5, data), indirect=indirect)
    assert chains.take(compiled_or_pure) == 1
    found = b"".join(chains.rig.read(address, length) for address, length in data)
    assert found == chains.image[5 * 512 : 5 * 512 + 1536 * count]
    assert chains.rig.read(chains.status, 1) == b"\0"
    gaps = chains.rig.read(data[0][0] + 1536, 7)
    assert gaps == bytes(7), "what is between the segments is not the request's"


@pytest.mark.parametrize("count", [2, 126])
def test_a_write_of_many_segments_over_several_granules_is_stored_whole(
    compiled_or_pure: Engine, count: int
) -> None:
    chains = Chains()
    data = spread(count, 1536)
    written = b""
    for at, (address, length) in enumerate(data):
        piece = bytes([at + 1]) * length
        chains.rig.write(address, piece)
        written += piece
    chains.put(chains.chain(OUT, 100, data), indirect=True)
    assert chains.take(compiled_or_pure) == 1
    assert chains.image[51200 : 51200 + len(written)] == written


def test_a_command_of_many_segments_is_sent_and_its_answer_lands_in_all_of_them(
    compiled_or_pure: Engine,
) -> None:
    chains = Chains()
    server = Loopback(Turn(), chains.image, engine=compiled_or_pure)

    assert server.rows.enter(chains.queue, _Owner())
    data = spread(MAX_SEGMENTS, 8)  # 1024 bytes
    chains.put(chains.chain(IN, 9, data), indirect=True)
    arguments = chains.queue, chains.disk, server.route, server.transmission, server.rows
    assert sum(compiled_or_pure.take_commands(*arguments)) == 1
    server._flush()
    assert chains.queue.in_flight == 0
    found = b"".join(chains.rig.read(address, length) for address, length in data)
    assert found == chains.image[9 * 512 : 11 * 512]


def _too_many(chains: Chains) -> list[Link]:
    return chains.chain(IN, 0, spread(MAX_SEGMENTS + 1, 512))


def _empty_segment(chains: Chains) -> list[Link]:
    return chains.chain(IN, 0, [(0x40000, 512), (0x50000, 0), (0x60000, 512)])


def _across_regions(chains: Chains) -> list[Link]:
    return chains.chain(IN, 0, [(0x40000, 512), (HALF - 256, 512)])


def _at_the_end_of_addresses(chains: Chains) -> list[Link]:
    return chains.chain(IN, 0, [(0x40000, 512), ((1 << 64) - 256, 512)])


def _written_before_it_is_read(chains: Chains) -> list[Link]:
    links = chains.chain(OUT, 0, [(0x40000, 512), (0x50000, 512)])
    return [links[0], (0x40000, 512, DESC_WRITE), links[2], links[3]]


def _indirect_inside(chains: Chains) -> list[Link]:
    links = chains.chain(IN, 0, [(0x40000, 512), (0x50000, 512)])
    return [*links[:2], (0x50000, 512, DESC_INDIRECT), links[3]]


def _no_status(chains: Chains) -> list[Link]:
    return chains.chain(IN, 0, spread(3, 512))[:-1]


@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize(
    "odd",
    [
        _too_many,
        _empty_segment,
        _across_regions,
        _at_the_end_of_addresses,
        _written_before_it_is_read,
        _indirect_inside,
        _no_status,
    ],
)
def test_a_chain_of_another_form_is_left_as_it_was(
    compiled_or_pure: Engine, odd: Callable[[Chains], list[Link]], indirect: bool
) -> None:
    chains = Chains()
    chains.put(odd(chains), indirect=indirect)
    before = chains.all_of_it()
    assert chains.take(compiled_or_pure) == 0
    assert chains.queue.cells[STOPPED] == STOP_FORM
    assert chains.is_untouched(before)


@pytest.mark.parametrize("length", [16, 32, 48 + 8, 16 * (MAX_SEGMENTS + 3), 0, 0xFFFFFFF0])
def test_an_indirect_table_of_another_length_is_left_as_it_was(
    compiled_or_pure: Engine, length: int
) -> None:
    chains = Chains()
    chains.put(chains.chain(IN, 0, spread(2, 512)), indirect=True)
    struct.pack_into("<I", chains.rig.shared, 8, length)
    before = chains.all_of_it()
    assert chains.take(compiled_or_pure) == 0
    assert chains.queue.cells[STOPPED] == STOP_FORM
    assert chains.is_untouched(before)


def test_an_indirect_table_across_regions_is_left_as_it_was(compiled_or_pure: Engine) -> None:
    chains = Chains()
    chains.put(chains.chain(IN, 0, spread(4, 512)), indirect=True)
    struct.pack_into("<Q", chains.rig.shared, 0, HALF - 32)
    before = chains.all_of_it()
    assert chains.take(compiled_or_pure) == 0
    assert chains.queue.cells[STOPPED] == STOP_FORM
    assert chains.is_untouched(before)


def test_a_chain_without_an_end_is_left_as_it_was(compiled_or_pure: Engine) -> None:
    chains = Chains()
    chains.put(chains.chain(IN, 0, spread(4, 512)), indirect=False)
    chains.rig.raw(5, 0x40000, 512, DESC_WRITE | DESC_NEXT, 1)  # In place of the status.
    before = chains.all_of_it()
    assert chains.take(compiled_or_pure) == 0
    assert chains.queue.cells[STOPPED] == STOP_FORM
    assert chains.is_untouched(before)


@pytest.mark.parametrize(
    ("type_", "sector", "n_bytes", "why"),
    [
        (IN, IMAGE_BYTES // 512 - 1, 512, STOP_RANGE),
        (IN, 1 << 55, 512, STOP_RANGE),
        (IN, 0, 500, STOP_RANGE),
        (OUT, 0, 512, STOP_WRITE),
        (IN, 0, 512, STOP_MISS),
    ],
)
def test_it_is_said_why_a_chain_is_not_usual(
    compiled_or_pure: Engine, type_: int, sector: int, n_bytes: int, why: int
) -> None:
    chains = Chains()
    chains.disk[MAY_WRITE] = why != STOP_WRITE
    if why == STOP_MISS:
        chains.cache.ready[0] = 0
    chains.put(chains.chain(type_, sector, spread(2, n_bytes)), indirect=True)
    before = chains.all_of_it()
    assert chains.take(compiled_or_pure) == 0
    assert chains.queue.cells[STOPPED] == why
    assert chains.is_untouched(before)


def test_a_head_that_does_not_exist_is_said_to_break_the_ring(compiled_or_pure: Engine) -> None:
    chains = Chains()
    chains.rig.put_head(256)
    assert chains.take(compiled_or_pure) == 0
    assert chains.queue.cells[STOPPED] == STOP_RING


def test_a_write_that_the_cache_stores_by_itself_is_answered(compiled_or_pure: Engine) -> None:
    chains = Chains()
    stored: list[tuple[int, bytes]] = []

    def store(offset: int, length: int, buffers: list[memoryview]) -> bool:
        stored.append((offset, b"".join(buffers)))
        return len(stored) > 1

    chains.cache.store = store
    chains.cache.ready[0] = chains.cache.open[0] = 0
    chains.rig.write(0x40000, b"w" * 512)
    chains.rig.write(HIGH, b"v" * 512)
    chains.put(chains.chain(OUT, 4, [(0x40000, 512), (HIGH, 512)]), indirect=True)
    before = chains.all_of_it()
    assert chains.take(compiled_or_pure) == 0, "it had to wait"
    assert chains.is_untouched(before)
    assert chains.take(compiled_or_pure) == 1
    assert stored == [(2048, b"w" * 512 + b"v" * 512)] * 2
    assert chains.rig.read(chains.status, 1) == b"\0"


@pytest.mark.parametrize("connections", [1, 4])
def test_segments_in_flight_have_a_bound_that_holds_until_they_are_answered(
    compiled_or_pure: Engine, connections: int
) -> None:
    """When a connection is lost, each becomes a view of 200 bytes, those of all connections."""
    chains = Chains(size=1024)
    server = Loopback(Turn(), chains.image, engine=compiled_or_pure)
    assert server.rows.enter(chains.queue, _Owner())
    links = chains.chain(IN, 0, spread(MAX_SEGMENTS, 8))
    table = chains.rig.alloc(chains.table(links))
    most = MAX_ROW_SEGMENTS // MAX_SEGMENTS // connections
    for head in range(most + 1):
        chains.rig.raw(head, table, 16 * len(links), DESC_INDIRECT)
        chains.rig.put_head(head)
    server.route.lead(server.route.outlets * connections)
    arguments = chains.queue, chains.disk, server.route, server.transmission, server.rows
    taken = compiled_or_pure.take_commands(*arguments)
    assert sum(taken) == most
    assert chains.queue.cells[STOPPED] == STOP_ROOM
    server._flush()
    assert server.transmission.cells[SEGMENTS] == chains.queue.in_flight == 0
    chains.queue.cells[STOPPED] = 0
    assert sum(compiled_or_pure.take_commands(*arguments)) == 1
