"""Did another client write the image? A sample of clean cached blocks against the server.

A clean block was durable on the server when it became clean, or was read from it. So a server that
lost power, and unflushed writes with it, still has the block as it is here; another client wrote a
block that differs. One exception: where a discard was under way, or was not flushed, one side may
have zeroes.

Our plugin counts writable sessions, so there the answer is exact, as long as nothing writes behind
its back. Elsewhere, this finds large changes (an image restored, a disk reinstalled, a file system
mounted on another host), not a single changed block. Dirty blocks cannot be compared: what the
server had there before is unknown.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Protocol, cast

from bridge.cache.index import Index
from bridge.cache.upstream import Upstream
from bridge.datapath.buffers import Bytes
from bridge.datapath.request import READ, Request
from bridge.units import SECTOR_BYTES

_HEAD_BYTES = 2 << 20
"""The beginning of the disk, with its partition table and mostly a first superblock: mounting a
file system to write changes that. As far as it is cached, it is compared in any case."""
_HEAD_BLOCKS = 64
_NEIGHBOURS = 64
"""Clean blocks compared because the blocks beside them are dirty: who else wrote that file?"""


@dataclass(frozen=True)
class Sample:
    """What a comparison found."""

    differing: int = 0
    """How many blocks the server has other content for."""
    witness: int = 0
    """The number of one of them."""
    unknown: bool = False
    """The server answered nothing, so nothing is known."""
    partial: bool = False
    """It did not answer for some of the blocks."""


class Sampled(Protocol):
    """The cache, as far as a sample needs it."""

    index: Index

    def drop_clean(self) -> int:
        """Forget every clean block."""


def check_sample(
    cache: Sampled,
    upstream: Upstream,
    done: Callable[[int], None],
    count: int,
    *,
    witness: int | None = None,
    discarded: tuple[int, int] = (0, 0),
) -> None:
    """Compare about `count` clean blocks; drop the clean part when any differs.

    Calls `done` with the number of blocks that differ, or -1 when the server answered nothing and
    nothing is known. The rest as in `compare`.
    """

    def compared(sample: Sample) -> None:
        if sample.differing:
            cache.drop_clean()
        done(-1 if sample.unknown else sample.differing)

    compare(cache.index, upstream.submit, compared, count, witness=witness, discarded=discarded)


def compare(
    index: Index,
    submit: Callable[[Request], None],
    done: Callable[[Sample], None],
    count: int,
    *,
    beside_dirty: bool = False,
    witness: int | None = None,
    discarded: tuple[int, int] = (0, 0),
    only_zeroes: bool = True,
) -> None:
    """Compare about `count` clean blocks with the server that `submit` leads to, then call `done`.

    `beside_dirty`: also some with dirty blocks beside them. `witness` is the number of a block that
    differed before, and is compared if it is still there. `discarded`: in these blocks sectors of
    zeroes are no evidence; nor is anything else there unless `only_zeroes`, since a server may
    ignore a discard, and then lose what it had not flushed.
    """
    chosen = _choose(index, count, beside_dirty=beside_dirty, witness=witness)
    left = len(chosen)
    compared = differing = found = 0

    def answered(request: Request) -> None:
        nonlocal left, compared, differing, found
        if not request.error:
            compared += 1
            if _is_changed(index, request, discarded, only_zeroes=only_zeroes):
                differing += 1
                found = request.offset >> index.block_shift
        left -= 1
        if not left:
            partial = compared < len(chosen)
            done(Sample(differing, found, unknown=not compared, partial=partial))

    if not chosen:
        done(Sample())
        return
    for slot, bit in chosen:
        submit(_read_of(index, slot, bit, answered))


def _read_of(index: Index, slot: int, bit: int, done: Callable[[Request], None]) -> Request:
    offset = index.granule_of[slot] << index.granule_shift
    offset += bit.bit_length() - 1 << index.block_shift
    length = min(index.block_bytes, index.geometry.disk_bytes - offset)
    buffer = memoryview(bytearray(length))
    content = bytes(_content(index, slot, bit, length))
    return Request(READ, offset, length, [buffer], done, owner=(slot, bit, content))


def _is_changed(
    index: Index, request: Request, discarded: tuple[int, int], *, only_zeroes: bool
) -> bool:
    """Whether what was read from the server proves that it was changed there."""
    slot, bit, ours = cast("tuple[int, int, bytes]", request.owner)
    (buffer,) = request.buffers
    if ours == buffer:
        return False
    # Guests go on meanwhile: the slot may be another granule's by now, and what was written,
    # flushed and is clean again may be newer than what the server has read.
    if (
        index.granule_of[slot] != request.offset >> index.granule_shift
        or not _clean(index, slot) & bit
        or _content(index, slot, bit, request.length) != ours
    ):
        return False
    block = request.offset >> index.block_shift
    if discarded[0] <= block < discarded[1]:
        return only_zeroes and not _differ_by_zeroes(ours, buffer)
    return True


def _content(index: Index, slot: int, bit: int, length: int) -> Bytes:
    """The first `length` bytes of a block."""
    at = (slot << index.granule_shift) + (bit.bit_length() - 1 << index.block_shift)
    return index.data[at : at + length]


def _differ_by_zeroes(one: bytes, other: memoryview) -> bool:
    """Each sector is the same in both, or zeroes in one of them."""
    for at in range(0, len(one), SECTOR_BYTES):
        a, b = one[at : at + SECTOR_BYTES], other[at : at + SECTOR_BYTES]
        if a != b and any(a) and any(b):
            return False
    return True


def _choose(
    index: Index, count: int, *, beside_dirty: bool, witness: int | None
) -> list[tuple[int, int]]:
    """(slot, bit) of the clean blocks to compare, in no order; all of them if there are few."""
    chosen: dict[tuple[int, int], None] = {}
    if witness is not None:
        per_granule = index.granule_shift - index.block_shift
        slot = index.find(witness >> per_granule)
        bit = 1 << (witness & (1 << per_granule) - 1)
        if slot and _clean(index, slot) & bit:
            chosen[slot, bit] = None
    head = (index.find(granule) for granule in range(_HEAD_BYTES >> index.granule_shift))
    _add(chosen, islice(_blocks(index, filter(None, head)), _HEAD_BLOCKS))
    if beside_dirty:
        beside = (slot for slot in range(1, index.slots + 1) if index.dirty(slot))
        _add(chosen, islice(_blocks(index, beside), _NEIGHBOURS))
    slots = _some_slots(index, count)
    if len(slots) < count:
        # Not one of each slot but all, as far as that goes.
        _add(chosen, islice(_blocks(index, slots), count))
    else:
        _add(chosen, ((slot, _any_bit(_clean(index, slot))) for slot in slots))
    return [each for each in chosen if each[1]]


def _add(chosen: dict[tuple[int, int], None], more: Iterable[tuple[int, int]]) -> None:
    for each in more:
        chosen[each] = None


def _blocks(index: Index, slots: Iterable[int]) -> Iterable[tuple[int, int]]:
    """(slot, bit) of every clean block of `slots`."""
    for slot in slots:
        clean = _clean(index, slot)
        while clean:
            yield slot, clean & -clean
            clean &= clean - 1


def _some_slots(index: Index, count: int) -> list[int]:
    """`count` slots in use, in random order, all if there are fewer."""
    states = index.state
    if index.used > max(4 * count, index.slots // 8):
        # At least every tenth try finds one: no walk through millions of slots.
        found: set[int] = set()
        while len(found) < count:
            slot = random.randint(1, index.slots)
            if states[slot]:
                found.add(slot)
        return list(found)
    used = [slot for slot in range(1, index.slots + 1) if states[slot]]
    return random.sample(used, min(count, len(used)))


def _clean(index: Index, slot: int) -> int:
    """The clean blocks of `slot`."""
    return index.valid(slot) & ~index.dirty(slot)


def _any_bit(bits: int) -> int:
    """One of `bits` at random, 0 if there is none."""
    if not bits:
        return 0
    for _ in range(random.randrange(bits.bit_count())):
        bits &= bits - 1
    return bits & -bits
