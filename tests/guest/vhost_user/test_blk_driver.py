"""The built-in guest against the whole back-end: front-end, rings, engine, a disk in memory."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest
import trio

from bridge.datapath.request import FLUSH
from bridge.errors import ConnectionLost, RequestError
from bridge.guest.vhost_user.messages import P_REPLY_ACK, RegionPayload
from bridge.peers.blk_driver import FEATURES, PACKED_FEATURES, BlkDriver
from bridge.peers.frontend import PROTOCOL_FEATURES
from bridge.peers.split_driver import QueueFull
from bridge.spec.virtio_blk import S_OK, T_FLUSH, T_IN, T_OUT
from bridge.spec.virtqueue import F_EVENT_IDX, F_INDIRECT, F_RING_PACKED
from tests.guest.vhost_user.backends import guest_on, running_backend
from tests.tools import until

RINGS = [pytest.param(FEATURES, id="split"), pytest.param(PACKED_FEATURES, id="packed")]

pytestmark = pytest.mark.usefixtures("no_fd_leak")


@pytest.mark.parametrize("indirect", [0, F_INDIRECT])
@pytest.mark.parametrize("event_idx", [0, F_EVENT_IDX])
@pytest.mark.parametrize("packed", [0, F_RING_PACKED])
async def test_data_written_is_read_back_and_on_the_disk(
    directory: Path, indirect: int, event_idx: int, packed: int
) -> None:
    features = FEATURES & ~(F_INDIRECT | F_EVENT_IDX) | indirect | event_idx | packed
    data = os.urandom(200 * 1024)
    async with guest_on(directory, features=features) as (backend, guest):
        await guest.write(8192, data)
        assert await guest.read(8192, len(data)) == data
        assert backend.target.data[8192 : 8192 + len(data)] == data


async def test_every_request_type_does_what_it_says(directory: Path) -> None:
    async with guest_on(directory) as (backend, guest):
        await guest.write(0, b"x" * 8192)
        await guest.flush()
        assert backend.target.seen[-1][0] == FLUSH
        await guest.discard([(0, 512), (1024, 512)])
        await guest.write_zeroes([(4096, 1024)], unmap=True)
        assert await guest.get_id() == "test-disk"
        data = await guest.read(0, 8192)

    x = b"x" * 512
    zero = bytes(512)
    assert data == zero + x + zero + x * 5 + zero * 2 + x * 6


async def test_config_says_size_and_limits(directory: Path) -> None:
    async with guest_on(directory) as (_backend, guest):
        assert guest.size_bytes == 16 << 20
        assert guest.config.num_queues == 4
        assert guest.config.block_size_bytes == 512


async def test_request_past_the_end_fails_and_the_next_works(directory: Path) -> None:
    async with guest_on(directory) as (_backend, guest):
        with pytest.raises(RequestError) as error:
            await guest.read(guest.size_bytes, 512)
        assert error.value.errno == errno.EIO
        with pytest.raises(RequestError) as error:
            await guest.request(99)
        assert error.value.errno == errno.ENOTSUP
        await guest.write(0, b"y" * 512)
        assert await guest.read(0, 512) == b"y" * 512


@pytest.mark.slow
@pytest.mark.parametrize("features", RINGS)
async def test_index_wraps_on_all_queues_under_depth(directory: Path, features: int) -> None:
    """Rule `ring`.2: indexes run freely over 65535."""
    async with guest_on(directory, num_queues=4, request_bytes=512, features=features) as (
        _backend,
        guest,
    ):
        for queue in guest.queues:
            for round_ in range(70_000 // queue.depth):
                while queue.free:
                    queue.submit(T_IN, round_ % 32768, 512)
                queue.kick()
                while len(queue.free) < queue.depth:
                    await queue.wait()
                    assert all(status == S_OK for _, status in queue.poll())


async def test_many_tasks_share_a_guest(directory: Path) -> None:
    async with guest_on(directory, num_queues=2, depth=4) as (_backend, guest):

        async def one(number: int) -> None:
            data = bytes([number]) * 4096
            for turn in range(5):
                offset = (number * 5 + turn) * 4096
                await guest.write(offset, data)
                assert await guest.read(offset, 4096) == data

        async with trio.open_nursery() as nursery:
            for number in range(40):
                nursery.start_soon(one, number)


async def test_cancelled_request_leaves_its_slot_busy_until_it_is_answered(
    directory: Path,
) -> None:
    async with guest_on(directory, depth=1, num_queues=1) as (backend, guest):
        backend.target.hold = True
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.read, 0, 512)
            await until(lambda: backend.target.held)
            nursery.cancel_scope.cancel()
        with pytest.raises(QueueFull):
            guest.queues[0].submit(T_FLUSH)
        backend.target.release()
        await guest.flush()
        assert len(guest.queues[0].free) == 1


async def test_memory_in_several_regions_and_data_in_small_segments(directory: Path) -> None:
    data = os.urandom(64 * 1024)
    async with (
        running_backend(directory) as backend,
        await BlkDriver.connect(
            backend.path, regions=5, segment_bytes=4096, queue_size=64
        ) as guest,
    ):
        for offset in range(0, 1 << 20, len(data)):
            await guest.write(offset, data)
            assert await guest.read(offset, len(data)) == data


async def test_kicks_and_calls_are_saved_with_event_idx(directory: Path) -> None:
    """Rule `notify`: a batch costs one kick at most."""
    async with guest_on(directory) as (_backend, guest):
        queue = guest.queues[0]
        for _ in range(10):
            while queue.free:
                queue.submit(T_IN, 0, 512)
            queue.kick()
            while len(queue.free) < queue.depth:
                await queue.wait()
                queue.poll()
        assert queue.kicks <= 10


@pytest.mark.parametrize("acknowledge", [True, False])
async def test_guest_without_acknowledgements_works_too(directory: Path, acknowledge: bool) -> None:
    protocol = PROTOCOL_FEATURES if acknowledge else PROTOCOL_FEATURES & ~P_REPLY_ACK
    async with guest_on(directory, protocol_features=protocol) as (_backend, guest):
        await guest.write(0, b"z" * 512)


@pytest.mark.parametrize("features", RINGS)
async def test_stopped_rings_go_on_where_they_were(directory: Path, features: int) -> None:
    """`session`: GET_VRING_BASE gives the next available index; nothing is lost or repeated."""
    async with guest_on(directory, features=features) as (_backend, guest):
        for turn in range(5):
            await guest.write(turn * 512, b"a" * 512)
            (base,) = await guest.stop()
            assert base == guest.queues[0].driver.base
            await guest._start_queue(guest.queues[0], base=base)
        assert await guest.read(0, 2560) == b"a" * 2560


async def test_stop_waits_for_requests_in_flight(directory: Path) -> None:
    """Rule `session`: all in-flight requests complete before GET_VRING_BASE is answered."""
    async with guest_on(directory) as (backend, guest):
        queue = guest.queues[0]
        backend.target.hold = True
        queue.submit(T_OUT, 0, 512, b"b" * 512)
        queue.kick()
        await until(lambda: backend.target.held)
        bases = []

        async def stop() -> None:
            bases.extend(await guest.stop())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop)
            await trio.sleep(0.02)
            assert not bases
            backend.target.release()
        assert bases == [1]
        assert queue.poll() == [(queue.depth and queue.free[-1], S_OK)]


async def test_disabled_ring_leaves_requests_queued_until_enabled(directory: Path) -> None:
    """Rule `session`: started and disabled means no side effects; the kick is not lost."""
    async with guest_on(directory) as (backend, guest):
        assert guest.front_end is not None
        await guest.front_end.enable_ring(0, False)
        queue = guest.queues[0]
        queue.submit(T_IN, 0, 512)
        queue.kick()
        await trio.sleep(0.02)
        assert backend.target.seen == []

        await guest.front_end.enable_ring(0, True)
        await queue.wait()
        assert len(queue.poll()) == 1


async def test_memory_plugged_and_unplugged_under_load(directory: Path) -> None:
    """Rule `session`: ADD_MEM_REG and REM_MEM_REG while rings run."""
    async with guest_on(directory) as (_backend, guest):
        front_end = guest.front_end
        assert front_end is not None
        stop = False

        async def load() -> None:
            number = 0
            while not stop:
                data = bytes([number & 0xFF]) * 4096
                await guest.write(number % 100 * 4096, data)
                assert await guest.read(number % 100 * 4096, 4096) == data
                number += 1
            assert number

        async with trio.open_nursery() as nursery:
            nursery.start_soon(load)
            for number in range(20):
                extra = RegionPayload((2 + number) << 40, 1 << 20, (2 + number) << 40, 0)
                fd = os.memfd_create("extra")
                os.ftruncate(fd, 1 << 20)
                await front_end.add_memory(extra, fd)
                os.close(fd)
                await trio.sleep(0.001)
                await front_end.remove_memory(extra)
            stop = True


async def test_memory_table_sent_again_under_load_loses_nothing(directory: Path) -> None:
    async with guest_on(directory) as (_backend, guest):
        for number in range(20):
            await guest._share()
            data = bytes([number]) * 4096
            await guest.write(0, data)
            assert await guest.read(0, 4096) == data


async def test_resize_reaches_the_guest(directory: Path) -> None:
    async with guest_on(directory) as (backend, guest):
        backend.device.resize(8 << 20)
        config = await guest.config_changed()
        assert config.capacity_sectors == (8 << 20) // 512


async def test_front_end_that_leaves_can_come_back(directory: Path) -> None:
    async with running_backend(directory) as backend:
        for number in range(5):
            async with await BlkDriver.connect(backend.path, num_queues=4) as guest:
                await guest.write(number * 512, bytes([number]) * 512)
        assert backend.target.data[:2560] == b"".join(bytes([n]) * 512 for n in range(5))


@pytest.mark.parametrize("features", RINGS)
async def test_guest_reconnects_with_the_same_rings(directory: Path, features: int) -> None:
    async with guest_on(directory, num_queues=2, features=features) as (_backend, guest):
        for number in range(10):
            await guest.write(number * 512, bytes([number]) * 512)
            await guest.reconnect()
            assert await guest.read(number * 512, 512) == bytes([number]) * 512


async def test_back_end_stopped_with_requests_in_flight_finishes_them(directory: Path) -> None:
    async with guest_on(directory) as (backend, guest):
        backend.target.hold = True
        guest.queues[0].submit(T_OUT, 0, 512, b"c" * 512)
        guest.queues[0].kick()
        await until(lambda: backend.target.held)
        backend.scope.cancel()
        await trio.sleep(0.01)
        assert backend.connections == [True]
        backend.target.release()
        await guest.queues[0].wait()
        assert guest.queues[0].poll()


async def test_back_end_that_dies_fails_requests_in_flight(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.peers.pending_requests._ALIVE_CHECK_S", 0.02)
    async with guest_on(directory) as (backend, guest):
        backend.target.hold = True
        with pytest.RaisesGroup(ConnectionLost):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.read, 0, 512)
                nursery.start_soon(guest.read, 0, 512)
                await until(lambda: len(backend.target.held) == 2)
                await trio.sleep(0.05)  # silence does not make it fail
                assert guest.front_end is not None
                guest.front_end._transport.sock.shutdown(socket.SHUT_RDWR)
        # Only now: a dead back-end answers nothing, one that drains would fail the requests itself.
        backend.target.release()
