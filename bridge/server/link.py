"""What a client does when its server goes away and comes back, without I/O.

Theory. A link outlives its connections. It takes requests at any time and hands **commands**
(requests that fit the export's limits) to its channels, the connections of the present
**generation**. Phases:

    NEW ──established──▶ UP ──leaving──▶ LEAVING ──lost──▶ DOWN ──established──▶ UP …
                                                            └─closed─▶ CLOSED

- UP: commands go to a channel; with several channels in turn.
- LEAVING: one channel is broken, or the server said ESHUTDOWN: nothing new is sent, the other
  channels get their replies. All channels are given up together, so a generation is one set of
  connections, and "the server has this write" means one thing.
- DOWN: commands wait. After `reconnect_timeout_s` they, and all that come, fail with EIO, until
  there is a connection again.

With a new generation the commands without an answer are sent again, in the order in which they
were sent before, then those that waited. A write that was answered is never sent again, so a
command that is sent again overwrites only what it overlapped while in flight, and between
requests in flight at the same time a disk promises no order. A command on which the server hangs
up each time is found and fails (see `suspects`). A connection that answered nothing of what it
was owed does not count as one: `reconnect_timeout_s` runs on.

Two things must not be believed of a new connection:

- **A write left behind.** A server without a fence may execute a write of the lost connection
  after the reconnect. If the loss left that possible (anything but the end of a unix socket), new
  changes that overlap one that had no answer wait for `stale_write_grace_s`, whether that one is
  sent again or was failed meanwhile. Where a process before this one may have left writes
  (`expect_stale_writes`), it may have done so anywhere, and all changes wait as long. Our nbdkit
  plugin fences (`session=yes` in the export's description), so nothing waits.
- **A flush.** Writes that were answered but not flushed may have died with the old server. Unless
  the layer above keeps them to send again (`keeps_unflushed`), or the server proves that it is the
  same one (`instance=` in the description), the next flush fails with EIO, once. A server that
  fails to flush may drop them, too. See `durability` and `flushes`.

Here stand the phases: what happens at each change from one to the other. The parts that it happens
to are `channels` (where commands go), `commands` (what a request is to the server), `changes`
(which of them may go now), `flushes`, `trial` and `patience` (times).
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from random import Random
from typing import Protocol

import structlog

from bridge.datapath.cells import (
    ALIGN_MASK,
    LONG_BYTES,
    MAX_READ_BYTES,
    SIZE_BYTES,
    WHOLE_READ_BYTES,
)
from bridge.datapath.lanes import WHOLE_BYTES
from bridge.datapath.request import CHANGES, FLUSH, OP_NAMES, Request
from bridge.datapath.turn import Turn
from bridge.server.changes import Changes, Outlived
from bridge.server.channels import Channel, Channels, Phase, without_abandoned
from bridge.server.client_options import ClientOptions
from bridge.server.commands import Commands
from bridge.server.export import Export
from bridge.server.flushes import Flushes, OnceMore
from bridge.server.patience import Patience
from bridge.server.trial import Trial
from bridge.units import SECTOR_BYTES

_log = structlog.get_logger(__name__)


class Above(Protocol):
    """The layer above: what it is told of new connections, amid the turn that brings them."""

    def reconnected(self) -> None:
        """A new connection is up. Nothing was sent on it yet: not what had no answer, either."""

    def export_changed(self, export: Export) -> None:
        """The export has grown; told after `reconnected`."""


class Link:
    """See the module's text. `now` is in seconds of any monotonic clock."""

    def __init__(
        self,
        options: ClientOptions,
        turn: Turn,
        *,
        above: Above | None = None,
        random: Random | None = None,
    ) -> None:
        """Takes part in `turn` as a stage (`turn.add_stage`), which is its owner's to arrange."""
        self._options = options
        self._turn = turn
        self._above = above
        channels = self._channels = Channels(turn)
        flushes = self._flushes = Flushes(turn, channels, self._send_once_more)
        self._commands = Commands(options, turn, channels, flushes)
        self._changes = Changes(options, turn, self._commands.do, channels.route)
        self._trial = Trial(channels, self._commands, flushes)
        self._patience = Patience(options, random or Random())
        self.durability = flushes.durability
        self.route = channels.route
        """Where usual commands go (see `datapath.usual`)."""
        self._unanswered: list[Request] = []
        """Commands that were sent on lost connections, in that order."""
        # Limits of the fast path in `submit`; 0 sends everything the slow way.
        self._size_bytes = 0
        self._max_read = 0
        self._align_mask = 0

    def use(self, options: ClientOptions) -> None:
        """From now on. How long it waits for a server may have changed, nothing else."""
        self._options = self._patience.options = options

    @property
    def phase(self) -> Phase:
        """See the module's text."""
        return self._channels.phase

    @property
    def generation(self) -> int:
        """The number of the present set of connections, from 1."""
        return self._channels.generation

    @property
    def export(self) -> Export:
        """What the server offers; while there is no connection, what it offered last."""
        return self._commands.export

    @property
    def given_up(self) -> bool:
        """There was no connection for too long: requests fail."""
        return self._channels.given_up

    @property
    def resent_total(self) -> int:
        """How many commands were sent more than once."""
        return self._commands.resent_total

    @property
    def flushes_refused_total(self) -> int:
        """How many flushes were failed, for something that may be lost."""
        return self._flushes.refused_total

    @property
    def keeps_unflushed(self) -> bool:
        """The layer above sends unflushed writes again when it is told of a new connection."""
        return self.durability.keeps_unflushed

    @keeps_unflushed.setter
    def keeps_unflushed(self, keeps: bool) -> None:
        self.durability.keeps_unflushed = keeps

    @property
    def in_flight(self) -> int:
        """How many commands are not finished."""
        waiting = self._flushes.waiting + self._trial.waiting + self._changes.in_flight
        return self._channels.in_flight + len(self._unanswered) + waiting

    # Requests.

    def submit(self, request: Request) -> None:
        """Start `request`. Never raises, never blocks; finishes nothing before it returns."""
        op = request.op
        length = request.length
        offset = request.offset
        if (
            op <= 1
            and 0 < length <= (self._changes.fast_write_bytes if op else self._max_read)
            and 0 <= offset <= self._size_bytes - length
            and not (offset | length) & self._align_mask
            and not request.flags
        ):
            channels = self._channels
            if channels.alone is not None:
                channels.alone.send(request)
            else:
                channels.send(request)
        else:
            self._submit_slow(request)

    def _submit_slow(self, request: Request) -> None:
        self._turn.wanted = True
        if request.op == FLUSH:
            self._commands.flush(request)
            return
        error = self._commands.refusal(request)
        changes = self._changes
        if error is not None:
            self._turn.finish(request, error)
        elif request.op in CHANGES and changes.must_enter and not self._channels.fails:
            changes.enter(request, self._align_mask + 1)
        else:
            self._commands.do(request)

    def advance(self) -> bool:
        """See `Stage`: begin the changes whose range has become free, and a FLUSH."""
        moved = self._changes.advance()
        return self._flushes.advance() or moved

    def _send_once_more(self, command: Request) -> None:
        self._commands.resent_total += 1
        self._commands.send_again(command)

    # Phases.

    def refusal(self, export: Export) -> str | None:
        """Why a server that came back must not be used, or None: it is the same export."""
        if not self.generation:
            return None
        old = self.export
        if export.usable_bytes < old.usable_bytes:
            return f"the export shrank from {old.size_bytes} to {export.size_bytes} bytes"
        if export.identity and old.identity and export.identity != old.identity:
            return "it is another volume now, of the same name"
        if export.read_only and not (old.read_only or self._options.read_only):
            return "the export is read-only now"
        if old.can_flush and not export.can_flush:
            return "the server cannot flush any more"
        most_bytes = max(old.min_block_bytes, SECTOR_BYTES)
        if export.min_block_bytes > most_bytes and not self._changes.ordered:
            return (
                f"the minimum block size grew from {old.min_block_bytes} to "
                f"{export.min_block_bytes}"
            )
        return None

    def established(self, now: float, export: Export, channels: Sequence[Channel]) -> None:
        """New connections, all to `export`: a new generation begins."""
        assert self.phase in (Phase.NEW, Phase.DOWN)
        assert channels
        self._turn.want()
        reads_only = export.read_only or self._options.read_only
        self._flushes.reconnected(export.volume.instance, reads_only=reads_only)
        self._channels.replaced(channels)
        old = self._commands.connected(export)
        self._size_bytes = export.usable_bytes
        self._align_mask = export.min_block_bytes - 1
        self._max_read = self._commands.payload_bytes
        limits = self.route.cells
        limits[SIZE_BYTES], limits[ALIGN_MASK] = self._size_bytes, self._align_mask
        limits[MAX_READ_BYTES] = min(self._max_read, LONG_BYTES - 1)
        limits[WHOLE_READ_BYTES] = min(self._max_read, WHOLE_BYTES)
        self._changes.connected(
            several=len(channels) > 1,
            in_parts=export.min_block_bytes > SECTOR_BYTES,
            fenced=export.is_fenced,
            write_bytes=0 if reads_only else self._commands.payload_bytes,
        )
        self._patience.connected(now)
        if old is not None:
            self._resume(now, old)

    def _resume(self, now: float, old: Export) -> None:
        """Send again what was not answered, then what waited."""
        self._channels.enter(on_trial=self._trial.is_due())
        if self._above is not None:
            self._above.reconnected()
            if self.export.usable_bytes != old.usable_bytes:
                self._above.export_changed(self.export)
        again, self._unanswered = self._unanswered, []
        waited = self._channels.take_waiting()
        self._commands.resent_total += len(again)
        self._patience.owed = bool(again or waited)
        self._changes.begin_grace(now, again)
        if (told := self._flushes.report_loss()) is not None:
            again = [command for command in again if command is not told]
            waited = [command for command in waited if command is not told]
        if self._channels.on_trial:
            self._channels.waiting[:0] = waited
            self._trial.begin(again)
        else:
            self._commands.send_all(self._trial.in_order([*again, *waited]))

    @property
    def can_be_moved(self) -> bool:
        """Nothing acknowledged is lost with the present connections, wherever the next ones lead:
        it is durable, or kept above, or the server says whether it is the same one."""
        durability = self.durability
        if durability.keeps_unflushed or durability.instance_mark:
            return True
        changing = any(channel.changes() for channel in self._channels.present)
        return not (changing or durability.unflushed(self._channels.answered))

    def leaving(self) -> None:
        """The connections are being given up: send nothing more on them."""
        if self.phase is Phase.UP:
            self._channels.enter(Phase.LEAVING)

    def lost(
        self,
        now: float,
        unanswered: list[Request],
        *,
        stale_possible: bool,
        answered: bool = True,
        blamed: Request | None = None,
    ) -> None:
        """All connections are closed. `unanswered`: their commands, in the order of sending.

        `stale_possible`: the server may still execute commands that it received. `answered`: some
        were answered. `blamed`: the server hung up, for this unanswered command perhaps.
        """
        assert self.phase in (Phase.UP, Phase.LEAVING)
        self._turn.want()
        for command in unanswered:
            if isinstance(command.done, OnceMore):
                command.done = command.done.done  # It is sent again anyway.
        self._flushes.connection_lost(unanswered)
        self._channels.lost(Phase.DOWN)
        unanswered, tried = self._trial.end(unanswered)
        unanswered, abandoned = without_abandoned(unanswered)
        self._unanswered += unanswered
        self._changes.stale_possible = stale_possible
        self._patience.lost(now, answered=answered)
        if blamed is None or blamed.is_abandoned:
            self._trial.clear()
        elif self._trial.judge(now, blamed, answered=answered, tried=blamed is tried):
            self._fail_blamed(blamed)
        if abandoned:
            self._drop(abandoned)
        self._give_up_when_due(now)

    def _fail_blamed(self, blamed: Request) -> None:
        self._patience.try_at_once()
        self._unanswered.remove(blamed)
        _log.error(
            "the server hangs up whenever a request is sent: it fails",
            op=OP_NAMES[blamed.op],
            offset=blamed.offset,
            length=blamed.length,
        )
        self._changes.left_behind([blamed])
        self._turn.finish(blamed, errno.EIO)

    def closed(self, unanswered: list[Request]) -> None:
        """No more connections: what is left fails."""
        self._flushes.connection_lost(unanswered)
        self._channels.lost(Phase.CLOSED)
        unanswered, _ = self._trial.end(unanswered)
        if unanswered:
            self._changes.stale_possible = True
        unanswered, abandoned = without_abandoned(unanswered)
        self._unanswered += unanswered
        if abandoned:
            self._drop(abandoned)
        self._fail_all(errno.EIO)

    def fail_pending(self, now: float, unanswered: list[Request], error: int) -> None:
        """Finish everything with `error`; the connections are closed already."""
        if self.phase in (Phase.UP, Phase.LEAVING):
            self.lost(now, unanswered, stale_possible=True)
        self._fail_all(error)

    def _fail_all(self, error: int) -> None:
        """Fail what waits, and what comes until there is a connection again.

        The server may execute what it was sent all the same. The client does not send that again,
        and a guest that was told of the failure may write something else there: such places are
        kept in mind.
        """
        self._turn.want()
        self._channels.fail_errno = error
        self._trial.clear()
        again, self._unanswered = self._unanswered, []
        failing = [*again, *self._channels.take_waiting(), *self._flushes.take_waiting()]
        for request in (*failing, *self._changes.take_waiting()):
            self._turn.finish(request, error)
        self._changes.left_behind(again)

    # Time.

    def next_delay_s(self) -> float:
        """How long to wait before the next attempt to connect."""
        return self._patience.next_delay_s()

    def next_deadline_s(self) -> float | None:
        """When `tick` has something to do."""
        deadlines = [self._changes.deadline_s]
        if self.phase is Phase.DOWN and not self.given_up:
            deadlines.append(self._patience.ends_s)
        return min((each for each in deadlines if each is not None), default=None)

    def tick(self, now: float) -> None:
        """Time has passed: end grace times, give up waiting."""
        self._turn.want()
        self._changes.tick(now)
        self._give_up_when_due(now)

    def _give_up_when_due(self, now: float) -> None:
        ends_s = self._patience.ends_s
        if self.phase is Phase.DOWN and not self.given_up and ends_s is not None and now >= ends_s:
            self._channels.given_up = True
            _log.error(
                "no connection for too long: requests fail",
                seconds=self._options.reconnect_timeout_s,
            )
            self._fail_all(errno.EIO)

    def wait_anew(self, now: float) -> None:
        """The connection was done without for a while, and is wanted again from now on."""
        self._turn.want()
        if self.phase is Phase.DOWN:
            self._channels.given_up = False
            self._patience.begin_anew(now)

    # What another process, or an abandoned request, has left behind.

    def expect_unflushed(self) -> None:
        """A process before this one may have left changes that are not flushed, on this server."""
        if self.route.rows is not None:
            self.route.rows.adopt_all()  # A flush that is a row was sent before that is known.
        self._channels.one_more_before()
        self.durability.one_more_before()

    def expect_stale_writes(self, now: float) -> None:
        """A process before this one may have left changes at the server, at unknown places: all
        that are not under way yet wait for the grace time. Call it when that process is gone."""
        self._changes.expect_stale(now)

    @property
    def may_leave_writes(self) -> bool:
        """The server may still execute old changes: the process after this one has to expect it."""
        return self._changes.may_be_left

    def abandon(self) -> None:
        """Some requests were abandoned (`Request.abandon`): commands of theirs that were not sent
        are dropped, those that were are never sent again, and other changes keep out of their way
        until they are answered or, if their connection is lost, for the grace time. The guests
        that were to be told have been: a failed flush would have told none of a loss."""
        self._turn.want()
        channels = self._channels
        self._unanswered, sent = without_abandoned(self._unanswered)
        channels.waiting, unsent = without_abandoned(channels.waiting)
        sent_before = self._trial.take_abandoned()
        flushes = self._flushes.take_abandoned()
        for channel in channels.present:
            for command in channel.abandon():
                self._outlive(command)
        self._drop(sent)
        # What is on trial is held already: its time began with this connection.
        for request in (*unsent, *sent_before, *flushes):
            self._turn.finish(request, errno.ECANCELED)

    def _outlive(self, command: Request) -> None:
        """The answer to `command` is still to come: what it is a part of goes no further then."""
        done = self._trial.done_of(command)
        if isinstance(done, Outlived):
            return  # The guest has paused before.
        if isinstance(done, OnceMore):
            done = done.done
        self._trial.set_done_of(command, self._changes.outlive(command, done))

    def _drop(self, abandoned: list[Request]) -> None:
        """These were sent on a connection that is lost, and are not to be sent again."""
        self._changes.left_behind(abandoned)
        for request in abandoned:
            self._turn.finish(request, errno.ECANCELED)


__all__ = ["Above", "Channel", "Link", "Phase"]
