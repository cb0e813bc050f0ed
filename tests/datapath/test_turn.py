"""A turn: who is told when, what is put off, and what never grows."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from errno import EIO

import pytest

from bridge.datapath.request import READ, Request
from bridge.datapath.turn import Outcome, Turn

RING_REQUESTS = 65_536


class Counting:
    """A stage that moves `left` times."""

    def __init__(self, left: int, moved: Callable[[int], None] = lambda left: None) -> None:
        self.left = left
        self.asked = 0
        self._moved = moved

    def advance(self) -> bool:
        self.asked += 1
        if not self.left:
            return False
        self.left -= 1
        self._moved(self.left)
        return True


def request(done: Callable[[Request], None]) -> Request:
    return Request(READ, 0, 0, [], done)


# Who is told


def test_owners_are_told_only_when_the_turn_ends() -> None:
    turn = Turn()
    told: list[Request] = []
    turn.finish(request(told.append))
    assert told == []
    assert turn.pending
    assert turn.end()
    assert len(told) == 1
    assert not turn.pending


def test_owner_that_raises_does_not_keep_other_owners_from_being_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    turn = Turn()
    told: list[int] = []
    logged: list[str] = []
    monkeypatch.setattr(
        "bridge.datapath.turn._log.error", lambda text, **more: logged.append(str(more))
    )

    def fail(each: Request) -> None:
        raise ValueError("a bug of ours")

    turn.finish(request(lambda each: told.append(1)))
    turn.finish(request(fail))
    turn.finish(request(lambda each: told.append(2)))
    assert turn.end()
    assert told == [1, 2]
    assert len(logged) == 1
    assert "a bug of ours" in logged[0]


def test_assertion_that_does_not_hold_is_not_passed_over() -> None:
    turn = Turn()

    def fail(each: Request) -> None:
        raise AssertionError("nothing can be believed")

    turn.finish(request(fail))
    with pytest.raises(AssertionError, match="believed"):
        turn.end()


def test_owners_are_told_once_and_of_the_error() -> None:
    turn = Turn()
    errors: list[int] = []
    turn.finish(request(lambda each: errors.append(each.error)), EIO)
    turn.finish(request(lambda each: errors.append(each.error)))
    turn.end()
    assert errors == [EIO, 0]
    assert not turn.end()
    assert errors == [EIO, 0]


def test_outcome_is_told_like_a_request() -> None:
    turn = Turn()
    told: list[int] = []
    turn.finish(Outcome(lambda outcome: told.append(outcome.error)), EIO)
    turn.end()
    assert told == [EIO]


def test_owners_are_told_in_the_order_in_which_things_ended() -> None:
    """What ends while they are told comes after everything that ended before."""
    turn = Turn()
    order: list[str] = []

    def first(each: Request) -> None:
        order.append("first")
        turn.finish(request(lambda each: order.append("that of the first")))

    turn.finish(request(first))
    turn.finish(request(lambda each: order.append("second")))
    turn.finished.append(request(lambda each: order.append("third")))
    turn.end()
    assert order == ["first", "second", "third", "that of the first"]


def test_requests_that_begin_one_another_do_not_deepen_the_stack() -> None:
    """As many as a guest's rings hold, each begun when the one before has ended."""
    turn = Turn()
    depths: set[int] = set()
    left = RING_REQUESTS

    def next_one(each: Request) -> None:
        nonlocal left
        if left % 4096 == 0 or left == 1:
            depths.add(len(inspect.stack(0)))
        left -= 1
        if left:
            turn.finish(request(next_one))

    turn.finish(request(next_one))
    turn.end()
    assert left == 0
    assert len(depths) == 1


def test_everything_may_end_at_once() -> None:
    turn = Turn()
    told: list[Request] = []
    for _ in range(RING_REQUESTS):
        turn.finish(request(told.append))
    turn.end()
    assert len(told) == RING_REQUESTS


# Stages


def test_stages_are_asked_until_nothing_moves() -> None:
    """And all of them again, since what one did may be what another waits for."""
    turn = Turn()
    one, other = Counting(3), Counting(1)
    turn.add_stage(one)
    turn.add_stage(other)
    turn.want()
    assert turn.end()
    assert (one.left, other.left) == (0, 0)
    assert one.asked == other.asked == 4
    assert not turn.end()


def test_what_a_stage_finishes_is_told_before_it_is_asked_again() -> None:
    turn = Turn()
    order: list[str] = []

    def moved(left: int) -> None:
        order.append(f"moved, {left} left")
        turn.finish(request(lambda each: order.append("told")))

    turn.add_stage(Counting(2, moved))
    turn.want()
    turn.end()
    assert order == ["moved, 1 left", "told", "moved, 0 left", "told"]


def test_stage_that_was_removed_is_not_asked() -> None:
    turn = Turn()
    stage = Counting(1)
    turn.add_stage(stage)
    turn.remove_stage(stage)
    turn.want()
    assert not turn.end()
    assert stage.asked == 0


