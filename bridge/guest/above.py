"""The layer above a device: the device reports the guest's starts and stops to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bridge.datapath.request import Request
from bridge.errors import LeftBehind
from bridge.guest.virtio.blk import one_epoch


class Above:
    """The storage side, as a device sees it. This base class ignores every call.

    The device calls `inherited` or `fresh_guest` once per guest, before its first ring runs.
    """

    def inherited(self, unflushed_on: int, loss_unreported: bool) -> None:
        """A guest connects that may have run with another process. The arguments are what that
        process stored with `BlkDevice.remember_durability`."""

    def fresh_guest(self) -> None:
        """A guest connects that has not run with another process."""

    def starting(self, go: Callable[[], None]) -> bool:
        """A ring starts. Returns False if it has to wait until `go` is called."""
        return True

    def recovered(self) -> None:
        """The device is about to execute again requests that another process began."""

    def abandoned(self, requests: Sequence[Request]) -> None:
        """The device has just abandoned these requests (`Request.abandon`)."""

    async def all_stopped(self) -> None:
        """Awaited before the last ring's stop is answered: the host that opens the image next must
        find everything on the server. Raises LeftBehind if that failed; cancelled when it takes too
        long."""

    async def left_behind(self) -> LeftBehind | None:
        """`all_stopped` failed, or took too long: send nothing more of the guest's. Returns the
        error that says which data is left here; None if none is."""
        return None

    def epoch(self) -> int:
        """See `lanes.Job`."""
        return one_epoch()
