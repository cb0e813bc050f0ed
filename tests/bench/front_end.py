"""A guest for `./run bench full`: random places, mixtures, several queues.

    python -m tests.bench.front_end SOCKET BLOCK_BYTES DEPTH QUEUES COUNT KIND STEP_BLOCKS

The bridge's own front-end (`bridge.peers`), which keeps `DEPTH` requests in flight on each queue,
prints the seconds that `COUNT` requests took. One that is answered with an error ends it.
"""

from __future__ import annotations

import random
import sys
import time
from typing import Final

import trio

from bridge.peers.blk_driver import BlkDriver
from bridge.peers.driver_queue import DriverQueue
from bridge.spec.virtio_blk import S_OK, T_IN, T_OUT
from tests.bench.rows import MIXED, READ

_READS_OF_MIXED: Final = 0.7


class _Load:
    """What is still to be asked."""

    def __init__(self, disk: BlkDriver, block_bytes: int, count: int, kind: str, step: int) -> None:
        self._blocks = disk.size_bytes // block_bytes
        self._sectors = block_bytes // 512
        self._block_bytes = block_bytes
        self._kind = kind
        self._step = step
        self._random = random.Random(count)
        self._data = self._random.randbytes(block_bytes)
        self.left = count
        self._next = 0

    def submit(self, queue: DriverQueue) -> None:
        """Put one request into `queue`."""
        self.left -= 1
        if self._step:
            block, self._next = self._next, (self._next + self._step) % self._blocks
        else:
            block = self._random.randrange(self._blocks)
        reads = self._kind == READ
        if self._kind == MIXED:
            reads = self._random.random() < _READS_OF_MIXED
        queue.submit(
            T_IN if reads else T_OUT,
            block * self._sectors,
            self._block_bytes,
            None if reads else self._data,
        )


async def _serve(queue: DriverQueue, load: _Load, depth: int) -> None:
    in_flight = 0
    while True:
        while in_flight < depth and load.left:
            load.submit(queue)
            in_flight += 1
        queue.kick()
        if not in_flight:
            return
        done = queue.poll()
        if not done:
            await queue.wait()
            continue
        for _, status in done:
            if status != S_OK:
                raise SystemExit(f"a request was answered with status {status}")
        in_flight -= len(done)


async def main() -> None:
    """See the module's text."""
    path, *numbers = sys.argv[1:]
    block_bytes, depth, queues, count = map(int, numbers[:4])
    kind, step = numbers[4], int(numbers[5])
    async with await BlkDriver.connect(
        path, num_queues=queues, depth=depth, request_bytes=block_bytes
    ) as disk:
        load = _Load(disk, block_bytes, count, kind, step)
        began_s = time.perf_counter()
        async with trio.open_nursery() as nursery:
            for queue in disk.queues:
                nursery.start_soon(_serve, queue, load, depth)
        print(time.perf_counter() - began_s)


if __name__ == "__main__":
    trio.run(main)
