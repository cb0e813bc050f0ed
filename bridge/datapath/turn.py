"""One turn of a loop: what has finished, what goes on from there, and what is put off to the end.

**Rule: completions are a list, never a call inside a call.** Code that finishes something calls
`finish`, which only notes it; `settle` tells the owners, in the order in which things finished.
So `submit()` never finishes anything before it returns, no stack grows with the number of requests
that wait for one another, and what a server's reply sets off does not run in the middle of the
parser of that reply.

A turn takes what came in (replies, chains, timers, control events: each of these only appends to
lists), then settles in rounds: owners are told, then every *stage* looks at its own queues and does
what can be done now. That repeats until nothing moves, so that reply → decision → next command
needs no further turn. Then follows what was put off with `at_end`: one `sendmsg` per connection,
one publication per ring. Between turns both lists are empty.

Stages are asked only if something has finished, or a caller `wants` it: **code that puts something
where a stage will look for it says so.** A turn that brought nothing but hits in the cache asks
none: that would cost such a request up to 9 %. `checks_stages` is for tests: stages that are not
asked are asked all the same, and must have had nothing to do.

What a turn publishes, a guest has not seen while it makes requests available; those may be taken in
the next turn. What has to be certain that a guest has seen it waits with `after_look` until the
loop has looked at every ring once more: what is found there from then on was made available after
that publication. (A ring that is not served for a while, or not to its end, keeps account of what
it left.)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Final, Protocol, Self

import structlog

_log = structlog.get_logger(__name__)

ROUNDS_MAX: Final = 1 << 20
"""Rounds of one turn. Each moves something that a guest, a timer or a server set going, and every
queue is bounded by the guest's rings (65,536 requests): more is a loop of ours."""


def _owner_failed(finished: Finished, error: Exception) -> None:
    """A bug of ours in what an end sets off: only the owner that waits for that end pays.

    Only an assertion that does not hold ends the process: nothing can be believed any more then.
    """
    if isinstance(error, AssertionError):
        raise error
    _log.error("internal error where the end of a request is told of", of=finished, exc_info=error)


def _nobody_sleeps() -> None:
    """For a loop that never sleeps: the turns are ended anyway."""


class Finished(Protocol):
    """Something with an end: a `Request`, or an `Outcome`."""

    error: int
    done: Callable[[Self], None]


class Outcome:
    """The end of something other than a request: `done(outcome)` is called once, `error` is 0 or an
    errno by then."""

    __slots__ = ("done", "error")

    def __init__(self, done: Callable[[Self], None]) -> None:
        self.done = done
        self.error = 0


class Stage(Protocol):
    """A part of the data path with queues of its own."""

    def advance(self) -> bool:
        """Do what can be done now; False if nothing moved."""


class Turn:
    """See the module's text."""

    checks_stages: ClassVar[bool] = False
    """See the module's text."""

    __slots__ = (
        *("_ends", "_next", "_running", "_stages", "_unseen", "_woken"),
        *("asleep", "finished", "number", "wanted"),
    )

    def __init__(self, woken: Callable[[], None] = _nobody_sleeps) -> None:
        """`woken()` is called when there is something to do while the loop that ends the turns
        is `asleep`."""
        self.finished: list[Finished] = []
        """What has ended and was not told of. Who appends here directly (the parser of replies, for
        speed) sets `error` first. Another list after each round."""
        self.number = 0
        """Of the turn, from 1; for budgets per turn."""
        self.asleep = False
        """No turn ends until `woken` was called. Set by the loop that ends them."""
        self._running = False
        self.wanted = False
        """The stages are to be asked. Set directly, for speed, by who is called within a turn or by
        a caller who ends or wants one; others call `want`."""
        self._ends: list[Callable[[], None]] = []
        self._next: list[Callable[[], None]] = []
        self._unseen: list[Callable[[], None]] = []
        self._stages: tuple[Stage, ...] = ()
        self._woken = woken

    def add_stage(self, stage: Stage) -> None:
        """Let `stage` take part from now on."""
        self._stages = (*self._stages, stage)

    def remove_stage(self, stage: Stage) -> None:
        """The end of `add_stage`."""
        self._stages = tuple(each for each in self._stages if each is not stage)

    def finish(self, what: Finished, error: int = 0) -> None:
        """`what` has ended with `error`, 0 or an errno; its owner is told in this turn, or in one
        that starts now."""
        what.error = error
        self.finished.append(what)
        if self.asleep:
            self._woken()

    def want(self) -> None:
        """Have a turn soon that asks the stages. A caller that submits something outside a turn
        calls this: it may have only moved into a queue that a stage looks at."""
        self.wanted = True
        if self.asleep:
            self._woken()

    def at_end(self, callback: Callable[[], None]) -> None:
        """Call `callback` once at the end of this turn, or of one that starts now. If it begins
        something, it says so as a task does: see `want`."""
        self._ends.append(callback)
        if self.asleep:
            self._woken()

    def next_turn(self, callback: Callable[[], None]) -> None:
        """Call `callback` once in the next turn: long work goes on there, and all other work has
        a chance before."""
        self._next.append(callback)
        if self.asleep:
            self._woken()

    def after_look(self, callback: Callable[[], None]) -> None:
        """Call `callback` when every ring was looked at once more after the end of this turn: see
        the module's text. It begins nothing."""
        self._unseen.append(callback)

    def looked(self) -> None:
        """Every ring has been looked at since the end of the last turn. For the loop."""
        if self._unseen:
            unseen, self._unseen = self._unseen, []
            for callback in unseen:
                callback()

    @property
    def pending(self) -> bool:
        """There is something to do without anything coming in."""
        return bool(self.finished or self._ends or self._next or self.wanted)

    def settle(self) -> bool:
        """Tell owners and let stages advance until nothing moves; False if nothing did."""
        if not (self.finished or self.wanted):
            if self.checks_stages:
                self._check_stages()
            return False
        moved = False
        rounds_left = ROUNDS_MAX
        while rounds_left:
            while self.finished:
                finished, self.finished = self.finished, []
                for each in finished:
                    try:
                        each.done(each)
                    except Exception as error:
                        _owner_failed(each, error)
                moved = True
            again = self.wanted = False
            for stage in self._stages:
                if stage.advance():
                    moved = again = True
            if not (again or self.wanted or self.finished):
                return moved
            rounds_left -= 1
        raise AssertionError("a turn that does not settle")

    def _check_stages(self) -> None:
        n_ends = len(self._ends)
        for stage in self._stages:
            assert not stage.advance(), f"{stage} had something to do, and wanted no turn for it"
        assert len(self._ends) == n_ends, "a stage that did nothing has put something off"
        assert not self.finished, "a stage that did nothing has finished something"
        assert not self.wanted, "a stage that did nothing wants a turn"

    def end(self) -> bool:
        """Settle, then do what was put off, until there is nothing; False if nothing was done.

        Not from within a turn: nothing that `finish` leads to may call this.
        """
        assert not self._running
        self._running = True
        self.number += 1
        worked = False
        try:
            if self._next:
                self.wanted = True  # Who put something off goes on with it.
                later, self._next = self._next, []
                for callback in later:
                    callback()
            while True:
                # Asked here as well: a turn that brought nothing but hits is as long as this.
                if self.finished or self.wanted or self.checks_stages:
                    worked |= self.settle()
                if not self._ends:
                    return worked
                ends, self._ends = self._ends, []
                for callback in ends:
                    callback()
                worked = True
        finally:
            self._running = False
