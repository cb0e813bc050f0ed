"""Who may write where: overlapping changes one after the other, in the order they came."""

from __future__ import annotations


class Claim:
    """One byte range that somebody changes, or waits to change."""

    __slots__ = ("active", "start", "stop")

    def __init__(self, start: int, stop: int) -> None:
        self.start = start
        self.stop = stop
        self.active = False

    def go(self) -> None:
        """The claim has become active. Here: it only keeps others out."""


class Ranges:
    """Claims in the order they came; a claim is active once no earlier one overlaps it.

    A list, searched from end to end: as many entries as requests in flight, and only in use where
    order matters (several connections, read-modify-write, the time after a reconnect).
    """

    __slots__ = ("_claims",)

    def __init__(self) -> None:
        self._claims: list[Claim] = []

    def __len__(self) -> int:
        return len(self._claims)

    @property
    def waiting(self) -> list[Claim]:
        """The claims that are not active yet, in order."""
        return [claim for claim in self._claims if not claim.active]

    def enter(self, claim: Claim) -> None:
        """Call `claim.go` as soon as no earlier claim overlaps it, possibly now."""
        start = claim.start
        stop = claim.stop
        free = True
        for other in self._claims:
            if other.start < stop and start < other.stop:
                free = False
                break
        self._claims.append(claim)
        if free:
            claim.active = True
            claim.go()

    def block(self, start: int, stop: int) -> Claim:
        """Keep all others out of a range that are not in it already."""
        claim = Claim(start, stop)
        claim.active = True
        # In front: it must also stop those that wait.
        self._claims.insert(0, claim)
        return claim

    def release(self, claim: Claim) -> None:
        """The change is done: the next ones that it kept waiting may go."""
        self._claims.remove(claim)
        released: list[Claim] = []
        for index, waiting in enumerate(self._claims):
            if waiting.active or waiting.start >= claim.stop or claim.start >= waiting.stop:
                continue
            if not self._blocked(waiting, index):
                waiting.active = True
                released.append(waiting)
        for waiting in released:
            waiting.go()

    def _blocked(self, waiting: Claim, index: int) -> bool:
        for other in self._claims[:index]:
            if other.start < waiting.stop and waiting.start < other.stop:
                return True
        return False


def merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The same bytes as `ranges` (start, stop) in as few as possible, in the disk's order."""
    found: list[tuple[int, int]] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found
