"""What a client does when its server goes away and comes back, without I/O.

Theory. A session outlives its connections. It takes requests at any time and hands **commands**
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

Two things a new connection must not be believed in:

- **A write left behind.** A server without a fence may execute a write of the lost connection
  after the reconnect. If the loss left that possible (anything but the end of a unix socket), new
  changes that overlap one that had no answer wait for `stale_write_grace_s`, whether that one is
  sent again or was failed meanwhile. Where a process before this one may have left writes
  (`expect_stale_writes`), it may have done so anywhere, and all changes wait as long. Our nbdkit
  plugin fences (`session=yes` in the export's description), so nothing waits.
- **A flush.** Writes that were answered but not flushed may have died with the old server. Unless
  the layer above keeps them to send again (`keeps_unflushed`), or the server proves that it is the
  same one (`instance=` in the description), the next flush fails with EIO, once. A server that
  fails to flush may drop them, too. `durability` has the rules; here stands what they lead to:
  one FLUSH is in flight at a time, so that no other one's failure can be overtaken by its success,
  and changes that were in flight when an epoch ended are sent once more when they are answered.

Overlapping changes race only where somebody could make them pass each other: with several
channels, or blocks that are read, modified and written. Then `Ranges` sends them one by one.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Callable, Sequence
from enum import Enum
from math import inf
from random import Random
from typing import Final, Protocol, cast

import structlog

from bridge.datapath.durability import BEFORE, Told
from bridge.datapath.request import (
    BLOCK_STATUS,
    CHANGES,
    DISCARD,
    FLUSH,
    FUA,
    OP_NAMES,
    PREFETCH,
    READ,
    REPEATED,
    UNASKED,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bridge.datapath.turn import Turn
from bridge.server.align import Aligner, cover
from bridge.server.chunks import StatusRequest
from bridge.server.client_options import ClientOptions
from bridge.server.export import Export
from bridge.server.grace import WHOLE_DISK, Held
from bridge.server.overlaps import Claim, Ranges, Span
from bridge.server.split import Limits, Split
from bridge.server.suspects import Suspects
from bridge.units import SECTOR_BYTES

_log = structlog.get_logger(__name__)

_GOOD_CONNECTION_S: Final = 1.0
_NOTHING_DONE: Final = (errno.EINVAL, errno.EOVERFLOW, errno.EPERM, errno.EOPNOTSUPP)
"""With these a server refuses a command; it has not tried to make anything durable."""
_NO_FAILURE: Final = (*_NOTHING_DONE, errno.ECANCELED)
"""The same, and that of a command that was abandoned: the server has done it."""
_STATUS_MAX_BYTES: Final = 1 << 30


class Phase(Enum):
    """See the module's text."""

    NEW = "new"
    UP = "up"
    LEAVING = "leaving"
    DOWN = "down"
    CLOSED = "closed"


class Channel(Protocol):
    """One connection, as the session sees it."""

    @property
    def unflushed(self) -> int:
        """How many writes without FUA it has answered."""

    @property
    def in_flight(self) -> int:
        """How many commands it has not answered."""

    def changes(self) -> list[Request]:
        """The commands that change the export and are not finished."""

    def send(self, request: Request) -> None:
        """Send a command; it finishes, or is among the unanswered ones when the channel is lost."""

    def abandon(self) -> list[Request]:
        """The commands without an answer that are of abandoned requests: from here on nothing
        touches the buffers that those came with."""


