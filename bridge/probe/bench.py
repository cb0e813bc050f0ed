"""A load on a device, as a guest would make it, and how long its requests took.

Each queue is kept at its depth: what is complete is replaced at once, as fast as this process can.
A duration is the time from the kick to the moment when the completion was seen here.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from time import perf_counter_ns
from typing import Final

import trio

from bridge.errors import ConfigError, ConnectionLost
from bridge.peers.blk_driver import BlkDriver
from bridge.peers.driver_queue import DriverQueue
from bridge.probe.connecting import connected
from bridge.probe.latencies import Latencies
from bridge.spec.virtio_blk import F_FLUSH, F_MQ, F_RO, S_OK, T_FLUSH, T_IN, T_OUT
from bridge.units import SECTOR_BYTES

READ, WRITE, RANDREAD, RANDWRITE, MIXED = "read", "write", "randread", "randwrite", "mixed"
PATTERNS: Final = (READ, WRITE, RANDREAD, RANDWRITE, MIXED)
READ_SHARE: Final = 0.7
"""Of the requests of a mixed load."""

_KINDS: Final = {T_IN: "read", T_OUT: "write", T_FLUSH: "flush"}
_DRAIN_S: Final = 60.0
"""For what is in flight when the time is over."""
_ALIVE_CHECK_S: Final = 1.0
_NS: Final = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of the device."""

    pattern: str = RANDREAD
    """`read` and `write` are sequential, each queue in a part of the disk of its own; the others
    ask for blocks at random, `mixed` reads for 70 % of them and writes the rest."""
    block_bytes: int = 4096
    depth: int = 32
    """Requests in flight on each queue."""
    queues: int = 1
    runtime_s: float = 10.0
    flush_every: int = 0
    """A flush after so many writes; 0: none."""
    seed: int = 1

    @property
    def writes(self) -> bool:
        """It changes the disk."""
        return self.pattern in (WRITE, RANDWRITE, MIXED)


@dataclass(frozen=True)
class Measured:
    """One kind of request."""

    latencies: Latencies
    errors: int
    moved_bytes: int
    """Without those that failed."""


@dataclass(frozen=True)
class Result:
    """What a load came to."""

    load: Load
    disk_bytes: int
    depth: int
    """As it was: a device without indirect descriptors has room for fewer."""
    elapsed_s: float
    kinds: dict[str, Measured]
    """By read, write and flush, as far as there were any."""


async def bench(path: str, load: Load) -> Result:
    """Run `load` on the device at `path`. Overwrites the disk if the load writes.

    Raises ConfigError for a load that this device cannot have, ConnectionLost if it hangs up or
    does not answer, and as `connected` does.
    """
    async with connected(
        path,
        check=partial(_check, load=load),
        num_queues=load.queues,
        queue_size=max(128, 1 << (load.depth - 1).bit_length()),
        depth=load.depth,
        request_bytes=load.block_bytes,
    ) as driver:
        workers = [_Worker(driver, queue, load) for queue in driver.queues]
        begin_ns = perf_counter_ns()
        async with trio.open_nursery() as nursery:
            for worker in workers:
                nursery.start_soon(worker.run, begin_ns + int(load.runtime_s * _NS))
        elapsed_s = (perf_counter_ns() - begin_ns) / _NS
        return Result(
            load, driver.size_bytes, driver.queues[0].depth, elapsed_s, _together(workers, load)
        )


def _check(driver: BlkDriver, *, load: Load) -> None:
    """Raises ConfigError for a load that this device cannot have."""
    queues = driver.config.num_queues if driver.features & F_MQ else 1
    if load.queues > queues:
        raise ConfigError(f"{load.queues} queues are asked for, the device offers {queues}")
    block_bytes = max(driver.config.block_size_bytes, SECTOR_BYTES)
    if load.block_bytes % block_bytes:
        raise ConfigError(
            f"the device's blocks have {block_bytes} bytes, and {load.block_bytes} are no multiple"
        )
    if driver.size_bytes < load.block_bytes * load.queues:
        raise ConfigError(
            f"the disk has {driver.size_bytes} bytes, which is less than one block for each queue"
        )
    if load.writes and driver.features & F_RO:
        raise ConfigError("the disk is read-only")
    if load.flush_every and not driver.features & F_FLUSH:
        raise ConfigError("the device does not offer to flush")


