"""What a front-end can do to the rings and the memory of a whole back-end.

Rules `notify`, `session`, `inflight`, `dirty_log` of docs/rules/virtio.md.
"""

from __future__ import annotations

import errno
import gc
import os
import random
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

from bridge.errors import ConnectionLost, RequestError
from bridge.guest.vhost_user.messages import (
    F_LOG_ALL,
    InflightRange,
    MessageType,
    RegionPayload,
    VringState,
)
from bridge.peers.blk_driver import FEATURES, PACKED_FEATURES, BlkDriver
from bridge.peers.driver_queue import STATUS_NONE, DriverQueue
from bridge.peers.frontend import FrontEnd, Refused
from bridge.peers.shared_memory import USER_OFFSET, SharedMemory
from bridge.peers.split_driver import SplitDriver
from bridge.spec.virtio_blk import S_IOERR, S_OK, T_GET_ID, T_IN, T_OUT
from bridge.spec.virtqueue import DESC_WRITE, F_EVENT_IDX, F_VERSION_1
from tests.guest.vhost_user.backends import Running, guest_on, running_backend
from tests.guest.vhost_user.fakes import memfd
from tests.tools import until

pytestmark = pytest.mark.usefixtures("no_fd_leak")

RINGS = [pytest.param(FEATURES, id="split"), pytest.param(PACKED_FEATURES, id="packed")]


def front_end_of(guest: BlkDriver) -> FrontEnd:
    """The guest's front-end."""
    assert guest.front_end is not None
    return guest.front_end


def addresses(guest: BlkDriver, queue: DriverQueue) -> dict[str, int]:
    """The front-end addresses of a queue's parts."""
    start = guest.memory.user_address(queue.ring_address)
    return {
        "desc": start,
        "avail": start + queue.driver.avail_offset,
        "used": start + queue.driver.used_offset,
    }


async def complete(queue: DriverQueue) -> list[tuple[int, int]]:
    """The next completions, taken without any call."""
    await until(lambda: queue.driver.has_used)
    return queue.poll()


# Notifications.


@pytest.mark.parametrize("features", RINGS)
async def test_polling_guest_without_kick_and_call_is_served(
    directory: Path, features: int
) -> None:
    """Rule `notify`: no kick fd means that the back-end must poll, no call fd never to signal."""
    async with guest_on(directory, features=features) as (_backend, guest):
        queue = guest.queues[0]
        front_end = front_end_of(guest)
        base = await front_end.stop_ring(0)
        await front_end.set_ring(
            0,
            size=queue.size,
            base=base,
            kick_fd=None,
            call_fd=None,
            **addresses(guest, queue),
        )
        for _ in range(3):
            queue.submit(T_IN, 0, 512)
            queue.driver.publish()
            assert [status for _, status in await complete(queue)] == [S_OK]


async def test_full_call_counter_costs_nothing_but_itself(directory: Path) -> None:
    async with guest_on(directory) as (_backend, guest):
        queue = guest.queues[0]
        with suppress(BlockingIOError):
            os.eventfd_read(queue.call_fd)
        os.eventfd_write(queue.call_fd, (1 << 64) - 2)
        for _ in range(3):
            queue.driver.arm()
            queue.submit(T_IN, 0, 512)
            queue.kick()
            assert len(await complete(queue)) == 1


async def test_new_call_fd_is_signalled_once_for_what_may_be_lost(directory: Path) -> None:
    """`notify` (SPDK dbe47004e5): a guest whose call fd was replaced must not wait without end."""
    async with guest_on(directory) as (_backend, guest):
        fresh = os.eventfd(0, os.EFD_NONBLOCK)
        await front_end_of(guest).set_ring_file(MessageType.SET_VRING_CALL, 0, fresh)
        assert os.eventfd_read(fresh) >= 1
        os.close(fresh)


async def test_first_completion_after_a_restart_calls_whatever_the_suppression_says(
    directory: Path,
) -> None:
    async with guest_on(directory) as (_backend, guest):
        queue = guest.queues[0]
        await guest.write(0, b"a" * 512)
        (base,) = await guest.stop()
        queue.driver.disarm()
        await guest._start_queue(queue, base=base)
        await trio.sleep(0.01)
        with suppress(BlockingIOError):
            os.eventfd_read(queue.call_fd)
        queue.submit(T_IN, 0, 512)
        queue.kick()
        assert len(await complete(queue)) == 1
        assert os.eventfd_read(queue.call_fd) >= 1


