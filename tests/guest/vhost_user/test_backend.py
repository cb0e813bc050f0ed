"""The back-end's socket against front-ends that behave badly (rules `session` and `message`)."""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import mmap
import os
import random
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import structlog
import trio
import trio.testing
from structlog.testing import capture_logs
from structlog.typing import EventDict

from bridge.errors import ConnectionLost
from bridge.guest.vhost_user.backend import _accept, serve
from bridge.guest.vhost_user.listener import Listener
from bridge.guest.vhost_user.messages import (
    F_PROTOCOL_FEATURES,
    VERSION,
    ConfigAccess,
    MessageHeader,
    MessageType,
    RegionPayload,
    VringFile,
    VringState,
    pack_memory_table,
    pack_message,
    pack_u64,
)
from bridge.peers.blk_driver import BlkDriver
from bridge.peers.frontend import FrontEnd, Refused
from tests.guest.vhost_user.backends import Running, guest_on, running_backend
from tests.guest.vhost_user.fakes import F_VERSION_1, FakeDevice, eventfd, memfd, open_fds
from tests.tools import until

pytestmark = pytest.mark.usefixtures("no_fd_leak")

ALL = (1 << 64) - 1


async def still_serves(backend: Running) -> None:
    """The next front-end gets its disk."""
    async with await BlkDriver.connect(backend.path) as guest:
        await guest.write(0, b"n" * 512)
        assert await guest.read(0, 512) == b"n" * 512


async def hangs_up(front_end: FrontEnd) -> None:
    """The back-end ends the conversation, after what it may still have to say."""
    with contextlib.suppress(ConnectionLost):
        while True:
            await front_end.receive()


BAD_STREAMS = {
    "version 0": MessageHeader(MessageType.GET_FEATURES, 0, 0).pack(),
    "version 3": MessageHeader(MessageType.GET_FEATURES, 3, 0).pack(),
    "a reply": MessageHeader(MessageType.GET_FEATURES, 5, 8).pack() + bytes(8),
    "payload of 4 GiB": MessageHeader(MessageType.SET_MEM_TABLE, 1, 0xFFFFFFFF).pack(),
    "payload over the limit": MessageHeader(MessageType.SET_CONFIG, 1, 4096).pack(),
    "unknown request": pack_message(77, b"abc"),
    "short u64": pack_message(MessageType.SET_FEATURES, bytes(4)),
    "long u64": pack_message(MessageType.SET_FEATURES, bytes(16)),
    "missing descriptor": pack_message(MessageType.SET_VRING_KICK, VringFile(0, True).pack()),
    "feature not offered": pack_message(MessageType.SET_FEATURES, pack_u64(1 << 63)),
    "unknown queue": pack_message(MessageType.SET_VRING_NUM, VringState(99, 128).pack()),
    "nregions 2^32 - 1": pack_message(
        MessageType.SET_MEM_TABLE, b"\xff\xff\xff\xff\0\0\0\0" + bytes(32)
    ),
    "config before CONFIG, then garbage": pack_message(
        MessageType.GET_CONFIG, ConfigAccess(0, 8, 0, bytes(8)).pack()
    )
    + b"\xff" * 12,
    "all ones": b"\xff" * 64,
    "text": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
}


@pytest.mark.parametrize("name", list(BAD_STREAMS))
async def test_bad_stream_ends_the_session_and_the_next_front_end_is_served(
    directory: Path, name: str
) -> None:
    async with running_backend(directory) as backend:
        with await FrontEnd.connect(backend.path) as front_end:
            await front_end.send_raw(BAD_STREAMS[name])
            await hangs_up(front_end)
        await still_serves(backend)


@pytest.mark.parametrize("count", range(1, 9))
async def test_descriptors_with_a_message_that_takes_none_are_closed(
    directory: Path, count: int
) -> None:
    """CVE-2019-14818: surplus descriptors were never closed."""
    async with running_backend(directory) as backend:
        before = open_fds()
        for _ in range(20):
            with await FrontEnd.connect(backend.path) as front_end:
                fds = [eventfd() for _ in range(count)]
                await front_end.send_raw(pack_message(MessageType.GET_FEATURES), fds)
                for fd in fds:
                    os.close(fd)
                await hangs_up(front_end)
        await until(lambda: open_fds() == before)


