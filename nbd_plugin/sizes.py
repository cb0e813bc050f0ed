"""Sizes as people write them."""

from __future__ import annotations

import re

from nbd_plugin.errors import PluginError

MAX_SIZE_BYTES = (1 << 63) - 512
"""NBD and the file offsets of Linux are signed 64-bit numbers; kept on a whole sector."""

_SIZE = re.compile(r"([0-9]{1,19})([bkmgtpe]?)(?:i?b)?", re.IGNORECASE)
_SHIFT = {"": 0, "b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}


def parse_size(text: str) -> int:
    """Bytes from `10G`, `512M`, `4096`: powers of 1024. Raises PluginError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise PluginError(f"size {text[:40]!r} is not a number with K, M, G, T, P or E")
    size_bytes = int(match[1]) << _SHIFT[match[2].lower()]
    if not 0 < size_bytes <= MAX_SIZE_BYTES:
        raise PluginError(f"size {text[:40]!r} must be between 1 byte and 8 EiB")
    return size_bytes


def format_size(size_bytes: int) -> str:
    """The shortest exact form, `10G`, else bytes."""
    for letter in "EPTGMK":
        unit = 1 << _SHIFT[letter.lower()]
        if size_bytes and size_bytes % unit == 0:
            return f"{size_bytes // unit}{letter}"
    return str(size_bytes)