class Session:
    """See the module's text. `now` is in seconds of any monotonic clock."""

    def __init__(self, options: ClientOptions, turn: Turn, *, random: Random | None = None) -> None:
        """Takes part in `turn` as a stage (`turn.add_stage`), which is its owner's to arrange."""
        self._turn = turn
        self.phase = Phase.NEW
        self.generation = 0
        self.durability = Told()
        self.on_reconnect: Callable[[], None] = _nothing
        self.on_export_changed: Callable[[Export], None] = _nothing_changed
        self.given_up = False
        self.resent_total = 0
        self.flushes_refused_total = 0
        self._options = options
        self._random = random or Random()
        self._export: Export | None = None
        self._limits = Limits(Export("", 0))
        self._channels: Sequence[Channel] = ()
        self._next_channel = 0
        self._channel: Channel | None = None
        """Where commands go, if that is one place; None: see `_send`."""
        self._waiting: list[Request] = []
        self._unanswered: list[Request] = []
        self._aligner = Aligner(self._command, turn.finish)
        self._ranges = Ranges()
        self._held = Held(self._ranges)
        self._outlived: set[Claim] = set()
        """What commands of abandoned requests, sent and not answered, may still change."""
        self._ordered = False
        self._stale_possible = False
        self._down_since_s = 0.0
        self._up_since_s = 0.0
        self._owed = False
        """The present connections began with commands that the last ones had not answered."""
        self._suspects = Suspects()
        self._begin_with_trial = False
        self._on_trial = False
        """Nothing is sent but what is tried."""
        self._trial: deque[Request] = deque()
        """Commands that are still to be sent alone; see `suspects`."""
        self._tried: Request | None = None
        """The one that is being tried, or the probe before all of them."""
        self._tried_done: Callable[[Request], None] = _ignore
        self._attempts = 0
        self._answered_before = BEFORE
        self._flushes: list[Request] = []
        """What the next FLUSH is for."""
        self._flushing: Request | None = None
        """The FLUSH that has no answer yet."""
        self._flushing_epoch = 0
        self._fail_errno = errno.EIO
        # Limits of the fast path in `submit`; 0 sends everything the slow way.
        self._size_bytes = 0
        self._max_read = 0
        self._max_write = 0
        self._align_mask = 0

    # Requests.

    def submit(self, request: Request) -> None:
        """Start `request`. Never raises, never blocks; finishes nothing before it returns."""
        op = request.op
        length = request.length
        offset = request.offset
        if (
            op <= 1
            and 0 < length <= (self._max_write if op else self._max_read)
            and 0 <= offset <= self._size_bytes - length
            and not (offset | length) & self._align_mask
            and not request.flags
        ):
            if self._channel is not None:
                self._channel.send(request)
            else:
                self._send(request)
        else:
            self._submit_slow(request)

    def _submit_slow(self, request: Request) -> None:
        if request.op == FLUSH:
            self._flush(request)
            return
        error = self._refusal(request)
        if error is not None:
            self._turn.finish(request, error)
        elif (
            request.op in CHANGES
            and (self._ordered or self._held or self._outlived)
            and not self._fails
        ):
            start, stop = request.offset, request.offset + request.length
            block_bytes = self._align_mask + 1
            change = _Change(request, *cover(start, stop - start, block_bytes))
            if self._ranges.enter(change):
                self._begin(change)
        else:
            self._command(request)

    # Changes that keep others out of their range.

    def advance(self) -> bool:
        """See `Stage`: begin the changes whose range has become free, and a FLUSH."""
        durability = self.durability
        if not durability.keeps_unflushed:
            # By now everybody was told of what has been answered. One channel is the usual case.
            channel = self._channel
            answered = (
                self._answered_before + channel.unflushed if channel is not None else self._answered
            )
            if durability.settled(answered):
                self._turn.at_end(durability.turn_over)
        moved = False
        gone = self._ranges.gone
        while gone:
            moved = True
            claim = gone.popleft()
            if isinstance(claim, _Change):
                self._begin(claim)
        if self._flushes and self._flushing is None and self.phase is Phase.UP:
            moved = True
            self._send_flush()
        return moved

    def _begin(self, change: _Change) -> None:
        request = change.request
        op, offset, length, buffers = request.op, request.offset, request.length, request.buffers
        done, owner = self._change_done, (request, change)
        self._command(_ChangeCommand(op, offset, length, buffers, done, request.flags, owner))

    def _change_done(self, inner: _ChangeCommand) -> None:
        request, change = inner.owner
        request.generation = inner.generation
        self._ranges.release(change)
        self._turn.finish(request, inner.error)

    def _refusal(self, request: Request) -> int | None:
        """The errno of a request that cannot be done, 0 if nothing is to be done, else None."""
        op = request.op
        offset, length = request.offset, request.length
        if offset < 0 or not 0 <= length <= self._size_bytes - offset:
            return errno.EINVAL
        if op in CHANGES and (self.export.read_only or self._options.read_only):
            return errno.EPERM
        if not length:
            return 0
        if (offset | length) & self._align_mask and self._align_mask < SECTOR_BYTES:
            return errno.EINVAL
        return None

    def _command(self, request: Request) -> None:
        """Do a checked request with commands that fit."""
        op = request.op
        export = self.export
        if request.is_abandoned:
            # A part of what was abandoned after the part before it had been answered.
            self._turn.finish(request, errno.ECANCELED)
        elif op == BLOCK_STATUS:
            self._block_status(request)
        elif (op == DISCARD and not export.can_trim) or (op == PREFETCH and not export.can_cache):
            request.generation = self.generation
            self._turn.finish(request)  # Hints.
        elif (request.offset | request.length) & self._align_mask:
            self._aligner.do(self._whole(request), export.min_block_bytes)
        elif op <= WRITE and self._fits(request):
            self._issue(request)
        else:
            Split(self._whole(request), export, self._limits, self._part, self._turn.finish).start()

    def _part(self, part: Request) -> None:
        """A part of a split request; the export may be another one by now."""
        if part.is_abandoned:
            self._turn.finish(
                part, errno.ECANCELED
            )  # One that was too long is not tried again smaller.
        elif part.op == FLUSH:
            # It stands for FUA: what it must vouch for is that write only (see `_whole`).
            part.flags = UNASKED
            self._flush(part)
        elif self._fits(part):
            self._issue(part)
        else:
            self._command(part)

    def _issue(self, request: Request) -> None:
        """Send one command that fits."""
        if request.flags & FUA and not self.durability.keeps_unflushed:
            request = Request(
                request.op,
                request.offset,
                request.length,
                request.buffers,
                self._fua_done,
                request.flags,
                request,
            )
            request.progress = self.durability.sending_epoch
        self._send(request)

    def _fua_done(self, inner: Request) -> None:
        request = inner.owner
        assert isinstance(request, Request)
        if not inner.error and inner.progress != self.durability.epoch:
            # Answered in the turn that brought the end of that epoch, but perhaps executed before.
            self.resent_total += 1
            self._send_again(inner)
            return
        if inner.error and inner.generation and inner.error not in _NO_FAILURE:
            self._refuse_flushes(self._end_epoch())
        request.generation = inner.generation
        self._turn.finish(request, inner.error)

    def _whole(self, request: Request) -> Request:
        """`request`, to be done with several commands, all of them in one epoch."""
        if request.op not in CHANGES or self.durability.keeps_unflushed:
            return request
        whole = Request(
            request.op,
            request.offset,
            request.length,
            request.buffers,
            self._whole_done,
            request.flags,
            request,
        )
        whole.progress = self.durability.sending_epoch
        return whole

    def _whole_done(self, whole: Request) -> None:
        request = whole.owner
        assert isinstance(request, Request)
        if not whole.error and whole.progress != self.durability.epoch:
            # The server may have dropped the first commands; the bytes are still here.
            self.resent_total += 1
            self._command(request)
            return
        request.generation = whole.generation
        self._turn.finish(request, whole.error)

    def _fits(self, request: Request) -> bool:
        """The request is one command that the present export takes."""
        op = request.op
        export = self.export
        limits = self._limits
        if (request.offset | request.length) & self._align_mask:
            return False
        if request.flags & FUA and not export.can_fua:
            return False
        if op <= WRITE:
            return request.length <= limits.payload_bytes
        if op == DISCARD:
            return export.can_trim and request.length <= limits.effect_bytes
        if op == WRITE_ZEROES:
            return export.can_write_zeroes and request.length <= limits.effect_bytes
        if op == PREFETCH:
            return export.can_cache and request.length <= limits.effect_bytes
        return op == BLOCK_STATUS and export.can_block_status

    def _block_status(self, request: Request) -> None:
        if not isinstance(request, StatusRequest):
            self._turn.finish(request, errno.EINVAL)
        elif not self.export.can_block_status:
            self._turn.finish(request, errno.EOPNOTSUPP)
        elif (request.offset | request.length) & self._align_mask:
            self._aligner.do(request, self.export.min_block_bytes)
        elif request.length > _STATUS_MAX_BYTES:
            part = StatusRequest(
                *(BLOCK_STATUS, request.offset, _STATUS_MAX_BYTES, []),
                *(self._status_done, 0, request),
            )
            part.extents = []
            self._send(part)
        else:
            self._send(request)

    def _status_done(self, part: StatusRequest) -> None:
        request = part.owner
        assert isinstance(request, StatusRequest)
        request.extents = part.extents
        request.generation = part.generation
        self._turn.finish(request, part.error)

    # Flushes.

    def _flush(self, request: Request) -> None:
        if not self.export.can_flush:
            request.generation = self.generation
            self._turn.finish(request, 0)
        elif self._fails:
            self._turn.finish(request, self._fail_errno)
        else:
            request.progress = self.durability.seen
            self._flushes.append(request)
            self._turn.want()

    def _send_flush(self) -> None:
        """Send one FLUSH for all that wait for one; none is in flight.

        One at a time: a server that fails to flush drops what it had and says so once. The success
        of another FLUSH, sent after that and read before, must not be believed.
        """
        if self.durability.untold:
            self._refuse_flushes(self._take_guests_flushes())
        if self._flushes:
            waiting, self._flushes = self._flushes, []
            inner = self._flushing = Request(FLUSH, 0, 0, [], self._flushed, 0, waiting)
            self._send_this_flush(inner)

    def _send_this_flush(self, inner: Request) -> None:
        self._note_flush_sent(inner)
        self._send(inner)

    def _note_flush_sent(self, inner: Request) -> None:
        """What a FLUSH that is sent now will vouch for."""
        inner.progress = self._answered
        self._flushing_epoch = self.durability.sending_epoch

    def _take_guests_flushes(self) -> list[Request]:
        """All that the guest has submitted and not heard of, also those of the FLUSH in flight."""
        taken: list[Request] = []
        if self._flushing is not None:
            flushes = cast("list[Request]", self._flushing.owner)
            taken, self._flushing.owner = _guests_and_others(flushes)
        waiting, self._flushes = _guests_and_others(self._flushes)
        return taken + waiting

    def _refuse_flushes(self, flushes: list[Request]) -> None:
        """Fail these flushes of the guest's: something may be lost that was complete before."""
        if not flushes:
            return
        self.flushes_refused_total += len(flushes)
        _log.error("a flush fails: writes before it may have been lost by the server")
        self._tell(flushes)
        for request in flushes:
            request.generation = self.generation
            self._turn.finish(request, errno.EIO)

    def _tell(self, flushes: list[Request]) -> None:
        for request in flushes:
            if not request.flags & (UNASKED | REPEATED):
                self.durability.tell(request.progress)

    def _flushed(self, inner: Request) -> None:
        error = inner.error
        flushes = cast("list[Request]", inner.owner)
        # Not if a new connection came in the same turn as this answer, and a loss was told of.
        expected = self._flushing is inner
        if expected:
            self._flushing = None
        for request in flushes:
            request.generation = inner.generation
            self._turn.finish(request, error)
        if error:
            self._tell(flushes)
            if inner.generation:  # The server said so, not we.
                self._refuse_flushes(self._end_epoch())
        elif expected:
            self.durability.flushed(inner.progress, self._flushing_epoch)

    def _end_epoch(self) -> list[Request]:
        """The server could not make something durable, and may have dropped what it had.

        What is in flight is sent once more when it is answered: nobody knows whether the server
        executed it before. Returns the flushes that have to fail with this.
        """
        durability = self.durability
        lost = durability.could_not_flush(self._answered)
        if durability.keeps_unflushed:
            return []
        for channel in self._channels:
            for request in channel.changes():
                if not isinstance(request.done, (_OnceMore, _Outlived)):
                    request.done = _OnceMore(self, request.done)
        return self._take_guests_flushes() if lost else []

    def _send_again(self, request: Request) -> None:
        """A command that was sent before; the export may be another one by now."""
        request.progress = self.durability.sending_epoch
        if request.is_abandoned:
            self._turn.finish(request, errno.ECANCELED)  # Its bytes are gone.
        elif self._fits(request):
            self._send(request)
        else:
            self._command(request)

    @property
    def _answered(self) -> int:
        """Changes answered that a FLUSH makes durable; what was before this process is one."""
        return self._answered_before + sum(channel.unflushed for channel in self._channels)

    @property
    def keeps_unflushed(self) -> bool:
        """The layer above sends unflushed writes again when `on_reconnect` tells it to."""
        return self.durability.keeps_unflushed

    @keeps_unflushed.setter
    def keeps_unflushed(self, keeps: bool) -> None:
        self.durability.keeps_unflushed = keeps

    def expect_unflushed(self) -> None:
        """A process before this one may have left changes that are not flushed, on this server."""
        self._answered_before += 1
        self.durability.one_more_before()

    # Where commands go.

    def _send(self, request: Request) -> None:
        """To a channel, if there are any to send to; else it waits for one, or fails."""
        if self._fails:
            self._turn.finish(request, self._fail_errno)
        elif self.phase is not Phase.UP or self._on_trial:
            self._waiting.append(request)
        else:
            channels = self._channels
            index = self._next_channel = (self._next_channel + 1) % len(channels)
            channels[index].send(request)

    def _choose_channel(self) -> None:
        """After everything that decides where commands go."""
        alone = self.phase is Phase.UP and not self._on_trial and len(self._channels) == 1
        self._channel = self._channels[0] if alone else None

    # Phases.

    @property
    def export(self) -> Export:
        """What the server offers; while there is no connection, what it offered last."""
        assert self._export is not None
        return self._export

    def refusal(self, export: Export) -> str | None:
        """Why a server that came back must not be used, or None: it is the same export."""
        old = self._export
        if old is None:
            return None
        if export.usable_bytes < old.usable_bytes:
            return f"the export shrank from {old.size_bytes} to {export.size_bytes} bytes"
        if export.identity and old.identity and export.identity != old.identity:
            return "it is another volume now, of the same name"
        if export.read_only and not (old.read_only or self._options.read_only):
            return "the export is read-only now"
        if old.can_flush and not export.can_flush:
            return "the server cannot flush any more"
        if export.min_block_bytes > max(old.min_block_bytes, SECTOR_BYTES) and not self._ordered:
            return (
                f"the minimum block size grew from {old.min_block_bytes} to "
                f"{export.min_block_bytes}"
            )
        return None

    def established(self, now: float, export: Export, channels: Sequence[Channel]) -> None:
        """New connections, all to `export`: a new generation begins."""
        assert self.phase in (Phase.NEW, Phase.DOWN)
        assert channels
        old = self._export
        self.generation += 1
        self.phase = Phase.UP
        self.given_up = False
        self._up_since_s = now
        self._channels = channels
        self._judge_unflushed(export)
        self._export = export
        self._limits = Limits(export)
        self._size_bytes = export.usable_bytes
        self._align_mask = export.min_block_bytes - 1
        self._ordered = len(channels) > 1 or export.min_block_bytes > SECTOR_BYTES
        self._choose_channel()
        self._set_fast_limits()
        if old is not None:
            self._resume(now, old)

    def _set_fast_limits(self) -> None:
        export = self.export
        self._max_read = self._limits.payload_bytes
        slow = self._ordered or self._held or self._outlived
        fast = not (slow or export.read_only or self._options.read_only)
        self._max_write = self._limits.payload_bytes if fast else 0

    def _judge_unflushed(self, export: Export) -> None:
        """Whether what the old connection answered may be gone (a flush must not vouch for it)."""
        if export.read_only or self._options.read_only:
            self.durability.nothing_before()
        lost = self.durability.connected(export.volume.instance, self._answered_before)
        if lost and self._answered_before > BEFORE:
            _log.error(
                "the server came back and may have lost writes that were not flushed: "
                "the next flush will fail"
            )
        elif lost:
            _log.warning(
                "the server came back: if a process before this one left writes that were not "
                "flushed, they may be lost"
            )

    def _resume(self, now: float, old: Export) -> None:
        """Send again what was not answered, then what waited."""
        export = self.export
        self._on_trial, self._begin_with_trial = self._begin_with_trial, False
        self._choose_channel()
        self.on_reconnect()
        if export.usable_bytes != old.usable_bytes:
            self.on_export_changed(export)
        again, self._unanswered = self._unanswered, []
        waited, self._waiting = self._waiting, []
        self.resent_total += len(again)
        self._owed = bool(again or waited)
        self._begin_grace(now, _changed(again) if self._stale_possible else [])
        if self.durability.untold:
            self._refuse_flushes(self._take_guests_flushes())
        again, waited = self._without_told_flush(again, waited)
        if self._on_trial:
            self._waiting[:0] = waited
            self._trial.extend(again)
            self._begin_trial()
        else:
            self._send_all(self._suspects.in_order([*again, *waited]))

    def _without_told_flush(
        self, again: list[Request], waited: list[Request]
    ) -> tuple[list[Request], list[Request]]:
        """Both without the FLUSH if all that it was for have heard of a loss."""
        flushing = self._flushing
        if flushing is None or flushing.owner:
            return again, waited
        self._flushing = None
        return (
            [request for request in again if request is not flushing],
            [request for request in waited if request is not flushing],
        )

    def _send_all(self, requests: list[Request]) -> None:
        """Send commands that were made for an earlier connection, or without one."""
        for request in requests:
            if request.op == FLUSH:
                self._send_this_flush(request)
            else:
                self._send_again(request)

    # Trials: see `suspects`.

    def _begin_trial(self) -> None:
        if self._trial and not self._suspects.proven:
            length = min(max(self._align_mask + 1, SECTOR_BYTES), self._size_bytes)
            offset = 0 if self._trial[0].offset >= length else self._size_bytes - length
            self._try(Request(READ, offset, length, [memoryview(bytearray(length))], _ignore))
        else:
            self._try_next()

    def _try_next(self) -> None:
        """Send the next command alone; after the last one, all that waited meanwhile."""
        while self._trial and self.phase is Phase.UP:
            request = self._trial.popleft()
            if request.op == FLUSH:
                self._note_flush_sent(request)
            elif not self._fits(request):
                self._waiting.append(request)
                continue
            else:
                request.progress = self.durability.sending_epoch
            self._try(request)
            return
        if self.phase is Phase.UP:
            self._suspects.clear()
            self._on_trial = False
            self._choose_channel()
            waited, self._waiting = self._waiting, []
            self._send_all(waited)

    def _try(self, request: Request) -> None:
        self._tried, self._tried_done = request, request.done
        request.done = self._answered_alone
        self._channels[0].send(request)

    def _answered_alone(self, request: Request) -> None:
        self._suspects.proven = True
        self._end_try()
        request.done(request)
        self._try_next()

    def _end_try(self) -> None:
        if self._tried is not None:
            self._tried.done = self._tried_done
            self._tried, self._tried_done = None, _ignore

    def _take_trial(self, unanswered: list[Request]) -> list[Request]:
        """End the trial; `unanswered` without the probe, and what was not tried any more."""
        tried = self._tried
        self._end_try()
        left = [*unanswered, *self._trial]
        self._trial.clear()
        if tried is not None and tried.done is _ignore:
            left = [request for request in left if request is not tried]
        return left

    def _judge_hang_up(self, now: float, blamed: Request, *, answered: bool, tried: bool) -> None:
        """The server hung up with `blamed` unanswered; `tried`: when it was sent alone."""
        if not tried:
            self._begin_with_trial = self._suspects.hung_up(blamed, now, answered=answered)
        elif blamed.done is _ignore:
            self._suspects.probe_failed()
        else:
            self._suspects.found(now)
            self._attempts = 0
            self._unanswered.remove(blamed)
            _log.error(
                "the server hangs up whenever a request is sent: it fails",
                op=OP_NAMES[blamed.op],
                offset=blamed.offset,
                length=blamed.length,
            )
            if self._stale_possible:
                self._hold(_changed([blamed]))
            self._turn.finish(blamed, errno.EIO)

    def _begin_grace(self, now: float, again: list[Span]) -> None:
        """Keep new changes away from what lost connections may still do: in `again`, and where
        changes were failed since."""
        if self._fenced:
            self._held.begin(now)
            self._held.expire(now)
        else:
            self._held.begin(now + self._options.stale_write_grace_s)
            self._hold(again, now + self._options.stale_write_grace_s)
        self._set_fast_limits()

    @property
    def _fenced(self) -> bool:
        """The server executes nothing of a lost connection once there is a new one."""
        return self.export.volume.is_fenced

    def _hold(self, spans: list[Span], until_s: float = inf) -> None:
        if spans and self._options.stale_write_grace_s:
            self._held.hold(spans, until_s)
            self._set_fast_limits()

    @property
    def _fails(self) -> bool:
        """What comes fails at once; it must not wait for the end of a grace time."""
        return self.given_up or self.phase is Phase.CLOSED

    def expect_stale_writes(self, now: float) -> None:
        """A process before this one may have left changes at the server, nobody knows where: all
        that are not under way yet wait for the grace time. Call it when that process is gone."""
        # Its connections ended with it, and the server has received what it will (but for what a
        # kernel still had to send): the grace of our own lost connections counts from no later
        # point either. It does not count from our first connection, which may be older than the
        # other's end: that of a bridge that stood by, or of the one that a guest migrates to.
        if self._fenced:
            return
        grace_s = self._options.stale_write_grace_s
        self._hold([WHOLE_DISK], now + grace_s)
        if grace_s:
            _log.info("the process before may have left writes: ours wait", seconds=grace_s)

    @property
    def may_leave_writes(self) -> bool:
        """The server may still execute old changes: the process after this one has to expect it."""
        return bool(self._held) and not self._fenced

    @property
    def can_be_moved(self) -> bool:
        """Nothing acknowledged is lost with the present connections, wherever the next ones lead:
        it is durable, or kept above, or the server says whether it is the same one."""
        durability = self.durability
        if durability.keeps_unflushed or durability.instance_mark:
            return True
        changing = any(channel.changes() for channel in self._channels)
        return not (changing or durability.unflushed(self._answered))

    def leaving(self) -> None:
        """The connections are being given up: send nothing more on them."""
        if self.phase is Phase.UP:
            self.phase = Phase.LEAVING
            self._choose_channel()

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
        self._answered_before = self._answered
        self._channels = ()
        for request in unanswered:
            if isinstance(request.done, _OnceMore):
                request.done = request.done.done  # It is sent again anyway.
        tried = self._tried
        unanswered, abandoned = _without_abandoned(self._take_trial(unanswered))
        self._unanswered += unanswered
        self._stale_possible = stale_possible
        if answered or not self._owed:
            # Otherwise it was no better than none: what waits has waited since an earlier loss.
            self._down_since_s = now
        if answered or now - self._up_since_s >= _GOOD_CONNECTION_S:
            # Only after a connection that was good for something does the backoff begin anew. A
            # server that takes connections and then drops them, or refuses every command with
            # ESHUTDOWN, must not be connected to without a pause.
            self._attempts = 0
        self.phase = Phase.DOWN
        self._on_trial = False
        self._choose_channel()
        if blamed is None or blamed.is_abandoned:
            self._suspects.clear()
        else:
            self._judge_hang_up(now, blamed, answered=answered, tried=blamed is tried)
        if abandoned:
            self._drop(abandoned)
        self._give_up_when_due(now)

    def next_delay_s(self) -> float:
        """How long to wait before the next attempt to connect."""
        attempts = self._attempts
        self._attempts += 1
        if not attempts:
            return 0.0
        options = self._options
        # Bounded before the power is: 2.0 ** 2000 would overflow.
        delay_s = options.reconnect_first_s * 2.0 ** min(attempts - 1, 30)
        return min(delay_s, options.reconnect_max_s) * self._random.uniform(0.5, 1.0)

    def tick(self, now: float) -> None:
        """Time has passed: end grace times, give up waiting."""
        if self._held:
            self._held.expire(now)
            self._set_fast_limits()
        self._give_up_when_due(now)

    def _give_up_when_due(self, now: float) -> None:
        timeout_s = self._options.reconnect_timeout_s
        if (
            self.phase is Phase.DOWN
            and timeout_s
            and not self.given_up
            and now - self._down_since_s >= timeout_s
        ):
            self.given_up = True
            _log.error("no connection for too long: requests fail", seconds=timeout_s)
            self._fail_all(errno.EIO)

    def wait_anew(self, now: float) -> None:
        """The connection was done without for a while, and is wanted again from now on."""
        if self.phase is Phase.DOWN:
            self._down_since_s = now
            self.given_up = False
            self._attempts = 0

    def next_deadline_s(self) -> float | None:
        """When `tick` has something to do."""
        deadline_s = self._held.deadline_s
        deadlines = [] if deadline_s is None else [deadline_s]
        if self.phase is Phase.DOWN and self._options.reconnect_timeout_s and not self.given_up:
            deadlines.append(self._down_since_s + self._options.reconnect_timeout_s)
        return min(deadlines, default=None)

    def _fail_all(self, error: int) -> None:
        """Fail what waits, and what comes until there is a connection again.

        The server may execute what it was sent all the same. Nobody sends that again, and whoever
        was told of the failure may write something else there: it has to be kept in mind.
        """
        self._fail_errno = error
        self._suspects.clear()
        again, self._unanswered = self._unanswered, []
        waited, self._waiting = self._waiting, []
        # Taken out first: what waits for one of those that fail now must fail with it, and not
        # be sent at any later time.
        claims = self._ranges.take_waiting()
        gone, self._ranges.gone = self._ranges.gone, deque()
        left = _changed(again) if self._stale_possible else []
        flushes, self._flushes = self._flushes, []
        self._tell(flushes)
        for request in (*again, *waited, *flushes):
            self._turn.finish(request, error)
        for claim in gone:
            if isinstance(claim, _Change):
                self._ranges.release(claim)
        for claim in (*gone, *claims):
            if isinstance(claim, _Change):
                self._turn.finish(claim.request, error)
        self._hold(left)

    def fail_pending(self, now: float, unanswered: list[Request], error: int) -> None:
        """Finish everything with `error`; the connections are closed already."""
        if self.phase in (Phase.UP, Phase.LEAVING):
            self.lost(now, unanswered, stale_possible=True)
        self._fail_all(error)

    def abandon(self) -> None:
        """Some requests were abandoned (`Request.abandon`): commands of theirs that were not sent
        are dropped, those that were are never sent again, and other changes keep out of their way
        until they are answered or, if their connection is lost, for the grace time. Whoever was to
        be told of anything has been: a failed flush of theirs would have told nobody of a loss."""
        self._unanswered, sent = _without_abandoned(self._unanswered)
        self._waiting, unsent = _without_abandoned(self._waiting)
        on_trial, sent_before = _without_abandoned(list(self._trial))
        self._trial = deque(on_trial)
        if self._tried is not None and self._tried.done != self._answered_alone:
            # It was abandoned itself: the trial goes on all the same when it is answered.
            self._tried_done, self._tried.done = self._tried.done, self._answered_alone
        self._flushes, flushes = _without_abandoned(self._flushes)
        if self._flushing is not None:
            answering = cast("list[Request]", self._flushing.owner)
            self._flushing.owner, more = _without_abandoned(answering)
            flushes += more
        for channel in self._channels:
            for command in channel.abandon():
                self._outlive(command)
        self._set_fast_limits()
        self._drop(sent)
        # What is on trial is held already: its time began with this connection.
        for request in (*unsent, *sent_before, *flushes):
            self._turn.finish(request, errno.ECANCELED)

    def _outlive(self, command: Request) -> None:
        """The answer to `command` is still to come: what it is a part of goes no further then."""
        on_trial = command is self._tried
        done = self._tried_done if on_trial else command.done
        if isinstance(done, _Outlived):
            return  # The guest has paused before.
        if isinstance(done, _OnceMore):
            done = done.done
        claim: Claim | None = None
        if command.op in CHANGES:
            claim = Claim(command.offset, command.offset + command.length)
            self._outlived.add(claim)
            self._ranges.enter(claim)
        if on_trial:
            self._tried_done = _Outlived(self, done, claim)
        else:
            command.done = _Outlived(self, done, claim)

    def _outlived_ended(self, claim: Claim) -> None:
        self._outlived.remove(claim)
        self._ranges.withdraw(claim)
        self._set_fast_limits()

    def _drop(self, abandoned: list[Request]) -> None:
        """These were sent on a connection that is lost, and are not to be sent again."""
        if self._stale_possible:
            self._hold(_changed(abandoned))
        for request in abandoned:
            self._turn.finish(request, errno.ECANCELED)

    def closed(self, unanswered: list[Request]) -> None:
        """No more connections: what is left fails."""
        self._channels = ()
        if unanswered := self._take_trial(unanswered):
            self._stale_possible = True
        unanswered, abandoned = _without_abandoned(unanswered)
        self._unanswered += unanswered
        self.phase = Phase.CLOSED
        self._choose_channel()
        if abandoned:
            self._drop(abandoned)
        self._fail_all(errno.EIO)

    @property
    def in_flight(self) -> int:
        """How many commands are not finished."""
        return (
            sum(channel.in_flight for channel in self._channels)
            + len(self._unanswered)
            + len(self._waiting)
            + len(self._flushes)
            + len(self._trial)
            + self._ranges.waiting_count
            + len(self._ranges.gone)
        )


