"""Did somebody else write the image? A sample of clean cached blocks against the server.

Our plugin counts writable sessions, so there the answer is exact, as long as nobody writes behind
its back. Where it is not, this finds what changed much (an image restored, a disk reinstalled), not
a single changed block.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Protocol

from bridge.request import READ, Request

from .backend import Backend
from .index import Index


class Sampled(Protocol):
    """The cache, as far as a sample needs it."""

    index: Index

    def drop_clean(self) -> int:
        """Forget every clean block."""


def check_sample(cache: Sampled, backend: Backend, done: Callable[[int], None], count: int) -> None:
    """Compare up to `count` clean blocks; drop the clean part when any differs.

    Calls `done` with the number of blocks that differ, or -1 when a read failed and nothing is
    known.
    """
    index = cache.index
    chosen = [(slot, block) for slot in _choose(index, count) if (block := _clean(index, slot))]
    left = len(chosen)
    differing = 0
    failed = False

    def compared(request: Request) -> None:
        nonlocal left, differing, failed
        slot, bit, buffer = request.owner
        failed = failed or bool(request.error)
        if not request.error and index.valid(slot) & ~index.dirty(slot) & bit:
            at = (slot << index.granule_shift) + (bit.bit_length() - 1 << index.block_shift)
            differing += index.data[at : at + request.length] != buffer[: request.length]
        left -= 1
        if not left:
            if differing:
                cache.drop_clean()
            done(differing if differing or not failed else -1)

    if not chosen:
        done(0)
        return
    for slot, bit in chosen:
        offset = index.granule_of[slot] << index.granule_shift
        offset += bit.bit_length() - 1 << index.block_shift
        length = min(index.block_bytes, index.geometry.disk_bytes - offset)
        buffer = memoryview(bytearray(length))
        backend.submit(Request(READ, offset, length, [buffer], compared, owner=(slot, bit, buffer)))


def _choose(index: Index, count: int) -> list[int]:
    """`count` slots in use, all if there are fewer."""
    states = index.state
    if index.used > max(4 * count, index.slots // 8):
        # At least every tenth try finds one: no walk through millions of slots.
        found: set[int] = set()
        while len(found) < count:
            slot = random.randint(1, index.slots)
            if states[slot]:
                found.add(slot)
        return sorted(found)
    used = [slot for slot in range(1, index.slots + 1) if states[slot]]
    return sorted(random.sample(used, min(count, len(used))))


def _clean(index: Index, slot: int) -> int:
    """The bit of one clean block of `slot`, or 0."""
    clean = index.valid(slot) & ~index.dirty(slot)
    return clean & -clean
