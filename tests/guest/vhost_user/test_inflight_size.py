"""The size that a front-end asks an in-flight region for, and the size of the ring it starts."""

from pathlib import Path

import pytest

from bridge.peers.blk_driver import BlkDriver
from tests.guest.vhost_user.backends import running_backend

SECTOR = bytes(range(256)) * 2


class Qemu10Guest(BlkDriver):
    """Asks for a region of 128 entries and then starts whatever ring its driver wants.

    QEMU 10 asks for its device's `queue-size`, 128; SeaBIOS then starts a ring of 256 and Linux
    one of 1024. A back-end that refused left the guest without its disk.
    """

    async def _share(self) -> None:
        ring_size, self._queue_size = self._queue_size, 128
        await super()._share()
        self._queue_size = ring_size


@pytest.mark.parametrize("ring_size", [64, 256, 1024])
async def test_ring_of_another_size_than_the_region_was_asked_for_is_served(
    directory: Path, no_fd_leak: None, ring_size: int
) -> None:
    async with running_backend(directory) as backend:
        guest = Qemu10Guest(backend.path, queue_size=ring_size, request_bytes=4096, inflight=True)
        async with guest:
            await guest.start()
            await guest.write(512, SECTOR)
            await guest.reconnect()
            assert await guest.read(512, len(SECTOR)) == SECTOR
