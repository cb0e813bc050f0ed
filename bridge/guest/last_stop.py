"""What is promised when the last ring of a device has stopped.

Then the guest may go on elsewhere. So everything that it wrote is brought to the server and flushed
first (`Above.all_stopped`). If that does not succeed within the limit, the storage side sends
nothing more of the guest's (`Above.left_behind`), and when something is left here that the next
host would miss, the stop is not answered with success: it raises LeftBehind, and the session
refuses the message, or hangs up. What was left in an in-flight region counts as missing while the
dirty log is on: such a region does not migrate, and neither does a loss that the guest has not been
told of.
"""

from __future__ import annotations

import structlog
import trio

from bridge.errors import LeftBehind
from bridge.guest.above import Above
from bridge.guest.drain import Drain
from bridge.guest.remembered import Remembered

_log = structlog.get_logger(__name__)


class LastStop:
    """The promise of one device, whenever its last ring stops."""

    def __init__(self, above: Above, drain: Drain, remembered: Remembered) -> None:
        self._above = above
        self._drain = drain
        self._remembered = remembered

    async def bring_up_to_date(self, deadline_s: float) -> tuple[LeftBehind | None, bool]:
        """Have everything that the guest wrote brought to the server; why that failed, or whether
        it took too long."""
        failure: LeftBehind | None = None

        async def bring() -> None:
            nonlocal failure
            try:
                await self._above.all_stopped()
            except LeftBehind as error:
                failure = error

        in_time = await self._drain.last(bring, deadline_s)
        return failure, not in_time

    async def promise(self, failure: LeftBehind | None, *, is_late: bool, migrates: bool) -> None:
        """No ring runs, and the front-end is about to be told so: raises LeftBehind if
        that would promise too much. `migrates`: the dirty log is on."""
        left_here = None
        if failure or is_late:
            with trio.CancelScope(shield=True):
                left_here = await self._above.left_behind()
        if (left_behind := left_here or failure) is not None:
            raise _logged(left_behind)
        in_region = self._remembered.left_requests
        if migrates and (is_late or in_region):
            what = f"{in_region} requests" if in_region else "the last flush"
            raise _logged(
                LeftBehind(
                    f"the server has not answered {what} in time, and the guest migrates: it "
                    "cannot before that is answered; let it go on here and migrate it later"
                )
            )
        if migrates and self._remembered.loss_unreported:
            raise _logged(
                LeftBehind(
                    "the server may have lost writes of the guest's, which its next flush has to "
                    "tell it, and only here: let the guest go on here and migrate it later"
                )
            )
        if in_region:
            _log.warning(
                "requests are left in the in-flight region until the guest goes on",
                requests=in_region,
            )
        if is_late:
            _log.error(
                "the server has not answered the last flush in time: what the guest wrote since "
                "the flush before may not be durable yet"
            )


def _logged(error: LeftBehind) -> LeftBehind:
    _log.error(error)
    return error
