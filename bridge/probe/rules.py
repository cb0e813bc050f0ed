"""What a rule of `check` is, and what it works with.

A rule opens a session of its own, so that one that goes wrong does not spoil the next. It returns
if the device keeps the promise, raises Broken if not, NotOffered if the device never made it.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Final

from bridge.guest.vhost_user.messages import F_PROTOCOL_FEATURES, MessageType
from bridge.peers.blk_driver import BlkDriver
from bridge.peers.disk_config import DiskConfig
from bridge.peers.driver_queue import DriverQueue
from bridge.peers.frontend import FrontEnd
from bridge.probe.connecting import connected
from bridge.spec.virtio_blk import S_IOERR, S_OK, S_UNSUPP
from bridge.units import SECTOR_BYTES

SPACE_BYTES: Final = 60
"""Of the configuration space, as far as the check reads it."""
STATUS_NAMES: Final = {S_OK: "OK", S_IOERR: "IOERR", S_UNSUPP: "UNSUPP"}


class Verdict(StrEnum):
    """What a rule found."""

    OK = "ok"
    FAILED = "failed"
    SKIPPED = "skipped"


class Broken(Exception):
    """The device does not keep a promise; the text says what it did instead."""


class NotOffered(Exception):
    """The device does not offer what a rule is about; the text names it."""


@dataclass(frozen=True)
class Device:
    """The device that is checked, and what it said of itself."""

    path: str
    features: int
    """As it offers them; so are the next."""
    protocol_features: int
    space: bytes
    """The first SPACE_BYTES of its configuration space."""

    @property
    def config(self) -> DiskConfig:
        """The same, taken apart."""
        return DiskConfig.unpack(self.space)

    @property
    def sectors(self) -> int:
        """The disk's size."""
        return self.config.capacity_sectors

    @property
    def block_bytes(self) -> int:
        """What offsets and lengths have to be multiples of."""
        return max(SECTOR_BYTES, self.config.block_size_bytes)

    def need(self, feature: int, name: str) -> None:
        """Raises NotOffered without this virtio feature."""
        if not self.features & feature:
            raise NotOffered(f"{name} is not offered")

    def need_protocol(self, feature: int, name: str) -> None:
        """Raises NotOffered without this protocol feature."""
        if not self.protocol_features & feature:
            raise NotOffered(f"{name} is not offered")

    @asynccontextmanager
    async def driver(self, **options: Any) -> AsyncIterator[BlkDriver]:
        """A driver on it, with the options of `BlkDriver`."""
        async with connected(self.path, **options) as driver:
            yield driver


async def learn(path: str) -> Device:
    """What the device at `path` says of itself. Raises ConnectionLost, ProtocolError, Refused."""
    with await FrontEnd.connect(path, timeout_s=20.0) as front_end:
        features = await front_end.get_u64(MessageType.GET_FEATURES)
        protocol = 0
        if features & F_PROTOCOL_FEATURES:
            protocol = await front_end.get_u64(MessageType.GET_PROTOCOL_FEATURES)
    with await FrontEnd.connect(path, timeout_s=20.0) as front_end:
        await front_end.negotiate(features)
        space = await front_end.get_config(0, SPACE_BYTES)
    return Device(path, features, protocol, space)


@dataclass(frozen=True)
class Rule:
    """A promise of vhost-user-blk devices."""

    name: str
    """Its section of docs/rules/virtio.md, and what it is about."""
    text: str
    """What holds if it is kept."""
    destructive: bool
    run: Callable[[Device], Awaitable[None]]


def rule(
    rules: list[Rule], name: str, text: str, *, destructive: bool = False
) -> Callable[[Callable[[Device], Awaitable[None]]], Callable[[Device], Awaitable[None]]]:
    """Decorates a function that tries a rule; adds that to `rules`."""

    def decorate(
        function: Callable[[Device], Awaitable[None]],
    ) -> Callable[[Device], Awaitable[None]]:
        rules.append(Rule(name, text, destructive, function))
        return function

    return decorate


async def ask(
    queue: DriverQueue, kind: int, sector: int = 0, length: int = 0, data: bytes | None = None
) -> tuple[int, bytes]:
    """Send one request, wait for it; its status, and `length` bytes of its buffer afterwards."""
    slot = queue.submit(kind, sector, length if data is None else len(data), data)
    queue.kick()
    while True:
        await queue.wait()
        for done, status in queue.poll():
            if done == slot:
                return status, bytes(queue.data(slot, length))


def status_name(status: int) -> str:
    """For a report."""
    return STATUS_NAMES.get(status, f"{status:#x}")


def expect_ok(status: int, what: str) -> None:
    """Raises Broken for any other status."""
    if status != S_OK:
        raise Broken(f"{what}: status {status_name(status)}")


def expect_refusal(status: int, what: str) -> None:
    """Raises Broken for everything but IOERR and UNSUPP."""
    if status not in (S_IOERR, S_UNSUPP):
        raise Broken(f"{what}: status {status_name(status)}, it should fail")


def expect_unsupported(status: int, what: str) -> None:
    """Raises Broken for everything but UNSUPP."""
    if status != S_UNSUPP:
        raise Broken(f"{what}: status {status_name(status)}, it should be UNSUPP")
