"""Random conversations: mostly plausible, often wrong in one place, sometimes nonsense.

`Dice` is where the randomness comes from, so that Hypothesis (which shrinks a failure) and a
seeded generator (which is fast), and the bytes of a coverage-guided fuzzer, play the same game.

    python -m tests.guest.vhost_user.fuzz --cases 100000 --seed 1
"""

from __future__ import annotations

import argparse
import os
import random
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import structlog
import trio

from bridge.datapath.loop import Loop
from bridge.errors import ProtocolError
from bridge.guest.device import BlkDevice
from bridge.guest.vhost_user.device_interface import VhostUserDevice
from bridge.guest.vhost_user.messages import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    P_REPLY_ACK,
    VERSION,
    ConfigAccess,
    InflightRange,
    LogRange,
    Message,
    MessageType,
    RegionPayload,
    VringAddress,
    VringFile,
    VringState,
    pack_memory_table,
    pack_message,
    pack_u64,
    unpack_u64,
)
from bridge.guest.vhost_user.reader import MessageReader
from bridge.guest.vhost_user.session import FrontEndSession
from bridge.guest.vhost_user.shapes import SHAPES
from bridge.guest.virtio.blk_config import DiskGeometry
from tests.guest.device_guest import StorageSide
from tests.guest.memory_target import MemoryTarget
from tests.guest.vhost_user.fakes import FakeDevice, open_fds

T = TypeVar("T")

MEMORY_BYTES = 1 << 16
USER_BASE = 0x7000_0000_0000
_EDGES = (0, 1, 2, 3, 7, 8, 0xFF, 0x100, 0xFFFF, 0x10000, 1 << 31, (1 << 32) - 1, 1 << 63)
_U64 = (1 << 64) - 1


class Dice(Protocol):
    """Where choices come from."""

    def number(self, low: int, high: int) -> int:
        """One of low … high."""

    def choose(self, options: Sequence[T]) -> T:
        """One of `options`."""

    def blob(self, length: int) -> bytes:
        """Any `length` bytes."""


class RandomDice:
    """Choices of a generator, such as that of a seed."""

    def __init__(self, generator: random.Random) -> None:
        self._random = generator

    def number(self, low: int, high: int) -> int:
        return self._random.randint(low, high)

    def choose(self, options: Sequence[T]) -> T:
        return self._random.choice(options)

    def blob(self, length: int) -> bytes:
        return self._random.randbytes(length)


def rarely(dice: Dice) -> bool:
    """True once in a while."""
    return dice.number(0, 15) == 15


def u64(dice: Dice, *usual: int) -> int:
    """Mostly one of `usual`, else something at an edge."""
    if rarely(dice):
        return (dice.choose(_EDGES) + dice.number(-2, 2)) & _U64
    return dice.choose(usual)


def u32(dice: Dice, *usual: int) -> int:
    """Mostly one of `usual`, else something at an edge."""
    return u64(dice, *usual) & 0xFFFFFFFF


def _region(dice: Dice) -> RegionPayload:
    number = dice.number(0, 3)
    return RegionPayload(
        u64(dice, number * MEMORY_BYTES),
        u64(dice, MEMORY_BYTES, MEMORY_BYTES, 4096),
        u64(dice, USER_BASE + number * MEMORY_BYTES),
        u64(dice, 0, 0, 0, 4096),
    )


def _state(dice: Dice, *usual: int) -> bytes:
    return VringState(u32(dice, 0, 1), u32(dice, *usual)).pack()


def _file(dice: Dice) -> bytes:
    return pack_u64(u64(dice, 0, 0, 1, 1, 0x100, 0x101))


def _address(dice: Dice) -> bytes:
    start = USER_BASE + dice.number(0, 1) * 0x4000
    return VringAddress(
        u32(dice, 0, 1),
        u32(dice, 0, 0, 0, 1),
        u64(dice, start),
        u64(dice, start + 0x3000),
        u64(dice, start + 0x2000),
        u64(dice, 0, 0x1000),
    ).pack()


def _config(dice: Dice) -> bytes:
    size = dice.choose((1, 4, 8, 60, 256, 0, 257))
    return ConfigAccess(
        u32(dice, 0, 0, 32, 59, 200), u32(dice, size), u32(dice, 0, 1, 2), dice.blob(size)
    ).pack()


def _features(dice: Dice) -> bytes:
    base = 1 << 32 | F_PROTOCOL_FEATURES
    return pack_u64(u64(dice, base, base, base | F_LOG_ALL, base | 1 << 29, 1 << 32, base | 1 << 9))


def _inflight(dice: Dice) -> bytes:
    return InflightRange(
        u64(dice, 4096, 65536),
        u64(dice, 0, 0, 64),
        u32(dice, 1, 2) & 0xFFFF,
        u32(dice, 64, 128) & 0xFFFF,
    ).pack(dice.choose((20, 24)))


