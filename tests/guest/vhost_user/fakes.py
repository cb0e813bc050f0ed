"""A device that remembers what it was told, and small helpers to talk to a session."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from bridge.errors import ProtocolError
from bridge.guest.vhost_user.device_interface import ConfigListener, MemoryRegion, RingSetup
from bridge.guest.vhost_user.messages import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    VERSION,
    Message,
    MessageHeader,
    MessageType,
    RegionPayload,
    VringAddress,
    VringFile,
    VringState,
    pack_u64,
    unpack_u64,
)
from bridge.guest.vhost_user.reply import Reply
from bridge.guest.vhost_user.session import FrontEndSession

F_VERSION_1 = 1 << 32
F_PACKED = 1 << 34
OFFERED = F_VERSION_1 | F_PACKED | 1 << 9 | 1 << 28 | 1 << 29


class FakeDevice:
    """A `VhostUserDevice` that records every call and keeps the rules that a device may rely on.

    Raises AssertionError when the session breaks one of them: an unknown ring, a descriptor that
    is not open, features while a ring runs. `refuse` names methods that raise ProtocolError.
    """

    supports_inflight = True
    supports_dirty_log = True

    def __init__(self, *, max_queues: int = 4, max_queue_size: int = 1024) -> None:
        self.max_queues = max_queues
        self.max_queue_size = max_queue_size
        self.listener: ConfigListener | None = None
        self.calls: list[tuple[object, ...]] = []
        self.rings: dict[int, RingSetup] = {}
        self.suspended: set[int] = set()
        self.refuse: set[str] = set()
        self.config = bytes(range(60))
        self.memory: list[MemoryRegion] = []
        self.stop_base = 1234
        self.features = 0
        self.is_logging = False

    def _note(self, name: str, *arguments: object) -> None:
        self.calls.append((name, *arguments))
        if name in self.refuse:
            raise ProtocolError(f"{name} refused")

    def names(self) -> list[str]:
        """The names of the calls so far."""
        return [call[0] for call in self.calls]

    def offered_features(self) -> int:
        return OFFERED

    def set_features(self, features: int) -> None:
        assert not self.rings
        assert not features & (F_PROTOCOL_FEATURES | F_LOG_ALL)
        self._note("set_features", features)
        self.features = features

    def read_config(self, offset: int, size: int) -> bytes:
        return self.config[offset : offset + size].ljust(size, b"\0")

    def write_config(self, offset: int, data: bytes, *, migration: bool) -> None:
        self._note("write_config", offset, data, migration)

    async def replace_memory(self, regions: list[MemoryRegion]) -> None:
        for region in regions:
            os.fstat(region.fd)
        self.memory = []
        self._note("replace_memory", regions)
        self.memory = list(regions)

    async def add_memory(self, region: MemoryRegion) -> None:
        os.fstat(region.fd)
        self._note("add_memory", region)
        self.memory.append(region)

    async def remove_memory(
        self, *, guest_address: int, user_address: int, size_bytes: int
    ) -> None:
        self._note("remove_memory", guest_address, user_address, size_bytes)
        place = guest_address, user_address, size_bytes
        kept = [
            each
            for each in self.memory
            if (each.guest_address, each.user_address, each.size_bytes) != place
        ]
        if kept == self.memory:
            raise ProtocolError("no such region")
        self.memory = kept

    def start_ring(self, index: int, ring: RingSetup) -> None:
        assert 0 <= index < self.max_queues
        assert index not in self.rings
        assert 0 < ring.size <= self.max_queue_size
        _check_open(ring.kick_fd, ring.call_fd, ring.error_fd)
        self._note("start_ring", index, ring)
        self.rings[index] = ring

    async def stop_ring(self, index: int) -> int:
        setup = self.rings.pop(index)
        _check_open(setup.kick_fd)
        self.suspended.discard(index)
        self._note("stop_ring", index)
        return self.stop_base

    def suspend_ring(self, index: int) -> None:
        assert index in self.rings
        self._note("suspend_ring", index)
        self.suspended.add(index)

    def resume_ring(self, index: int) -> None:
        assert index in self.rings
        self._note("resume_ring", index)
        self.suspended.discard(index)

    def set_kick(self, index: int, fd: int | None) -> None:
        self._set_fd("set_kick", index, fd)

    def set_call(self, index: int, fd: int | None) -> None:
        self._set_fd("set_call", index, fd)

    def set_error(self, index: int, fd: int | None) -> None:
        self._set_fd("set_error", index, fd)

    def _set_fd(self, name: str, index: int, fd: int | None) -> None:
        assert index in self.rings
        _check_open(fd)
        self._note(name, index, fd)

    def set_ring_log(self, index: int, log_guest_address: int | None) -> None:
        assert index in self.rings
        self._note("set_ring_log", index, log_guest_address)

    def create_inflight(self, num_queues: int, queue_size: int) -> tuple[int, int]:
        self._note("create_inflight", num_queues, queue_size)
        return memfd(4096), 4096

    def set_inflight(
        self, fd: int, offset: int, size: int, num_queues: int, queue_size: int
    ) -> None:
        os.fstat(fd)
        self._note("set_inflight", offset, size, num_queues, queue_size)

    def set_log(self, fd: int, offset: int, size: int) -> None:
        os.fstat(fd)
        self._note("set_log", offset, size)

    def set_logging(self, enabled: bool) -> None:
        self._note("set_logging", enabled)
        self.is_logging = enabled

    async def reset(self) -> None:
        assert not self.rings
        self._note("reset")

    async def disconnected(self) -> None:
        self._note("disconnected")
        self.rings.clear()
        self.memory = []


def _check_open(*fds: int | None) -> None:
    for fd in fds:
        if fd is not None:
            os.fstat(fd)


@dataclass
class Talk:
    """A session with a fake device, and short ways to send it messages."""

    device: FakeDevice = field(default_factory=FakeDevice)
    sent: list[bytes] = field(default_factory=list)
    channel_alive: bool = True

    def __post_init__(self) -> None:
        self.session = FrontEndSession(self.device, self._send)

    def _send(self, fd: int, data: bytes) -> bool:
        os.fstat(fd)
        self.sent.append(data)
        return self.channel_alive

    async def send(
        self,
        request: int,
        payload: bytes = b"",
        fds: list[int] | None = None,
        *,
        need_reply: bool = False,
    ) -> Reply | None:
        """One message, whose descriptors the session takes over."""
        flags = VERSION | (FLAG_NEED_REPLY if need_reply else 0)
        header = MessageHeader(request, flags, len(payload))
        return await self.session.handle(Message(header, payload, fds or []))

    async def ask(self, request: int, payload: bytes = b"", fds: list[int] | None = None) -> int:
        """One message with need_reply; the acknowledgement (0: done)."""
        reply = await self.send(request, payload, fds, need_reply=True)
        assert reply is not None
        return unpack_u64(reply.data[12:])

    async def negotiate(self, features: int = F_VERSION_1 | F_PROTOCOL_FEATURES) -> None:
        """Take `features` and every protocol feature."""
        offered = await self.send(MessageType.GET_PROTOCOL_FEATURES)
        assert offered is not None
        await self.send(MessageType.SET_PROTOCOL_FEATURES, offered.data[12:])
        await self.send(MessageType.SET_OWNER)
        await self.send(MessageType.SET_FEATURES, pack_u64(features))

    async def set_up_ring(self, index: int = 0, *, size: int = 128, base: int = 0) -> None:
        """Describe a ring and start it; with bit 30 it still has to be enabled."""
        await self.send(MessageType.SET_VRING_NUM, VringState(index, size).pack())
        await self.send(MessageType.SET_VRING_BASE, VringState(index, base).pack())
        await self.send(MessageType.SET_VRING_ADDR, ring_address(index).pack())
        await self.send(MessageType.SET_VRING_KICK, VringFile(index, True).pack(), [eventfd()])
        await self.send(MessageType.SET_VRING_CALL, VringFile(index, True).pack(), [eventfd()])

    async def run_ring(self, index: int = 0) -> None:
        """Describe a ring, start it and enable it."""
        await self.set_up_ring(index)
        await self.send(MessageType.SET_VRING_ENABLE, VringState(index, 1).pack())


def ring_address(index: int = 0, *, flags: int = 0, log: int = 0, shift: int = 0) -> VringAddress:
    """Where the fake rings are."""
    start = 0x7000_0000_0000 + index * 0x10000 + shift
    return VringAddress(
        index, flags, desc=start, used=start + 0x3000, avail=start + 0x2000, log=log
    )


def region(number: int = 0, *, size_bytes: int = 1 << 20) -> RegionPayload:
    """The number-th region of the fake memory."""
    return RegionPayload(number << 24, size_bytes, 0x7000_0000_0000 + (number << 24), 0)


def eventfd() -> int:
    """A new eventfd, to be given away."""
    return os.eventfd(0, os.EFD_CLOEXEC)


def memfd(size_bytes: int = 1 << 20) -> int:
    """A new memory file, to be given away."""
    fd = os.memfd_create("test")
    os.ftruncate(fd, size_bytes)
    return fd


def open_fds() -> int:
    """Number of descriptors that this process has open."""
    return len(os.listdir("/proc/self/fd"))
