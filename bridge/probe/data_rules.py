"""Rules that write: what was written is read, whatever way it was written in."""

from __future__ import annotations

import os
from random import Random

import trio

from bridge.peers.blk_driver import FEATURES, PACKED_FEATURES, BlkDriver
from bridge.probe.rules import (
    Broken,
    Device,
    NotOffered,
    Rule,
    ask,
    expect_ok,
    expect_refusal,
    expect_unsupported,
    rule,
)
from bridge.spec.virtio_blk import (
    F_CONFIG_WCE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_WRITE_ZEROES,
    SEGMENT,
    SEGMENT_UNMAP,
    T_DISCARD,
    T_OUT,
    T_WRITE_ZEROES,
)
from bridge.spec.virtqueue import F_RING_PACKED
from bridge.units import SECTOR_BYTES

RULES: list[Rule] = []

_AREA_BYTES = 4 << 20
"""Of the disk's beginning: what these rules use, if the disk is that large."""
_STEPS = 300
_UNKNOWN_FLAG = 1 << 7


def _area(device: Device) -> int:
    """Its length, in whole blocks. Raises NotOffered for a disk that cannot be written."""
    if device.features & F_RO:
        raise NotOffered("the disk is read-only")
    size = min(_AREA_BYTES, device.sectors * SECTOR_BYTES)
    return size // device.block_bytes * device.block_bytes


async def fill(device: Device) -> None:
    """Write what no block has twice, so that a mix-up is seen by the rules that only read."""
    async with device.driver() as driver:
        await driver.write(0, os.urandom(_area(device)))


def _compare(found: bytes, expected: bytes, what: str) -> None:
    if found != expected:
        pairs = enumerate(zip(found, expected, strict=True))
        at = next(index for index, (one, other) in pairs if one != other)
        raise Broken(f"{what}: byte {at} is {found[at]:#04x}, {expected[at]:#04x} was written")