async def test_spurious_kicks_do_nothing(directory: Path) -> None:
    """Rule `notify`: a kick with nothing new is not a request."""
    async with guest_on(directory) as (backend, guest):
        for _ in range(100):
            os.eventfd_write(guest.queues[0].kick_fd, 1)
            await trio.lowlevel.checkpoint()
        await trio.sleep(0.01)
        assert backend.target.seen == []
        await guest.write(0, b"k" * 512)


async def test_kick_fd_replaced_while_running_is_the_one_waited_for(directory: Path) -> None:
    async with guest_on(directory) as (_backend, guest):
        queue = guest.queues[0]
        for _ in range(3):
            os.close(queue.kick_fd)
            queue.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
            await front_end_of(guest).set_ring_file(MessageType.SET_VRING_KICK, 0, queue.kick_fd)
            await guest.write(0, b"k" * 512)


def calls(queue: DriverQueue) -> int:
    """How often the device has called since the last look."""
    try:
        return os.eventfd_read(queue.call_fd)
    except BlockingIOError:
        return 0


async def is_called_for_a_read(queue: DriverQueue) -> bool:
    """Whether the device calls for the next request's end."""
    calls(queue)
    queue.submit(T_IN, 0, 512)
    queue.kick()
    await complete(queue)
    await trio.sleep(0.002)
    return bool(calls(queue))


async def test_event_idx_counts_and_the_flags_do_not(directory: Path) -> None:
    """Rule `notify`: with EVENT_IDX avail.flags is ignored and used.flags stays 0."""
    async with guest_on(directory) as (_backend, guest):
        queue = guest.queues[0]
        driver = queue.driver
        assert isinstance(driver, SplitDriver)
        await guest.write(0, b"e" * 512)
        for wanted in (True, False):
            driver.set_avail_flags(1 if wanted else 0)
            driver.set_used_event((driver.used_idx + (0 if wanted else 100)) & 0xFFFF)
            assert await is_called_for_a_read(queue) == wanted
            assert driver.device_used_flags == 0


async def test_flags_count_without_event_idx(directory: Path) -> None:
    """Rule `notify`: flags 1 means no call, 0 means a call; used_event means nothing."""
    async with guest_on(directory, features=FEATURES & ~F_EVENT_IDX) as (_backend, guest):
        queue = guest.queues[0]
        driver = queue.driver
        assert isinstance(driver, SplitDriver)
        await guest.write(0, b"f" * 512)
        for wanted in (True, False):
            driver.set_avail_flags(0 if wanted else 1)
            driver.set_used_event((driver.used_idx + (100 if wanted else 0)) & 0xFFFF)
            assert await is_called_for_a_read(queue) == wanted


async def test_device_offers_version_1_and_as_many_queues_as_it_has(directory: Path) -> None:
    """Rules `features` and `session`: VERSION_1 is offered; GET_QUEUE_NUM and num_queues agree."""
    async with guest_on(directory) as (_backend, guest):
        assert guest.features & F_VERSION_1
        assert (
            await front_end_of(guest).get_u64(MessageType.GET_QUEUE_NUM) == guest.config.num_queues
        )


# Ring addresses.


@pytest.mark.parametrize(
    ("part", "shift"),
    [
        pytest.param("desc", 8, id="desc misaligned"),
        pytest.param("avail", 1, id="avail misaligned"),
        pytest.param("used", 2, id="used misaligned"),
        pytest.param("used", -64, id="used over avail"),
        pytest.param("avail", -16, id="avail over desc"),
        pytest.param("desc", 1 << 40, id="desc nowhere"),
        pytest.param("used", 1 << 40, id="used nowhere"),
        pytest.param("desc", -USER_OFFSET, id="a guest address"),
        pytest.param("used", (1 << 64) - (1 << 48), id="used over the end"),
    ],
)
async def test_ring_at_impossible_addresses_is_refused_and_the_session_lives(
    directory: Path, part: str, shift: int
) -> None:
    """Rule `ring`.1: misaligned, overlapping or unmapped rings."""
    async with guest_on(directory) as (_backend, guest):
        wrong = addresses(guest, guest.queues[0])
        wrong[part] = (wrong[part] + shift) & ((1 << 64) - 1)
        front_end = front_end_of(guest)
        for _ in range(2):
            with pytest.raises(Refused):
                await set_up_second(front_end, wrong, size=128)
        await guest.write(0, b"l" * 512)


