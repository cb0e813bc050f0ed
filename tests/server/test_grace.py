"""What is held: for how long, and in how many pieces at most."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from bridge.server.grace import GraceSpans
from bridge.server.overlaps import Claim, Overlaps, merged


class Change(Claim):
    """A change that says whether it has gone."""

    def __init__(self, overlaps: Overlaps, start: int, stop: int) -> None:
        super().__init__(start, stop)
        self._overlaps = overlaps
        self._goes = overlaps.enter(self)

    @property
    def gone(self) -> bool:
        assert self.active == (self._goes or self in self._overlaps.gone)
        return self.active


spans = st.lists(
    st.tuples(st.integers(0, 40), st.integers(1, 8)).map(lambda pair: (pair[0], sum(pair)))
)


@given(spans)
def test_merged_covers_the_same_bytes_with_gaps_between(given_spans) -> None:
    found = merged(given_spans)
    assert {byte for span in found for byte in range(*span)} == {
        byte for span in given_spans for byte in range(*span)
    }
    assert all(first[1] < second[0] for first, second in pairwise(found))


def test_hold_without_a_time_waits_for_one() -> None:
    overlaps = Overlaps()
    held = GraceSpans(overlaps)
    held.hold([(0, 4)])
    change = Change(overlaps, 3, 5)
    assert held.deadline_s is None
    held.expire(1e9)
    assert not change.gone
    held.begin(7)
    assert held.deadline_s == 7
    held.expire(7)
    assert change.gone
    assert not held


def test_hold_begin_leaves_the_times_that_there_are() -> None:
    overlaps = Overlaps()
    held = GraceSpans(overlaps)
    held.hold([(0, 4)])
    held.hold([(8, 12)], 3)
    held.begin(7)
    assert held.deadline_s == 3
    held.expire(3)
    assert Change(overlaps, 8, 12).gone
    assert not Change(overlaps, 0, 4).gone


def test_hold_past_its_bound_becomes_the_whole_disk_until_the_last_time() -> None:
    overlaps = Overlaps()
    held = GraceSpans(overlaps)
    held.hold([(2 * number, 2 * number + 1) for number in range(1024)], 5)
    assert Change(overlaps, 1, 2).gone
    waiting = Change(overlaps, 2, 3)
    held.hold([(4096, 4097)], 4)
    assert overlaps.waiting == [waiting]
    assert not Change(overlaps, 1 << 62, (1 << 62) + 1).gone
    held.expire(4)
    assert not waiting.gone
    held.expire(5)
    assert waiting.gone
    assert not held