async def test_more_descriptors_than_fit_are_refused_and_closed(directory: Path) -> None:
    """Rule `message`: MSG_CTRUNC is an error; what arrived is closed."""
    async with running_backend(directory) as backend:
        before = open_fds()
        with await FrontEnd.connect(backend.path) as front_end:
            fds = [eventfd() for _ in range(100)]
            await front_end.send_raw(pack_message(MessageType.GET_FEATURES), fds)
            for fd in fds:
                os.close(fd)
            await hangs_up(front_end)
        await until(lambda: open_fds() == before)
        await still_serves(backend)


async def test_descriptors_sent_with_every_byte_of_a_message_are_closed(directory: Path) -> None:
    async with running_backend(directory) as backend:
        before = open_fds()
        with await FrontEnd.connect(backend.path) as front_end:
            fd = eventfd()
            with contextlib.suppress(ConnectionLost):
                for byte in pack_message(MessageType.SET_VRING_ADDR, bytes(40)):
                    await front_end.send_raw(bytes([byte]), [fd])
                    await trio.lowlevel.checkpoint()
                await front_end.receive()
            os.close(fd)
        await until(lambda: open_fds() == before)
        await still_serves(backend)


async def test_message_byte_by_byte_with_its_descriptor_last_is_taken(directory: Path) -> None:
    async with running_backend(directory) as backend:
        with await FrontEnd.connect(backend.path) as front_end:
            await front_end.negotiate(F_VERSION_1 | F_PROTOCOL_FEATURES)
            data = pack_message(
                MessageType.SET_VRING_CALL, VringFile(0, True).pack(), flags=VERSION | 8
            )
            for byte in data[:-1]:
                await front_end.send_raw(bytes([byte]))
                await trio.lowlevel.checkpoint()
            fd = eventfd()
            await front_end.send_raw(data[-1:], [fd])
            os.close(fd)
            assert (await front_end.receive()).payload == bytes(8)


async def test_many_messages_in_one_piece_are_answered_in_order(directory: Path) -> None:
    async with running_backend(directory) as backend:
        with await FrontEnd.connect(backend.path) as front_end:
            names = [MessageType.GET_FEATURES, MessageType.GET_PROTOCOL_FEATURES] * 50
            await front_end.send_raw(b"".join(pack_message(name) for name in names))
            got = [(await front_end.receive()).header.request for _ in names]
            assert got == names


async def test_refusal_that_was_asked_for_leaves_the_session_alive(directory: Path) -> None:
    async with running_backend(directory) as backend:
        with await FrontEnd.connect(backend.path) as front_end:
            await front_end.negotiate(F_VERSION_1 | F_PROTOCOL_FEATURES)
            for _ in range(3):
                with pytest.raises(Refused):
                    await front_end.enable_ring(200)
                with pytest.raises(Refused):
                    await front_end.get_config(0, 0)
            assert await front_end.get_u64(MessageType.GET_QUEUE_NUM) == 4


@pytest.mark.parametrize("length", range(0, 52, 3))
async def test_front_end_that_vanishes_at_any_byte_is_forgotten(
    directory: Path, length: int
) -> None:
    """Rule `session`: disconnect at any byte; everything is closed, the next one is served."""
    region = RegionPayload(0, 1 << 20, 0, 0)
    data = pack_message(MessageType.SET_MEM_TABLE, pack_memory_table([region]))
    async with running_backend(directory) as backend:
        with await FrontEnd.connect(backend.path) as front_end:
            if length:
                fd = memfd()
                await front_end.send_raw(data[:length], [fd])
                os.close(fd)
        await still_serves(backend)


async def test_front_end_that_never_reads_replies_stops_only_its_own_conversation(
    directory: Path,
) -> None:
    async with running_backend(directory) as backend:
        async with await BlkDriver.connect(backend.path) as guest:
            assert guest.front_end is not None
            sock = guest.front_end._transport.sock
            flood = pack_message(MessageType.GET_FEATURES) * 1000
            for _ in range(100):
                try:
                    sock.send(flood)
                except BlockingIOError:
                    break
                await trio.lowlevel.checkpoint()
            await guest.write(0, b"r" * 512)
            assert await guest.read(0, 512) == b"r" * 512
        await still_serves(backend)


async def test_second_front_end_waits_for_the_first_to_leave(directory: Path) -> None:
    async with running_backend(directory) as backend:
        first = await FrontEnd.connect(backend.path)
        await first.get_u64(MessageType.GET_FEATURES)
        second = await FrontEnd.connect(backend.path)
        answered = trio.Event()

        async def ask() -> None:
            await second.get_u64(MessageType.GET_FEATURES)
            answered.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.sleep(0.02)
            assert not answered.is_set()
            first.close()
            await answered.wait()
        second.close()


