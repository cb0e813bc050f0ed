"""Which dirty blocks go to the server in one WRITE: those that follow one another on the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bridge.cache.index import Index


def first_run(
    index: Index,
    slots: Sequence[int],
    at: int,
    bits: int,
    *,
    max_blocks: int,
    is_apart: Callable[[int, int], bool],
) -> tuple[int, list[tuple[int, int]]]:
    """The first run of `bits` of `slots[at]`, and what follows it on the disk in the next slots.

    `slots` are in disk order. `is_apart(slot, bits)`: these blocks of a following slot must not be
    in the same WRITE. Returns the offset in bytes, and (slot, bits) of each part.
    """
    slot = slots[at]
    per_granule = 1 << index.granule_shift - index.block_shift
    granule = index.granule_of[slot]
    first = (bits & -bits).bit_length() - 1
    count = _ones(bits >> first)
    offset = (granule << index.granule_shift) + (first << index.block_shift)
    parts = [(slot, (1 << first + count) - (1 << first))]
    total = count
    # On into the next granule, while this run reaches its end and the next begins with it.
    while first + count == per_granule and at + 1 < len(slots):
        at += 1
        following = slots[at]
        granule += 1
        if index.granule_of[following] != granule:
            break
        first, count = 0, _ones(index.to_send(following))
        total += count
        bits = (1 << count) - 1
        if not count or total > max_blocks or is_apart(following, bits):
            break
        parts.append((following, bits))
    return offset, parts


def copy_of(index: Index, parts: Sequence[tuple[int, int]]) -> bytes:
    """The data of these parts, each of blocks that follow one another."""
    shift = index.block_shift
    pieces = []
    for slot, bits in parts:
        base = (slot << index.granule_shift) + ((bits & -bits).bit_length() - 1 << shift)
        pieces.append(index.data[base : base + (bits.bit_count() << shift)])
    return b"".join(pieces)


def _ones(bits: int) -> int:
    """How many of the lowest bits are set without a gap."""
    return (~bits & bits + 1).bit_length() - 1
