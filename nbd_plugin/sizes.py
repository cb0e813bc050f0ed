"""Sizes as people write them."""

from __future__ import annotations

import re
from fractions import Fraction

from nbd_plugin.errors import PluginError

MAX_SIZE_BYTES = (1 << 63) - 512
"""NBD and the file offsets of Linux are signed 64-bit numbers; kept on a whole sector."""

_SIZE = re.compile(
    r"([0-9]{1,19})(?:\.([0-9]{1,18})(?= ?[KMGTPE]))? ?(?:([KMGTPE])(i?B)?|B)?",
    re.IGNORECASE | re.ASCII,  # The sign for Kelvin is a K, too, and in no table of ours.
)
_LETTERS = " KMGTPE"


def parse_size(text: str) -> int:
    """Bytes from `10G`, `1.5GiB` (powers of 1024), `10GB` (of 1000), `4096`. Raises PluginError.

    `bridge.units.parse_size` reads the same, for the bridge.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise PluginError(
            f"size {text[:40]!r} is not a number with K, M, G, T, P or E (powers of 1024), or with "
            "KB, MB, GB and so on (powers of 1000)"
        )
    whole, fraction, letter, suffix = match.groups()
    base = 1000 if (suffix or "").upper() == "B" else 1024
    power = _LETTERS.index(letter.upper()) if letter else 0
    size_bytes = int(Fraction(f"{whole}.{fraction or 0}") * base**power)
    if not 0 < size_bytes <= MAX_SIZE_BYTES:
        raise PluginError(f"size {text[:40]!r} must be between 1 byte and 8 EiB")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """The shortest exact form, `10G`, else bytes."""
    for power in range(len(_LETTERS) - 1, 0, -1):
        unit = 1024**power
        if size_bytes and size_bytes % unit == 0:
            return f"{size_bytes // unit}{_LETTERS[power]}"
    return str(size_bytes)
