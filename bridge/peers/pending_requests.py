"""Requests of many tasks on the virtqueues of one driver: who waits, and which result is whose."""

from __future__ import annotations

import errno
from collections import defaultdict
from collections.abc import Callable

import trio

from bridge.errors import ConnectionLost, ProtocolError, RequestError
from bridge.peers.driver_queue import DriverQueue
from bridge.spec.virtio_blk import S_IOERR, S_OK, S_UNSUPP

_ALIVE_CHECK_S = 1.0
"""How long to wait for a completion before looking whether the back-end is still there."""


class PendingRequests:
    """Requests that were submitted, and results that were not taken yet, by queue and slot."""

    def __init__(self, may_go_on: Callable[[], bool]) -> None:
        """`may_go_on()`: False once what is in flight will never complete."""
        self._may_go_on = may_go_on
        self._results: dict[tuple[int, int], int] = {}
        """Queue and slot → status byte."""
        self._abandoned: set[tuple[int, int]] = set()
        """Queue and slot of requests whose task was cancelled."""
        self._lots: dict[int, trio.lowlevel.ParkingLot] = defaultdict(trio.lowlevel.ParkingLot)
        self._waiting: set[int] = set()
        """Queues for which a task waits for the device."""

    async def complete(
        self,
        on: DriverQueue,
        submit: Callable[[DriverQueue], int],
        take: Callable[[DriverQueue, int], None] | None,
    ) -> None:
        """Submit a request with `submit(queue)`, which returns its slot, and wait for its status.

        A free slot is waited for first. `take(queue, slot)` is called after a success, while the
        slot still holds the data. Raises RequestError (EIO for IOERR, ENOTSUP for UNSUPP),
        ProtocolError for a status that is none, ConnectionLost when the back-end hung up.
        Cancelled, the request goes on; its slot stays busy until the device is done with it.
        """
        while not on.free:
            await self._progress(on)
        slot = submit(on)
        key = (on.index, slot)
        on.kick()
        try:
            while key not in self._results:
                await self._progress(on)
        except BaseException:
            if key not in self._results:
                # The slot stays busy until the device is done with it.
                self._abandoned.add(key)
            else:
                self._claim(on, slot)
            raise
        status = self._results[key]
        try:
            if status != S_OK:
                raise _request_error(status)
            if take is not None:
                take(on, slot)
        finally:
            self._claim(on, slot)

    async def _progress(self, on: DriverQueue) -> None:
        """Wait until something about `on` changes: results are there, or slots are free.

        One task waits for the device and takes completions for all tasks; the others are parked.
        With nothing in flight there is nothing to wait for but the owners of the results.
        """
        lot = self._lots[on.index]
        if on.index in self._waiting:
            # Only that task may take completions, or it would wait for one that is gone.
            await lot.park()
            return
        if self._reap(on):
            await trio.lowlevel.checkpoint()
            return
        unclaimed = sum(queue == on.index for queue, _ in self._results)
        if len(on.free) + unclaimed == on.depth:
            await lot.park()
            return
        self._waiting.add(on.index)
        try:
            with trio.move_on_after(_ALIVE_CHECK_S) as scope:
                await on.wait()
        finally:
            self._waiting.discard(on.index)
            self._reap(on)
            lot.unpark_all()
        if scope.cancelled_caught and not self._may_go_on():
            raise ConnectionLost("the back-end hung up with requests in flight")

    def _reap(self, on: DriverQueue) -> bool:
        """Take completions; their slots are not free before their owners have taken the data."""
        done = on.poll()
        for slot, status in done:
            key = (on.index, slot)
            if key in self._abandoned:
                self._abandoned.discard(key)
            else:
                self._results[key] = status
                on.free.remove(slot)
        if done:
            self._lots[on.index].unpark_all()
        return bool(done)

    def _claim(self, on: DriverQueue, slot: int) -> None:
        """The owner is done with a result; its slot is free."""
        del self._results[on.index, slot]
        on.free.append(slot)
        self._lots[on.index].unpark_all()


def _request_error(status: int) -> RequestError:
    if status == S_UNSUPP:
        return RequestError(errno.ENOTSUP, "the device does not support the request (UNSUPP)")
    if status == S_IOERR:
        return RequestError(errno.EIO, "the device failed the request (IOERR)")
    raise ProtocolError(f"the device gave status {status:#x}, which is none")