async def test_unread_channel_blocks_nothing(directory: Path) -> None:
    """Rule 2: the main socket never waits for the back-end channel."""
    async with guest_on(directory) as (backend, guest):
        for _ in range(3000):
            assert backend.device.listener is not None
            backend.device.listener.config_changed()
        await guest.write(0, b"s" * 512)
        assert (await guest.refresh_config()).capacity_sectors == 32768
        await guest.config_changed()


async def test_closed_channel_does_not_end_the_session(directory: Path) -> None:
    async with guest_on(directory) as (backend, guest):
        assert guest.front_end is not None
        assert guest.front_end._channel is not None
        guest.front_end._channel.close()
        for size in (8 << 20, 4 << 20):
            backend.device.resize(size)
        assert (await guest.refresh_config()).capacity_sectors == (4 << 20) // 512


async def test_channel_replaced_is_the_one_used(directory: Path) -> None:
    """Rule `session`: BACKEND_REQ replaces the old channel on repeat."""
    async with guest_on(directory) as (backend, guest):
        assert guest.front_end is not None
        for _ in range(10):
            await guest.front_end.open_channel()
        backend.device.resize(8 << 20)
        assert (await guest.config_changed()).capacity_sectors == (8 << 20) // 512


async def test_nothing_is_sent_after_the_last_ring_stopped(directory: Path) -> None:
    """Rule `session`: a suspended device does not call, write or send."""
    async with guest_on(directory) as (backend, guest):
        queue = guest.queues[0]
        await guest.write(0, b"t" * 512)
        await guest.stop()
        before = bytes(guest.memory.regions[0].view)
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(queue.call_fd)
        queue.submit(0, 0, 512)
        driver_wrote = bytes(guest.memory.regions[0].view)
        queue.driver.publish()
        os.eventfd_write(queue.kick_fd, 1)
        backend.device.resize(8 << 20)
        await trio.sleep(0.02)

        assert before != driver_wrote
        assert queue.driver.device_used_idx == 1
        with pytest.raises(BlockingIOError):
            os.eventfd_read(queue.call_fd)
        assert guest.front_end is not None
        assert guest.front_end._channel is not None
        with pytest.raises(BlockingIOError):
            guest.front_end._channel.sock.recv(1)
        await guest.front_end.get_u64(MessageType.GET_FEATURES)


async def test_ring_number_is_masked_before_use(directory: Path) -> None:
    """Rule `notify` (SPDK 71c1bbeeb5): bit 8 is a flag, not part of the queue's number."""
    async with guest_on(directory) as (_backend, guest):
        assert guest.front_end is not None
        await guest.front_end.tell(MessageType.SET_VRING_CALL, pack_u64(0x100))
        queue = guest.queues[0]
        queue.submit(0, 0, 512)
        queue.kick()
        await until(lambda: queue.driver.has_used)
        assert queue.poll()


async def test_connected_socket_serves_one_front_end_and_ends(directory: Path) -> None:
    ours, theirs = socket.socketpair()
    device = FakeDevice()
    with Listener.from_fd(theirs.detach()) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, device, listener)
            with FrontEnd(ours) as front_end:
                await front_end.get_u64(MessageType.GET_FEATURES)
    assert device.names() == ["disconnected"]


@contextlib.asynccontextmanager
async def served(device: FakeDevice, path: Path) -> AsyncIterator[list[EventDict]]:
    """`device` is served at `path` meanwhile; gives what is logged."""
    with capture_logs() as logs, Listener.at_path(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, device, listener)
            yield logs
            nursery.cancel_scope.cancel()


async def test_bug_in_the_device_costs_the_session_and_not_the_process(directory: Path) -> None:
    device = FakeDevice()

    def broken(offset: int, size: int) -> bytes:
        raise ZeroDivisionError

    device.read_config = broken  # type: ignore[method-assign]
    async with served(device, directory / "s") as logs:
        for _ in range(2):
            with await FrontEnd.connect(directory / "s") as front_end:
                await front_end.negotiate(F_VERSION_1 | F_PROTOCOL_FEATURES)
                with pytest.raises(ConnectionLost):
                    await front_end.get_config(0, 8)
    assert [log["event"] for log in logs if log["log_level"] == "error"] == [
        "the vhost-user session failed"
    ] * 2


