"""Ranges that new changes are kept out of for a grace time.

A write of a dead connection may still be executed there by the server; a newer write that was
executed before it would be lost.
"""

from __future__ import annotations

from math import inf
from typing import Final

from bridge.server.overlaps import Overlaps, Span, merged

_SPANS_MAX: Final = 1024
"""As many as a full ring of small writes can leave behind; with more than that all of the disk is
held, until the last of them may be let go."""
WHOLE_DISK: Final = (0, 1 << 64)
"""Past the end of any disk, also of one that grows."""


class GraceSpans:
    """Spans with the times at which they are let go; `ranges` keeps the changes out of them.

    A span without a time waits for one: commands that were failed while there was no connection may
    be executed later, too, and their time begins with the next connection.
    """

    def __init__(self, overlaps: Overlaps) -> None:
        self._overlaps = overlaps
        self._spans: list[tuple[float, Span]] = []
        """By time; infinite: none yet."""

    def __bool__(self) -> bool:
        return bool(self._spans)

    @property
    def deadline_s(self) -> float | None:
        """When `expire` has something to do."""
        if not self._spans or self._spans[0][0] == inf:
            return None
        return self._spans[0][0]

    def hold(self, spans: list[Span], until_s: float = inf) -> None:
        """Keep changes out of `spans`, also those that wait; those under way go on."""
        found = sorted([*self._spans, *((until_s, span) for span in merged(spans))])
        if len(found) > _SPANS_MAX:
            found = [(found[-1][0], WHOLE_DISK)]
        self._keep(found)

    def begin(self, until_s: float) -> None:
        """Ranges without a time yet are let go at `until_s`."""
        self._spans = sorted((min(each, until_s), span) for each, span in self._spans)

    def expire(self, now: float) -> None:
        """Let go of ranges that were held long enough."""
        if self._spans and self._spans[0][0] <= now:
            self._keep([item for item in self._spans if item[0] > now])

    def _keep(self, spans: list[tuple[float, Span]]) -> None:
        self._spans = spans
        self._overlaps.hold(merged([span for _, span in spans]))
