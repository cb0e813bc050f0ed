"""Copying between a request's buffers and one flat range of bytes; bytes of zeroes."""

from __future__ import annotations

from bisect import bisect_right
from itertools import accumulate
from typing import Final

Bytes = bytes | bytearray | memoryview
"""Anything with bytes that can be sliced."""

_FEW: Final = 16

ZEROES: Final = memoryview(bytes(1 << 20))
"""To write zeroes from. Never written to, so it takes no memory of its own."""


def slices(buffers: list[memoryview], start: int, length: int) -> list[memoryview]:
    """The parts of `buffers` that are the bytes `start` … `start + length`, none of them empty."""
    if not length:
        return []
    if len(buffers) == 1:
        return [buffers[0][start : start + length]]
    first = 0
    if start and len(buffers) > _FEW:
        # A guest's buffers may be a thousand, and are gone through once per granule.
        ends = list(accumulate(map(len, buffers)))
        first = bisect_right(ends, start)
        start -= ends[first - 1] if first else 0
    found = []
    for at in range(first, len(buffers)):
        buffer = buffers[at]
        size = len(buffer)
        if start < size:
            part = buffer[start : start + length]
            found.append(part)
            length -= len(part)
            if not length:
                break
            start = 0
        else:
            start -= size
    return found


def scatter(buffers: list[memoryview], start: int, source: Bytes) -> None:
    """Copy `source` into `buffers` from byte `start` on."""
    at = 0
    for part in slices(buffers, start, len(source)):
        part[:] = source[at : at + len(part)]
        at += len(part)


def gather(
    buffers: list[memoryview],
    start: int,
    target: bytearray | memoryview,
    done_bytes: int,
    length: int,
) -> None:
    """Copy the bytes `start` … `start + length` of `buffers` to `target[done_bytes …]`."""
    for part in slices(buffers, start, length):
        target[done_bytes : done_bytes + len(part)] = part
        done_bytes += len(part)


def zero(buffers: list[memoryview], start: int, length: int) -> None:
    """Zero the bytes `start` … `start + length` of `buffers`."""
    for view in slices(buffers, start, length):
        for at in range(0, len(view), len(ZEROES)):
            part = view[at : at + len(ZEROES)]
            part[:] = ZEROES[: len(part)]
