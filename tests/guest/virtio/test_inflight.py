"""The in-flight region (`inflight`): its layout, what is refused, and every death there can be."""

from __future__ import annotations

import fcntl
import os
import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bridge.errors import ProtocolError
from bridge.guest.virtio.inflight import (
    InflightRegion,
    TrackedSplitQueue,
    queue_region_bytes,
    queue_size_by_region,
)
from bridge.guest.virtio.inflight_packed import TrackedPackedQueue
from bridge.guest.virtio.queue import VirtQueue
from tests.guest.virtio.dying import Died, Life
from tests.guest.virtio.mock import DEVICE_WRITES, QueueRig
from tests.guest.virtio.packed_driver import PackedDriver

SIZE = 8


class Split:
    """A split ring and its part of an in-flight region."""

    packed = False

    def __init__(self, base: int = 0) -> None:
        self.guest = QueueRig(size=SIZE, base=base)
        self.base = base
        self.region = memoryview(bytearray(queue_region_bytes(SIZE, packed=False)))
        self.n_tokens = 0
        self.order: dict[int, int] = {}
        """Token by the address of its status byte."""

    def add(self) -> int:
        """One more request."""
        self.n_tokens += 1
        address = self.guest.alloc(1)
        self.order[address] = self.n_tokens
        self._add([(self.guest.alloc(bytes(16)), 16, 0), (address, 1, DEVICE_WRITES)])
        return self.n_tokens

    def _add(self, buffers: list[tuple[int, int, int]]) -> None:
        self.guest.driver.add(self.n_tokens, buffers)
        self.guest.driver.publish()

    def start(self, life: Life, *, base: int | None = None) -> VirtQueue:
        """A process that serves the ring for as long as `life` has it."""
        queue = TrackedSplitQueue(
            *(self.guest.memory, self.guest.areas), **self._options(life, base)
        )
        queue.used = life.watch(queue.used)
        queue.elements = life.watch(queue.elements)
        return queue

    def _options(self, life: Life, base: int | None) -> dict[str, Any]:
        return {
            "size": SIZE,
            "base": self.base if base is None else base,
            "event_idx": True,
            "indirect": True,
            "region": life.watch(self.region),
            "n_entries": SIZE,
        }

    def poll(self) -> list[int]:
        return [token for token, _ in self.guest.driver.poll()]

    def token(self, chain: tuple) -> int:  # type: ignore[type-arg]
        """Whose request it is, by where its status lies."""
        view, at = chain[5], chain[6]
        view[at] = 0x5A
        [address] = [a for a in self.order if self.guest.read(a, 1) == b"\x5a"]
        view[at] = 0
        return self.order[address]


