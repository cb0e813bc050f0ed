"""The regions of guest memory of a front-end session: checked here, mapped by the device.

Their descriptors are kept: the process after this one may have to map the same memory without the
front-end's help (see `handover`).
"""

from __future__ import annotations

import os
from collections.abc import Callable

from bridge.errors import ProtocolError
from bridge.guest.vhost_user.device_interface import MemoryRegion, VhostUserDevice
from bridge.guest.vhost_user.messages import (
    MAX_TABLE_REGIONS,
    U64_MAX,
    Message,
    MessageType,
    RegionPayload,
    message_of,
    pack_memory_table,
    unpack_memory_table,
)
from bridge.guest.vhost_user.reply import Handler, Reply, reply_u64

MAX_MEMORY_SLOTS = 509
"""rust-vmm and libvhost-user answer the same; QEMU's own limit is 512."""


class MemoryTable:
    """The regions of one session, in the order in which the front-end sent them."""

    def __init__(
        self, device: VhostUserDevice, on_region: Callable[[RegionPayload, int], None] | None = None
    ) -> None:
        """`on_region(region, fd)` is called with each region before the device maps it."""
        self._device = device
        self._on_region = on_region or _no_listener
        self._regions: list[RegionPayload] = []
        self._fds: list[int] = []
        """Ours, of the regions, in their order."""

    def close(self) -> None:
        """Close the kept descriptors. Idempotent."""
        while self._fds:
            os.close(self._fds.pop())

    def messages(self) -> list[Message]:
        """What tells another session of the same memory. The descriptors stay ours."""
        if len(self._regions) <= MAX_TABLE_REGIONS:
            table = pack_memory_table(self._regions)
            return [message_of(MessageType.SET_MEM_TABLE, table, self._fds)]
        return [
            message_of(MessageType.ADD_MEM_REG, region.pack_single(), [fd])
            for region, fd in zip(self._regions, self._fds, strict=True)
        ]

    def handlers(self) -> dict[MessageType, Handler]:
        """The handlers of the messages about memory."""
        return {
            MessageType.SET_MEM_TABLE: self.set_mem_table,
            MessageType.ADD_MEM_REG: self.add_mem_reg,
            MessageType.REM_MEM_REG: self.rem_mem_reg,
            MessageType.GET_MAX_MEM_SLOTS: self.get_max_mem_slots,
        }

    async def set_mem_table(self, payload: bytes, fds: list[int]) -> None:
        """Replace all regions. If the device refuses the new ones, no region is left."""
        regions = unpack_memory_table(payload)
        if len(regions) > MAX_TABLE_REGIONS:
            raise ProtocolError(f"{len(regions)} memory regions, the limit is {MAX_TABLE_REGIONS}")
        checked: list[RegionPayload] = []
        for region in regions:
            _check_region(region, checked)
            checked.append(region)
        for region, fd in zip(regions, fds, strict=True):
            self._on_region(region, fd)
        self._regions = []
        self.close()
        await self._device.replace_memory(
            [_memory_region(region, fd) for region, fd in zip(regions, fds, strict=True)]
        )
        self._regions = checked
        while fds:
            self._fds.insert(0, fds.pop())

    async def add_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        """Add a region. A known one may come again: a second device on this connection (QEMU's
        device_del and device_add with the chardev kept) sends all of them."""
        region = RegionPayload.unpack_single(payload)
        known = [each for each in self._regions if _same_place(each, region)]
        others = [each for each in self._regions if not _same_place(each, region)]
        if len(others) >= MAX_MEMORY_SLOTS:
            raise ProtocolError(f"more than {MAX_MEMORY_SLOTS} memory regions")
        _check_region(region, others)
        self._on_region(region, fds[0])
        await self._device.add_memory(_memory_region(region, fds[0]))
        for each in known:
            self._forget(each)
        self._regions.append(region)
        self._fds.append(fds.pop())

    def _forget(self, region: RegionPayload) -> None:
        index = self._regions.index(region)
        del self._regions[index]
        os.close(self._fds.pop(index))

    async def rem_mem_reg(self, payload: bytes, fds: list[int]) -> None:
        """Remove the region with these addresses and size; its file offset is not compared."""
        wanted = RegionPayload.unpack_single(payload)
        for region in self._regions:
            if _same_place(region, wanted):
                break
        else:
            raise ProtocolError(f"no memory region at {wanted.guest_address:#x}")
        await self._device.remove_memory(
            guest_address=region.guest_address,
            user_address=region.user_address,
            size_bytes=region.size_bytes,
        )
        self._forget(region)

    async def get_max_mem_slots(self, payload: bytes, fds: list[int]) -> Reply:
        return reply_u64(MessageType.GET_MAX_MEM_SLOTS, MAX_MEMORY_SLOTS)


def _no_listener(region: RegionPayload, fd: int) -> None:
    """The default of `on_region`."""


def _memory_region(region: RegionPayload, fd: int) -> MemoryRegion:
    return MemoryRegion(
        region.guest_address,
        region.size_bytes,
        region.user_address,
        region.mmap_offset_bytes,
        fd,
    )


def check_range(offset: int, size: int) -> None:
    """Raise ProtocolError unless the range is not empty and its end fits a u64 (CVE-2020-10722)."""
    if size == 0 or offset + size > U64_MAX:
        raise ProtocolError(f"{size} bytes from offset {offset:#x} cannot be a range of a file")


def _check_region(region: RegionPayload, others: list[RegionPayload]) -> None:
    """Raise ProtocolError if the region is empty, overflows, or overlaps one of `others`."""
    check_range(region.mmap_offset_bytes, region.size_bytes)
    for start in (region.guest_address, region.user_address):
        if start + region.size_bytes - 1 > U64_MAX:
            raise ProtocolError(f"memory region at {start:#x} runs over the end of addresses")
    for other in others:
        if _overlap(region.guest_address, region.size_bytes, other.guest_address, other.size_bytes):
            raise ProtocolError(
                f"memory regions at guest addresses {region.guest_address:#x} and "
                f"{other.guest_address:#x} overlap"
            )
        if _overlap(region.user_address, region.size_bytes, other.user_address, other.size_bytes):
            raise ProtocolError(
                f"memory regions at front-end addresses {region.user_address:#x} and "
                f"{other.user_address:#x} overlap"
            )


def _same_place(one: RegionPayload, other: RegionPayload) -> bool:
    """The same addresses and size; file and offset are not compared."""
    return (one.guest_address, one.user_address, one.size_bytes) == (
        other.guest_address,
        other.user_address,
        other.size_bytes,
    )


def _overlap(start: int, size: int, other_start: int, other_size: int) -> bool:
    return start < other_start + other_size and other_start < start + size
