"""Large requests: how many bytes are begun in one turn, and how many are in flight.

A guest decides how long its requests are: a chain of 1024 descriptors may name one buffer again and
again, and 1024 such chains may be available at once. What is small is begun on the spot; a batch of
it is bounded by the rings' sizes. Everything else goes through a **lane**, in the order in which it
came: a turn of the loop begins only so much of it, and the rest waits for a later turn or for
something to end. A request that is longer than a piece is begun piece by piece.

Reads, writes and range operations have a lane each: writes that wait for room in the cache, or
discards that wait for the server, are in nobody else's way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from math import inf
from typing import Any, Final, Protocol

from bridge.request import READ, WRITE, Request

SMALL_BYTES: Final = 64 << 10
"""Up to here a request is begun at once: 1024 of them are copied in about 20 ms."""
WHOLE_BYTES: Final = 2 << 20
"""Up to here a request goes on in one piece: the longest that Linux and Windows send."""
PIECE_BYTES: Final = 1 << 20
"""What longer ones are cut into."""
RANGE_COST_BYTES: Final = 1 << 20
"""What a discard or write-zeroes counts for, whatever its length: it may look at every slot of a
cache."""
TURN_BYTES: Final = 8 << 20
"""Begun in one turn: copied in about 2 ms."""
IN_FLIGHT_BYTES: Final = 256 << 20
"""In flight at a time: more than a fast network holds."""


class Turns(Protocol):
    """The loop, as far as a lane needs it."""

    now: float
    """Another number in every turn."""

    def soon(self, callback: Callable[[], None], /) -> None:
        """Call `callback` in the next turn."""


class _OneTurn:
    """A loop that has one turn only, with room for everything."""

    now = 0.0

    def soon(self, callback: Callable[[], None], /) -> None:
        """There is no other turn."""
        raise AssertionError("a lane without a limit waits for nothing")


class Lane:
    """Large requests of one kind. `submit` begins a request or a piece of one."""

    def __init__(self, submit: Callable[[Request], None], turns: Turns | None) -> None:
        """Without `turns` there is no limit to what is begun in one."""
        self._submit = submit
        self._turns: Turns = _OneTurn() if turns is None else turns
        self._per_turn_bytes = inf if turns is None else TURN_BYTES
        self._turn = -1.0
        self._left_bytes = self._per_turn_bytes
        self._waiting: deque[Job] = deque()
        self._scheduled = False
        self._going_on = False
        self.in_flight_bytes = 0

    @property
    def is_free(self) -> bool:
        """Nothing waits, and this turn has room: a hit may be served on the spot."""
        if self._waiting:
            return False
        if self._turn != self._turns.now:
            return self._turn_has_room()
        return self._left_bytes > 0

    def copied(self, n_bytes: int) -> None:
        """A request was served on the spot: it is part of the turn's work."""
        self._left_bytes -= n_bytes

    def begin_whole(self, n_bytes: int) -> bool:
        """The caller begins a request of `n_bytes`, if that is allowed; only while `is_free`."""
        in_flight_bytes = self.in_flight_bytes + n_bytes
        if in_flight_bytes > IN_FLIGHT_BYTES and in_flight_bytes > n_bytes:
            return False
        self.in_flight_bytes = in_flight_bytes
        self._left_bytes -= n_bytes
        return True

    def enter(self, job: Job) -> None:
        """Begin `job`, now or when it is its turn."""
        self._waiting.append(job)
        self._go_on()

    def ended(self, n_bytes: int) -> None:
        """So much is not in flight any more."""
        self.in_flight_bytes -= n_bytes
        if self._waiting:
            self._go_on()

    def take(self, owner: Any) -> list[Job]:
        """Take out what waits for `owner`, begun in part or not at all."""
        found = [job for job in self._waiting if job.owner is owner]
        if found:
            self._waiting = deque(job for job in self._waiting if job.owner is not owner)
        return found

    def _is_full(self, more_bytes: int) -> bool:
        in_flight_bytes = self.in_flight_bytes
        return in_flight_bytes > 0 and in_flight_bytes + more_bytes > IN_FLIGHT_BYTES

    def _turn_has_room(self) -> bool:
        if self._turn != self._turns.now:
            self._turn = self._turns.now
            self._left_bytes = self._per_turn_bytes
        return self._left_bytes > 0

    def _go_on(self) -> None:
        """Begin what may be begun. A loop, not a recursion: pieces may end before `submit` does."""
        if self._going_on:
            return
        self._going_on = True
        try:
            while self._waiting:
                job = self._waiting[0]
                cost_bytes = job.next_bytes
                if cost_bytes:
                    if not self._admits(cost_bytes):
                        break
                    self.in_flight_bytes += cost_bytes
                    self._left_bytes -= cost_bytes
                    self._submit(job.begin())
                if not job.next_bytes and self._waiting and self._waiting[0] is job:
                    self._waiting.popleft()
        finally:
            self._going_on = False

    def _admits(self, cost_bytes: int) -> bool:
        if self._is_full(cost_bytes):
            return False  # whatever ends goes on here
        if self._turn_has_room():
            return True
        if not self._scheduled:
            self._scheduled = True
            self._turns.soon(self._next_turn)
        return False

    def _next_turn(self) -> None:
        self._scheduled = False
        self._go_on()


class Job:
    """A request in a lane: `done(errno)` is called once, when every piece that was begun has ended
    and either none is left or one failed."""

    __slots__ = ("_done", "_error", "_lane", "_next", "_pieces", "in_flight", "owner")

    def __init__(
        self, lane: Lane, owner: Any, pieces: Iterator[Request], done: Callable[[int], None]
    ) -> None:
        """`pieces`: at least one, made as they are needed; their `done` is the job's to set."""
        self._lane = lane
        self.owner = owner
        self._pieces = pieces
        self._next = next(pieces, None)
        self._done = done
        self._error = 0
        self.in_flight: dict[Request, None] = {}
        """The pieces that were begun and have not ended, oldest first."""

    @property
    def next_bytes(self) -> int:
        """What the next piece costs; 0 if there is none to be begun."""
        return _cost_bytes(self._next) if self._next is not None else 0

    def begin(self) -> Request:
        """The next piece, which is in flight from now on."""
        piece = self._next
        assert piece is not None
        self._next = next(self._pieces, None)
        self.in_flight[piece] = None
        piece.done = self._ended
        return piece

    def stop(self, error: int) -> None:
        """Begin nothing more; `done(error)` once nothing is in flight, possibly now."""
        self._error = self._error or error
        self._forget_rest()
        if not self.in_flight:
            self._done(self._error)

    def _forget_rest(self) -> None:
        self._next = None
        self._pieces = iter(())

    def _ended(self, piece: Request) -> None:
        del self.in_flight[piece]
        if piece.error:
            self._error = self._error or piece.error
            self._forget_rest()
        if not self.in_flight and self._next is None:
            self._done(self._error)
        self._lane.ended(_cost_bytes(piece))


def _cost_bytes(piece: Request) -> int:
    return piece.length if piece.op in (READ, WRITE) else RANGE_COST_BYTES