class Packed(Split):
    """A packed ring and its part of an in-flight region."""

    packed = True

    def __init__(self, base: int = 0) -> None:
        super().__init__()
        area = self.guest.memory.views(0, PackedDriver.area_bytes(SIZE))[0]
        area[:] = bytes(len(area))
        self.driver = PackedDriver(area, size=SIZE, start=base % SIZE, wrap=base // SIZE % 2 ^ 1)
        at = 16 * SIZE
        self.areas = (area[:at], area[at : at + 4], area[at + 4 : at + 8])
        self.region = memoryview(bytearray(queue_region_bytes(SIZE, packed=True)))
        self.base = self.driver.start_base

    def _add(self, buffers: list[tuple[int, int, int]]) -> None:
        self.driver.add(self.n_tokens, buffers)

    def start(self, life: Life, *, base: int | None = None) -> VirtQueue:
        options = self._options(life, base)
        queue = TrackedPackedQueue(self.guest.memory, self.areas, **options)
        queue._halves = life.watch(queue._halves)
        queue._lengths = life.watch(queue._lengths)
        return queue

    def poll(self) -> list[int]:
        return [token for token, _ in self.driver.poll()]


RINGS = [Split, Packed]


@pytest.fixture(params=RINGS, ids=["split", "packed"])
def make_ring(request: pytest.FixtureRequest) -> Callable[..., Split]:
    return request.param  # type: ignore[no-any-return]


def serve_all(ring: Split, queue: VirtQueue) -> list[int]:
    """Execute what was recovered and what is available; the tokens in that order."""
    chains = [*queue.recovered(), *queue.pop()]
    tokens = [ring.token(chain) for chain in chains]
    for chain in chains:
        queue.push(chain[0], 1)
        queue.publish()
    return tokens


def life_of_a_process(ring: Split, life: Life) -> None:
    """Out-of-order completion in batches, with new requests in between."""
    queue = ring.start(life)
    first = queue.pop()
    queue.push(first[2][0], 1)
    queue.push(first[0][0], 1)
    queue.publish()
    ring.add()
    [fourth] = queue.pop()
    queue.push(fourth[0], 1)
    queue.publish()
    queue.push(first[1][0], 1)
    queue.publish()


def count_stores(make_ring: Callable[..., Split], base: int) -> int:
    life = Life()
    ring = make_ring(base)
    for _ in range(3):
        ring.add()
    life_of_a_process(ring, life)
    return life.made


# 7 is the last index before a wrap in the packed ring, 65533 in the split one.
@pytest.mark.parametrize("base", [0, 7, 65533])
def test_inflight_death_after_any_store_loses_nothing_and_repeats_no_answer(
    make_ring: Callable[..., Split], base: int
) -> None:
    """The crash matrix: all seven steps, and every store in between."""
    deaths = count_stores(make_ring, base)
    assert deaths > 20
    for after in range(deaths):
        ring = make_ring(base)
        tokens = {ring.add() for _ in range(3)}
        with pytest.raises(Died):
            life_of_a_process(ring, Life(after))
        tokens |= set(range(1, ring.n_tokens + 1))
        answered = ring.poll()
        queue = ring.start(Life())
        executed = serve_all(ring, queue)
        answered += ring.poll()
        assert sorted(answered) == sorted(tokens), after
        assert executed == sorted(executed), after  # in the order of their making
        assert queue.in_flight == 0
        # And the ring goes on.
        token = ring.add()
        assert serve_all(ring, queue) == [token]
        assert ring.poll() == [token]


def test_inflight_death_while_recovering_loses_nothing(make_ring: Callable[..., Split]) -> None:
    for after in range(0, count_stores(make_ring, 0), 3):
        again = 0
        while True:
            ring = make_ring(0)
            for _ in range(3):
                ring.add()
            with pytest.raises(Died):
                life_of_a_process(ring, Life(after))
            answered = ring.poll()
            try:
                serve_all(ring, ring.start(Life(again)))
            except Died:
                dead = True
            else:
                dead = False
            answered += ring.poll()
            serve_all(ring, ring.start(Life()))
            answered += ring.poll()
            assert sorted(answered) == list(range(1, ring.n_tokens + 1)), (after, again)
            if not dead:
                break
            again += 1


def test_inflight_base_of_the_front_end_does_not_count_when_requests_were_lost(
    make_ring: Callable[..., Split],
) -> None:
    """cloud-hypervisor names the available index after a reconnect."""
    ring = make_ring(0)
    for _ in range(2):
        ring.add()
    ring.start(Life()).pop()
    ring.add()
    base = 3 if not ring.packed else 3 | 1 << 15 | 3 << 16 | 1 << 31
    queue = ring.start(Life(), base=base)
    assert queue.in_flight == 2
    assert serve_all(ring, queue) == [1, 2, 3]
    assert sorted(ring.poll()) == [1, 2, 3]


def test_inflight_requests_are_repeated_in_the_order_of_popping_not_of_their_heads(
    make_ring: Callable[..., Split],
) -> None:
    """Writes to the same place must not pass each other."""
    ring = make_ring(0)
    for _ in range(3):
        ring.add()
    queue = ring.start(Life())
    chains = queue.pop()
    for chain in (chains[1], chains[0], chains[2]):  # heads become free in another order
        queue.push(chain[0], 1)
    queue.publish()
    ring.poll()
    for _ in range(3):
        ring.add()
    again = queue.pop()
    assert [chain[0] for chain in again] != sorted(chain[0] for chain in again)
    assert serve_all(ring, ring.start(Life())) == [4, 5, 6]


def test_inflight_recovered_requests_come_first_in_the_order_of_their_popping() -> None:
    ring = Split()
    for _ in range(4):
        ring.add()
    queue = ring.start(Life())
    chains = queue.pop()
    queue.push(chains[1][0], 1)
    queue.publish()
    queue = ring.start(Life())
    assert [ring.token(chain) for chain in queue.recovered()] == [1, 3, 4]
    assert queue.recovered() == []
    assert queue.pop() == []
    assert queue.in_flight == 3


def test_inflight_recovered_descriptors_are_checked_again() -> None:
    """The guest may have changed them meanwhile."""
    ring = Split()
    ring.add()
    ring.start(Life()).pop()
    for index in range(SIZE):
        ring.guest.raw(index, 1 << 50, 16, 1, 3)
    [chain] = ring.start(Life()).recovered()
    assert chain[-1] is not None


def test_inflight_fresh_region_beside_a_ring_that_has_run_starts_at_its_used_index() -> None:
    """SPDK#3766: after a migration the region is new and the ring is not."""
    ring = Split(base=1000)
    ring.add()
    queue = ring.start(Life())
    assert struct.unpack_from("<HHHH", ring.region, 8) == (1, SIZE, 0, 1000)
    assert serve_all(ring, queue) == [1]


def test_inflight_region_of_another_ring_with_nothing_in_flight_is_accepted() -> None:
    """A guest was reset: its new driver starts at 0, the region is still there."""
    ring = Split(base=5000)
    ring.add()
    serve_all(ring, ring.start(Life()))
    new = Split()
    new.region = ring.region
    new.add()
    assert serve_all(new, new.start(Life())) == [1]
    assert new.poll() == [1]


def test_inflight_packed_ring_stopped_in_order_starts_where_the_front_end_says() -> None:
    ring = Packed()
    ring.add()
    queue = ring.start(Life())
    serve_all(ring, queue)
    assert queue.close(told=True) == 2 | 1 << 15 | 2 << 16 | 1 << 31
    new = Packed(base=3)
    new.region = ring.region
    new.add()
    assert serve_all(new, new.start(Life())) == [1]
    assert new.poll() == [1]


def test_inflight_packed_ring_whose_front_end_vanished_starts_where_it_was() -> None:
    """Only the region knows: a packed ring's used index is not in guest memory."""
    ring = Packed()
    ring.add()
    queue = ring.start(Life())
    serve_all(ring, queue)
    queue.close(told=False)
    ring.add()
    assert serve_all(ring, ring.start(Life(), base=0)) == [2]


def test_inflight_full_ring_is_recovered(make_ring: Callable[..., Split]) -> None:
    """Found by fuzzing: with no free entry left the packed region's free list is empty."""
    ring = make_ring(0)
    for _ in range(SIZE // 2):
        ring.add()
    ring.start(Life()).pop()
    tokens = list(range(1, SIZE // 2 + 1))
    queue = ring.start(Life())
    assert serve_all(ring, queue) == tokens
    assert ring.poll() == tokens
    for token in range(SIZE // 2 + 1, SIZE + 1):
        ring.add()
        assert serve_all(ring, queue) == [token]


def test_inflight_layout_of_a_split_entry() -> None:
    ring = Split()
    ring.add()
    ring.add()
    queue = ring.start(Life())
    chains = queue.pop()
    entries = [struct.unpack_from("<B5xHQ", ring.region, 16 + 16 * chain[0]) for chain in chains]
    assert entries == [(1, 0, 0), (1, 0, 1)]
    queue.push(chains[0][0], 1)
    queue.push(chains[1][0], 1)
    queue.publish()
    version, n_entries, last_batch_head, used_idx = struct.unpack_from("<HHHH", ring.region, 8)
    assert (version, n_entries, last_batch_head, used_idx) == (1, SIZE, chains[1][0], 2)
    entry = struct.unpack_from("<B5xH", ring.region, 16 + 16 * chains[1][0])
    assert entry == (0, chains[0][0])


def test_inflight_layout_of_a_packed_entry() -> None:
    ring = Packed()
    ring.add()
    [chain] = ring.start(Life()).pop()
    entry = struct.unpack_from("<BxHHHQHHIQ", ring.region, 32)
    assert entry[:5] == (1, 1, 1, 2, 0)  # in flight, next, last, count, counter
    address, length, id_, flags = struct.unpack_from("<QIHH", ring.driver.ring, 0)
    assert entry[5:] == (id_, flags, length, address)
    assert struct.unpack_from("<HHHHHHBB", ring.region, 8) == (1, SIZE, 2, 2, 0, 0, 1, 1)
    assert chain[0] == 0


# Regions that lie


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (12, struct.pack("<H", SIZE)),  # last_batch_head out of range, with a batch to finish
        (12, struct.pack("<H", 65535)),
        (14, struct.pack("<H", 3000)),  # used_idx far from the ring's
        (14, struct.pack("<H", 65535 - SIZE)),
    ],
)
def test_inflight_split_region_with_impossible_indexes_is_refused(offset: int, data: bytes) -> None:
    """CVE-2026-63110, QEMU#3974: list indexes and counts of the region are checked."""
    ring = Split()
    ring.add()
    ring.add()
    queue = ring.start(Life())
    chains = queue.pop()
    queue.push(chains[0][0], 1)
    queue.publish()
    ring.region[14:16] = struct.pack("<H", 0)  # a batch of one was not finished
    ring.region[offset : offset + len(data)] = data
    with pytest.raises(ProtocolError):
        ring.start(Life())


def test_inflight_list_that_loops_ends() -> None:
    ring = Split()
    for _ in range(3):
        ring.add()
    queue = ring.start(Life())
    chains = queue.pop()
    for chain in chains[:2]:
        queue.push(chain[0], 1)
    queue.publish()
    ring.region[14:16] = struct.pack("<H", 0)
    for head in range(SIZE):
        struct.pack_into("<H", ring.region, 16 + 16 * head + 6, chains[1][0])
    assert ring.start(Life()).in_flight <= 2


def test_inflight_counter_at_its_end_does_not_overflow(make_ring: Callable[..., Split]) -> None:
    ring = make_ring(0)
    ring.add()
    ring.start(Life()).pop()
    header, entry = (32, 32) if ring.packed else (16, 16)
    for index in range(SIZE):
        struct.pack_into("<Q", ring.region, header + entry * index + 8, (1 << 64) - 1)
    queue = ring.start(Life())
    ring.add()
    assert serve_all(ring, queue) == [1, 2]


@pytest.mark.parametrize("seed", range(200))
def test_inflight_random_region_is_refused_or_recovers_boundedly(
    make_ring: Callable[..., Split], seed: int
) -> None:
    rng = random.Random(seed)
    ring = make_ring(0)
    for _ in range(3):
        ring.add()
    queue = ring.start(Life())
    chains = queue.pop()
    queue.push(chains[0][0], 1)
    queue.publish()
    for _ in range(rng.randint(1, 12)):
        # Version and number of entries are the map's to check.
        ring.region[rng.randrange(12, len(ring.region))] = rng.choice([0, 1, 3, 7, 8, 255])
    try:
        queue = ring.start(Life())
    except ProtocolError:
        return
    chains = queue.recovered()
    assert len(chains) == queue.in_flight <= SIZE
    for chain in chains:
        queue.push(chain[0], 1)
    queue.publish()
    assert queue.in_flight == 0


# The region as a whole


@pytest.fixture
def region_fd() -> Iterator[int]:
    fd = os.memfd_create("inflight-under-test", os.MFD_ALLOW_SEALING)
    yield fd
    os.close(fd)


def test_inflight_queues_are_64_byte_aligned() -> None:
    """4 queues of 1024: 65792 bytes."""
    assert 4 * queue_region_bytes(1024, packed=False) == 65792
    assert queue_region_bytes(1, packed=False) == 64
    assert queue_region_bytes(1, packed=True) == 64


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("num_queues", [1, 3, 4])
def test_inflight_size_tells_what_a_region_was_made_for(packed: bool, num_queues: int) -> None:
    """QEMU 10 asks for queues of 128 and starts rings of 1024; a restart may have other options."""
    for exponent in range(11):
        size = num_queues * queue_region_bytes(1 << exponent, packed=packed)
        told = queue_size_by_region(size, num_queues, packed=packed)
        assert num_queues * queue_region_bytes(told, packed=packed) == size
        assert told >= 1 << exponent
    for size in (8, 4096, 16384, 65792 + 64):
        assert queue_size_by_region(size, num_queues, packed=packed) == 0


def test_inflight_created_region_is_sealed_and_can_be_mapped_again() -> None:
    region, fd, size = InflightRegion.create(num_queues=2, queue_size=128, packed=False)
    try:
        seals = fcntl.fcntl(fd, fcntl.F_GET_SEALS)
        assert seals == fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        with pytest.raises(PermissionError):
            os.ftruncate(fd, 1)
        region.queue(1)[0] = 0x5A
        again = InflightRegion.map(fd, 0, size, num_queues=2, queue_size=128, packed=False)
        assert again.queue(1)[0] == 0x5A
        assert again.queue(0)[0] == 0
    finally:
        os.close(fd)


def test_inflight_region_created_anew_does_not_leak_the_former() -> None:
    """CVE-2020-10726."""

    def usage() -> tuple[int, int]:
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), maps.read().count("memfd:inflight")

    before = usage()
    for _ in range(20):
        region, fd, _ = InflightRegion.create(num_queues=1, queue_size=8, packed=False)
        os.close(fd)
        del region
    assert usage() == before


@pytest.mark.parametrize(
    ("file_bytes", "offset", "size", "num_queues"),
    [
        (4096, 0, 64, 1),  # the range is too short (CVE-2021-3839)
        (4096, 0, 4096, 100),
        (100, 0, 4096, 1),  # the file is
        (4096, 4096, 4096, 1),
        (4096, 1 << 62, 4096, 1),
        (0, 0, 4096, 1),
    ],
)
def test_inflight_region_too_short_is_refused(
    region_fd: int, file_bytes: int, offset: int, size: int, num_queues: int
) -> None:
    os.ftruncate(region_fd, file_bytes)
    with pytest.raises(ProtocolError):
        InflightRegion.map(
            region_fd, offset, size, num_queues=num_queues, queue_size=8, packed=False
        )


@pytest.mark.parametrize(("version", "n_entries"), [(2, 8), (1, 7), (1, 16), (1, 0)])
def test_inflight_region_that_contradicts_itself_is_refused(
    region_fd: int, version: int, n_entries: int
) -> None:
    os.ftruncate(region_fd, 4096)
    os.pwrite(region_fd, struct.pack("<HH", version, n_entries), 8)
    with pytest.raises(ProtocolError, match="version"):
        InflightRegion.map(region_fd, 0, 4096, num_queues=1, queue_size=8, packed=False)


def test_inflight_region_at_an_unaligned_offset_is_mapped(region_fd: int) -> None:
    os.ftruncate(region_fd, 8192)
    region = InflightRegion.map(region_fd, 4160, 192, num_queues=1, queue_size=8, packed=False)
    region.queue(0)[0] = 0x77
    assert os.pread(region_fd, 1, 4160) == b"\x77"


def test_queue_beyond_the_region_is_refused() -> None:
    region, fd, _ = InflightRegion.create(num_queues=1, queue_size=8, packed=False)
    os.close(fd)
    with pytest.raises(ProtocolError):
        region.queue(1)