@rule(RULES, "data_written", "what was written is read, at both ends of the disk", destructive=True)
async def _written(device: Device) -> None:
    _area(device)
    size = device.sectors * SECTOR_BYTES
    async with device.driver() as driver:
        for length in (device.block_bytes, min(1 << 20, size) // 2 // 4096 * 4096):
            if not length:
                continue
            for offset in (0, (size - length) // device.block_bytes * device.block_bytes):
                data = os.urandom(length)
                await driver.write(offset, data)
                _compare(await driver.read(offset, length), data, f"{length} bytes at {offset}")


@rule(RULES, "data_model", "overlapping writes of any size take effect in order", destructive=True)
async def _model(device: Device) -> None:
    size = _area(device)
    for features in (FEATURES, PACKED_FEATURES):
        if features & F_RING_PACKED and not device.features & F_RING_PACKED:
            continue
        async with device.driver(segment_bytes=8192, features=features) as driver:
            model = bytearray(os.urandom(size))
            await driver.write(0, model)
            await _steps(device, driver, model)
            _compare(await driver.read(0, size), bytes(model), "at the end")


async def _steps(device: Device, driver: BlkDriver, model: bytearray) -> None:
    chance = Random(1)
    blocks = len(model) // device.block_bytes
    for _ in range(_STEPS):
        first = chance.randrange(blocks)
        count = min(chance.randint(1, 64), blocks - first)
        offset, length = first * device.block_bytes, count * device.block_bytes
        choice = chance.random()
        if choice < 0.5:
            data = chance.randbytes(length)
            await driver.write(offset, data)
            model[offset : offset + length] = data
        elif choice < 0.6 and device.features & F_WRITE_ZEROES:
            await driver.write_zeroes([(offset, min(length, _zeroes_max(device)))])
            length = min(length, _zeroes_max(device))
            model[offset : offset + length] = bytes(length)
        elif choice < 0.65 and device.features & F_FLUSH:
            await driver.flush()
        else:
            found = await driver.read(offset, length)
            _compare(found, bytes(model[offset : offset + length]), f"a read at {offset}")


def _zeroes_max(device: Device) -> int:
    return device.config.max_write_zeroes_sectors * SECTOR_BYTES


@rule(RULES, "data_queues", "what is written on one queue is read on the others", destructive=True)
async def _queues(device: Device) -> None:
    device.need(F_MQ, "MQ")
    size = _area(device)
    count = min(device.config.num_queues, 4)
    share = size // count // device.block_bytes * device.block_bytes
    if count < 2 or not share:
        raise NotOffered("there is one queue only")
    parts = [os.urandom(share) for _ in range(count)]
    async with device.driver(num_queues=count, request_bytes=16384) as driver:

        async def write(index: int) -> None:
            await driver.write(index * share, parts[index], queue=index)

        async with trio.open_nursery() as nursery:
            for index in range(count):
                nursery.start_soon(write, index)
        for index, part in enumerate(parts):
            found = await driver.read(index * share, share, queue=(index + 1) % count)
            _compare(found, part, f"queue {(index + 1) % count}, at {index * share}")


@rule(RULES, "data_kept", "what was flushed is there in the next session", destructive=True)
async def _kept(device: Device) -> None:
    length = min(_area(device), 1 << 18)
    data = os.urandom(length)
    async with device.driver() as driver:
        await driver.write(0, data)
        if device.features & F_FLUSH:
            await driver.flush()
    async with device.driver() as driver:
        _compare(await driver.read(0, length), data, "in the next session")


@rule(RULES, "data_write_cache", "the write cache can be turned off and on", destructive=True)
async def _write_cache(device: Device) -> None:
    device.need(F_CONFIG_WCE, "CONFIG_WCE")
    length = device.block_bytes
    _area(device)
    async with device.driver() as driver:
        before = driver.config.writeback
        for enabled in (False, True):
            await driver.set_writeback(enabled)
            if (await driver.refresh_config()).writeback != enabled:
                raise Broken(f"writeback was set to {int(enabled)} and is not")
            data = os.urandom(length)
            await driver.write(0, data)
            _compare(await driver.read(0, length), data, f"with writeback {int(enabled)}")
        await driver.set_writeback(bool(before))


@rule(RULES, "data_end", "a write across the end of the disk changes nothing", destructive=True)
async def _end(device: Device) -> None:
    _area(device)
    block = device.block_bytes
    last = device.sectors * SECTOR_BYTES - block
    data = os.urandom(block)
    async with device.driver() as driver:
        await driver.write(last, data)
        status, _ = await ask(driver.queues[0], T_OUT, last // SECTOR_BYTES, data=bytes(2 * block))
        expect_refusal(status, "a write across the end")
        _compare(await driver.read(last, block), data, "the last block")


@rule(RULES, "data_zeroes", "WRITE_ZEROES makes zeroes, just there", destructive=True)
async def _zeroes(device: Device) -> None:
    device.need(F_WRITE_ZEROES, "WRITE_ZEROES")
    await _ranges(device, T_WRITE_ZEROES, "WRITE_ZEROES")


@rule(RULES, "data_discard", "DISCARD touches nothing beside its range", destructive=True)
async def _discard(device: Device) -> None:
    device.need(F_DISCARD, "DISCARD")
    await _ranges(device, T_DISCARD, "DISCARD")


async def _ranges(device: Device, kind: int, name: str) -> None:
    size = min(_area(device), 1 << 18)
    config = device.config
    zeroes = kind == T_WRITE_ZEROES
    segments_max = config.max_write_zeroes_segments if zeroes else config.max_discard_segments
    block = device.block_bytes
    sectors = block // SECTOR_BYTES
    data = os.urandom(size)
    async with device.driver() as driver:
        queue = driver.queues[0]
        await driver.write(0, data)
        status, _ = await ask(queue, kind, data=SEGMENT.pack(sectors, 2 * sectors, 0))
        expect_ok(status, f"a {name} of two blocks")
        found = await driver.read(0, size)
        _compare(found[:block], data[:block], f"in front of the {name}")
        _compare(found[3 * block :], data[3 * block :], f"behind the {name}")
        if zeroes and found[block : 3 * block] != bytes(2 * block):
            raise Broken("not all of its range is zero")
        await driver.write(0, data)
        for flags in (_UNKNOWN_FLAG, *([] if zeroes else [SEGMENT_UNMAP])):
            status, _ = await ask(queue, kind, data=SEGMENT.pack(0, sectors, flags))
            expect_unsupported(status, f"a {name} with flags {flags:#x}")
        if segments_max < 1024:
            several = SEGMENT.pack(0, 0, 0) * (segments_max + 1)
            status, _ = await ask(queue, kind, data=several)
            expect_refusal(status, f"a {name} of {segments_max + 1} segments")
        _compare(await driver.read(0, size), data, f"after a {name} that was refused")


@rule(RULES, "data_flush", "flushes beside writes are answered, like those", destructive=True)
async def _flush(device: Device) -> None:
    device.need(F_FLUSH, "FLUSH")
    size = min(_area(device), 1 << 20)
    data = os.urandom(size)
    async with device.driver(request_bytes=16384) as driver, trio.open_nursery() as nursery:
        nursery.start_soon(driver.write, 0, data)
        for _ in range(5):
            await driver.flush()
    async with device.driver() as driver:
        _compare(await driver.read(0, size), data, "written beside flushes")