async def test_bug_at_the_end_of_a_session_costs_the_session_and_not_the_process(
    directory: Path,
) -> None:
    device = FakeDevice()

    async def broken() -> None:
        raise ZeroDivisionError

    device.disconnected = broken  # type: ignore[method-assign]
    async with served(device, directory / "s") as logs:
        for _ in range(2):
            with await FrontEnd.connect(directory / "s") as front_end:
                await front_end.negotiate(F_VERSION_1 | F_PROTOCOL_FEATURES)
        await until(lambda: len([log for log in logs if "failed" in log["event"]]) == 2)
    (first, _) = [log for log in logs if log["log_level"] == "error"]
    assert first["event"] == "the end of the vhost-user session failed"
    assert first["exc_info"]


async def test_front_end_that_says_nothing_leaves_when_another_waits(
    directory: Path, autojump_clock: trio.testing.MockClock
) -> None:
    device = FakeDevice()
    async with served(device, directory / "s") as logs:
        silent = await FrontEnd.connect(directory / "s")
        await trio.sleep(3600)  # alone it may be silent for as long as it likes
        assert silent.is_alive
        with await FrontEnd.connect(directory / "s") as front_end:
            await front_end.get_u64(MessageType.GET_FEATURES)
        silent.close()
    reasons = [log["reason"] for log in logs if log["event"] == "front-end disconnected"]
    assert reasons[0] == "said nothing for 5 s, and another front-end waits"


async def test_front_end_that_waits_for_one_that_is_served_is_logged_once(
    directory: Path, autojump_clock: trio.testing.MockClock
) -> None:
    device = FakeDevice()
    async with served(device, directory / "s") as logs:
        first = await FrontEnd.connect(directory / "s")
        await first.get_u64(MessageType.GET_FEATURES)
        second = await FrontEnd.connect(directory / "s")
        await trio.sleep(3600)
        await first.get_u64(MessageType.GET_FEATURES)
        first.close()
        second.close()
    assert len([log for log in logs if "another front-end waits" in log["event"]]) == 1


async def test_why_a_front_end_left_is_logged(directory: Path) -> None:
    with capture_logs() as logs:
        async with running_backend(directory) as backend:
            with await FrontEnd.connect(backend.path) as front_end:
                await front_end.send_raw(pack_message(MessageType.SET_FEATURES, bytes(4)))
                await hangs_up(front_end)
            await until(lambda: backend.connections == [True, False])

    (log,) = [log for log in logs if log["event"] == "front-end disconnected"]
    assert log["reason"] == "broke the protocol: SET_FEATURES: SET_FEATURES has 4 bytes, 8 needed"


async def _starts_a_ring(front_end: FrontEnd) -> None:
    await front_end.negotiate(F_VERSION_1 | F_PROTOCOL_FEATURES)
    await front_end.set_features()
    kick, call = eventfd(), eventfd()
    with contextlib.suppress(ConnectionLost, Refused):
        await front_end.set_ring(
            0,
            size=64,
            base=0,
            desc=0x7F0000000000,
            avail=0x7F0000001000,
            used=0x7F0000002000,
            kick_fd=kick,
            call_fd=call,
        )
        await front_end.enable_ring(0)
    os.close(kick)
    os.close(call)


def _told(logs: list[Any]) -> list[str]:
    return [log["reason"] for log in logs if "share the guest's memory" in log["event"]]


async def test_guest_memory_that_is_not_shared_at_all_is_told_once_with_the_remedy(
    directory: Path,
) -> None:
    with capture_logs() as logs:
        async with running_backend(directory) as backend:
            for _ in range(3):
                with await FrontEnd.connect(backend.path) as front_end:
                    await _starts_a_ring(front_end)

    (event,) = [log for log in logs if log["log_level"] == "error"]
    assert "share=on" in event["event"]
    assert "<memoryBacking>" in event["event"]
    assert event["reason"] == "it shares none"


@pytest.mark.parametrize(("mapping", "told"), [(mmap.MAP_PRIVATE, 1), (mmap.MAP_SHARED, 0)])
async def test_guest_memory_that_the_front_end_maps_privately_is_told_once(
    mapping: int, told: int, directory: Path
) -> None:
    """QEMU's share=off: it sends a file, and the guest writes to a copy of it."""
    fd = memfd(1 << 20)
    with capture_logs() as logs, mmap.mmap(fd, 1 << 20, flags=mapping) as mapped:
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        async with running_backend(directory) as backend:
            for _ in range(2):
                with await FrontEnd.connect(backend.path) as front_end:
                    await front_end.negotiate(F_VERSION_1 | F_PROTOCOL_FEATURES)
                    await front_end.set_memory([(RegionPayload(0, 1 << 20, address, 0), fd)])
    os.close(fd)

    assert _told(logs) == ["it maps its own copy (share=off)"] * told