def test_turn_that_does_not_settle_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.datapath.turn.ROUNDS_MAX", 100)
    turn = Turn()
    turn.add_stage(Counting(1000))
    turn.want()
    with pytest.raises(AssertionError, match="does not settle"):
        turn.end()


# What is put off


def test_what_was_put_off_runs_once_when_all_have_been_told() -> None:
    turn = Turn()
    order: list[str] = []

    def second(each: Request) -> None:
        order.append("second")

    def first(each: Request) -> None:
        order.append("first")
        turn.at_end(lambda: order.append("end"))
        turn.finish(request(second))

    turn.finish(request(first))
    turn.end()
    assert order == ["first", "second", "end"]
    turn.end()
    assert order == ["first", "second", "end"]


def test_what_ends_at_the_end_is_told_in_the_same_turn() -> None:
    turn = Turn()
    order: list[str] = []

    def told(each: Request) -> None:
        order.append("told")
        turn.at_end(lambda: order.append("end again"))

    def end() -> None:
        order.append("end")
        turn.finish(request(told))

    turn.at_end(end)
    turn.end()
    assert order == ["end", "told", "end again"]
    assert not turn.pending


def test_next_turn_is_not_this_one() -> None:
    turn = Turn()
    numbers: list[int] = []

    def go_on() -> None:
        numbers.append(turn.number)
        if len(numbers) < 3:
            turn.next_turn(go_on)

    turn.next_turn(go_on)
    for _ in range(5):
        turn.end()
    assert numbers == [1, 2, 3]


def test_next_turn_asked_for_by_an_owner_waits() -> None:
    turn = Turn()
    went_on: list[None] = []
    turn.finish(request(lambda each: turn.next_turn(lambda: went_on.append(None))))
    turn.end()
    assert went_on == []
    assert turn.pending
    turn.end()
    assert went_on == [None]


def test_turn_within_a_turn_is_refused() -> None:
    """Nothing that an owner does may end the turn: that would be a call inside a call again."""
    turn = Turn()

    def end(each: Request) -> None:
        turn.end()

    turn.finish(request(end))
    with pytest.raises(AssertionError):
        turn.end()


# Who sleeps


@pytest.mark.parametrize("what", ["finish", "want", "at_end", "next_turn"])
def test_loop_that_ends_the_turns_is_woken_if_asleep(what: str) -> None:
    woken: list[None] = []
    turn = Turn(lambda: woken.append(None))
    calls: dict[str, Callable[[], None]] = {
        "finish": lambda: turn.finish(request(lambda each: None)),
        "want": turn.want,
        "at_end": lambda: turn.at_end(lambda: None),
        "next_turn": lambda: turn.next_turn(lambda: None),
    }
    calls[what]()
    assert woken == []
    turn.asleep = True
    calls[what]()
    assert woken == [None]
    assert turn.pending


def test_turn_that_was_wanted_asks_the_stages_once() -> None:
    turn = Turn()
    stage = Counting(0)
    turn.add_stage(stage)
    turn.want()
    assert turn.pending
    turn.end()
    assert stage.asked == 1
    assert not turn.pending


def test_turn_that_was_not_wanted_asks_no_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """A hit in the cache costs what it costs, not what every part of the data path may want."""
    monkeypatch.setattr(Turn, "checks_stages", False)
    turn = Turn()
    stage = Counting(0)
    turn.add_stage(stage)
    turn.at_end(lambda: None)
    assert turn.end()
    assert stage.asked == 0


def test_stages_are_asked_about_what_is_begun_at_the_end() -> None:
    turn = Turn()
    stage = Counting(0)
    turn.add_stage(stage)

    def begin() -> None:
        stage.left = 2
        turn.want()

    turn.at_end(begin)
    turn.end()
    assert stage.left == 0
    assert not turn.pending


def test_forgotten_wish_is_found_in_tests() -> None:
    turn = Turn()
    turn.add_stage(Counting(1))
    turn.at_end(lambda: None)
    with pytest.raises(AssertionError, match="wanted no turn"):
        turn.end()


def test_stage_that_puts_something_off_without_a_wish_is_found_in_tests() -> None:
    """What a link does when writes were answered: nothing moves, and yet the guest's next flush
    would count for too little."""
    turn = Turn()

    class PutsOff:
        def advance(self) -> bool:
            turn.at_end(lambda: None)
            return False

    turn.add_stage(PutsOff())
    turn.at_end(lambda: None)
    with pytest.raises(AssertionError, match="put something off"):
        turn.end()


def test_turn_wanted_within_a_turn_is_that_turn() -> None:
    turn = Turn()
    turn.finish(request(lambda each: turn.want()))
    turn.end()
    assert not turn.pending


def test_what_waits_until_guests_have_seen_a_turn_waits_for_a_look_at_the_rings() -> None:
    turn = Turn()
    seen: list[str] = []
    turn.after_look(lambda: seen.append("first"))
    turn.end()
    assert (seen, turn.pending) == ([], False)
    turn.looked()
    turn.after_look(lambda: seen.append("second"))
    turn.end()
    assert seen == ["first"]
    turn.looked()
    turn.looked()
    assert seen == ["first", "second"]