class _OnceMore:
    """The `done` of a change that was in flight when an epoch ended: it is sent once more."""

    __slots__ = ("_session", "done")

    def __init__(self, session: Session, done: Callable[[Request], None]) -> None:
        self._session = session
        self.done = done

    def __call__(self, request: Request) -> None:
        request.done = self.done
        if request.error:
            self.done(request)
        else:
            request.generation = 0  # Nobody has answered what is sent now.
            self._session.resent_total += 1
            self._session._send_again(request)


class _Outlived:
    """The `done` of a command of an abandoned request that is still to be answered."""

    __slots__ = ("_claim", "_done", "_session")

    def __init__(
        self, session: Session, done: Callable[[Request], None], claim: Claim | None
    ) -> None:
        """`claim` keeps other changes out of its way meanwhile."""
        self._session = session
        self._done = done
        self._claim = claim

    def __call__(self, command: Request) -> None:
        command.error = command.error or errno.ECANCELED
        self._done(command)
        if self._claim is not None:
            self._session._outlived_ended(self._claim)


class _Change(Claim):
    """A request that waits for its range, and holds it while it is in flight."""

    __slots__ = ("request",)

    def __init__(self, request: Request, start: int, stop: int) -> None:
        super().__init__(start, stop)
        self.request = request


class _ChangeCommand(Request):
    """The command of a `_Change`."""

    __slots__ = ()

    owner: tuple[Request, _Change]


def _guests_and_others(flushes: list[Request]) -> tuple[list[Request], list[Request]]:
    """Those whose failure the guest hears of, and the rest."""
    return (
        [request for request in flushes if not request.flags & UNASKED],
        [request for request in flushes if request.flags & UNASKED],
    )


def _without_abandoned(requests: list[Request]) -> tuple[list[Request], list[Request]]:
    """`requests` without those that were abandoned, and these."""
    abandoned = [each for each in requests if each.is_abandoned]
    if not abandoned:
        return requests, []
    return [each for each in requests if not each.is_abandoned], abandoned


def _changed(requests: list[Request]) -> list[Span]:
    """What some of `requests` change."""
    return [(each.offset, each.offset + each.length) for each in requests if each.op in CHANGES]


def _ignore(request: Request) -> None:
    """Nobody waits for its end: a probe."""


def _nothing() -> None:
    """No hook."""


def _nothing_changed(export: Export) -> None:
    """No hook."""


__all__ = ["Channel", "Phase", "Session"]
