"""A process that dies between any two stores of the usual case: see `virtio.inflight`.

The one that follows finds everything in the in-flight region and executes the rest in the general
way: nothing is lost, and nothing that the guest could see as answered is done again.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from itertools import pairwise

import pytest

from bridge.datapath.buffers import scatter
from bridge.datapath.cells import BLOCK_MASK, CAPACITY_BYTES, DISK_CELLS, MAY_WRITE, cells
from bridge.datapath.turn import Turn
from bridge.datapath.usual import publish, take_commands, take_hits
from bridge.guest.virtio.chain import Chain
from bridge.guest.virtio.inflight import TrackedSplitQueue
from bridge.guest.virtio.queue import VirtQueue
from bridge.peers.split_driver import write_chain
from bridge.spec.virtqueue import DESC_INDIRECT as INDIRECT
from tests.datapath.loopback import Loopback, at_hand
from tests.guest.virtio.dying import Died, Life
from tests.guest.virtio.mock import DEVICE_WRITES
from tests.guest.virtio.test_inflight import Split

IMAGE_BYTES = 1 << 17


class Ring(Split):
    """A ring of writes and reads, each of a block of its own, some in several segments, and the
    disk."""

    only: int | None = None
    """All are reads (0) or writes (1): they are merged."""

    def __init__(self, base: int) -> None:
        super().__init__(base)
        self.image = bytearray(IMAGE_BYTES)
        self.rooms: dict[int, int] = {}
        """Where what a request reads is to be, by token."""
        self.disk = cells(DISK_CELLS)
        self.disk[CAPACITY_BYTES], self.disk[BLOCK_MASK] = IMAGE_BYTES, 511
        self.disk[MAY_WRITE] = 1

    def add(self) -> int:
        self.n_tokens += 1
        token = self.n_tokens
        is_write = token % 2 if self.only is None else self.only
        header = self.guest.alloc(struct.pack("<IIQ", is_write, 0, token))
        data = self.guest.alloc(bytes([token]) * 512 if is_write else 512)
        if not is_write:
            self.image[512 * token : 512 * token + 512] = bytes([token]) * 512
            self.rooms[token] = data
        status = self.guest.alloc(1)
        self.order[status] = self.n_tokens
        way = 0 if is_write else DEVICE_WRITES
        cuts = [0, 512] if token % 4 < 2 else [0, 100, 101, 512]
        chain = [(header, 16, 0)]
        chain += [(data + start, end - start, way) for start, end in pairwise(cuts)]
        chain += [(status, 1, DEVICE_WRITES)]
        table_bytes = 16 * len(chain)
        table = self.guest.alloc(bytes(table_bytes))
        write_chain(self.guest.memory.views(table, table_bytes)[0], chain)
        self._add([(table, table_bytes, INDIRECT)])
        return self.n_tokens

    def queue(self, life: Life) -> TrackedSplitQueue:
        queue = self.start(life)
        assert isinstance(queue, TrackedSplitQueue)
        return queue

    def done(self, token: int) -> bool:
        """What was written is on the disk, or what was read is in memory."""
        expected = bytes([token]) * 512
        if token in self.rooms and self.guest.read(self.rooms[token], 512) != expected:
            return False
        return self.image[512 * token : 512 * token + 512] == expected

    def execute(self, chain: Chain) -> None:
        """In the general way."""
        _, type_, sector, readable, writable, status_view, status_at, fault = chain
        assert fault is None
        assert status_view is not None
        if type_:
            self.image[sector * 512 : sector * 512 + 512] = b"".join(readable)
        else:
            scatter(writable, 0, self.image[sector * 512 : sector * 512 + 512])
        status_view[status_at] = 0


class Reads(Ring):
    """Of adjacent reads."""

    only = 0


class Writes(Ring):
    """Of adjacent writes."""

    only = 1


class _Owner:
    """A ring that was never asked for anything unusual."""

    def adopt(self, head: int, cookie: int, row: tuple[int, ...]) -> None:
        raise AssertionError("nothing unusual happened")

    def publish_later(self) -> None:
        """The test does."""


def hits(ring: Ring, life: Life) -> None:
    """Two batches, served from a cache."""
    queue = ring.queue(life)
    cache = at_hand(ring.image)
    cache.data = life.watch(cache.data)
    assert take_hits(queue, ring.disk, cache) == (1, 2)
    publish(queue)
    ring.add()
    assert take_hits(queue, ring.disk, cache) == (1, 0)
    publish(queue)


def commands(ring: Ring, life: Life) -> None:
    """Two batches, sent to a server; answered in three, and in another order."""
    queue = ring.queue(life)
    server = Loopback(Turn(), life.watch(ring.image), late=True)
    rows = server.rows
    assert rows.enter(queue, _Owner())

    def take() -> None:
        assert sum(take_commands(queue, ring.disk, server.route, server.transmission, rows))

    take()
    server._flush()
    publish(queue)
    ring.add()
    take()
    server._flush()
    publish(queue)
    while queue.in_flight:
        server._answer()
    publish(queue)
    assert rows.merged_total == (0 if ring.only is None else 2)


def serve_the_rest(ring: Ring, queue: VirtQueue) -> None:
    for chain in [*queue.recovered(), *queue.pop()]:
        ring.execute(chain)
        queue.push(chain[0], 1)
    queue.publish()


@pytest.mark.parametrize("base", [0, 65533])
@pytest.mark.parametrize(
    ("life_of_a_process", "kind"),
    [(hits, Ring), (commands, Ring), (commands, Reads), (commands, Writes)],
)
def test_death_after_any_store_of_the_usual_case_loses_nothing_and_repeats_no_answer(
    life_of_a_process: Callable[[Ring, Life], None], kind: type[Ring], base: int
) -> None:
    ring, life = kind(base), Life()
    for _ in range(3):
        ring.add()
    life_of_a_process(ring, life)
    assert life.made > 30
    for after in range(life.made):
        ring = kind(base)
        for _ in range(3):
            ring.add()
        with pytest.raises(Died):
            life_of_a_process(ring, Life(after))
        answered = ring.poll()
        for token in answered:
            assert ring.done(token), (after, "answered, and not done")
        queue = ring.start(Life())
        serve_the_rest(ring, queue)
        answered += ring.poll()
        assert sorted(answered) == list(range(1, ring.n_tokens + 1)), after
        assert queue.in_flight == 0
        assert all(map(ring.done, answered)), after
