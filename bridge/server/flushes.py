"""The flushes of a link: which are asked, sent and reported, and which have to fail.

`durability` has the rules; here stands what they lead to. One FLUSH is in flight at a time: a
server that fails to flush drops what it had and says so once, and the success of another FLUSH,
sent after that and read before, must not be believed. All that is asked meanwhile shares the next.
Changes that were in flight when an epoch ended are sent once more when they are answered.

A change with FUA that fails has the same effect, and its answer may be read after that of a FLUSH
which the server executed later. So the success of a FLUSH is told of when the changes with FUA that
were in flight then have been answered, and counts only if no epoch has ended meanwhile.

A guest's flush may be a row (see `datapath.cells`) while none of this is at hand: no other FLUSH is
in flight or asked, no change with FUA is, nothing is unreported. Then its success has only to be
noted. Before any of that changes, the row is adopted: its FLUSH is `_flushing` from there on, as if
it had been asked here. A FLUSH that is asked meanwhile waits until the row is answered.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final, cast

import structlog

from bridge.datapath.cells import BEFORE as ANSWERED_BEFORE
from bridge.datapath.cells import FLUSH_ROW, SEEN
from bridge.datapath.durability import BEFORE, ReportingDurability
from bridge.datapath.merged import each_of
from bridge.datapath.request import CHANGES, FLUSH, FUA, INTERNAL, REPEATED, Request
from bridge.datapath.turn import Turn
from bridge.server.changes import Outlived
from bridge.server.channels import Channels, Phase, without_abandoned

_log = structlog.get_logger(__name__)

_NOTHING_DONE: Final = (errno.EINVAL, errno.EOVERFLOW, errno.EPERM, errno.EOPNOTSUPP)
"""With these a server refuses a command; it has not tried to make anything durable."""
NO_FAILURE: Final = (*_NOTHING_DONE, errno.ECANCELED)
"""The same, and that of a command that was abandoned: the server has done it."""


class OnceMore:
    """The `done` of a change that was in flight when an epoch ended: it is sent once more."""

    __slots__ = ("_send", "done")

    def __init__(self, send: Callable[[Request], None], done: Callable[[Request], None]) -> None:
        self._send = send
        self.done = done

    def __call__(self, command: Request) -> None:
        command.done = self.done
        if command.error:
            self.done(command)
        else:
            for each in each_of([command]):
                each.generation = 0  # The server has not answered what is sent now.
                self._send(each)


class Flushes:
    """See the module's text. `send_again` takes commands that were answered in vain."""

    def __init__(
        self, turn: Turn, channels: Channels, send_again: Callable[[Request], None]
    ) -> None:
        self._turn = turn
        self._channels = channels
        self._send_again = send_again
        self.durability = ReportingDurability()
        self.refused_total = 0
        self._asked: list[Request] = []
        """What the next FLUSH is for."""
        self._flushing: Request | None = None
        """The FLUSH that has no answer yet."""
        self._flushing_epoch = 0
        self._succeeded: Request | None = None
        """That FLUSH, answered, while its success is in doubt."""
        self._doubtful: set[Request] | None = None
        """The changes with FUA that it waits for; None: to be seen."""
        self._left: set[Request] = set()
        """Those that had no answer when the connection was lost on which that FLUSH was answered.
        Both only while it is in doubt: a command in them keeps the guest's memory alive."""
        self._durable_changes = 0
        """Changes with FUA that have begun, and whose end was not told of."""
        self._row_is_new = False
        """A guest's flush has become a row in this turn."""
        channels.route.shown = self._shown
        channels.route.flushes = self

    @property
    def waiting(self) -> int:
        """How many wait for the next FLUSH, or for the success of one to be certain."""
        return len(self._asked) + (self._succeeded is not None)

    def ask(self, request: Request) -> None:
        """Finish `request` when all that its maker knows of is durable, or may be lost."""
        if self._channels.fails:
            self._turn.finish(request, self._channels.fail_errno)
        else:
            request.progress = self.durability.seen
            self._asked.append(request)
            self._turn.want()

    def advance(self) -> bool:
        """See `Stage`: send a FLUSH if one is asked for and none is in flight."""
        durability = self.durability
        if not durability.keeps_unflushed and durability.settled(self._channels.answered):
            # By now every owner was told of what has been answered.
            self._turn.after_look(durability.guests_have_seen)
        moved = self._succeeded is not None and self._conclude(self._succeeded)
        if self._row_is_new:
            self._row_is_new = False
            self._send_row()
            return True
        if not self._asked or self._is_flushing or self._channels.phase is not Phase.UP:
            return moved
        if durability.unreported:
            self._refuse(self._take_guests())
        if self._asked:
            waiting, self._asked = self._asked, []
            inner = self._flushing = Request(FLUSH, 0, 0, [], self._answered, 0, waiting)
            self.send(inner)
        return True

    # A guest's flush that is a row.

    @property
    def _is_flushing(self) -> bool:
        """A FLUSH has no answer yet."""
        if self._flushing is not None:
            return True
        flat = self._channels.route.alone
        return flat is not None and flat.cells[FLUSH_ROW] != 0

    def may_be_row(self) -> bool:
        """See cells.Flushes."""
        durability = self.durability
        channels = self._channels
        flat = channels.route.alone
        if (
            self._asked
            or self._flushing is not None
            or self._durable_changes
            or durability.unreported
            or durability.keeps_unflushed
            or durability.sending_epoch != durability.epoch
            or flat is None
        ):
            return False
        flat.cells[SEEN] = durability.seen
        flat.cells[ANSWERED_BEFORE] = channels.answered_before
        # (That of a row which is there already: no epoch has ended since.)
        self._flushing_epoch = durability.epoch
        return True

    def row_taken(self) -> None:
        """See cells.Flushes."""
        self._row_is_new = True
        self._turn.want()

    def _send_row(self) -> None:
        """Others of this turn share its FLUSH."""
        route = self._channels.route
        if route.alone is None or route.rows is None:
            return
        if route.alone.held:
            route.rows.send_held(route.alone)
        if self._asked and self._is_flushing:
            route.rows.adopt_all()
        if self._flushing is not None:
            cast("list[Request]", self._flushing.owner).extend(self._asked)
            self._asked = []

    def row_succeeded(self, covers: int) -> None:
        """See cells.Flushes."""
        self.durability.flushed(self._channels.answered_before + covers, self._flushing_epoch)
        self._turn.want()

    def adopt_row(self, flush: Request, covers: int, seen: int) -> Request:
        """See cells.Flushes."""
        assert self._flushing is None
        flush.progress = seen
        inner = self._flushing = Request(FLUSH, 0, 0, [], self._answered, 0, [flush])
        inner.progress = self._channels.answered_before + covers
        return inner

    def durable_change_begins(self) -> None:
        """A change with FUA is about to be sent."""
        self._durable_changes += 1
        rows = self._channels.route.rows
        if rows is not None and self._flushing is None and self._is_flushing:
            rows.adopt_all()

    def durable_change_ends(self) -> None:
        """It was told of."""
        self._durable_changes -= 1

    def _shown(self, unflushed: int) -> None:
        """See cells.Route."""
        durability = self.durability
        answered = self._channels.answered_before + unflushed
        if not durability.keeps_unflushed and durability.settled(answered):
            durability.guests_have_seen()

    def send(self, flush: Request) -> None:
        """Send our FLUSH, perhaps again."""
        self.note_sent(flush)
        self._channels.send(flush)

    def note_sent(self, flush: Request) -> None:
        """Our FLUSH is sent now: what it will vouch for."""
        flush.progress = self._channels.answered
        self._flushing_epoch = self.durability.sending_epoch

    def _take_guests(self) -> list[Request]:
        """All that the guest has submitted and not heard of, also those of the FLUSH in flight."""
        taken: list[Request] = []
        if self._flushing is not None:
            flushes = cast("list[Request]", self._flushing.owner)
            taken, self._flushing.owner = _guests_and_others(flushes)
        waiting, self._asked = _guests_and_others(self._asked)
        return taken + waiting

    def _refuse(self, flushes: list[Request]) -> None:
        """Fail these flushes of the guest's: something may be lost that was complete before."""
        if not flushes:
            return
        self.refused_total += len(flushes)
        _log.error("a flush fails: writes before it may have been lost by the server")
        self._note_reported(flushes)
        for request in flushes:
            request.generation = self._channels.generation
            self._turn.finish(request, errno.EIO)

    def _note_reported(self, flushes: list[Request]) -> None:
        for request in flushes:
            if not request.flags & (INTERNAL | REPEATED):
                self.durability.reported(request.progress)

    def _answered(self, inner: Request) -> None:
        """Our FLUSH was answered. What was answered with it is told of first (see `advance`)."""
        if inner.error or self._flushing is not inner:
            self._flushed(inner)
        else:
            self._succeeded, self._doubtful = inner, None
            self._turn.want()

    def _conclude(self, inner: Request) -> bool:
        """Tell of the success of our FLUSH; False: it is in doubt."""
        channels = self._channels
        if inner.generation != channels.generation or not channels.present:
            if self._is_in_doubt(self._left):
                # The answers that are waited for will not come.
                self._flushing_ends()
                self._asked[:0] = cast("list[Request]", inner.owner)
                return True
        elif self.durability.sending_epoch == self._flushing_epoch:
            # The FLUSH was answered on one of the connections. What was sent on another one before
            # that was read may have failed before it, though nothing came from there since.
            before = max(channel.sent_before_replies for channel in channels.present)
            present = (
                each for channel in channels.present for each in channel.durable_changes(before)
            )
            if self._is_in_doubt(set(present)):
                return False
        self._flushed(inner)
        return True

    def _is_in_doubt(self, unanswered: set[Request]) -> bool:
        """Whether the FLUSH that succeeded waits for some of these changes with FUA."""
        self._doubtful = unanswered if self._doubtful is None else self._doubtful & unanswered
        return bool(self._doubtful)

    def connection_lost(self, unanswered: list[Request]) -> None:
        """These commands have no answer, and get none on that connection."""
        flushing = self._flushing
        if flushing is not None and flushing.generation:  # It has one.
            self._left = {each for each in unanswered if each.flags & FUA and each.op in CHANGES}

    def _flushing_ends(self) -> None:
        """Nothing is to be heard any more of the FLUSH in flight."""
        self._flushing = self._succeeded = self._doubtful = None
        self._left = set()

    def _flushed(self, inner: Request) -> None:
        error = inner.error
        flushes = cast("list[Request]", inner.owner)
        # Not if a new connection came in the same turn as this answer, and a loss was told of.
        # (Where an epoch has ended meanwhile, and something was lost with it, the guest's flushes
        # have failed: see `_refuse`. Others succeed, which says nothing of what is lost, as if they
        # had been sent after that: the cache and `Commands` look at the epoch, and who promises
        # something to others looks at `unreported` as well.)
        expected = self._flushing is inner
        if expected:
            self._flushing_ends()
        for request in flushes:
            request.generation = inner.generation
            self._turn.finish(request, error)
        if error:
            self._note_reported(flushes)
            if inner.generation:  # The server said so, not we.
                self.server_failed()
        elif expected:
            self.durability.flushed(inner.progress, self._flushing_epoch)

    def server_failed(self) -> None:
        """The server could not make something durable, and may have dropped what it had.

        What is in flight is sent once more when it is answered: it is unknown whether the
        server executed it before. The guest's flushes have to fail with this.
        """
        durability = self.durability
        lost = durability.flush_failed(self._channels.answered)
        if durability.keeps_unflushed:
            return
        for channel in self._channels.present:
            for command in channel.changes():
                if not isinstance(command.done, (OnceMore, Outlived)):
                    command.done = OnceMore(self._send_again, command.done)
        if lost:
            self._refuse(self._take_guests())

    def reconnected(self, instance: str, *, reads_only: bool) -> None:
        """A new connection is about to be used, to the server `instance` ("": it does not say)."""
        if reads_only:
            self.durability.nothing_before()
        answered = self._channels.answered
        lost = self.durability.connected(instance, answered)
        if lost and answered > BEFORE:
            _log.error(
                "the server came back and may have lost writes that were not flushed: "
                "the next flush will fail"
            )
        elif lost:
            _log.warning(
                "the server came back: if a process before this one left writes that were not "
                "flushed, they may be lost"
            )

    def report_loss(self) -> Request | None:
        """Fail the guest's flushes if something may be lost. Returns our FLUSH that had no answer
        on the last connection, if it need not be sent again: all that it was for have heard."""
        if self.durability.unreported:
            self._refuse(self._take_guests())
        flushing = self._flushing
        if flushing is None or flushing.owner:
            return None
        self._flushing_ends()
        return flushing

    def take_waiting(self) -> list[Request]:
        """Those that no FLUSH is in flight for; the caller fails them, which tells of losses."""
        flushes, self._asked = self._asked, []
        if self._succeeded is not None and self._is_in_doubt(self._left):
            flushes[:0] = cast("list[Request]", self._succeeded.owner)
            self._flushing_ends()
        self._note_reported(flushes)
        return flushes

    def take_abandoned(self) -> list[Request]:
        """Those of abandoned requests, which no FLUSH is for from here on."""
        self._asked, flushes = without_abandoned(self._asked)
        if self._flushing is not None:
            answering = cast("list[Request]", self._flushing.owner)
            self._flushing.owner, more = without_abandoned(answering)
            flushes += more
        return flushes


def _guests_and_others(flushes: list[Request]) -> tuple[list[Request], list[Request]]:
    """Those whose failure the guest hears of, and the rest."""
    return (
        [request for request in flushes if not request.flags & INTERNAL],
        [request for request in flushes if request.flags & INTERNAL],
    )