_PAYLOADS: dict[MessageType, Callable[[Dice], bytes]] = {
    MessageType.SET_FEATURES: _features,
    MessageType.SET_PROTOCOL_FEATURES: lambda dice: pack_u64(
        u64(dice, 0x1922B, 0x19229, P_REPLY_ACK, 0)
    ),
    MessageType.SET_MEM_TABLE: lambda dice: pack_memory_table(
        [_region(dice) for _ in range(dice.choose((0, 1, 1, 2, 2, 8, 9)))]
    ),
    MessageType.SET_LOG_BASE: lambda dice: LogRange(u64(dice, 4096), u64(dice, 0)).pack(),
    MessageType.SET_VRING_NUM: lambda dice: _state(dice, 64, 128),
    MessageType.SET_VRING_ADDR: _address,
    MessageType.SET_VRING_BASE: lambda dice: _state(dice, 0, 5, 65535),
    MessageType.GET_VRING_BASE: lambda dice: _state(dice, 0),
    MessageType.SET_VRING_KICK: _file,
    MessageType.SET_VRING_CALL: _file,
    MessageType.SET_VRING_ERR: _file,
    MessageType.SET_VRING_ENABLE: lambda dice: _state(dice, 0, 1, 1, 1),
    MessageType.GET_CONFIG: _config,
    MessageType.SET_CONFIG: _config,
    MessageType.GET_INFLIGHT_FD: _inflight,
    MessageType.SET_INFLIGHT_FD: _inflight,
    MessageType.ADD_MEM_REG: lambda dice: _region(dice).pack_single(),
    MessageType.REM_MEM_REG: lambda dice: _region(dice).pack_single(),
    MessageType.SET_STATUS: lambda dice: pack_u64(u64(dice, 0, 1, 3, 11, 15)),
}

_REQUESTS = (
    *tuple(MessageType),
    MessageType.SET_VRING_NUM,
    MessageType.SET_VRING_ADDR,
    MessageType.SET_VRING_KICK,
    MessageType.SET_VRING_KICK,
    MessageType.SET_VRING_ENABLE,
    MessageType.SET_MEM_TABLE,
    MessageType.SET_FEATURES,
)


def _memory_file(dice: Dice) -> int:
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC)
    os.ftruncate(fd, dice.choose((MEMORY_BYTES, MEMORY_BYTES, MEMORY_BYTES, 4096, 0, 100)))
    return fd


def _socket(dice: Dice) -> int:
    ours, theirs = socket.socketpair()
    ours.close()
    return theirs.detach()


def _eventfd(dice: Dice) -> int:
    # A full counter makes writing block, or fail when it must not block.
    value = dice.choose((0, 0, 0, 1))
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    if value:
        os.eventfd_write(fd, (1 << 64) - 2)
    return fd


def _null(dice: Dice) -> int:
    return os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)


def _fds(dice: Dice, request: int, payload: bytes) -> list[int]:
    """Mostly as many and of the kind that the request wants."""
    makers = (_eventfd, _memory_file, _socket, _null)
    try:
        shape = SHAPES[MessageType(request)]
        count = shape.fds(payload) if callable(shape.fds) else dice.choose(shape.fds)
    except Exception:
        count = dice.number(0, 2)
    if rarely(dice):
        count = dice.number(0, 8)
    if request in (
        MessageType.SET_VRING_KICK,
        MessageType.SET_VRING_CALL,
        MessageType.SET_VRING_ERR,
    ):
        usual: Callable[[Dice], int] = _eventfd
    elif request == MessageType.SET_BACKEND_REQ_FD:
        usual = _socket
    else:
        usual = _memory_file
    return [(dice.choose(makers) if rarely(dice) else usual)(dice) for _ in range(min(count, 8))]


def any_message(dice: Dice) -> tuple[bytes, list[int]]:
    """A whole message (header and payload) and its descriptors."""
    request: int = dice.choose(_REQUESTS)
    make = _PAYLOADS.get(MessageType(request))
    payload = make(dice) if make is not None else b""
    if rarely(dice):
        payload = dice.choose((payload[:-1], payload + b"\0", b"", dice.blob(len(payload))))
    if rarely(dice):
        request = u32(dice, 0, 19, 33, 44, 255)
    flags = VERSION | dice.choose((0, FLAG_NEED_REPLY, FLAG_NEED_REPLY, FLAG_NEED_REPLY))
    if rarely(dice) and rarely(dice):
        flags = dice.number(0, 255)
    return pack_message(request, payload, flags=flags), _fds(dice, request, payload)


