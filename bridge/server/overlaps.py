"""Which change may go where: overlapping ones run one after the other, in the order they came.

Theory. The claims cut the disk into pieces, and each piece belongs to the claim that came last
there. A new claim waits for the owners of the pieces that it covers, and owns them from then on:
those owners already wait for the owners before them. So each claim waits for few others,
however many overlap, and what entering and releasing cost grows with the logarithm of the claims
(a guest may have 65,536 requests in flight).

Claims that wait for no other are disjoint. They become active, unless they touch a span that is
held; then they are parked until it is not. Those that became active are put on a list, `gone`,
which the owner of the ranges works off at its own pace: no number of claims makes the stack grow.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque

from sortedcontainers import SortedDict

Span = tuple[int, int]
"""Start and stop of some bytes of the disk."""


class Claim:
    """One byte range that a request changes, or waits to change."""

    __slots__ = ("active", "blockers", "followers", "key", "pieces", "start", "stop", "taken")

    def __init__(self, start: int, stop: int) -> None:
        assert start < stop
        self.start = start
        self.stop = stop
        self.key = 0
        """In `listed.Listed`."""
        self.active = False
        self.taken = False
        """It must no longer go; it only keeps its place until those before it are done."""
        self.blockers = 0
        """How many pieces it waits for."""
        self.followers: list[Claim] | None = None
        """Those that wait for it, once for each piece."""
        self.pieces = {start}
        """Where the pieces that it owns start, once it is among the claims."""


class Overlaps:
    """Claims in the order they came; a claim is active once no earlier one overlaps it, and its
    range is not held. See the module's text."""

    __slots__ = ("_held_starts", "_held_stops", "_parked", "_pieces", "_ready", "_wait", "gone")

    def __init__(self) -> None:
        self.gone: deque[Claim] = deque()
        """Claims that have become active since they had to wait; their owner takes them out."""
        self._pieces: SortedDict[int, tuple[int, Claim]] = SortedDict()
        """Start → stop, owner."""
        self._wait: dict[Claim, None] = {}
        """The claims that are not active yet, in order."""
        self._parked: dict[Claim, None] = {}
        """Those of them that wait for held spans only."""
        self._ready: deque[Claim] = deque()
        self._held_starts: list[int] = []
        self._held_stops: list[int] = []

    @property
    def is_empty(self) -> bool:
        """There is no claim."""
        return not self._pieces  # One that waits has some, or a later one has taken them over.

    @property
    def waiting(self) -> list[Claim]:
        """The claims that are not active yet, in order."""
        return list(self._wait)

    @property
    def waiting_count(self) -> int:
        """How many claims are not active yet."""
        return len(self._wait)

    def enter(self, claim: Claim) -> bool:
        """True if the claim is active; else it will be among `gone` when no earlier one overlaps
        it any more."""
        start = claim.start
        stop = claim.stop
        pieces = self._pieces
        n_covered = 0
        # Disjoint and sorted: what overlaps stands right before the first that starts at `stop`.
        index = pieces.bisect_left(stop)
        while index:
            index -= 1
            at, (end, owner) = pieces.peekitem(index)
            if end <= start:
                break
            n_covered += 1
            del pieces[at]
            owner.pieces.discard(at)
            if owner.followers is None:
                owner.followers = []
            owner.followers.append(claim)
            if at < start:
                pieces[at] = (start, owner)
                owner.pieces.add(at)
            if end > stop:
                pieces[stop] = (end, owner)
                owner.pieces.add(stop)
            if at <= start:
                break
        pieces[start] = (stop, claim)
        claim.blockers = n_covered
        if not n_covered and not (self._held_stops and self._is_held(claim)):
            claim.active = True
            return True
        self._wait[claim] = None
        if not n_covered:
            self._parked[claim] = None
        return False

    def release(self, claim: Claim) -> None:
        """The change is done: the next ones that it kept waiting may go."""
        self._remove(claim)
        if self._ready:
            self._run()

    def withdraw(self, claim: Claim) -> None:
        """The change is over, whether its claim has gone, still waits or was taken."""
        if claim.active:
            self.release(claim)
            return
        if claim.taken:
            return
        claim.taken = True
        del self._wait[claim]
        if claim in self._parked:
            del self._parked[claim]
            self._ready.append(claim)
            self._run()

    def hold(self, spans: list[Span]) -> None:
        """Keep changes out of `spans`, and of no others from now on; those under way go on.

        The spans are sorted, with gaps between them (see `merged`).
        """
        self._held_starts = [start for start, _ in spans]
        self._held_stops = [stop for _, stop in spans]
        parked, self._parked = self._parked, {}
        self._ready += parked
        self._run()

    def take_waiting(self) -> list[Claim]:
        """Every claim that is not active yet, in order. They will not go, nor need a release."""
        taken = list(self._wait)
        self._wait.clear()
        for claim in taken:
            claim.taken = True
        parked, self._parked = self._parked, {}
        self._ready += parked
        self._run()
        return taken

    def _remove(self, claim: Claim) -> None:
        pieces = self._pieces
        for at in claim.pieces:
            del pieces[at]
        if claim.followers is None:
            return
        for follower in claim.followers:
            follower.blockers -= 1
            if not follower.blockers:
                self._ready.append(follower)
        claim.followers = None  # Else the first of a long chain would keep all of it.

    def _run(self) -> None:
        """Let go what may."""
        ready = self._ready
        while ready:
            claim = ready.popleft()
            if claim.taken:
                self._remove(claim)
            elif self._is_held(claim):
                self._parked[claim] = None
            else:
                del self._wait[claim]
                claim.active = True
                self.gone.append(claim)

    def _is_held(self, claim: Claim) -> bool:
        index = bisect_right(self._held_stops, claim.start)
        return index < len(self._held_starts) and self._held_starts[index] < claim.stop


def merged(ranges: list[Span]) -> list[Span]:
    """The same bytes as `ranges` (start, stop) in as few as possible, in the disk's order."""
    found: list[Span] = []
    for start, stop in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], stop))
        else:
            found.append((start, stop))
    return found
