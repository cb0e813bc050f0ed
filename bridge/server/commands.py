"""What a request is to the server: commands that the present export takes, and what they vouch for.

A **command** is a request that fits the export's limits. One that does not is cut into parts that
do, widened to whole blocks, or done by itself where the export has no such command. The export may
be another one whenever there is a new connection, so a command that is sent again is looked at
again.

What was done in an epoch that has ended may be lost (see `durability`): a change of several
commands, or with FUA, is done once more then. The bytes are still here.
"""

from __future__ import annotations

import errno
from typing import Final

from bridge.datapath.durability import ReportingDurability
from bridge.datapath.request import (
    BLOCK_STATUS,
    CHANGES,
    DISCARD,
    FLUSH,
    FUA,
    INTERNAL,
    PREFETCH,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bridge.datapath.turn import Turn
from bridge.server.align import Aligner
from bridge.server.channels import Channels
from bridge.server.chunks import StatusRequest
from bridge.server.client_options import ClientOptions
from bridge.server.export import Export
from bridge.server.flushes import NO_FAILURE, Flushes
from bridge.server.split import Limits, Split
from bridge.units import SECTOR_BYTES

_STATUS_MAX_BYTES: Final = 1 << 30


class Commands:
    """See the module's text."""

    def __init__(
        self, options: ClientOptions, turn: Turn, channels: Channels, flushes: Flushes
    ) -> None:
        self._read_only = options.read_only
        self._turn = turn
        self._channels = channels
        self._flushes = flushes
        self._durability: ReportingDurability = flushes.durability
        self._aligner = Aligner(self.do, turn.finish)
        self._export: Export | None = None
        self._limits = Limits(Export("", 0))
        self._align_mask = 0
        self.resent_total = 0

    @property
    def export(self) -> Export:
        """What the server offers; while there is no connection, what it offered last."""
        assert self._export is not None
        return self._export

    @property
    def payload_bytes(self) -> int:
        """The longest READ or WRITE that is one command."""
        return self._limits.payload_bytes

    @property
    def is_read_only(self) -> bool:
        """Changes are refused."""
        return self.export.read_only or self._read_only

    def connected(self, export: Export) -> Export | None:
        """The server offers this from now on; returns what it offered before."""
        old, self._export = self._export, export
        self._limits = Limits(export)
        self._align_mask = export.min_block_bytes - 1
        return old

    def refusal(self, request: Request) -> int | None:
        """The errno of a request that cannot be done, 0 if nothing is to be done, else None."""
        op = request.op
        offset, length = request.offset, request.length
        if offset < 0 or not 0 <= length <= self.export.usable_bytes - offset:
            return errno.EINVAL
        if op in CHANGES and self.is_read_only:
            return errno.EPERM
        if not length:
            return 0
        if (offset | length) & self._align_mask and self._align_mask < SECTOR_BYTES:
            return errno.EINVAL
        return None

    def do(self, request: Request) -> None:
        """Do a checked request with commands that fit."""
        op = request.op
        export = self.export
        if request.is_abandoned:
            # A part of what was abandoned after the part before it had been answered.
            self._turn.finish(request, errno.ECANCELED)
        elif op == BLOCK_STATUS:
            self._block_status(request)
        elif (op == DISCARD and not export.can_trim) or (op == PREFETCH and not export.can_cache):
            request.generation = self._channels.generation
            self._turn.finish(request)  # Hints.
        elif (request.offset | request.length) & self._align_mask:
            self._aligner.do(self._whole(request), export.min_block_bytes)
        elif op <= WRITE and self.fits(request):
            self._issue(request)
        else:
            Split(self._whole(request), export, self._limits, self._part, self._turn.finish).start()

    def _part(self, part: Request) -> None:
        """A part of a split request; the export may be another one by now."""
        if part.is_abandoned:
            # One that was too long is not tried again smaller.
            self._turn.finish(part, errno.ECANCELED)
        elif part.op == FLUSH:
            # It stands for FUA: what it must vouch for is that write only (see `_whole`).
            part.flags = INTERNAL
            self.flush(part)
        elif self.fits(part):
            self._issue(part)
        else:
            self.do(part)

    def flush(self, request: Request) -> None:
        """Do a FLUSH."""
        if self.export.can_flush:
            self._flushes.ask(request)
        else:
            request.generation = self._channels.generation
            self._turn.finish(request)

    def send_again(self, command: Request) -> None:
        """Send a command that was sent before; the export may be another one by now."""
        command.progress = self._durability.sending_epoch
        if command.is_abandoned:
            self._turn.finish(command, errno.ECANCELED)  # Its bytes are gone.
        elif self.fits(command):
            self._channels.send(command)
        else:
            self.do(command)

    def send_all(self, commands: list[Request]) -> None:
        """Send commands that were made for an earlier connection, or without one."""
        for command in commands:
            if command.op == FLUSH:
                self._flushes.send(command)
            else:
                self.send_again(command)

    def _issue(self, request: Request) -> None:
        """Send one command that fits."""
        if request.flags & FUA and not self._durability.keeps_unflushed:
            request = Request(
                request.op,
                request.offset,
                request.length,
                request.buffers,
                self._fua_done,
                request.flags,
                request,
            )
            request.progress = self._durability.sending_epoch
            self._flushes.durable_change_begins()
        self._channels.send(request)

    def _fua_done(self, inner: Request) -> None:
        request = inner.owner
        assert isinstance(request, Request)
        if not inner.error and inner.progress != self._durability.epoch:
            # Answered in the turn that brought the end of that epoch, but perhaps executed before.
            self.resent_total += 1
            self.send_again(inner)
            return
        if inner.error and inner.generation and inner.error not in NO_FAILURE:
            self._flushes.server_failed()
        self._flushes.durable_change_ends()
        request.generation = inner.generation
        self._turn.finish(request, inner.error)

    def _whole(self, request: Request) -> Request:
        """`request`, to be done with several commands, all of them in one epoch."""
        if request.op not in CHANGES or self._durability.keeps_unflushed:
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
        whole.progress = self._durability.sending_epoch
        return whole

    def _whole_done(self, whole: Request) -> None:
        request = whole.owner
        assert isinstance(request, Request)
        if not whole.error and whole.progress != self._durability.epoch:
            # The server may have dropped the first commands; the bytes are still here.
            self.resent_total += 1
            self.do(request)
            return
        request.generation = whole.generation
        self._turn.finish(request, whole.error)

    def fits(self, request: Request) -> bool:
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
            self._channels.send(part)
        else:
            self._channels.send(request)

    def _status_done(self, part: StatusRequest) -> None:
        request = part.owner
        assert isinstance(request, StatusRequest)
        request.extents = part.extents
        request.generation = part.generation
        self._turn.finish(request, part.error)
