"""Which dirty blocks go to the server in one WRITE: those that follow one another on the disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from bridge.cache.index import Index


def lowest_run(bits: int) -> int:
    """The lowest of `bits` that are set without a gap."""
    return bits & ~(bits + (bits & -bits))


def run_on(
    index: Index,
    slots: Sequence[int],
    at: int,
    run: int,
    *,
    max_blocks: int,
    is_apart: Callable[[int, int], bool],
) -> list[tuple[int, int]]:
    """`run` of `slots[at]`, which reaches the end of its granule, and what follows it on the disk.

    `slots` are in disk order. `is_apart(slot, bits)`: these blocks of a following slot must not be
    in the same WRITE. Returns (slot, bits) of each part.
    """
    parts = [(slots[at], run)]
    granule = index.granule_of[slots[at]]
    total = run.bit_count()
    last_block = 1 << index.blocks - 1
    # On into the next granule, while this run reaches its end and the next begins with it.
    while run & last_block and at + 1 < len(slots):
        at += 1
        following = slots[at]
        granule += 1
        if index.granule_of[following] != granule:
            break
        bits = index.to_send(following)
        run = lowest_run(bits)
        total += run.bit_count()
        if not run & 1 or total > max_blocks or is_apart(following, run):
            break
        parts.append((following, run))
    return parts


def copy_of(index: Index, parts: Sequence[tuple[int, int]]) -> bytes:
    """The data of these parts, each of blocks that follow one another."""
    shift = index.block_shift
    pieces = []
    for slot, bits in parts:
        base = (slot << index.granule_shift) + ((bits & -bits).bit_length() - 1 << shift)
        pieces.append(index.data[base : base + (bits.bit_count() << shift)])
    return pieces[0].tobytes() if len(pieces) == 1 else b"".join(pieces)
