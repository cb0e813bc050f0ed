"""Rules about the life of a session: stopping a ring, hanging up, and going on afterwards."""

from __future__ import annotations

import os
import struct

from bridge.guest.vhost_user.messages import P_INFLIGHT_SHMFD
from bridge.peers.frontend import FrontEnd
from bridge.probe.rules import Broken, Device, Rule, ask, expect_ok, rule
from bridge.spec.virtio_blk import T_IN

RULES: list[Rule] = []

_ENTRY_BYTES = 16
_HEADER = struct.Struct("<QHHHH")
"""Of a queue in the in-flight region: features, version, descriptors, last batch, used index."""


@rule(RULES, "session_stop", "a ring stops where it has got to, with everything answered")
async def _stop(device: Device) -> None:
    async with device.driver() as driver:
        queue = driver.queues[0]
        for _ in range(5):
            queue.submit(T_IN, 0, device.block_bytes)
        queue.kick()
        (base,) = await driver.stop()
        answered = len(queue.poll())
        # A ring that was disabled may have left requests alone: then its base says so.
        if base != answered:
            raise Broken(f"the ring stopped at {base} with {answered} of 5 requests answered")


@rule(RULES, "session_reconnect", "a session that ends at any point is followed by another one")
async def _reconnect(device: Device) -> None:
    for _ in range(3):
        (await FrontEnd.connect(device.path, timeout_s=20.0)).close()
    with await FrontEnd.connect(device.path, timeout_s=20.0) as front_end:
        await front_end.negotiate(device.features)
    async with device.driver() as driver:
        driver.queues[0].submit(T_IN, 0, device.block_bytes)
        driver.queues[0].kick()
    async with device.driver() as driver:
        expect_ok((await ask(driver.queues[0], T_IN, 0, device.block_bytes))[0], "a read")


@rule(RULES, "inflight_region", "the in-flight region is large enough, and counts what is popped")
async def _region(device: Device) -> None:
    device.need_protocol(P_INFLIGHT_SHMFD, "INFLIGHT_SHMFD")
    queues, size = 1, 64
    with await FrontEnd.connect(device.path, timeout_s=20.0) as front_end:
        await front_end.negotiate(device.features)
        region, fd = await front_end.get_inflight(queues, size)
        try:
            length = os.fstat(fd).st_size
            begin = os.pread(fd, 16, region.mmap_offset)
        finally:
            os.close(fd)
    needed = queues * (_HEADER.size + size * _ENTRY_BYTES)
    if region.mmap_size < needed:
        raise Broken(f"it has {region.mmap_size} bytes, {needed} are needed")
    if length < region.mmap_offset + region.mmap_size:
        raise Broken(f"its file has {length} bytes")
    _, version, descriptors, _, _ = _HEADER.unpack(begin)
    if version not in (0, 1) or (version and descriptors not in (0, size)):
        raise Broken(f"its version is {version}, with {descriptors} descriptors")


@rule(RULES, "inflight_reconnect", "with an in-flight region a new session goes on with the rings")
async def _go_on(device: Device) -> None:
    device.need_protocol(P_INFLIGHT_SHMFD, "INFLIGHT_SHMFD")
    async with device.driver(inflight=True) as driver:
        queue = driver.queues[0]
        status, before = await ask(queue, T_IN, 0, device.block_bytes)
        expect_ok(status, "a read")
        await driver.reconnect()
        status, after = await ask(queue, T_IN, 0, device.block_bytes)
        expect_ok(status, "a read after the reconnect")
        if before != after:
            raise Broken("the same block has other data after the reconnect")
