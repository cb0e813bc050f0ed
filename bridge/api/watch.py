"""Polled from time to time: slow requests, and the rate of write-out.

While requests come, or something is dirty, this looks every half a second at what is in flight.
Otherwise it waits for requests to come, and costs nothing.

**Slow requests.** A request that was in flight at two looks which are `slow_s` apart is logged,
with what it waits for, and again when it has ended. It costs nothing per request. While there is no
server, or nothing may be sent to it, the log says that instead of each request. Not more than
`_LINES_MAX` requests are logged per `_LINES_PER_S`; the rest is counted in the next line.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice
from typing import Any, Final

import structlog
import trio

from bridge.api.live import EndObserver, Live
from bridge.api.sampler import Sampler
from bridge.datapath.request import OP_NAMES, Request
from bridge.server.link import Phase

_log = structlog.get_logger(__name__)

_LOOK_S: Final = 0.5
_OLDEST: Final = 1024
"""So many of the requests in flight are looked at: what is slow is among the oldest."""
_LINES_MAX: Final = 5
_LINES_PER_S: Final = 60.0
_RATE_WINDOW_S: Final = 10.0


class Watch:
    """See the module's text."""

    def __init__(self, live: Live, sampler: Sampler, *, slow_s: float) -> None:
        self._live = live
        self._sampler = sampler
        self.slow_s = slow_s
        """May be changed; 0: no request is slow."""
        self.slow_total = 0
        self.last_clean_s = live.now()
        """When nothing was dirty, as far as was seen."""
        self._seen: dict[Request, float] = {}
        """The oldest requests in flight, and when each was seen first."""
        self._lines: deque[float] = deque(maxlen=_LINES_MAX)
        self._unsaid = 0
        self._written: deque[tuple[float, int]] = deque()
        """(time, bytes written out until then), over the last seconds."""

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await self._sampler.activity()
            before = -1
            while True:
                now = self._live.now()
                self.look(now)
                total = self._live.requests_total
                if total == before and not self._live.in_flight and not self._live.dirty_bytes:
                    break
                before = total
                await trio.sleep(_LOOK_S)
            self._written.clear()
            await trio.sleep(_LOOK_S)

    def look(self, now: float) -> None:
        """Look once; `now` is on the clock of `live`."""
        self._note_written(now)
        if not self._live.dirty_bytes:
            self.last_clean_s = now
        seen = self._seen
        self._seen = {
            request: seen.get(request, now)
            for request in islice(self._live.unanswered(), _OLDEST)
            if not isinstance(request.done, _Ending) and self._live.is_as_it_came(request)
        }
        if not self.slow_s:
            return
        slow = [each for each, since_s in self._seen.items() if now - since_s >= self.slow_s]
        for request in slow:
            since_s = self._seen.pop(request)
            self.slow_total += 1
            self._report(request, since_s, now)

    @property
    def write_out_rate(self) -> float | None:
        """Bytes per second written out lately; None: nothing was seen yet."""
        if len(self._written) < 2:
            return None
        (first_s, first), (last_s, last) = self._written[0], self._written[-1]
        return (last - first) / (last_s - first_s) if last_s > first_s else None

    def _note_written(self, now: float) -> None:
        cache = self._live.cache
        if cache is None:
            return
        self._written.append((now, cache.stats.writeback_bytes))
        while self._written[0][0] < now - _RATE_WINDOW_S:
            self._written.popleft()

    def _report(self, request: Request, since_s: float, now: float) -> None:
        silent = self._live.phase is not Phase.UP or bool(self._live.left_reason)
        said = not silent and self._may_say(now)
        where = self.where(request)
        request.done = _Ending(request.done, self._ended if said else _unsaid, since_s)
        if not said:
            self._unsaid += not silent
            return
        more = {"more_unsaid": self._unsaid} if self._unsaid else {}
        self._unsaid = 0
        _log.warning(
            "slow request",
            op=OP_NAMES[request.op],
            offset=request.offset,
            length=request.length,
            seconds=round(now - since_s, 1),
            waits_for=where,
            **more,
        )

    def _may_say(self, now: float) -> bool:
        lines = self._lines
        if len(lines) == _LINES_MAX and now - lines[0] < _LINES_PER_S:
            return False
        lines.append(now)
        return True

    def _ended(self, request: Request, since_s: float) -> None:
        _log.info(
            "slow request ended",
            op=OP_NAMES[request.op],
            offset=request.offset,
            length=request.length,
            seconds=round(self._live.now() - since_s, 1),
            error=request.error,
        )

    def where(self, request: Request) -> str:
        """What `request`, which is in flight, waits for, as far as can be told."""
        live = self._live
        if live.left_reason:
            return f"nothing is sent: {live.left_reason}"
        if live.phase is not Phase.UP:
            return "a connection to the server"
        if live.is_at_server(request):
            return "the server's answer"
        cache = live.cache
        waiting = {} if cache is None else {why: n for why, n in cache.waiting.items() if n}
        if live.waits_for_grace:
            return "the end of the grace time after a lost connection"
        if waiting:
            return "the cache: " + ", ".join(f"{why} {count}" for why, count in waiting.items())
        if not live.commands_in_flight:
            return "its turn"
        return "the server's answer" + ("" if cache is not None else " to others")


def _unsaid(request: Request, since_s: float) -> None:
    """The end of a slow request that was only counted."""


class _Ending(EndObserver):
    """The `done` of a request that was reported as slow."""

    __slots__ = ("_ended", "_since_s")

    def __init__(
        self,
        done: Callable[[Any], None],
        ended: Callable[[Request, float], None],
        since_s: float,
    ) -> None:
        super().__init__(done)
        self._ended = ended
        self._since_s = since_s

    def __call__(self, request: Request) -> None:
        self._ended(request, self._since_s)
        request.done = self.then
        self.then(request)
