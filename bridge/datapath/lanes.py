"""Large requests: how many bytes are begun in one turn, and how many are in flight.

A guest decides how long its requests are: a chain of 1024 descriptors may name one buffer again and
again, and 1024 such chains may be available at once. What is small is begun on the spot; a batch of
it is bounded by the rings' sizes. Everything else goes through a **lane**, in the order in which it
came: a turn of the loop begins only so much of it, and the rest waits for a later turn or for
something to end. A request that is longer than a piece is begun piece by piece.

Reads, writes and range operations have a lane each: writes that wait for room in the cache, or
discards that wait for the server, do not hold up the other lanes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from errno import ECANCELED
from typing import Final, cast

from bridge.datapath.request import Request
from bridge.datapath.turn import Turn

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


class Lane:
    """Large requests of one kind. `submit` begins a request or a piece of one."""

    def __init__(self, submit: Callable[[Request], None], turn: Turn) -> None:
        self._submit = submit
        self.turn = turn
        self._turn_number = -1
        """Of the turn that `_left_bytes` is for."""
        self._left_bytes = TURN_BYTES
        self._waiting: deque[Job] = deque()
        self._scheduled = False
        self.in_flight_bytes = 0

    @property
    def is_free(self) -> bool:
        """Nothing waits, and this turn has room: a hit may be served on the spot."""
        if self._waiting:
            return False
        if self._turn_number != self.turn.number:
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
        """This much is no longer in flight."""
        self.in_flight_bytes -= n_bytes
        if self._waiting:
            self._go_on()

    def leave(self, job: Job) -> None:
        """`job` begins nothing more."""
        if job in self._waiting:
            self._waiting.remove(job)

    def _is_full(self, more_bytes: int) -> bool:
        in_flight_bytes = self.in_flight_bytes
        return in_flight_bytes > 0 and in_flight_bytes + more_bytes > IN_FLIGHT_BYTES

    def _turn_has_room(self) -> bool:
        if self._turn_number != self.turn.number:
            self._turn_number = self.turn.number
            self._left_bytes = TURN_BYTES
        return self._left_bytes > 0

    def _go_on(self) -> None:
        """Begin what may be begun."""
        while self._waiting:
            job = self._waiting[0]
            cost_bytes = job.next_bytes
            if cost_bytes:
                if not self._admits(cost_bytes):
                    return
                self.in_flight_bytes += cost_bytes
                self._left_bytes -= cost_bytes
                self._submit(job.begin())
            if not job.next_bytes:
                self._waiting.popleft()

    def _admits(self, cost_bytes: int) -> bool:
        if self._is_full(cost_bytes):
            return False  # whatever ends goes on here
        if self._turn_has_room():
            return True
        if not self._scheduled:
            self._scheduled = True
            self.turn.next_turn(self._next_turn)
        return False

    def _next_turn(self) -> None:
        self._scheduled = False
        self._go_on()


class Job:
    """A request in a lane, in pieces. It ends when every piece that was begun has ended and either
    none is left or one failed.

    The guest hears of all pieces at once. So a flush that failed in between has not told it of the
    first ones, and they are done once more if the server may have dropped them: all that were begun
    before that flush failed. (Not when they end: this is told of an end later than it comes, maybe
    after a flush that failed later.)
    """

    __slots__ = (
        *("_ends", "_epoch", "_error", "_in_flight", "_lane", "_next", "_pieces"),
        "owner",
    )

    def __init__(
        self,
        lane: Lane,
        owner: Request,
        pieces: Iterator[tuple[int, Request]],
        epoch: Callable[[], int] | None = None,
    ) -> None:
        """`owner` is the request that the pieces are of. `pieces`: what each costs (above 0), and a
        request whose `done` and `owner` are the job's to set; at least one. They are made as they
        are needed. `epoch`: for changes, another number whenever the server may have dropped what
        it had acknowledged."""
        self._lane = lane
        self.owner = owner
        self._pieces = pieces
        self._next = next(pieces, None)
        self._in_flight: set[Request] = set()
        self._error = 0
        self._epoch = epoch
        self._ends: list[tuple[int, int, Request]] = []
        """Of pieces that have ended: in which epoch they were begun, what they cost, and they
        themselves."""

    @property
    def next_bytes(self) -> int:
        """What the next piece costs; 0 if there is none to be begun."""
        return self._next[0] if self._next is not None else 0

    def begin(self) -> Request:
        """The next piece, which is in flight from now on."""
        assert self._next is not None
        cost_bytes, piece = self._next
        self._next = next(self._pieces, None)
        self._in_flight.add(piece)
        piece.done = self._ended
        piece.owner = self.owner, cost_bytes, self._epoch() if self._epoch is not None else 0
        return piece

    def abandon(self, scratch: memoryview) -> None:
        """The owner was abandoned (`Request.abandon`): so are the pieces in flight, and no more are
        begun."""
        self._error = self._error or ECANCELED
        self._next = None
        self._pieces = iter(())  # They have views of the guest's memory.
        self._lane.leave(self)
        for piece in self._in_flight:
            piece.abandon(piece.done, scratch)
        if not self._in_flight:
            self._finish()

    def _finish(self) -> None:
        """Tell of the owner's end, and let go of it: a cycle of references would keep the memory of
        a guest that is gone until the garbage collector comes, which an idle process never needs.
        """
        self._ends = []
        self._pieces = iter(())
        self.owner.owner = None
        self._lane.turn.finish(self.owner, self._error)

    def _ended(self, piece: Request) -> None:
        self._in_flight.remove(piece)
        _, cost_bytes, epoch = cast("tuple[Request, int, int]", piece.owner)
        if piece.error:
            self._error = self._error or piece.error
            self._next = None
        elif self._epoch is not None:
            self._ends.append((epoch, cost_bytes, piece))
        if not self._in_flight and self._next is None and not self._do_again():
            self._finish()
        self._lane.ended(cost_bytes)

    def _do_again(self) -> bool:
        """Begin the pieces of an older epoch once more; False if there is none."""
        if self._error or self._epoch is None:
            return False
        now = self._epoch()
        older = [(cost_bytes, piece) for epoch, cost_bytes, piece in self._ends if epoch != now]
        if not older:
            return False
        self._ends = [each for each in self._ends if each[0] == now]
        self._pieces = iter(older)
        self._next = next(self._pieces)
        self._lane.enter(self)
        return True
