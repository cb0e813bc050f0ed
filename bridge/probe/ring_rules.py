"""Rules about virtqueues: forms and sizes, many requests at once, notifications, bad chains."""

from __future__ import annotations

import os
from collections.abc import Callable

import trio

from bridge.errors import BridgeError
from bridge.peers.blk_driver import FEATURES, PACKED_FEATURES, BlkDriver
from bridge.peers.driver_queue import DriverQueue
from bridge.peers.split_driver import SplitDriver, write_descriptor
from bridge.probe.rules import Broken, Device, Rule, ask, expect_ok, rule
from bridge.spec.virtio_blk import F_MQ, S_OK, T_IN
from bridge.spec.virtqueue import DESC_NEXT, DESC_WRITE, F_EVENT_IDX, F_INDIRECT, F_RING_PACKED
from bridge.units import SECTOR_BYTES

RULES: list[Rule] = []

_SAMPLE_BYTES = 1 << 20
"""Of the disk's beginning, read in one way and in another."""
_PLAIN = FEATURES & ~(F_INDIRECT | F_EVENT_IDX)
_QUEUES_MAX = 8
_BAD_S = 0.5
"""How long a device may take over a chain that it need not answer."""


async def _reads_alike(device: Device, **options: object) -> None:
    """A disk that is read with these options of the driver's is the same as without any."""
    length = _sample_bytes(device)
    async with device.driver(features=_PLAIN) as driver:
        expected = await driver.read(0, length)
    async with device.driver(**options) as driver:
        found = await driver.read(0, length)
    if found != expected:
        at = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
        raise Broken(f"other data is read, from byte {at} on")


def _sample_bytes(device: Device) -> int:
    return min(_SAMPLE_BYTES, device.sectors * SECTOR_BYTES)


@rule(RULES, "ring_indirect", "a split ring with indirect descriptors reads the same")
async def _indirect(device: Device) -> None:
    device.need(F_INDIRECT, "INDIRECT_DESC")
    await _reads_alike(device, features=_PLAIN | F_INDIRECT, segment_bytes=4096)


@rule(RULES, "ring_event_idx", "a split ring with EVENT_IDX reads the same, and no call is lost")
async def _event_idx(device: Device) -> None:
    device.need(F_EVENT_IDX, "EVENT_IDX")
    await _reads_alike(device, features=_PLAIN | F_EVENT_IDX, request_bytes=4096)


@rule(RULES, "ring_packed", "a packed ring reads the same")
async def _packed(device: Device) -> None:
    device.need(F_RING_PACKED, "RING_PACKED")
    await _reads_alike(device, features=PACKED_FEATURES, request_bytes=8192)
    await _reads_alike(device, features=_PLAIN | F_RING_PACKED, request_bytes=8192)


@rule(RULES, "ring_sizes", "rings of 4, 64 and 256 descriptors read the same")
async def _sizes(device: Device) -> None:
    for size in (4, 64, 256):
        await _reads_alike(device, features=_PLAIN, queue_size=size, request_bytes=16384)


@rule(RULES, "ring_indexes", "a ring goes on when its 16-bit indexes wrap")
async def _indexes(device: Device) -> None:
    await _reads_alike(device, features=_PLAIN, base=65530, request_bytes=8192, queue_size=64)


