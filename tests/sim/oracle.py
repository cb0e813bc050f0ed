"""Every legal content of every sector, for the guest and for the server's image.

Each change has a number, which its sectors hold, and an interval: from its submission to its
answer. What a read may return is that of a regular register: a change that began before the read
ended, unless another one was complete before the read began and had itself begun after that one's
end. What the server may be left with after a flush is the same, as if the flush were the read:
nothing older than what was complete when the flush was submitted.

Without a cache the server may lose what no flush covers. The guest may see that at once
(`visible`), but its next flush has to fail before another may succeed (`promised`).
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf

from tests.sim.medium import SECTOR, Medium, numbers_of, sector_bytes


class Violation(AssertionError):
    """The bridge broke a promise."""


class Change:
    """A write, a discard or a write of zeroes by the guest, or by another host."""

    __slots__ = (
        *("anything", "began", "done", "durable", "ended", "first_number", "kept", "known"),
        *("lost", "number", "promised", "torn", "visible"),
    )

    def __init__(self, number: int, began: int, *, zeroes: bool, anything: bool) -> None:
        self.first_number = number
        self.number = 0 if zeroes else number
        self.began = began
        self.ended: float = inf
        self.done = False
        self.known: float = 0
        """Another host's: the guest's bridge had no connection then, and has had one only since
        that moment. A read that was asked for before may be of what the cache had."""
        self.anything = anything
        """A discard: any content is right until something else is written."""
        self.torn = False
        """It was given up, or interrupted by a kill, amid a sector perhaps: the sectors may hold
        parts of it, in the latter case until it was executed again."""
        self.kept = True
        """The server has not lost it."""
        self.lost: float = inf
        """When it did."""
        self.visible = True
        self.promised = True
        self.durable = False
        """A flush, or its own answer, said so."""

    def __repr__(self) -> str:
        kind = "discard" if self.anything else "zeroes" if not self.number else "write"
        end = "" if self.ended == inf else f"…{self.ended:.0f}"
        marks = "".join(
            mark
            for mark, yes in (
                *((" done", self.done), (" lost", not self.visible)),
                *((" told", not self.promised), (" durable", self.durable)),
            )
            if yes
        )
        return f"<{kind} {self.first_number} {self.began}{end}{marks}>"


class Oracle:
    """The guest's disk. Moments are counted, not timed: every event is one."""

    def __init__(self, medium: Medium, *, has_cache: bool) -> None:
        self._medium = medium
        self._has_cache = has_cache
        self.moment = 0
        self.numbers = 0
        first = Change(0, 0, zeroes=True, anything=False)
        first.ended, first.done, first.durable = 0, True, True
        self.sectors: list[list[Change]] = [[first] for _ in medium.numbers]
        self.checked = 0
        """Sectors that were judged."""

    def now(self) -> int:
        """Another moment."""
        self.moment += 1
        return self.moment

    # The guest.

    def begin(
        self, first: int, count: int, *, zeroes: bool = False, anything: bool = False
    ) -> Change:
        """A change of these sectors is submitted."""
        self.numbers += 1
        change = Change(self.numbers, self.now(), zeroes=zeroes, anything=anything)
        for at in range(first, first + count):
            self.sectors[at].append(change)
        return change

    def end(self, change: Change, *, done: bool) -> None:
        """It was answered. If it failed, it may have been done or not."""
        change.ended = self.now()
        change.done = done

    def allowed(self, at: int, since: float, mark: str = "visible") -> set[int] | None:
        """What sector `at` may hold for a read since `since` that ends now. None: anything."""
        changes = self.sectors[at]
        is_read = mark == "visible"
        bound = -1
        for each in changes:
            if each.done and each.ended < since and each.began > bound and getattr(each, mark):
                if is_read and each.known >= since:
                    continue
                bound = each.began
        found = set()
        for each in changes:
            if each.ended >= bound:
                if each.anything:
                    return None
                found.add(each.number)
                if each.torn and (not each.done or each.ended >= since):
                    found.add(-1)
        return found

    def judge_read(self, first: int, data: bytes | memoryview, since: int) -> None:
        """The guest has read `data`, since the moment at which it asked."""
        for at, number in enumerate(numbers_of(data), first):
            self.checked += 1
            allowed = self.allowed(at, since)
            if allowed is None:
                continue
            if number not in allowed:
                raise Violation(
                    f"sector {at}: the guest reads {_name(number)}, may be {sorted(allowed)}; "
                    f"{self.sectors[at][-6:]}"
                )
            start = (at - first) * SECTOR
            if number < 0 and not self._is_mix(at, data[start : start + SECTOR], allowed):
                raise Violation(
                    f"sector {at}: the guest reads what is not of {sorted(allowed)} alone; "
                    f"{self.sectors[at][-6:]}"
                )

    def _is_mix(self, at: int, sector: bytes | memoryview, allowed: set[int]) -> bool:
        """Each byte of a torn sector is one that it may have; or the server has what is torn."""
        if sector == sector_bytes(-1):
            return True
        if all(each.number >= 0 for each in self.sectors[at]):
            allowed = allowed - {-1}
        contents = [sector_bytes(number) for number in allowed]
        return all(any(each[k] == byte for each in contents) for k, byte in enumerate(sector))

    def flushed(self, since: int) -> None:
        """A flush submitted at `since` has succeeded."""
        for at, changes in enumerate(self.sectors):
            if len(changes) > 1:
                self.judge_image(at, since, "promised", "a flush has succeeded")
        for changes in self.sectors:
            for each in changes:
                if each.done and each.ended < since and each.promised:
                    each.durable = True

    def flush_failed(self) -> None:
        """The guest was told that something may be lost."""
        if self._has_cache:
            return
        now = self.now()
        for changes in self.sectors:
            for each in changes:
                if each.done and not each.durable and each.ended <= now:
                    each.promised = False

    def durable_at_once(self, change: Change, first: int, count: int) -> None:
        """A change was answered whose answer means that it is durable."""
        since = self.now()
        for at in range(first, first + count):
            self.judge_image(at, since, "promised", "a durable write was answered")
        change.durable = True

    def judge_image(self, at: int, since: float, mark: str, when: str) -> None:
        """Whatever the server may be left with of sector `at` is right."""
        self.checked += 1
        allowed = self.allowed(at, since, mark)
        if allowed is None:
            return
        for number in self._medium.possible(at):
            if number not in allowed:
                raise Violation(
                    f"sector {at}: {when}, and the server may be left with {_name(number)}, "
                    f"not {sorted(allowed)}; {self.sectors[at][-6:]}"
                )

    def judge_whole_image(self, when: str, mark: str = "promised") -> None:
        """The same for every sector."""
        since = self.now()
        for at, changes in enumerate(self.sectors):
            if len(changes) > 1:
                self.judge_image(at, since, mark, when)

    # What happens to the guest and the server.

    def server_lost(self, at: int, numbers: Iterable[int]) -> None:
        """The server no longer has these changes of sector `at`.

        Nor others, where there is a cache: of changes in flight at a time the server gets the last
        one's data only, which answers all of them."""
        gone = set(numbers)
        lost = [each for each in self.sectors[at] if each.number in gone and not each.durable]
        for each in self.sectors[at] if self._has_cache else ():
            if any(each.began < other.ended and other.began < each.ended for other in lost):
                each.kept = each.durable
        for each in lost:
            each.kept = False
            each.lost = self.now()
            each.visible = self._has_cache

    def loss_unnoticed(self, since: float = 0) -> None:
        """What was lost `since` then, no process could have noticed, or none that could say so."""
        for changes in self.sectors:
            for each in changes:
                if not each.visible and each.lost > since:
                    each.promised = False

    def operator_told(self) -> None:
        """A bridge without a cache has ended, and said with its exit status and its last words that
        what the guest wrote since its last flush may not be durable."""
        for each in (each for changes in self.sectors for each in changes):
            if not each.durable and each.ended != inf:
                each.promised = False

    def interrupted(self, changes: Iterable[Change]) -> None:
        """The bridge was killed while it copied a sector of one of these. Those without an answer
        are executed again (docs/durability.md, "What cannot be promised")."""
        for each in changes:
            each.torn = each.torn or each.ended == inf

    def guest_forgets(self, changes: Iterable[Change]) -> None:
        """The guest was reset: what it had in flight is over, done or not."""
        now = self.now()
        for each in changes:
            if each.ended == inf:
                each.ended = now
                each.torn = True
        if not self._has_cache:
            for each in (each for changes in self.sectors for each in changes):
                if not each.durable:
                    each.promised = False

    def host_lost(self, may_come: Iterable[tuple[int, int]], *, written_through: bool) -> None:
        """The host lost power: a new guest finds what the server has. `may_come`: sector and number
        of what is under way to the server's disk still. `written_through`: what was complete had
        been acknowledged by the server."""
        when = "the host has lost power"
        since = self.now()
        coming: dict[int, set[int]] = {}
        for at, number in may_come:
            coming.setdefault(at, set()).add(number)
        for at, changes in enumerate(self.sectors):
            if len(changes) > 1:
                self.judge_image(at, since, "durable", when)
                if written_through:
                    allowed = self.allowed(at, since, "kept")
                    if allowed is not None and self._medium.numbers[at] not in allowed:
                        raise Violation(
                            f"sector {at}: {when}, and the server has "
                            f"{_name(self._medium.numbers[at])}, not {sorted(allowed)}"
                        )
        for at in range(len(self.sectors)):
            self.sectors[at] = []
            for number in {*self._medium.possible(at), *coming.get(at, ())}:
                change = Change(number, since, zeroes=not number, anything=False)
                change.ended, change.done = since, True
                self.sectors[at].append(change)

    def grow(self, numbers: list[int]) -> None:
        """The disk has more sectors, with these contents."""
        for number in numbers:
            change = Change(number, 0, zeroes=not number, anything=False)
            change.ended, change.done, change.durable = 0, True, True
            self.sectors.append([change])


def _name(number: int) -> str:
    return "something that nobody wrote" if number < 0 else f"the write {number}"
