"""DISCARD and WRITE_ZEROES requests, cut into what can be done at once.

Whole blocks go to `range_operations` in bounded pieces, one after the other. Parts of blocks, short
ranges, and everything on a server without WRITE_ZEROES, become writes of zero bytes through the
cache. A discard of parts of blocks does nothing to them: it is a hint.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Final, NamedTuple, cast

from bridge.cache.common import Common
from bridge.cache.range_operations import RangeOperations, RequestOutcome
from bridge.datapath.buffers import ZEROES
from bridge.datapath.request import DISCARD, FUA, WRITE, WRITE_ZEROES, Request

_ZEROES_BYTES = 256 * 1024
"""One write of zero bytes; the same memory for all."""


_STEPS_PER_TURN: Final = 32
"""8 MiB of zeroes: into the cache they end at once, and there may be terabytes of them."""


class _Step(NamedTuple):
    """What can be done at once: a discard or write-zeroes of whole blocks, or a write of zero
    bytes. In bytes of the disk."""

    op: int
    start: int
    end_byte: int
    flags: int


class _RangeOp(RequestOutcome):
    """A request that is done when every step is; the first error ends it. It is the outcome of its
    own steps."""

    __slots__ = ("steps", "taken")

    def __init__(
        self, request: Request, steps: Iterator[_Step], done: Callable[[_RangeOp], None]
    ) -> None:
        super().__init__(request, done)
        self.steps = steps
        self.taken = 0


class RangeRequests:
    """The slow path of DISCARD and WRITE_ZEROES."""

    def __init__(
        self, common: Common, range_operations: RangeOperations, submit: Callable[[Request], None]
    ) -> None:
        """`submit` takes the writes: the cache's own."""
        self._common = common
        self._index = common.index
        self._upstream = common.upstream
        self._range_operations = range_operations
        self._run_blocks = max(1, common.options.exclusive_run_bytes >> self._index.block_shift)
        self._zero_copy_bytes = common.options.zero_copy_bytes
        self._submit = submit

    def discard(self, request: Request) -> None:
        """Discard the whole blocks of a range."""
        if not self._upstream.can_trim:
            self._common.turn.finish(request, errno.EOPNOTSUPP)
            return
        first, end = self._whole_blocks(request)
        end_byte = request.offset + request.length
        steps = self._operation_steps(DISCARD, first, end, end_byte, request.flags)
        self._next_step(_RangeOp(request, steps, self._next_step))

    def write_zeroes(self, request: Request) -> None:
        """Make a range read as zeroes."""
        first, end = self._whole_blocks(request)
        start, end_byte, flags = request.offset, request.offset + request.length, request.flags
        shift = self._index.block_shift
        small = (end - first << shift) <= self._zero_copy_bytes
        if small or not self._upstream.can_write_zeroes:
            steps = self._write_steps(start, end_byte, flags)
        else:
            steps = chain(
                self._write_steps(start, first << shift, flags),
                self._operation_steps(WRITE_ZEROES, first, end, end_byte, flags),
                self._last_write_steps(end_byte, flags),
            )
        self._next_step(_RangeOp(request, steps, self._next_step))

    def _next_step(self, op: _RangeOp) -> None:
        """The step before ended with `op.error`: take the next one."""
        op.taken += 1
        if op.taken % _STEPS_PER_TURN == 0:
            self._common.turn.next_turn(lambda: self._take_step(op))
        else:
            self._take_step(op)

    def _take_step(self, op: _RangeOp) -> None:
        if op.request.is_abandoned and not op.error:
            op.error = errno.ECANCELED
        step = None if op.error else next(op.steps, None)
        if step is None:
            self._common.turn.finish(op.request, op.error)
        elif step.op == WRITE:
            start, length = step.start, step.end_byte - step.start
            # The request comes first: a write that has to wait is not done once that is abandoned.
            owner = op.request, op
            self._submit(
                Request(WRITE, start, length, [ZEROES[:length]], self._written, step.flags, owner)
            )
        else:
            shift = self._index.block_shift
            end = -(-step.end_byte >> shift)
            self._range_operations.start(
                step.op, step.start >> shift, end, step.end_byte, step.flags, op
            )

    def _written(self, write: Request) -> None:
        _, op = cast("tuple[Request, _RangeOp]", write.owner)
        op.error = write.error
        self._next_step(op)

    def _whole_blocks(self, request: Request) -> tuple[int, int]:
        """The blocks that lie wholly within the request; the disk's last one may be short."""
        shift = self._index.block_shift
        end_byte = request.offset + request.length
        first = -(-request.offset >> shift)
        end = end_byte >> shift
        if end_byte == self._index.geometry.disk_bytes:
            end = -(-end_byte >> shift)
        return first, max(first, end)

    def _operation_steps(
        self, op: int, first: int, end: int, end_byte: int, flags: int
    ) -> Iterator[_Step]:
        shift = self._index.block_shift
        while first < end:
            until = min(end, first + self._run_blocks)
            yield _Step(op, first << shift, min(until << shift, end_byte), flags)
            first = until

    def _last_write_steps(self, end_byte: int, flags: int) -> Iterator[_Step]:
        """Zero what comes before `end_byte` in its block, unless that was the end of the disk."""
        start = end_byte >> self._index.block_shift << self._index.block_shift
        if end_byte != self._index.geometry.disk_bytes:
            yield from self._write_steps(start, end_byte, flags)

    def _write_steps(self, start: int, end_byte: int, flags: int) -> Iterator[_Step]:
        while start < end_byte:
            length = min(end_byte - start, _ZEROES_BYTES)
            yield _Step(WRITE, start, start + length, flags & FUA)
            start += length
