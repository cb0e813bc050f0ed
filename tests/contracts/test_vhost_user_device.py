"""The promises of a `VhostUserDevice`, kept by the session's fake device and by the real one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from bridge.datapath.loop import Loop
from bridge.errors import ProtocolError
from bridge.guest.device import BlkDevice
from bridge.guest.vhost_user.device_interface import MemoryRegion, VhostUserDevice
from bridge.guest.vhost_user.messages import F_LOG_ALL, F_PROTOCOL_FEATURES
from bridge.guest.virtio.blk_config import DiskGeometry
from tests.guest.device_guest import USER_BASE
from tests.guest.vhost_user.fakes import FakeDevice, memfd
from tests.guest.virtio.mock import FakeDisk

SIZE = 1 << 20


@pytest.fixture(params=["fake device", "device"])
def device(request: pytest.FixtureRequest) -> Iterator[VhostUserDevice]:
    if request.param == "fake device":
        yield FakeDevice()
        return
    loop = Loop(poll_us=0)
    disk = FakeDisk(SIZE)
    disk.turn = loop.turn
    yield BlkDevice(loop, disk, DiskGeometry(SIZE), serial="contract", max_queues=4)
    loop.close()


@pytest.fixture
def region() -> Iterator[MemoryRegion]:
    with ExitStack() as stack:
        fd = memfd(SIZE)
        stack.callback(os.close, fd)
        yield MemoryRegion(0, SIZE, USER_BASE, 0, fd)


def test_session_s_own_feature_bits_are_not_offered(device: VhostUserDevice) -> None:
    offered = device.offered_features()
    assert offered
    assert not offered & (F_LOG_ALL | F_PROTOCOL_FEATURES)


@pytest.mark.parametrize(("offset", "size"), [(0, 8), (0, 60), (56, 8), (60, 4), (300, 200)])
def test_config_is_as_long_as_was_asked_and_zero_past_its_end(
    device: VhostUserDevice, offset: int, size: int
) -> None:
    data = device.read_config(offset, size)
    assert len(data) == size
    assert data == (device.read_config(0, 60) + bytes(500))[offset : offset + size]


def test_bounds_are_those_of_the_protocol(device: VhostUserDevice) -> None:
    assert 1 <= device.max_queues <= 256
    assert 1 <= device.max_queue_size <= 32768
    assert device.listener is None


async def test_memory_that_was_added_can_be_removed_once(
    device: VhostUserDevice, region: MemoryRegion
) -> None:
    place = {
        "guest_address": region.guest_address,
        "user_address": region.user_address,
        "size_bytes": region.size_bytes,
    }
    await device.add_memory(region)
    await device.remove_memory(**place)
    with pytest.raises(ProtocolError):
        await device.remove_memory(**place)


async def test_replaced_memory_is_gone(device: VhostUserDevice, region: MemoryRegion) -> None:
    await device.replace_memory([region])
    await device.replace_memory([])
    with pytest.raises(ProtocolError):
        await device.remove_memory(
            guest_address=region.guest_address,
            user_address=region.user_address,
            size_bytes=region.size_bytes,
        )


def test_inflight_region_is_as_large_as_it_says_and_zeroed(device: VhostUserDevice) -> None:
    assert device.supports_inflight
    fd, size_bytes = device.create_inflight(1, 16)
    try:
        assert size_bytes > 0
        assert os.fstat(fd).st_size >= size_bytes
        assert os.pread(fd, size_bytes, 0).strip(b"\0") == b""
    finally:
        os.close(fd)