class Listening:
    """A listening socket whose accept() fails before it works."""

    def __init__(self, *errors: int) -> None:
        self._errors = list(errors)

    def accept(self) -> tuple[socket.socket, str]:
        """See socket.socket."""
        if self._errors:
            raise OSError(self._errors.pop(0), "")
        ours, theirs = socket.socketpair()
        theirs.close()
        return ours, ""


async def test_process_out_of_descriptors_accepts_later(
    autojump_clock: trio.testing.MockClock,
) -> None:
    errors = (errno.EMFILE, errno.ECONNABORTED, errno.ENFILE, errno.ENOMEM)
    (await _accept(Listening(*errors))).close()  # type: ignore[arg-type]

    assert autojump_clock.current_time() > 0.2


async def test_listening_socket_that_is_broken_is_an_error() -> None:
    with pytest.raises(OSError, match="Errno"):
        await _accept(Listening(errno.EINVAL))  # type: ignore[arg-type]


async def abort_somewhere(path: Path, dice: random.Random) -> None:
    """Connect, get as far as chance wants, send something half, and vanish."""
    if dice.random() < 0.2:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.setblocking(False)
            try:
                sock.connect(str(path))
            except BlockingIOError:
                return
            data = dice.choice(list(BAD_STREAMS.values()))
            fds = [eventfd() for _ in range(dice.randrange(4))]
            control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            sock.sendmsg([data[: dice.randrange(1, len(data))]], control if fds else [])
            for fd in fds:
                os.close(fd)
        return
    guest = BlkDriver(path, depth=2, request_bytes=4096, num_queues=dice.randrange(1, 5))
    try:
        await guest.start()
        for queue in guest.queues:
            if dice.random() < 0.5:
                queue.submit(dice.choice((0, 1, 4, 8)), 0, 4096)
                queue.kick()
        if dice.random() < 0.3 and guest.queues[0].driver.in_flight:
            await guest.queues[0].wait()
        if dice.random() < 0.2:
            await guest.stop()
    finally:
        guest.close()


async def connect_and_abort(directory: Path, *, cycles: int, seed: int) -> None:
    """`cycles` front-ends come and vanish in the middle of something; nothing may be left over."""
    dice = random.Random(seed)
    async with running_backend(directory) as backend:
        before = open_fds()
        for _ in range(cycles):
            await abort_somewhere(backend.path, dice)
        await until(lambda: len(backend.connections) >= cycles * 0.7)
        await until(lambda: not backend.connections[-1])
        await until(lambda: open_fds() == before)
        await still_serves(backend)


async def test_300_front_ends_that_abort_leave_nothing_behind(directory: Path) -> None:
    """Rule `session`, the descriptor leak campaign in small;
    `python -m tests.guest.vhost_user.test_backend` has the 10,000."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    try:
        await connect_and_abort(directory, cycles=300, seed=1)
    finally:
        structlog.reset_defaults()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory(prefix="vu", dir="/tmp") as name:
        structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
        cycles = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
        for part in range(0, cycles, 500):
            run = connect_and_abort

            async def some(seed: int = part) -> None:
                await connect_and_abort(Path(name), cycles=min(500, cycles - seed), seed=seed)

            trio.run(some)
        print(f"{cycles} connect/abort cycles: nothing left behind")


async def test_front_end_is_hung_up_on_when_rings_are_closed_and_nobody_can_connect_any_more(
    directory: Path,
) -> None:
    """It would connect again at once, and wait for a process that is about to end: a QEMU 7.2 whose
    handshake ended so did not try again, and its guest's disk stood still for good."""
    stopping, may_stop = trio.Event(), trio.Event()
    async with running_backend(directory) as backend:
        disconnected = backend.device.disconnected

        async def drained() -> None:
            stopping.set()
            await may_stop.wait()
            await disconnected()

        with (
            pytest.MonkeyPatch.context() as patched,
            await FrontEnd.connect(backend.path) as front_end,
        ):
            patched.setattr(backend.device, "disconnected", drained)
            await front_end.get_u64(MessageType.GET_FEATURES)
            backend.scope.cancel()
            await stopping.wait()
            with pytest.raises(BlockingIOError):
                front_end._transport.sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            may_stop.set()
            await hangs_up(front_end)
            assert not backend.path.exists()
