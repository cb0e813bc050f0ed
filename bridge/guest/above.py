"""The layer above a device: what it is told of the guest, and asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bridge.datapath.request import Request
from bridge.errors import LeftBehind
from bridge.guest.virtio.blk import one_epoch


class Above:
    """The storage side, for a device. This one keeps nothing, and has nothing to say to any of it.

    A guest comes with `inherited` or `fresh_guest`, before its first ring runs.
    """

    def inherited(self, unflushed_on: int, loss_untold: bool) -> None:
        """A guest comes that has run with another process, perhaps, and gets what that one
        remembered (see `BlkDevice.remember_durability`)."""

    def fresh_guest(self) -> None:
        """One comes that has not."""

    def starting(self, go: Callable[[], None]) -> bool:
        """A ring starts: False, if it has to wait until `go` is called."""
        return True

    def recovered(self) -> None:
        """Requests that another process began are about to be executed again."""

    def abandoned(self, requests: Sequence[Request]) -> None:
        """These were abandoned (`Request.abandon`), right now."""

    async def all_stopped(self) -> None:
        """Awaited before the last ring's stop is answered: whoever opens the image next must find
        everything there. Raises LeftBehind if that failed; cancelled when it takes too long."""

    async def left_behind(self) -> LeftBehind | None:
        """It failed, or took too long: see to it that nothing more of the guest's is sent. Returns
        what is left here, None if nothing is."""
        return None

    def epoch(self) -> int:
        """See `lanes.Job`."""
        return one_epoch()