async def set_up_second(front_end: FrontEnd, where: dict[str, int], *, size: int) -> None:
    """Try to run queue 1 there."""
    await front_end.set_ring(1, size=size, base=0, kick_fd=None, call_fd=None, **where)
    await front_end.enable_ring(1)


async def test_ring_that_ends_with_the_region_is_taken_and_one_byte_more_is_not(
    directory: Path,
) -> None:
    async with guest_on(directory) as (_backend, guest):
        region = guest.memory.regions[0]
        end = region.user_address + region.size_bytes
        where = addresses(guest, guest.queues[0])
        used_bytes = 6 + 8 * 128
        last = end - used_bytes & ~3
        with pytest.raises(Refused):
            await set_up_second(front_end_of(guest), where | {"used": last + 4}, size=128)
        await set_up_second(front_end_of(guest), where | {"used": last}, size=128)


# Memory.


async def test_memory_file_shorter_than_it_says_is_refused(directory: Path) -> None:
    """Touching a mapping past the file's end would be a SIGBUS."""
    async with guest_on(directory) as (_backend, guest):
        for size, region in (
            (4096, RegionPayload(1 << 40, 8192, 1 << 41, 0)),
            (8192, RegionPayload(1 << 40, 8192, 1 << 41, 4096)),
            (0, RegionPayload(1 << 40, 4096, 1 << 41, 0)),
            (4096, RegionPayload(1 << 40, 1, 1 << 41, 4096)),
        ):
            fd = memfd(size)
            with pytest.raises(Refused):
                await front_end_of(guest).add_memory(region, fd)
            os.close(fd)
        await guest.write(0, b"m" * 512)


async def test_memory_file_that_cannot_be_mapped_is_refused(directory: Path) -> None:
    async with guest_on(directory) as (_backend, guest):
        for fd in (
            os.open("/dev/null", os.O_RDWR),
            os.open("/proc/self/maps", os.O_RDONLY),
            os.open(directory, os.O_RDONLY),
            os.eventfd(0),
            os.dup(0),
        ):
            with pytest.raises(Refused):
                await front_end_of(guest).add_memory(RegionPayload(1 << 40, 4096, 1 << 41, 0), fd)
            os.close(fd)
        await guest.write(0, b"m" * 512)


async def test_ring_whose_memory_is_taken_away_breaks_and_only_that(directory: Path) -> None:
    """`session`: users of old mappings are quiesced; a ring in thin air is broken, not a crash."""
    async with guest_on(directory) as (_backend, guest):
        queue = guest.queues[0]
        front_end = front_end_of(guest)
        regions = [(each.region, each.fd) for each in guest.memory.regions]
        await front_end.set_memory([])
        assert os.eventfd_read(queue.error_fd) == 1
        os.eventfd_write(queue.kick_fd, 1)
        await front_end.set_ring_file(MessageType.SET_VRING_CALL, 0, queue.call_fd)
        base = await front_end.stop_ring(0)
        assert base == queue.driver.base

        await front_end.set_memory(regions)
        await guest._start_queue(queue, base=base)
        await guest.write(0, b"m" * 512)


async def test_buffer_over_two_regions_that_are_apart_in_the_file_is_whole(
    directory: Path,
) -> None:
    """CVE-2018-1059, CVE-2019-18960: contiguous for the guest is not contiguous for us."""
    memory = SharedMemory()
    first = memory.add(65536, guest_address=1 << 20, user_address=1 << 44)
    second = memory.add(65536, guest_address=(1 << 20) + 65536, user_address=1 << 43)
    data = os.urandom(1024)
    async with guest_on(directory) as (backend, guest):
        front_end = front_end_of(guest)
        for region in (second, first):
            await front_end.add_memory(region.region, region.fd)
        first.view[-512:] = data[:512]
        second.view[:512] = data[512:]
        where = (1 << 20) + 65536 - 512
        queue = guest.queues[0]
        header, status = queue._header_buffers[0], queue._status_buffers[0]
        for kind, flags in ((T_OUT, 0), (T_IN, DESC_WRITE)):
            struct.pack_into("<IIQ", queue._headers, 0, kind, 0, 4)
            queue.driver.add(0, [header, (where, 1024, flags), status])
            queue.free.remove(0)
            queue.kick()
            assert await complete(queue) == [(0, S_OK)]
            assert backend.target.data[2048:3072] == data
            first.view[-512:] = second.view[:512] = bytes(512)
        del region
    memory.close()