_OPENING = (
    (MessageType.SET_PROTOCOL_FEATURES, pack_u64(0x18229)),
    (MessageType.SET_FEATURES, pack_u64(1 << 32 | F_PROTOCOL_FEATURES)),
    (MessageType.SET_MEM_TABLE, pack_memory_table([RegionPayload(0, MEMORY_BYTES, USER_BASE, 0)])),
    (MessageType.SET_VRING_NUM, VringState(0, 128).pack()),
    (
        MessageType.SET_VRING_ADDR,
        VringAddress(0, 0, USER_BASE, USER_BASE + 0x3000, USER_BASE + 0x2000, 0).pack(),
    ),
    (MessageType.SET_VRING_KICK, VringFile(0, True).pack()),
    (MessageType.SET_VRING_CALL, VringFile(0, True).pack()),
    (MessageType.SET_VRING_ENABLE, VringState(0, 1).pack()),
)


def opening(dice: Dice) -> list[tuple[bytes, list[int]]]:
    """The first messages of an honest conversation, up to some point."""
    return [
        (pack_message(request, payload), _fds(dice, request, payload))
        for request, payload in _OPENING[: dice.number(0, len(_OPENING))]
    ]


async def converse(dice: Dice, device: VhostUserDevice, *, turn: Callable[[], None]) -> int:
    """One conversation, cut into pieces anywhere, until it ends or breaks; messages handled.

    Raises AssertionError when a rule of the session is broken, and whatever escapes from it.
    `turn` is called after each message: the data path's turn.
    """
    session = FrontEndSession(device, lambda fd, data: dice.number(0, 3) > 0)
    reader = MessageReader()
    handled = 0
    try:
        queue = opening(dice)
        for _ in range(dice.number(0, 20)):
            queue.append(any_message(dice))
        while queue:
            data, fds = queue.pop(0)
            message = _feed(dice, reader, data, fds)
            if message is None:
                break
            await _handle(session, message)
            handled += 1
            if device.listener is not None and rarely(dice):
                device.listener.config_changed()
            turn()
    except ProtocolError:
        pass
    finally:
        while queue:
            for fd in queue.pop()[1]:
                os.close(fd)
        reader.close()
        await session.close()
        turn()
    return handled


def _feed(dice: Dice, reader: MessageReader, data: bytes, fds: list[int]) -> Message | None:
    """One message in pieces, its descriptors with the first byte; sometimes it never ends."""
    end = len(data) if not rarely(dice) else dice.number(1, len(data))
    position = 0
    while position < end:
        step = min(dice.number(1, reader.wanted), end - position)
        message = reader.feed_untrusted(data[position : position + step], fds)
        fds = []
        position += step
        if message is not None:
            return message
    return None


async def _handle(session: FrontEndSession, message: Message) -> None:
    """Have a message handled, and see that it is answered exactly when it asks for it."""
    header = message.header
    reply = await session.handle(message)
    assert message.fds == []
    try:
        own_reply = SHAPES[MessageType(header.request)].replies
    except ValueError:
        own_reply = False
    if own_reply:
        assert reply is not None
    elif reply is not None:
        assert header.need_reply
        assert unpack_u64(reply.data[12:]) in (0, 1)
    if reply is not None:
        assert int.from_bytes(reply.data[:4], sys.byteorder) == header.request
        assert int.from_bytes(reply.data[8:12], sys.byteorder) == len(reply.data) - 12
        if reply.fd is not None:
            os.close(reply.fd)


class RealDevice:
    """A `BlkDevice` over memory, and the data path's turns."""

    def __init__(self) -> None:
        self.loop = Loop(poll_us=0)
        self.target = MemoryTarget(self.loop.turn, 1 << 20)
        geometry = DiskGeometry(1 << 20)
        self.device = BlkDevice(
            self.loop,
            self.target,
            geometry,
            serial="fuzz",
            max_queues=2,
            above=StorageSide(on_abandoned=self.target.abandoned),
        )

    def turn(self) -> None:
        """What the loop does when something happened."""
        self.loop._turns([], 0.0, polling=False)


async def campaign(cases: int, seed: int) -> int:
    """Conversations number `seed` … `seed + cases - 1`, on the fake and the real device in turn.

    Returns the messages handled. Raises with the seed of the conversation that broke something.
    """
    real = RealDevice()
    before = open_fds()
    messages = 0
    for number in range(seed, seed + cases):
        dice = RandomDice(random.Random(number))
        try:
            if number % 2:
                messages += await converse(dice, real.device, turn=real.turn)
            else:
                fake = FakeDevice(max_queues=2)
                messages += await converse(dice, fake, turn=lambda: None)
            assert open_fds() == before
        except BaseException as error:
            error.add_note(f"conversation number {number}")
            raise
    real.loop.close()
    return messages


def main() -> None:
    """Run a campaign and say what it was."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    start = time.perf_counter()
    messages = trio.run(campaign, options.cases, options.seed)
    seconds = time.perf_counter() - start
    print(f"{options.cases} conversations, {messages} messages, {seconds:.1f} s: nothing broke")


if __name__ == "__main__":
    main()