class _Worker:
    """One queue under load."""

    def __init__(self, driver: BlkDriver, queue: DriverQueue, load: Load) -> None:
        self._driver = driver
        self._queue = queue
        self._load = load
        self._random = Random(load.seed * 1000 + queue.index)
        self._sectors = load.block_bytes // SECTOR_BYTES
        blocks = driver.size_bytes // load.block_bytes
        share = blocks // load.queues
        is_sequential = load.pattern in (READ, WRITE)
        self._first = queue.index * share if is_sequential else 0
        self._blocks = share if is_sequential else blocks
        self._next = 0
        self._unflushed = 0
        self._began_ns = [0] * queue.depth
        self._kind = [T_IN] * queue.depth
        self.latencies = {kind: Latencies() for kind in _KINDS}
        self.errors = dict.fromkeys(_KINDS, 0)
        for slot in range(queue.depth):
            queue.data(slot)[:] = os.urandom(load.block_bytes)

    async def run(self, end_ns: int) -> None:
        """Keep the queue full until `end_ns`, then see everything answered."""
        queue = self._queue
        give_up_ns = end_ns + int(_DRAIN_S * _NS)
        self._fill(perf_counter_ns())  # Whatever time it is: a busy machine may have spent it all.
        while (now_ns := perf_counter_ns()) < end_ns or len(queue.free) < queue.depth:
            if now_ns < end_ns:
                self._fill(now_ns)
            elif now_ns > give_up_ns:
                raise ConnectionLost(
                    f"the device left {queue.depth - len(queue.free)} requests unanswered for "
                    f"{_DRAIN_S:.0f} s"
                )
            with trio.move_on_after(_ALIVE_CHECK_S) as scope:
                await queue.wait()
            if scope.cancelled_caught and not self._driver.is_alive:
                raise ConnectionLost("the device hung up")
            self._take(queue.poll())

    def _fill(self, now_ns: int) -> None:
        queue = self._queue
        while queue.free:
            kind = self._next_kind()
            if kind == T_FLUSH:
                slot = queue.submit(T_FLUSH)
            else:
                slot = queue.submit(kind, self._next_sector(), self._load.block_bytes)
            self._kind[slot] = kind
            self._began_ns[slot] = now_ns
        queue.kick()

    def _next_kind(self) -> int:
        load = self._load
        if load.flush_every and self._unflushed >= load.flush_every:
            self._unflushed = 0
            return T_FLUSH
        if not load.writes or (load.pattern == MIXED and self._random.random() < READ_SHARE):
            return T_IN
        self._unflushed += 1
        return T_OUT

    def _next_sector(self) -> int:
        if self._load.pattern in (READ, WRITE):
            block = self._next
            self._next = (block + 1) % self._blocks
        else:
            block = int(self._random.random() * self._blocks)
        return (self._first + block) * self._sectors

    def _take(self, done: Sequence[tuple[int, int]]) -> None:
        now_ns = perf_counter_ns()
        for slot, status in done:
            kind = self._kind[slot]
            self.latencies[kind].add(now_ns - self._began_ns[slot])
            if status != S_OK:
                self.errors[kind] += 1


def _together(workers: Sequence[_Worker], load: Load) -> dict[str, Measured]:
    found = {}
    for kind, name in _KINDS.items():
        latencies = Latencies()
        for worker in workers:
            latencies.merge(worker.latencies[kind])
        if latencies.count:
            errors = sum(worker.errors[kind] for worker in workers)
            block_bytes = 0 if kind == T_FLUSH else load.block_bytes
            moved_bytes = (latencies.count - errors) * block_bytes
            found[name] = Measured(latencies, errors, moved_bytes)
    return found