async def test_regions_with_a_file_offset_map_the_right_bytes(directory: Path) -> None:
    fd = memfd(3 << 16)
    os.pwrite(fd, b"q" * 512, 4096 + 100)
    async with guest_on(directory) as (backend, guest):
        region = RegionPayload(1 << 30, 65536, 1 << 40, 4096 + 100)
        await front_end_of(guest).add_memory(region, fd)
        queue = guest.queues[0]
        struct.pack_into("<IIQ", queue._headers, 0, T_OUT, 0, 0)
        chain = [queue._header_buffers[0], (1 << 30, 512, 0), queue._status_buffers[0]]
        queue.driver.add(0, chain)
        queue.free.remove(0)
        queue.kick()
        assert await complete(queue) == [(0, S_OK)]
        assert backend.target.data[:512] == b"q" * 512
    os.close(fd)


# Stopping.


@pytest.mark.parametrize("features", RINGS)
async def test_stop_with_a_dead_storage_is_bounded_and_fails_the_requests(
    directory: Path, features: int
) -> None:
    """Rule `session`: QEMU waits for GET_VRING_BASE without a limit of its own."""
    async with (
        running_backend(directory, drain_timeout_s=0.05) as backend,
        await BlkDriver.connect(backend.path, features=features) as guest,
    ):
        queue = guest.queues[0]
        backend.target.hold = True
        queue.submit(T_IN, 0, 512)
        queue.submit(T_OUT, 0, 512, b"x" * 512)
        queue.kick()
        await until(lambda: len(backend.target.held) == 2)

        bases = await guest.stop()

        assert sorted(status for _, status in queue.poll()) == [S_IOERR] * 2
        assert bases == [queue.driver.base]
        backend.target.hold = False
        await guest._start_queue(queue, base=queue.driver.base)
        await guest.write(0, b"o" * 512)


async def test_front_end_that_vanishes_with_requests_in_flight_gets_no_late_writes(
    directory: Path,
) -> None:
    async with running_backend(directory, drain_timeout_s=0.05) as backend:
        guest = await BlkDriver.connect(backend.path)
        queue = guest.queues[0]
        backend.target.hold = True
        slot = queue.submit(T_IN, 0, 512)
        queue.kick()
        await until(lambda: backend.target.held)
        front_end_of(guest).close()
        await until(lambda: backend.connections == [True, False])
        used = queue.driver.used_idx
        after = bytes(guest.memory.regions[0].view)
        backend.target.release()
        await trio.sleep(0.01)
        assert bytes(guest.memory.regions[0].view) == after
        assert queue.driver.used_idx == used
        assert slot is not None
        guest.close()


@pytest.mark.parametrize("features", RINGS)
async def test_memory_of_a_guest_that_left_is_given_back_at_once(
    directory: Path, features: int
) -> None:
    """Not when the garbage collector comes next: a guest's memory is large, and the next guest
    wants as much."""
    gc.collect()
    gc.disable()
    before = maps_of_memory_files()  # Of tests before this one.
    try:
        async with running_backend(directory) as running:
            guest = await BlkDriver.connect(
                running.path, features=features, inflight=True, request_bytes=3 << 20
            )
            async with guest:
                await guest.write(0, b"a" * (3 << 20))
                await guest.read(0, 3 << 20)
                await guest.write_zeroes([(0, 4096), (65536, 4096)])
                await guest.discard([(0, 65536)])
                running.target.error = errno.EIO
                with suppress(RequestError):
                    await guest.discard([(0, 65536), (131072, 65536)])
            del guest
            await until(lambda: running.connections and not running.connections[-1])
            assert maps_of_memory_files() <= before
    finally:
        gc.enable()


