"""Times without a server: counted, and reported to the operator.

An outage begins when a connection is lost and ends when there are new ones. While it lasts the
operator is reminded once a minute, not at every attempt.
"""

from __future__ import annotations

from typing import Final

import structlog

_log = structlog.get_logger(__name__)

_REMIND_S: Final = 60.0


class Outages:
    """Of one client. `now` is in seconds of any monotonic clock."""

    def __init__(self, server: str) -> None:
        """`server`: as the operator knows it."""
        self._server = server
        self._began_s: float | None = None
        self._reminded_s = 0.0
        self._ended_total_s = 0.0
        self._unanswered = 0
        self.total = 0
        """How many there were, the present one included."""
        self.reason = ""
        """Why the last attempt to connect failed; "" while there is a connection. Not the error:
        its traceback has the requests of the reply that broke a rule, and so the guest's memory."""

    def seconds(self, now: float) -> float:
        """How long the present one has lasted; 0.0: there is none."""
        return 0.0 if self._began_s is None else now - self._began_s

    def seconds_total(self, now: float) -> float:
        """All of them together."""
        return self._ended_total_s + self.seconds(now)

    def begin(self, now: float, reason: Exception) -> None:
        """A connection was lost."""
        self.reason = _text(reason)
        if self._began_s is not None:
            return
        self._began_s = self._reminded_s = now
        self._unanswered = 0
        self.total += 1
        _log.warning("connection lost", server=self._server, reason=reason)

    def lost(self, unanswered: int) -> None:
        """All connections are closed, and so many commands have no answer."""
        self._unanswered += unanswered

    def failed(self, reason: Exception) -> bool:
        """An attempt to connect failed; True if for another reason than the last one."""
        before, self.reason = self.reason, _text(reason)
        return self.reason != before

    def remind(self, now: float) -> None:
        """Time has passed."""
        if self._began_s is None or now - self._reminded_s < _REMIND_S:
            return
        self._reminded_s = now
        _log.warning(
            "still without a server",
            server=self._server,
            seconds=round(now - self._began_s),
            unanswered=self._unanswered,
            reason=self.reason,
        )

    def end(self, now: float, generation: int) -> None:
        """There are connections again."""
        seconds = self.seconds(now)
        self._ended_total_s += seconds
        self._began_s = None
        self.reason = ""
        _log.info(
            "reconnected",
            server=self._server,
            generation=generation,
            after_s=round(seconds, 1),
            sent_again=self._unanswered,
        )


def _text(reason: Exception) -> str:
    return str(reason) or repr(reason)
