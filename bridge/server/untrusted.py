"""What a server says, bounded before it is used: all of it goes through here.

Numbers reach file headers, the guest's config space and loops; text reaches logs and terminals.
Out of bounds is a ProtocolError, which costs the connection and names both sides' numbers.
"""

from __future__ import annotations

import re

from bridge.errors import ProtocolError
from bridge.spec.nbd import NAME_MAX_BYTES, SIZE_MAX_BYTES

_DECIMAL = re.compile(r"[+-]?[0-9]+")


def bounded(what: str, number: int, *, least: int = 0, most: int) -> int:
    """`number`, if it is `least` … `most`. Raises ProtocolError."""
    if number > most:
        limit = "2^63 - 1" if most == SIZE_MAX_BYTES else str(most)
        raise ProtocolError(f"{what} of {number}: more than {limit}")
    if number < least:
        raise ProtocolError(f"{what} of {number}: less than {least}")
    return number


def counter(what: str, word: str | None) -> int | None:
    """The number that `word` is, None if it is none. Raises ProtocolError outside 0 … 2^63 - 1."""
    if word is None or not _DECIMAL.fullmatch(word):
        return None
    return bounded(what, int(word), most=SIZE_MAX_BYTES)


def text(data: bytes, what: str) -> str:
    """A string of the protocol: UTF-8, no NUL, at most 4096 bytes. Raises ProtocolError."""
    if len(data) > NAME_MAX_BYTES:
        raise ProtocolError(f"{what} of {len(data)} bytes: at most {NAME_MAX_BYTES}")
    if b"\0" in data:
        raise ProtocolError(f"{what} with a NUL in it")
    return data.decode("utf-8", "replace")


def printable(data: bytes) -> str:
    """A server's message, fit for a log: it may hold anything."""
    return clean(data[:512].decode("utf-8", "replace"))


def clean(string: str) -> str:
    """`string` without what a terminal would obey."""
    return "".join(c if c.isprintable() else " " for c in string).strip()
