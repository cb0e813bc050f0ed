"""Sizes as operators write and read them."""

from __future__ import annotations

import re

SECTOR_BYTES = 512
"""What a guest counts a disk in, whatever its blocks are."""

_SIZE = re.compile(
    r"([0-9]{1,18})(?:\.([0-9]{1,18})(?= ?[KMGT]))? ?(?:([KMGT])(i?B)?|B)?",
    re.IGNORECASE | re.ASCII,  # The sign for Kelvin is a K, too, and in no table of ours.
)
_LIKE_SIZE = re.compile(r"([0-9.]+)\s*([KMGT])[a-z]*", re.IGNORECASE | re.ASCII)
_UNITS = ((50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB"))


def parse_size(text: str) -> int:
    """Bytes of a size such as 512M, 1.5GiB (powers of 1024) or 10GB (of 1000). Raises ValueError.

    `nbd_plugin.sizes.parse_size` reads the same, for nbdkit.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size: {_hint(text)}")
    whole, decimals, letter, suffix = match.groups()
    base = 1000 if (suffix or "").upper() == "B" else 1024
    unit = _power(base, " KMGT".index(letter.upper()) if letter else 0)
    # Integers are exact; so is `fractions`, which is 0.5 MB.
    return int(whole + (decimals or "")) * unit // _power(10, len(decimals or ""))


def _power(base: int, exponent: int) -> int:
    found: int = base**exponent
    return found


def _hint(text: str) -> str:
    if (found := _LIKE_SIZE.fullmatch(text.strip())) and len(text) < 40:
        number, letter = found[1], found[2].upper()
        return f"write {number}{letter} (powers of 1024) or {number}{letter}B (powers of 1000)"
    return "write a number with K, M, G or T (powers of 1024) or KB, MB, GB or TB (powers of 1000)"


def size_text(count: int) -> str:
    """`count` bytes for a reader, such as 64 MiB or 1.5 GiB."""
    for shift, unit in _UNITS:
        if count >> shift:
            return f"{count / (1 << shift):.1f}".removesuffix(".0") + f" {unit}"
    return f"{count} bytes"
