"""Rules about single requests that leave the disk as it is: reads, and what has to be refused."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from bridge.peers.blk_driver import BlkDriver
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
    F_DISCARD,
    F_FLUSH,
    F_RO,
    F_WRITE_ZEROES,
    ID_BYTES,
    SEGMENT,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)
from bridge.spec.virtqueue import DESC_WRITE
from bridge.units import SECTOR_BYTES

RULES: list[Rule] = []

_UNKNOWN_TYPE = 0x1B1B
_GUARD = 0xA5
_GUARD_BYTES = 64
_HEADER = struct.Struct("<IIQ")


@rule(RULES, "request_read", "the first and the last block can be read, the same each time")
async def _read(device: Device) -> None:
    length = device.block_bytes
    async with device.driver() as driver:
        queue = driver.queues[0]
        for sector in (0, device.sectors - length // SECTOR_BYTES):
            status, once = await ask(queue, T_IN, sector, length)
            expect_ok(status, f"a read of {length} bytes at sector {sector}")
            _, again = await ask(queue, T_IN, sector, length)
            if once != again:
                raise Broken(f"two reads of sector {sector} differ, and nobody wrote")


@rule(RULES, "request_range", "reads and writes that are not wholly on the disk fail")
async def _range(device: Device) -> None:
    block = device.block_bytes
    sectors = block // SECTOR_BYTES
    async with device.driver() as driver:
        queue = driver.queues[0]
        for sector, length, what in (
            (device.sectors, block, "a read behind the end"),
            (device.sectors - sectors, 2 * block, "a read across the end"),
            ((1 << 64) - sectors, 2 * block, "a read whose end is beyond 2^64"),
            (1 << 55, block, "a read at byte 2^64"),
        ):
            expect_refusal((await ask(queue, T_IN, sector, length))[0], what)
        status, _ = await ask(queue, T_OUT, device.sectors, data=bytes(block))
        expect_refusal(status, "a write behind the end")


@rule(RULES, "request_length", "a read that is not whole sectors fails")
async def _length(device: Device) -> None:
    async with device.driver() as driver:
        for length in (1, SECTOR_BYTES - 1, SECTOR_BYTES + 1):
            status, _ = await ask(driver.queues[0], T_IN, 0, length)
            expect_refusal(status, f"a read of {length} bytes")


@rule(RULES, "request_type", "an unknown request type is UNSUPP")
async def _type(device: Device) -> None:
    async with device.driver() as driver:
        status, _ = await ask(driver.queues[0], _UNKNOWN_TYPE, 0, SECTOR_BYTES)
        expect_unsupported(status, f"request type {_UNKNOWN_TYPE:#x}")


@rule(RULES, "request_id", "GET_ID gives the same text each time, ended by a zero or 20 bytes long")
async def _id(device: Device) -> None:
    async with device.driver() as driver:
        queue = driver.queues[0]
        found = []
        for fill in (b"\xff", b"\x00"):
            queue.data(queue.free[-1])[:ID_BYTES] = fill * ID_BYTES
            status, data = await ask(queue, T_GET_ID, 0, ID_BYTES)
            expect_ok(status, "GET_ID")
            found.append(data.partition(b"\0")[0])
    if found[0] != found[1]:
        raise Broken(f"it is {found[0]!r} first and {found[1]!r} then")


@rule(RULES, "request_flush", "a flush succeeds where it is offered")
async def _flush(device: Device) -> None:
    device.need(F_FLUSH, "FLUSH")
    async with device.driver() as driver:
        expect_ok((await ask(driver.queues[0], T_FLUSH))[0], "a flush")


@rule(RULES, "request_read_only", "a read-only disk refuses writes, and still flushes and reads")
async def _read_only(device: Device) -> None:
    device.need(F_RO, "RO")
    block = device.block_bytes
    async with device.driver() as driver:
        queue = driver.queues[0]
        status, before = await ask(queue, T_IN, 0, block)
        expect_ok(status, "a read")
        status, _ = await ask(queue, T_OUT, 0, data=before)
        expect_refusal(status, "a write")
        expect_ok((await ask(queue, T_GET_ID, 0, ID_BYTES))[0], "GET_ID")


@rule(RULES, "request_ranges", "DISCARD and WRITE_ZEROES that are odd or beyond the end fail")
async def _ranges(device: Device) -> None:
    offered = [
        (kind, name)
        for feature, kind, name in (
            (F_DISCARD, T_DISCARD, "DISCARD"),
            (F_WRITE_ZEROES, T_WRITE_ZEROES, "WRITE_ZEROES"),
        )
        if device.features & feature
    ]
    if not offered:
        raise NotOffered("neither DISCARD nor WRITE_ZEROES is offered")
    sectors = device.block_bytes // SECTOR_BYTES
    async with device.driver() as driver:
        for kind, name in offered:
            for data, what in (
                (SEGMENT.pack(device.sectors, sectors, 0), "behind the end"),
                (SEGMENT.pack((1 << 64) - 1, sectors, 0), "that ends beyond 2^64"),
                (SEGMENT.pack(device.sectors, sectors, 0)[:-1], "of 15 bytes"),
            ):
                status, _ = await ask(driver.queues[0], kind, data=data)
                expect_refusal(status, f"a {name} {what}")


@rule(RULES, "chain_framing", "it does not matter how a request is divided into descriptors")
async def _framing(device: Device) -> None:
    async with device.driver() as driver:
        chains = Chains(driver)
        status, expected = await ask(driver.queues[0], T_IN, 0, device.block_bytes)
        expect_ok(status, "a read")
        length = device.block_bytes
        for header, data, what in (
            ((16,), (length + 1,), "data and status in one descriptor"),
            ((8, 8), (length, 1), "a header of 8 and 8 bytes"),
            ((16,), (100, length - 100, 1), "data of 100 bytes and the rest"),
            ((1, 15), (1, length - 1, 1), "a header of 1 and 15 bytes"),
        ):
            status, found, _ = await chains.read(0, length, header=header, writable=data)
            expect_ok(status, f"a read with {what}")
            if found != expected:
                raise Broken(f"a read with {what} gives other data")


@rule(RULES, "chain_bounds", "the device writes the data and one status byte, nothing else")
async def _bounds(device: Device) -> None:
    length = device.block_bytes
    async with device.driver() as driver:
        chains = Chains(driver)
        for sector in (0, device.sectors):
            await chains.read(sector, length, header=(16,), writable=(length, 1))
            if chains.is_touched:
                raise Broken(f"a read at sector {sector} wrote outside of its buffers")


@rule(RULES, "used_length", "the used length claims no byte that was not the device's to write")
async def _used_length(device: Device) -> None:
    length = device.block_bytes
    async with device.driver() as driver:
        chains = Chains(driver)
        for sector in (0, device.sectors):
            _, found, used = await chains.read(sector, length, header=(16,), writable=(length, 1))
            if used > length + 1:
                raise Broken(f"{used} bytes of {length + 1} are said to be written")
            untouched = len(found) - len(found.rstrip(bytes([_GUARD])))
            if sector and length < used and untouched == length:
                raise Broken(f"a read that failed claims {used} bytes, and wrote none of the data")


class Chains:
    """Reads of any form on the first queue, in memory with guard bytes around each buffer."""

    def __init__(self, driver: BlkDriver) -> None:
        self._queue = driver.queues[0]
        self._memory = driver.memory
        self._guards: list[memoryview] = []

    async def read(
        self, sector: int, length: int, *, header: Sequence[int], writable: Sequence[int]
    ) -> tuple[int, bytes, int]:
        """Status, data and used length of a read whose header and whose data with the status are in
        descriptors of those lengths."""
        self._guards = []
        head, head_address = self._area(sum(header))
        head[:] = _HEADER.pack(T_IN, 0, sector)
        body, body_address = self._area(sum(writable))
        body[:] = bytes([_GUARD]) * len(body)
        buffers = [*_pieces(head_address, header, 0), *_pieces(body_address, writable, DESC_WRITE)]
        driver = self._queue.driver
        driver.add(0, buffers)
        self._queue.kick()
        while True:
            await self._queue.wait()
            for _, used in driver.poll():
                return body[length], bytes(body[:length]), used

    def _area(self, length: int) -> tuple[memoryview, int]:
        address = self._memory.allocate(length + 2 * _GUARD_BYTES)
        whole = self._memory.view(address, length + 2 * _GUARD_BYTES)
        whole[:] = bytes([_GUARD]) * len(whole)
        self._guards += [whole[:_GUARD_BYTES], whole[-_GUARD_BYTES:]]
        return whole[_GUARD_BYTES:-_GUARD_BYTES], address + _GUARD_BYTES

    @property
    def is_touched(self) -> bool:
        """The device wrote around the buffers of the last read."""
        return any(bytes(each) != bytes([_GUARD]) * _GUARD_BYTES for each in self._guards)


def _pieces(address: int, lengths: Sequence[int], flags: int) -> list[tuple[int, int, int]]:
    found = []
    for length in lengths:
        found.append((address, length, flags))
        address += length
    return found
