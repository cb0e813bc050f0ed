"""DISCARD and WRITE_ZEROES requests, cut into what can be done at once.

Whole blocks go to `exclusive` in bounded pieces, one after the other. Parts of blocks, short
ranges, and everything on a server without WRITE_ZEROES, become writes of zero bytes through the
cache. A discard of parts of blocks does nothing to them: it is a hint.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Final

from bridge.request import DISCARD, FUA, WRITE, WRITE_ZEROES, Request

from .backend import Backend
from .exclusive import Exclusives
from .index import Index
from .options import Options

_ZEROES = memoryview(bytes(256 * 1024))
"""One write of zero bytes; the same memory for all."""

_STEPS_PER_TURN: Final = 32
"""8 MiB of zeroes."""


Step = Callable[[Callable[[int], None]], None]


class _Steps:
    """A request that is done when every step is; the first error ends it."""

    __slots__ = ("_again", "_error", "_next_turn", "_request", "_running", "_steps")

    def __init__(
        self,
        request: Request,
        steps: Iterator[Step],
        next_turn: Callable[[Callable[[], None]], None] | None,
    ) -> None:
        self._request = request
        self._next_turn = next_turn
        self._steps = steps
        self._error = 0
        self._running = False
        self._again = False

    def go_on(self, error: int = 0) -> None:
        """The step before ended with `error`: take the next one."""
        self._error = error
        self._again = True
        if self._running:
            return  # A step that ended at once: the loop below goes on, the stack does not grow.
        self._run()

    def _run(self) -> None:
        self._running = True
        done = 0
        while self._again:
            if done == _STEPS_PER_TURN and self._next_turn is not None:
                # Zeroes into the cache end at once, and there may be terabytes of them.
                self._next_turn(self._run)
                return
            done += 1
            self._again = False
            step = None if self._error else next(self._steps, None)
            if step is None:
                self._request.finish(self._error)
                return
            step(self.go_on)
        self._running = False


class Ranges:
    """The slow path of DISCARD and WRITE_ZEROES."""

    def __init__(
        self,
        index: Index,
        exclusives: Exclusives,
        backend: Backend,
        options: Options,
        submit: Callable[[Request], None],
        next_turn: Callable[[Callable[[], None]], None] | None,
    ) -> None:
        """`next_turn` calls back in the loop's next turn; None: there are no turns."""
        self._next_turn = next_turn
        self._index = index
        self._exclusives = exclusives
        self._backend = backend
        self._run_blocks = max(1, options.exclusive_run_bytes >> index.block_shift)
        self._zero_copy_bytes = options.zero_copy_bytes
        self._submit = submit

    def discard(self, request: Request) -> None:
        """Discard the whole blocks of a range."""
        if not self._backend.can_trim:
            request.finish(errno.EOPNOTSUPP)
            return
        first, end = self._whole_blocks(request)
        stop = request.offset + request.length
        steps = self._exclusive_steps(DISCARD, first, end, stop, request.flags)
        _Steps(request, steps, self._next_turn).go_on()

    def write_zeroes(self, request: Request) -> None:
        """Make a range read as zeroes."""
        first, end = self._whole_blocks(request)
        start, stop, flags = request.offset, request.offset + request.length, request.flags
        shift = self._index.block_shift
        small = (end - first << shift) <= self._zero_copy_bytes
        if small or not self._backend.can_write_zeroes:
            steps = self._write_steps(start, stop, flags)
        else:
            steps = chain(
                self._write_steps(start, first << shift, flags),
                self._exclusive_steps(WRITE_ZEROES, first, end, stop, flags),
                self._last_write_steps(stop, flags),
            )
        _Steps(request, steps, self._next_turn).go_on()

    def _whole_blocks(self, request: Request) -> tuple[int, int]:
        """The blocks that lie wholly within the request; the disk's last one may be short."""
        shift = self._index.block_shift
        stop = request.offset + request.length
        first = -(-request.offset >> shift)
        end = stop >> shift
        if stop == self._index.geometry.disk_bytes:
            end = -(-stop >> shift)
        return first, max(first, end)

    def _exclusive_steps(
        self, op: int, first: int, end: int, stop: int, flags: int
    ) -> Iterator[Step]:
        shift = self._index.block_shift
        while first < end:
            until = min(end, first + self._run_blocks)
            yield partial(
                self._exclusives.start, op, first, until, min(until << shift, stop), flags
            )
            first = until

    def _last_write_steps(self, stop: int, flags: int) -> Iterator[Step]:
        """Zero what comes before `stop` in its block, unless that was the end of the disk."""
        start = stop >> self._index.block_shift << self._index.block_shift
        if stop != self._index.geometry.disk_bytes:
            yield from self._write_steps(start, stop, flags)

    def _write_steps(self, start: int, stop: int, flags: int) -> Iterator[Step]:
        while start < stop:
            length = min(stop - start, len(_ZEROES))
            yield partial(self._write, start, length, flags & FUA)
            start += length

    def _write(self, start: int, length: int, flags: int, done: Callable[[int], None]) -> None:
        def finished(request: Request) -> None:
            done(request.error)

        self._submit(Request(WRITE, start, length, [_ZEROES[:length]], finished, flags))