@rule(RULES, "ring_depth", "many requests at once are each answered once, with their own data")
async def _depth(device: Device) -> None:
    length = _sample_bytes(device)
    block = device.block_bytes
    async with device.driver(request_bytes=65536) as driver:
        expected = await driver.read(0, length)
    async with device.driver(request_bytes=block, queue_size=256, features=_PLAIN) as driver:
        queue = driver.queues[0]
        asked: dict[int, int] = {}
        waiting = list(range(0, length // block * block, block))[:1024]
        waiting.sort(key=lambda offset: offset * 2654435761 % (1 << 32))
        while waiting or asked:
            while waiting and queue.free:
                offset = waiting.pop()
                asked[queue.submit(T_IN, offset // SECTOR_BYTES, block)] = offset
            queue.kick()
            await queue.wait()
            _compare(queue, asked, expected, block)


def _compare(queue: DriverQueue, asked: dict[int, int], expected: bytes, block: int) -> None:
    for slot, status in queue.poll():
        offset = asked.pop(slot)
        expect_ok(status, f"a read at byte {offset}, among others")
        if queue.data(slot, block) != expected[offset : offset + block]:
            raise Broken(f"a read at byte {offset}, among others, gives other data")


@rule(RULES, "ring_queues", "every queue reads the same")
async def _queues(device: Device) -> None:
    device.need(F_MQ, "MQ")
    count = min(device.config.num_queues, _QUEUES_MAX)
    async with device.driver(num_queues=count) as driver:
        found = set()
        for queue in driver.queues:
            status, data = await ask(queue, T_IN, 0, device.block_bytes)
            expect_ok(status, f"a read on queue {queue.index}")
            found.add(data)
    if len(found) != 1:
        raise Broken("the same block has different data on different queues")


@rule(RULES, "notify_spurious", "a kick without a request does nothing, and later ones still work")
async def _spurious(device: Device) -> None:
    async with device.driver() as driver:
        queue = driver.queues[0]
        for _ in range(20):
            os.eventfd_write(queue.kick_fd, 1)
        await trio.sleep(0.05)
        if queue.driver.has_used:
            raise Broken("a completion came without a request")
        expect_ok((await ask(queue, T_IN, 0, device.block_bytes))[0], "a read")


@rule(RULES, "malformed_chains", "a malformed chain is not served, and the next session works")
async def _malformed(device: Device) -> None:
    for what, put in _MALFORMED.items():
        try:
            async with device.driver(features=_PLAIN, request_bytes=4096) as driver:
                await _try_malformed(driver, what, put)
        except BridgeError:
            pass  # It may hang up. What counts is the next session.
        async with device.driver() as driver:
            status, _ = await ask(driver.queues[0], T_IN, 0, device.block_bytes)
            expect_ok(status, f"a read after {what}")


async def _try_malformed(
    driver: BlkDriver, what: str, put: Callable[[BlkDriver, SplitDriver], memoryview]
) -> None:
    queue = driver.queues[0]
    assert isinstance(queue.driver, SplitDriver)
    status = put(driver, queue.driver)
    queue.kick()
    with trio.move_on_after(_BAD_S):
        await queue.wait()
    if status[0] == S_OK:
        raise Broken(f"{what} is answered with OK")


_NOWHERE = 0x7FFF_0000_0000
"""A guest address without memory."""


def _put(
    driver: BlkDriver, ring: SplitDriver, chain: list[tuple[int, int, int, int]]
) -> memoryview:
    """Put these descriptors (address, length, flags, next) into the table from 0 on; address 0: of
    a header for a read of sector 0, 1: of the status byte, which is returned."""
    header, status = driver.memory.allocate(16), driver.memory.allocate(16)
    driver.memory.view(header, 16)[:] = bytes(16)
    view = driver.memory.view(status, 1)
    view[0] = 0xFF
    for index, (address, length, flags, next_index) in enumerate(chain):
        address = {0: header, 1: status}.get(address, address)
        write_descriptor(ring.table, index, address, length, flags, next_index)
    ring.put_head(0)
    ring.expect(0, 0)
    return view


def _outside(driver: BlkDriver, ring: SplitDriver) -> memoryview:
    chain = [(0, 16, DESC_NEXT, 1), (_NOWHERE, 512, DESC_NEXT | DESC_WRITE, 2), (1, 1, 2, 0)]
    return _put(driver, ring, chain)


def _short_header(driver: BlkDriver, ring: SplitDriver) -> memoryview:
    return _put(driver, ring, [(0, 8, DESC_NEXT, 1), (1, 1, DESC_WRITE, 0)])


def _loop(driver: BlkDriver, ring: SplitDriver) -> memoryview:
    return _put(driver, ring, [(0, 16, DESC_NEXT, 1), (1, 1, DESC_NEXT | DESC_WRITE, 1)])


def _beyond_table(driver: BlkDriver, ring: SplitDriver) -> memoryview:
    return _put(driver, ring, [(0, 16, DESC_NEXT, 1), (1, 1, DESC_NEXT | DESC_WRITE, ring.size)])


_MALFORMED: dict[str, Callable[[BlkDriver, SplitDriver], memoryview]] = {
    "a buffer outside of memory": _outside,
    "a header of 8 bytes": _short_header,
    "a chain that is a loop": _loop,
    "a chain that leaves the table": _beyond_table,
}
