"""What the next process has to know of a guest: it is kept in the in-flight region.

The requests that a ring has popped and not answered are there, and what no message says again: the
write cache was turned off, a loss is not told yet, something is unflushed on a server instance.
"""

from __future__ import annotations

import os

from bridge.guest.virtio.blk_config import BlkConfig
from bridge.guest.virtio.chain import MAX_QUEUE_SIZE
from bridge.guest.virtio.inflight import InflightRegion, queue_size_by_region


class Remembered:
    """The in-flight region of one device, if it has one, and what is in it or would be."""

    def __init__(self, config: BlkConfig) -> None:
        self.region: InflightRegion | None = None
        self.has_inherited = False
        """The guest with the present in-flight region has run with another process."""
        self.has_served = False
        """A ring ran here: what a guest left unflushed when it stopped is known."""
        self.unflushed_on = 0
        self.loss_unreported = False
        self._config = config
        self._source: tuple[int, int, int] | None = None
        self._left: set[int] = set()
        """The stopped rings of which requests were left in the in-flight region `_left_in`."""
        self._left_in: tuple[int, int, int] | None = None

    def create(self, num_queues: int, queue_size: int, *, packed: bool) -> tuple[int, int]:
        """A new region; its descriptor and how many bytes it has."""
        region, fd, size_bytes = InflightRegion.create(
            num_queues=num_queues, queue_size=queue_size, packed=packed
        )
        self.forget()
        self.region = region
        self._source = _source(fd, 0)
        self.remember()
        return fd, size_bytes

    def map(
        self, fd: int, offset: int, size: int, num_queues: int, queue_size: int, *, packed: bool
    ) -> InflightRegion:
        """The region in that file, which another process may have used: see `take_over`.

        A region from `create` has room for more than it says, but only up to what we make: its
        size is the front-end's to choose. Raises ProtocolError.
        """
        room = queue_size_by_region(size, num_queues, packed=packed)
        if room > MAX_QUEUE_SIZE:
            room = 0
        region = InflightRegion.map(
            fd,
            offset,
            size,
            num_queues=num_queues,
            queue_size=max(queue_size, room),
            packed=packed,
        )
        self.forget()
        self.region = region
        self._source = _source(fd, offset)
        return region

    def take_over(self, region: InflightRegion) -> bool:
        """Whether the guest that `region` is of has run with another process."""
        self.has_inherited = region.was_used and (
            not self.has_served or bool(region.unflushed_on) or region.loss_unreported
        )
        return self.has_inherited

    def remember(self) -> None:
        """For the process after this one: the guest will not say any of it again."""
        if self.region is not None:
            self.region.remember(
                write_through=self._config.writeback_refused,
                loss_unreported=self.loss_unreported,
                unflushed_on=self.unflushed_on,
            )

    def leave(self, index: int) -> None:
        """Requests of ring `index`, which stops, stay in the region."""
        self._left.add(index)
        self._left_in = self._source

    def was_left(self, index: int) -> bool:
        """What ring `index` has in flight, by the region, was left there by us."""
        return self._left_in == self._source and index in self._left

    def starting(self, index: int) -> None:
        """Ring `index` is about to run; what it has left is executed again."""
        self._left.discard(index)
        if self.region is None:
            self._left.clear()
        else:
            self.region.note_use()

    @property
    def left_requests(self) -> int:
        """How many requests are in the region while no ring runs, whoever has left them there: a
        process before this one did so where the front-end has not started the ring again."""
        return 0 if self.region is None else self.region.in_flight

    def clear(self) -> None:
        """The driver has forgotten its requests in flight, and uses their memory again."""
        if self.region is not None:
            self.region.clear()
        self._left.clear()

    def forget(self) -> None:
        """The region is no longer in use."""
        self.region = None
        self.has_inherited = False
        self._source = None


def _source(fd: int, offset: int) -> tuple[int, int, int]:
    """Which bytes of which file: the same region comes with another descriptor each time."""
    status = os.fstat(fd)
    return status.st_dev, status.st_ino, offset
