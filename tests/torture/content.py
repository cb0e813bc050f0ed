"""What the sectors of a tortured disk hold: who wrote them, and where to.

A written sector repeats 16 bytes: the number of the write, the sector's own address, the disk's
number. So an old sector, one from elsewhere and a torn one are all told apart.
"""

from __future__ import annotations

import struct

from bridge.units import SECTOR_BYTES

TORN = -1
"""The number of a sector that no single write has made, or that belongs elsewhere."""

_WORDS = struct.Struct("<QII")
_TIMES = SECTOR_BYTES // _WORDS.size
_ZEROES = bytes(SECTOR_BYTES)


def sectors_of(disk: int, first: int, count: int, number: int) -> bytes:
    """`count` sectors from sector `first` of `disk`, as the write `number` makes them."""
    return b"".join(_WORDS.pack(number, at, disk) * _TIMES for at in range(first, first + count))


def numbers_of(disk: int, first: int, data: bytes) -> list[int]:
    """Which write each sector of `data` comes from, the first of which was read from `first`: 0
    for zeroes, TORN for nonsense."""
    found = []
    for at, start in enumerate(range(0, len(data), SECTOR_BYTES), first):
        words = data[start : start + _WORDS.size]
        sector = data[start : start + SECTOR_BYTES]
        if sector == _ZEROES:
            found.append(0)
            continue
        number, address, owner = _WORDS.unpack(words)
        whole = sector == words * _TIMES
        found.append(number if whole and (address, owner) == (at, disk) else TORN)
    return found
