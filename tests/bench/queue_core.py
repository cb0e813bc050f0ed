"""The data path without I/O: microseconds per 4 KiB request from pop to used element.

A queue, the engine and a target that finishes every request at once. Run it before and
after a change to `SplitQueue`, `BlkEngine` or their in-flight and packed variants; the lowest of
many short rounds is printed, since whatever else the machine does only adds.
"""

from __future__ import annotations

import argparse
import itertools
import mmap
import time
from collections.abc import Callable

from bridge.datapath.request import Request
from bridge.datapath.turn import Turn
from bridge.guest.virtio.blk import BlkEngine
from bridge.guest.virtio.blk_config import BlkConfig, DiskGeometry
from bridge.guest.virtio.chain import Chain
from bridge.guest.virtio.inflight import TrackedSplitQueue, queue_region_bytes
from bridge.guest.virtio.inflight_packed import TrackedPackedQueue
from bridge.guest.virtio.memory import GuestMemory, Region
from bridge.guest.virtio.packed_queue import PackedQueue
from bridge.guest.virtio.queue import VirtQueue
from bridge.guest.virtio.split_queue import SplitQueue, ring_sizes_bytes
from bridge.peers.packed_driver import PackedDriver, write_packed_chain
from bridge.peers.split_driver import SplitDriver, write_chain
from bridge.spec.virtqueue import DESC_INDIRECT, DESC_WRITE, EVENT_AREA_BYTES

_QUEUE_SIZE = 256
_ROUND_REQUESTS = 256


class _Finished:
    """A target that has everything at once."""

    def __init__(self, turn: Turn) -> None:
        self._turn = turn

    def submit(self, request: Request) -> None:
        request.error = 0
        self._turn.finished.append(request)


class _Ring:
    """As much of `RunningRing` as the engine sees."""

    def __init__(self, push: Callable[[int, int], None]) -> None:
        self._push = push

    def complete(self, chain: Chain, status: int, length: int) -> None:
        head, _, _, _, _, view, status_at, _ = chain
        assert view is not None
        view[status_at] = status
        self._push(head, length)


def measure(
    *, depth: int, indirect: bool, tracked: bool, packed: bool, seconds: float = 1.0
) -> float:
    """Microseconds per request: the lowest of as many rounds as fit into `seconds`."""
    guest = memoryview(mmap.mmap(-1, 16 << 20))
    memory = GuestMemory([Region(0, 0, guest)])
    make_driver = PackedDriver if packed else SplitDriver
    area = guest[: make_driver.area_bytes(_QUEUE_SIZE)]
    driver = make_driver(area, size=_QUEUE_SIZE, event_idx=True)
    queue = _queue(memory, driver, guest, tracked=tracked)
    config = BlkConfig(DiskGeometry(1 << 30), num_queues=1)
    turn = Turn()
    engine = BlkEngine(config, _Finished(turn), serial="x", fault=print, turn=turn)
    engine.negotiated(config.features())
    ring = _Ring(queue.push)
    chains = [_chain(guest, slot, indirect=indirect, packed=packed) for slot in range(depth)]
    best_s = float("inf")
    end_s = time.perf_counter() + seconds
    while time.perf_counter() < end_s:
        spent_s = 0.0
        for _ in range(_ROUND_REQUESTS // depth):
            for slot, chain in enumerate(chains):
                driver.add(slot, chain)
            driver.publish()
            started_s = time.perf_counter()
            engine.start(ring, queue.pop())
            turn.end()
            queue.publish()
            spent_s += time.perf_counter() - started_s
            if len(driver.poll()) != depth:
                raise SystemExit("the queue lost a request")
        best_s = min(best_s, spent_s)
    return best_s / (_ROUND_REQUESTS // depth * depth) * 1e6


def _queue(
    memory: GuestMemory, driver: SplitDriver | PackedDriver, guest: memoryview, *, tracked: bool
) -> VirtQueue:
    packed = isinstance(driver, PackedDriver)
    table, available, used = (
        (16 * _QUEUE_SIZE, EVENT_AREA_BYTES, EVENT_AREA_BYTES)
        if packed
        else ring_sizes_bytes(_QUEUE_SIZE)
    )
    areas = (
        guest[:table],
        guest[driver.avail_offset : driver.avail_offset + available],
        guest[driver.used_offset : driver.used_offset + used],
    )
    if not tracked:
        plain = PackedQueue if packed else SplitQueue
        return plain(
            *(memory, areas),
            size=_QUEUE_SIZE,
            base=driver.base,
            event_idx=True,
            indirect=True,
        )
    kept = TrackedPackedQueue if packed else TrackedSplitQueue
    return kept(
        *(memory, areas),
        size=_QUEUE_SIZE,
        base=driver.base,
        event_idx=True,
        indirect=True,
        region=memoryview(bytearray(queue_region_bytes(_QUEUE_SIZE, packed=packed))),
        n_entries=_QUEUE_SIZE,
    )


def _chain(
    guest: memoryview, slot: int, *, indirect: bool, packed: bool
) -> list[tuple[int, int, int]]:
    """A 4 KiB read as Linux lays it out."""
    header = 0x100000 + slot * 64
    guest[header + 8 : header + 16] = (slot * 8).to_bytes(8, "little")
    buffers = [
        (header, 16, 0),
        (0x200000 + slot * 4096, 4096, DESC_WRITE),
        (header + 32, 1, DESC_WRITE),
    ]
    if not indirect:
        return buffers
    table = 0x180000 + slot * 64
    write = write_packed_chain if packed else write_chain
    return [(table, write(guest[table : table + 48], buffers), DESC_INDIRECT)]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="./run bench queue_core", description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each line")
    arguments = parser.parse_args()
    print(f"{'':44}{'µs per request':>15}")
    for packed, depth, indirect, tracked in itertools.product(
        (False, True), (1, 32), (False, True), (False, True)
    ):
        name = f"{'packed' if packed else 'split'}, depth {depth}, "
        name += "indirect" if indirect else "direct"
        name += ", in-flight region" if tracked else ""
        spent_us = measure(
            depth=depth,
            indirect=indirect,
            tracked=tracked,
            packed=packed,
            seconds=arguments.seconds,
        )
        print(f"{name:44}{spent_us:15.2f}", flush=True)


if __name__ == "__main__":
    main()