def maps_of_memory_files() -> set[str]:
    """The files, by inode, that this process has maps of."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[4] for line in lines if "/memfd:" in line}


async def test_reset_device_starts_over_with_the_same_memory(directory: Path) -> None:
    async with guest_on(directory) as (_backend, guest):
        front_end = front_end_of(guest)
        queue = guest.queues[0]
        await guest.write(0, b"r" * 512)
        await front_end.tell(MessageType.RESET_DEVICE)
        await front_end.set_features()
        await guest._start_queue(queue, base=queue.driver.base)
        assert await guest.read(0, 512) == b"r" * 512


async def test_guest_that_boots_again_starts_its_rings_at_zero(directory: Path) -> None:
    """rust-vmm/vhost#180: the used index is the guest's, read from its memory at the start."""
    async with guest_on(directory) as (_backend, guest):
        queue = guest.queues[0]
        for _ in range(3):
            await guest.write(0, b"b" * 512)
            await guest.stop()
            size = SplitDriver.area_bytes(queue.size)
            area = guest.memory.view(queue.ring_address, size)
            area[:] = bytes(size)
            queue.driver = SplitDriver(area, size=queue.size, event_idx=True)
            await guest._start_queue(queue, base=0)
        await guest.write(0, b"b" * 512)


# In-flight region.


@asynccontextmanager
async def interrupted(
    directory: Path, **options: Any
) -> AsyncIterator[tuple[Running, BlkDriver, DriverQueue]]:
    """A guest whose back-end left 3 requests unanswered: its front-end vanished."""
    async with running_backend(directory, drain_timeout_s=0.01) as backend:
        async with await BlkDriver.connect(backend.path, inflight=True, **options) as guest:
            queue = guest.queues[0]
            await guest.write(4096, b"1" * 512)
            backend.target.hold = True
            for number in range(3):
                queue.submit(T_OUT, number, 512, bytes([number]) * 512)
            queue.kick()
            await until(lambda: len(backend.target.held) == 3)
            front_end_of(guest).close()
            await until(lambda: not backend.connections[-1])
            backend.target.hold = False
            backend.target.held.clear()
            yield backend, guest, queue


@pytest.mark.parametrize("base", ["used", "avail"])
async def test_recovery_ignores_which_base_the_front_end_names(directory: Path, base: str) -> None:
    """Rule 2: cloud-hypervisor names the available index, QEMU the used one."""
    async with interrupted(directory) as (backend, guest, queue):
        await guest.negotiate()
        await guest._share()
        driver = queue.driver
        await guest._start_queue(
            queue, base=driver.base if base == "avail" else driver.restore_base
        )
        done = []
        while len(done) < 3:
            done += await complete(queue)
        assert [status for _, status in done] == [S_OK] * 3
        assert backend.target.data[:1536] == b"".join(bytes([n]) * 512 for n in range(3))
        assert [offset for _, offset, _ in backend.target.seen[-3:]] == [0, 512, 1024]
        await guest.write(0, b"2" * 512)


@pytest.mark.parametrize("features", RINGS)
@pytest.mark.parametrize("seed", range(20))
async def test_inflight_region_full_of_nonsense_is_survived(
    directory: Path, features: int, seed: int
) -> None:
    """Rule `inflight`, CVE-2026-63110: the region is the front-end's to write to."""
    dice = random.Random(seed)
    async with interrupted(directory, features=features) as (backend, guest, _queue):
        assert guest._inflight is not None
        described, fd = guest._inflight
        for _ in range(dice.randrange(1, 200)):
            at = dice.randrange(0 if dice.random() < 0.2 else 12, described.mmap_size)
            os.pwrite(fd, dice.randbytes(1), at)
        with suppress(Refused, ConnectionLost):
            await guest.reconnect()
        await trio.sleep(0.005)
        front_end_of(guest).close()
        await until(lambda: not backend.connections[-1])
        async with await BlkDriver.connect(backend.path) as other:
            await other.write(0, b"n" * 512)


@pytest.mark.parametrize(
    "described",
    [
        pytest.param(InflightRange(64, 0, 1, 128), id="too small"),
        pytest.param(InflightRange(4096, 1 << 62, 1, 128), id="past the file"),
        pytest.param(InflightRange(4096, 0, 4, 1024), id="too many queues for it"),
    ],
)
async def test_inflight_region_that_does_not_fit_is_refused(
    directory: Path, described: InflightRange
) -> None:
    """CVE-2021-3839."""
    async with running_backend(directory) as backend:
        guest = BlkDriver(backend.path)
        try:
            await guest.negotiate()
            fd = memfd(4096)
            with pytest.raises(Refused):
                await front_end_of(guest).set_inflight(described, fd)
            os.close(fd)
        finally:
            guest.close()


