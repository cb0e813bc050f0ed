"""Overlapping changes one after the other: against a model, and with very many of them."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bridge.server.grace import WHOLE_DISK, GraceSpans
from bridge.server.overlaps import Claim, Overlaps, Span, merged

MANY = 64 * 1024
"""What 64 queues of 1024 can have in flight."""


class Change(Claim):
    """A change that notes when it goes, and is over at once if told to."""

    __slots__ = ("log", "name", "over_at_once")

    def __init__(
        self, log: list[int], name: int, span: Span, *, over_at_once: bool = False
    ) -> None:
        super().__init__(*span)
        self.log = log
        self.name = name
        self.over_at_once = over_at_once


def enter(overlaps: Overlaps, change: Change) -> None:
    if overlaps.enter(change):
        begin(overlaps, change)
    go_on(overlaps)


def release(overlaps: Overlaps, claim: Claim) -> None:
    overlaps.release(claim)
    go_on(overlaps)


def go_on(overlaps: Overlaps) -> None:
    """What the owner of the ranges does: begin the changes that may go."""
    while overlaps.gone:
        change = overlaps.gone.popleft()
        assert isinstance(change, Change)
        begin(overlaps, change)


def begin(overlaps: Overlaps, change: Change) -> None:
    assert change.active
    change.log.append(change.name)
    if change.over_at_once:
        overlaps.release(change)


class Model:
    """The rule itself: a claim goes once no earlier one and no held span overlaps it. One that was
    taken does not go, but keeps its place until no earlier one overlaps it."""

    def __init__(self) -> None:
        self.claims: list[tuple[int, Span]] = []
        self.active: set[int] = set()
        self.taken: set[int] = set()
        self.held: list[Span] = []

    def step(self) -> set[int]:
        """Those that go now."""
        left: list[tuple[int, Span]] = []
        for name, span in self.claims:
            if name not in self.taken or any(_overlap(span, other) for _, other in left):
                left.append((name, span))
        self.claims = left
        new = set()
        for index, (name, span) in enumerate(self.claims):
            before = [each for _, each in self.claims[:index]] + self.held
            waits = name not in self.active and name not in self.taken
            if waits and not any(_overlap(span, other) for other in before):
                new.add(name)
        self.active |= new
        return new

    @property
    def waiting(self) -> list[int]:
        """Those that have not gone, in order."""
        names = [name for name, _ in self.claims]
        return [name for name in names if name not in self.active and name not in self.taken]


def _overlap(one: Span, other: Span) -> bool:
    return one[0] < other[1] and other[0] < one[1]


spans = st.tuples(st.integers(0, 20), st.integers(1, 6)).map(lambda pair: (pair[0], sum(pair)))
steps = st.lists(
    st.one_of(
        st.tuples(st.just("enter"), spans),
        st.tuples(st.just("release"), st.integers(0, 30)),
        st.tuples(st.just("hold"), st.lists(spans, max_size=3)),
        st.tuples(st.just("take"), st.none()),
    ),
    max_size=60,
)


@given(steps)
@example([("enter", (1, 2)), ("enter", (0, 2)), ("take", None), ("enter", (0, 1))])
def test_ranges_do_what_the_rule_says(given_steps) -> None:
    overlaps, model = Overlaps(), Model()
    log: list[int] = []
    changes: dict[int, Change] = {}
    for number, (what, value) in enumerate(given_steps):
        log.clear()
        if what == "enter":
            changes[number] = Change(log, number, value)
            model.claims.append((number, value))
            enter(overlaps, changes[number])
        elif what == "release":
            if not model.active:
                continue
            name = sorted(model.active)[value % len(model.active)]
            model.active.remove(name)
            model.claims = [claim for claim in model.claims if claim[0] != name]
            release(overlaps, changes[name])
        elif what == "hold":
            model.held = merged(value)
            overlaps.hold(model.held)
            go_on(overlaps)
        else:
            waiting = model.waiting
            assert overlaps.take_waiting() == [changes[name] for name in waiting]
            model.taken.update(waiting)
        expected = model.step()
        assert set(log) == expected
        assert len(log) == len(expected)
        assert overlaps.waiting == [changes[name] for name in model.waiting]
        assert not any(claim.active for claim in overlaps.waiting)
        assert overlaps.waiting_count == len(model.waiting)


def test_overlapping_claims_go_in_the_order_they_came() -> None:
    overlaps = Overlaps()
    log: list[int] = []
    first = Change(log, 0, (0, 8))
    enter(overlaps, first)
    for name, span in enumerate([(4, 12), (0, 2), (6, 20), (1, 3)], 1):
        enter(overlaps, Change(log, name, span, over_at_once=True))
    assert log == [0]
    release(overlaps, first)
    assert sorted(log) == [0, 1, 2, 3, 4]
    assert log.index(1) < log.index(3)
    assert log.index(2) < log.index(4)


def test_65536_claims_on_one_range_that_are_over_at_once_do_not_recurse() -> None:
    overlaps = Overlaps()
    log: list[int] = []
    first = Claim(0, 512)
    assert overlaps.enter(first)
    for name in range(MANY):
        enter(overlaps, Change(log, name, (0, 512), over_at_once=True))
    release(overlaps, first)
    assert log == list(range(MANY))


def test_taken_claims_keep_their_place_until_those_before_are_done() -> None:
    overlaps = Overlaps()
    log: list[int] = []
    first = Change(log, 1, (0, 8))
    enter(overlaps, first)
    waiting = Change(log, 2, (0, 8))
    enter(overlaps, waiting)
    assert overlaps.take_waiting() == [waiting]
    assert overlaps.waiting_count == 0
    later = Change(log, 3, (4, 8))
    enter(overlaps, later)
    assert log == [1]
    release(overlaps, first)
    assert log == [1, 3]


def test_taking_claims_leaves_held_spans_as_they_are() -> None:
    overlaps = Overlaps()
    log: list[int] = []
    held = GraceSpans(overlaps)
    held.hold([(0, 4)], 3)
    held.hold([(8, 12)])
    enter(overlaps, Change(log, 1, (0, 1)))
    assert len(overlaps.take_waiting()) == 1
    assert held.deadline_s == 3
    enter(overlaps, Change(log, 2, (11, 12)))
    held.expire(3)
    go_on(overlaps)
    assert log == []
    held.begin(7)
    held.expire(7)
    go_on(overlaps)
    assert log == [2]


class Counted(int):
    """A place on the disk that counts how often it is compared."""

    comparisons = 0

    def __lt__(self, other: int) -> bool:
        Counted.comparisons += 1
        return int(self) < int(other)

    def __le__(self, other: int) -> bool:
        Counted.comparisons += 1
        return int(self) <= int(other)

    def __gt__(self, other: int) -> bool:
        Counted.comparisons += 1
        return int(self) > int(other)

    __hash__ = int.__hash__


def comparisons_of(count: int, width: int) -> int:
    """Enter `count` claims of `width` blocks each while all of the disk is held, then let go."""
    overlaps = Overlaps()
    log: list[int] = []
    held = GraceSpans(overlaps)
    held.hold([WHOLE_DISK], 5)
    Counted.comparisons = 0
    for name in range(count):
        block = name * 7919 % count
        span = (Counted(block * 8), Counted((block + width) * 8))
        enter(overlaps, Change(log, name, span, over_at_once=True))
    assert log == []
    held.expire(5)
    go_on(overlaps)
    assert len(log) == count
    return Counted.comparisons


@pytest.mark.slow
def test_letting_go_of_the_whole_disk_takes_n_log_n_steps() -> None:
    for width in (1, 3):
        few, many = comparisons_of(4096, width), comparisons_of(65536, width)
        assert many < 16 * few * 2, (few, many)
        assert many < 65536 * 16 * 12
