"""Which changes may go now: overlapping ones wait for each other, and for what may be stale.

Changes pass each other only where they can be reordered: with several channels, or blocks that
are read, modified and written (`ordered`). Then those that overlap go one by one. And they
keep out of where the server may still do something old: what was left behind by lost connections,
for a time (`GraceSpans`), and what unanswered commands of abandoned requests do. Otherwise they
need not come here: that is what `fast_write_bytes` says.

Writes that are rows keep out of each other's way by themselves, and out of that of the claims here,
which are in the same table (`datapath.spans`): one that overlaps any of these is not usual, and
comes here. A change that overlaps a row has all rows become requests, with a claim for each write.
So two that overlap are never in flight, one here and one there.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from math import inf

import structlog

from bridge.datapath.cells import MAX_WRITE_BYTES, WHOLE_WRITE_BYTES, Route
from bridge.datapath.lanes import SMALL_BYTES, WHOLE_BYTES
from bridge.datapath.request import CHANGES, Request
from bridge.datapath.turn import Turn
from bridge.server.align import cover
from bridge.server.client_options import ClientOptions
from bridge.server.grace import WHOLE_DISK, GraceSpans
from bridge.server.listed import Listed
from bridge.server.overlaps import Claim, Overlaps, Span

_log = structlog.get_logger(__name__)


class Change(Claim):
    """A request that waits for its range, and holds it while it is in flight."""

    __slots__ = ("request",)

    def __init__(self, request: Request, start: int, stop: int) -> None:
        super().__init__(start, stop)
        self.request = request


class _ChangeCommand(Request):
    """The command of a `Change`, or of a write that was a row (see `Changes.adopt`)."""

    __slots__ = ()

    owner: tuple[Request, Claim]


class Outlived:
    """The `done` of a command of an abandoned request that is still to be answered."""

    __slots__ = ("_changes", "_claim", "_done")

    def __init__(
        self, changes: Changes, done: Callable[[Request], None], claim: Claim | None
    ) -> None:
        """`claim` keeps other changes out of its way meanwhile."""
        self._changes = changes
        self._done = done
        self._claim = claim

    def __call__(self, command: Request) -> None:
        command.error = command.error or errno.ECANCELED
        self._done(command)
        if self._claim is not None:
            self._changes.outlived_ended(self._claim)


class Changes:
    """See the module's text. `do` takes the changes that may go."""

    def __init__(
        self, options: ClientOptions, turn: Turn, do: Callable[[Request], None], route: Route
    ) -> None:
        self._route = route
        route.changes = self
        self._grace_s = options.stale_write_grace_s
        self._turn = turn
        self._do = do
        self._overlaps = Overlaps()
        self._listed = Listed(route.spans)
        self._grace = GraceSpans(self._overlaps)
        self._outlived: set[Claim] = set()
        """What commands of abandoned requests, sent and not answered, may still change."""
        self.ordered = False
        """They could pass each other."""
        self._in_parts = False
        """That is so because blocks are read, modified and written."""
        self.stale_possible = False
        """The server may execute commands sent on connections that are lost."""
        self._fenced = False
        """It executes nothing of a lost connection once there is a new one."""
        self._most_bytes = 0
        self.fast_write_bytes = 0
        """The longest write that may go at once, past all of this; 0: none may."""

    def connected(self, *, several: bool, in_parts: bool, fenced: bool, write_bytes: int) -> None:
        """How it is with the present server: over `several` connections; with changes done
        `in_parts`, as its blocks are large; it takes writes of so many bytes at once, 0: none."""
        self.ordered = several or in_parts
        self._in_parts = in_parts
        self._fenced = fenced
        self._most_bytes = write_bytes
        self._choose_way()

    def _choose_way(self) -> None:
        """After everything that decides whether changes have to come here."""
        self.fast_write_bytes = 0 if self.must_enter else self._most_bytes
        usual_bytes = self.fast_write_bytes
        if self.ordered and not (self._in_parts or self._grace or self._outlived):
            # Rows keep out of each other's way, and out of that of claims that they know of.
            usual_bytes = self._most_bytes if self._listed.is_complete else 0
        limits = self._route.cells
        limits[MAX_WRITE_BYTES] = min(usual_bytes, SMALL_BYTES)
        limits[WHOLE_WRITE_BYTES] = min(usual_bytes, WHOLE_BYTES)

    @property
    def must_enter(self) -> bool:
        """Changes have to come here."""
        return bool(self.ordered or self._grace or self._outlived)

    @property
    def in_flight(self) -> int:
        """How many wait here."""
        return self._overlaps.waiting_count + len(self._overlaps.gone)

    def enter(self, request: Request, block_bytes: int) -> None:
        """Do the change `request` on its whole blocks, now or when it may go."""
        rows = self._route.rows
        change = Change(request, *cover(request.offset, request.length, block_bytes))
        if rows is not None and self._listed.row_overlaps(change.start, change.stop):
            rows.adopt_all()  # They have claims then, and it waits for one of these.
        if self._enter(change):
            self._begin(change)

    def adopt(self, request: Request) -> Request:
        """See cells.Changes."""
        claim = Claim(request.offset, request.offset + request.length)
        self._enter(claim)
        op, offset, length, buffers = request.op, request.offset, request.length, request.buffers
        return _ChangeCommand(op, offset, length, buffers, self._done, 0, (request, claim))

    def give_up(self, command: Request) -> Request:
        """See cells.Changes."""
        assert isinstance(command, _ChangeCommand)
        request, claim = command.owner
        self._leave(claim)
        return request

    def _enter(self, claim: Claim) -> bool:
        """See `Overlaps.enter`."""
        self._listed.add(claim)
        if not self._listed.is_complete:
            self._choose_way()
        return self._overlaps.enter(claim)

    def _leave(self, claim: Claim) -> None:
        """It is over."""
        self._overlaps.withdraw(claim)
        self._unlist(claim)

    def _unlist(self, claim: Claim) -> None:
        was_complete = self._listed.is_complete
        self._listed.remove(claim)
        if not was_complete:
            self._choose_way()

    def advance(self) -> bool:
        """See `Stage`: begin the changes that may go by now."""
        gone = self._overlaps.gone
        if not gone:
            return False
        while gone:
            claim = gone.popleft()
            if isinstance(claim, Change):
                self._begin(claim)
        return True

    def _begin(self, change: Change) -> None:
        request = change.request
        op, offset, length, buffers = request.op, request.offset, request.length, request.buffers
        done, owner = self._done, (request, change)
        self._do(_ChangeCommand(op, offset, length, buffers, done, request.flags, owner))

    def _done(self, inner: _ChangeCommand) -> None:
        request = self.give_up(inner)
        request.generation = inner.generation
        self._turn.finish(request, inner.error)

    def take_waiting(self) -> list[Request]:
        """All that wait here: they go no more, and their end is the caller's."""
        # Taken out first: what waits for one that ends now must not be sent at any later time.
        claims = self._overlaps.take_waiting()
        gone, self._overlaps.gone = self._overlaps.gone, deque()
        for claim in gone:
            if isinstance(claim, Change):
                self._overlaps.release(claim)
        taken = [claim for claim in (*gone, *claims) if isinstance(claim, Change)]
        for change in taken:
            self._unlist(change)
        return [change.request for change in taken]

    # What the server may still do.

    def left_behind(self, commands: Sequence[Request]) -> None:
        """These were sent on connections that are lost, and are not sent again."""
        if self.stale_possible:
            self._hold(_changed(commands))

    def begin_grace(self, now: float, again: Sequence[Request]) -> None:
        """There is a new connection. Keep new changes away from what lost ones may still do: with
        the commands that are sent `again`, and where changes were failed since."""
        if self._fenced:
            self._grace.begin(now)
            self._grace.expire(now)
        else:
            self._grace.begin(now + self._grace_s)
            self._hold(_changed(again) if self.stale_possible else [], now + self._grace_s)
        self._choose_way()

    def _hold(self, spans: list[Span], until_s: float = inf) -> None:
        if spans and self._grace_s:
            self._grace.hold(spans, until_s)
            self._choose_way()

    def expect_stale(self, now: float) -> None:
        """See `Link.expect_stale_writes`."""
        # Its connections ended with it, and the server has received what it will (but for what a
        # kernel still had to send): the grace of our own lost connections counts from no later
        # point either. It does not count from our first connection, which may be older than the
        # other's end: that of a bridge that stood by, or of the one that a guest migrates to.
        if self._fenced:
            return
        self._turn.want()
        self._hold([WHOLE_DISK], now + self._grace_s)
        if self._grace_s:
            _log.info(
                "the previous process may have left writes: new writes wait", seconds=self._grace_s
            )

    @property
    def may_be_left(self) -> bool:
        """The server may still execute old changes: the process after this one has to expect it."""
        return bool(self._grace) and not self._fenced

    @property
    def deadline_s(self) -> float | None:
        """When `tick` has something to do."""
        return self._grace.deadline_s

    def tick(self, now: float) -> None:
        """Time has passed: end grace times."""
        if self._grace:
            self._grace.expire(now)
            self._choose_way()

    def outlive(self, command: Request, done: Callable[[Request], None]) -> Outlived:
        """The answer to `command`, of an abandoned request, is still to come: keep other changes
        out of its way until then. Returns its `done`, which goes on with the given one."""
        claim: Claim | None = None
        if command.op in CHANGES:
            claim = Claim(command.offset, command.offset + command.length)
            self._outlived.add(claim)
            self._enter(claim)
            self._choose_way()
        return Outlived(self, done, claim)

    def outlived_ended(self, claim: Claim) -> None:
        """The command that it was for has ended."""
        self._outlived.remove(claim)
        self._leave(claim)
        self._choose_way()


def _changed(commands: Sequence[Request]) -> list[Span]:
    """What some of `commands` change."""
    return [(each.offset, each.offset + each.length) for each in commands if each.op in CHANGES]