# Dirty log.


class Log:
    """A dirty bitmap of the guest's memory, shared with the back-end."""

    def __init__(self, pages: int) -> None:
        self.bytes = -(-pages // 8)
        self.fd = memfd(self.bytes)

    def take(self) -> set[int]:
        """The guest addresses of the pages that are marked, which are then not."""
        bits = os.pread(self.fd, self.bytes, 0)
        os.pwrite(self.fd, bytes(self.bytes), 0)
        return {
            (index * 8 + bit) << 12
            for index, byte in enumerate(bits)
            if byte
            for bit in range(8)
            if byte >> bit & 1
        }


@pytest.mark.parametrize("features", RINGS)
async def test_everything_written_while_logging_is_marked(directory: Path, features: int) -> None:
    """`dirty_log`: data of IN and GET_ID, the status byte, the used ring; nothing that was read."""
    async with guest_on(directory, features=features, request_bytes=16384) as (_backend, guest):
        front_end = front_end_of(guest)
        queue = guest.queues[0]
        region = guest.memory.regions[0]
        log = Log((region.guest_address + region.size_bytes) >> 12)
        await guest.write(0, b"d" * 16384)
        await front_end.set_log(log.fd, log.bytes)
        await front_end.set_features(front_end.features | F_LOG_ALL)
        used = queue.ring_address + (queue.driver.used_offset if features == FEATURES else 0)
        await front_end.set_ring_address(0, **addresses(guest, queue), log=used)

        for kind, length in ((T_IN, 16384), (T_GET_ID, 20), (T_OUT, 8192)):
            log.take()
            slot = queue.submit(kind, 0, length)
            queue.kick()
            assert await complete(queue) == [(slot, S_OK)]
            # The call comes after the mark; the loop may still be about to sleep.
            await trio.sleep(0.005)
            marked = log.take()
            data = queue._data_addresses[slot]
            pages = {data + at for at in range(0, length, 4096)}
            assert (pages <= marked) == (kind != T_OUT)
            assert queue._status_buffers[slot][0] & ~4095 in marked
            assert used & ~4095 in marked

        await front_end.set_features(front_end.features & ~F_LOG_ALL)
        log.take()
        await guest.read(0, 4096)
        assert log.take() == set()
        os.close(log.fd)


async def test_log_shorter_than_the_memory_is_not_written_past_its_end(directory: Path) -> None:
    """CVE-2020-10722, CVE-2019-14835."""
    async with guest_on(directory) as (_backend, guest):
        front_end = front_end_of(guest)
        fd = memfd(8192)
        await front_end.set_log(fd, 8, 16)
        await front_end.set_features(front_end.features | F_LOG_ALL)
        await guest.read(0, 4096)
        content = os.pread(fd, 8192, 0)
        assert content[:16] == bytes(16)
        assert content[24:] == bytes(8192 - 24)
        os.close(fd)


async def test_log_range_past_its_file_is_refused(directory: Path) -> None:
    async with guest_on(directory) as (backend, guest):
        fd = memfd(4096)
        with pytest.raises(ConnectionLost):
            await front_end_of(guest).set_log(fd, 8192)
        os.close(fd)
        async with await BlkDriver.connect(backend.path) as other:
            await other.write(0, b"g" * 512)


async def test_unknown_queue_is_refused_as_the_qtest_nxvirtq_does(directory: Path) -> None:
    async with guest_on(directory) as (_backend, guest):
        for request in (
            MessageType.SET_VRING_NUM,
            MessageType.SET_VRING_BASE,
            MessageType.SET_VRING_ENABLE,
        ):
            with pytest.raises(Refused):
                await front_end_of(guest).tell(request, VringState(4, 1).pack())
        with pytest.raises(RequestError) as error:
            await guest.read(guest.size_bytes, 512)
        assert error.value.errno == errno.EIO
        assert STATUS_NONE not in (S_OK, S_IOERR)
