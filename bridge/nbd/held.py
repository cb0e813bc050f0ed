"""What new changes are kept out of for a time: where the server may still do something old."""

from __future__ import annotations

from math import inf
from typing import Final

from bridge.nbd.ranges import Claim, Ranges, merged

Span = tuple[int, int]
"""Start and stop of some bytes of the disk."""

_SPANS_MAX: Final = 1024
"""Each is compared with every new change. As many as a full ring of small writes can leave behind;
with more than that all of the disk is held."""
WHOLE_DISK: Final = (0, 1 << 64)
"""Past the end of any disk, also of one that grows."""


class Held:
    """Spans with the times at which they are let go; claims in `ranges` keep the changes out.

    A span without a time waits for one: what was failed while there was no connection is left
    behind, too, and its time begins with the next connection.
    """

    def __init__(self, ranges: Ranges) -> None:
        self._ranges = ranges
        self._claims: list[tuple[float, Claim]] = []
        """By time; infinite: none yet."""

    def __bool__(self) -> bool:
        return bool(self._claims)

    @property
    def deadline_s(self) -> float | None:
        """When `expire` has something to do."""
        if not self._claims or self._claims[0][0] == inf:
            return None
        return self._claims[0][0]

    def hold(self, spans: list[Span], until_s: float = inf) -> None:
        """Keep changes out of `spans`, also those that wait; those under way go on."""
        claims = self._claims
        claims += [(until_s, self._ranges.block(*span)) for span in merged(spans)]
        claims.sort(key=_until_s)
        if len(claims) > _SPANS_MAX:
            self._claims = [(claims[-1][0], self._ranges.block(*WHOLE_DISK))]
            self._release(claims)

    def begin(self, until_s: float) -> None:
        """What had no time yet is let go at `until_s`."""
        self._claims = [(min(each, until_s), claim) for each, claim in self._claims]

    def expire(self, now: float) -> None:
        """Let go of what has been held long enough."""
        over = [item for item in self._claims if item[0] <= now]
        self._claims = [item for item in self._claims if item[0] > now]
        self._release(over)

    def let_go(self) -> list[tuple[float, Span]]:
        """Let go of everything, and say what it was, for `hold_again`."""
        claims, self._claims = self._claims, []
        self._release(claims)
        return [(until_s, (claim.start, claim.stop)) for until_s, claim in claims]

    def hold_again(self, let_go: list[tuple[float, Span]]) -> None:
        """Hold what `let_go` gave."""
        for until_s, span in let_go:
            self.hold([span], until_s)

    def _release(self, claims: list[tuple[float, Claim]]) -> None:
        for _, claim in claims:
            self._ranges.release(claim)


def _until_s(item: tuple[float, Claim]) -> float:
    return item[0]
