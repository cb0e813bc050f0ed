"""Sizes as operators write and read them."""

from __future__ import annotations

import re

SECTOR_BYTES = 512
"""What a guest counts a disk in, whatever its blocks are."""

_SIZE = re.compile(r"([0-9]{1,18})(?:\.([0-9]{1,18})(?=[KMGT]))?([KMGT]?)(?:i?B)?", re.IGNORECASE)
_UNITS = ((50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB"))


def parse_size(text: str) -> int:
    """Bytes of a size such as 512M or 1.5G; K, M, G and T are powers of 1024. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: write a number with K, M, G or T, such as 1.5G")
    whole, decimals = match[1], match[2] or ""
    unit = 1 << 10 * " KMGT".index(match[3].upper() or " ")
    # Integers are exact; so is `fractions`, which is 0.5 MB.
    per_unit: int = 10 ** len(decimals)
    return int(whole + decimals) * unit // per_unit


def size_text(count: int) -> str:
    """`count` bytes for a reader, such as 64 MiB or 1.5 GiB."""
    for shift, unit in _UNITS:
        if count >> shift:
            return f"{count / (1 << shift):.1f}".removesuffix(".0") + f" {unit}"
    return f"{count} bytes"
