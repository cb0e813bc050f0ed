"""A guest turns its write cache off: what it wrote before is made durable without its asking."""

from __future__ import annotations

import structlog

from bridge.datapath.request import FLUSH, INTERNAL, Request, Target
from bridge.datapath.turn import Turn

_log = structlog.get_logger(__name__)


class WriteCacheFlush:
    """The flush when the write cache is turned off."""

    def __init__(self, target: Target, turn: Turn) -> None:
        self._target = target
        self._turn = turn
        self._count = 0
        """In flight, and one more to come."""

    def flush_what_was_written(self) -> None:
        """One at a time: a guest may turn its write cache off as often as it likes."""
        if self._count:
            self._count = 2  # Once more, for what was written since.
            return
        self._count = 1
        self._target.submit(Request(FLUSH, 0, 0, [], self._written_flushed, INTERNAL))
        self._turn.want()

    def _written_flushed(self, flush: Request) -> None:
        again = self._count > 1
        self._count = 0
        if flush.error:
            _log.error("what was written before the write cache was turned off may not be durable")
        if again:
            self.flush_what_was_written()
