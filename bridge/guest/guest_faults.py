"""What a guest does wrong, counted by kind, and said without filling the log."""

from __future__ import annotations

from collections import Counter

import structlog

_log = structlog.get_logger(__name__)


class GuestFaults:
    """The faults of one guest."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def ring_broken(self, index: int, reason: str) -> None:
        self.counts["a broken ring"] += 1
        count = self.counts["a broken ring"]
        if not count & (count - 1):
            # A guest can reset its disk and break it again without end: said at 1, 2, 4, 8 …
            _log.error("a ring broke, it is stopped", ring=index, reason=reason, count=count)

    def bad_request(self, problem: str) -> None:
        """Count what a guest does wrong; say it once per kind, however often it happens."""
        kind = problem.partition(":")[0]
        self.counts[kind] += 1
        if self.counts[kind] == 1:
            _log.warning("the guest sent a bad request (said once, counted)", what=problem)
