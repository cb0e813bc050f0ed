"""Choices that a fuzzer makes: a `random.Random` whose numbers are the bytes of an input.

What is written for a seeded generator is then a target for one that looks for coverage: it changes
bytes, and sees which choice leads to code that no other input has reached.
"""

from __future__ import annotations

import random
from typing import Any


class BytesRandom(random.Random):
    """Takes its numbers from `data`, then zeroes."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = data
        self._at = 0

    def __reduce__(self) -> Any:
        raise TypeError("the bytes of an input are used once")

    @property
    def left(self) -> int:
        """Bytes that were not used yet."""
        return max(0, len(self._data) - self._at)

    def rest(self) -> bytes:
        """All that is left."""
        found = self._data[self._at :]
        self._at = len(self._data)
        return found

    def random(self) -> float:
        """One of 0, 1/256 … 255/256: one byte."""
        return self.getrandbits(8) / 256

    def getrandbits(self, k: int) -> int:
        """`k` bits, of as few bytes as hold them; those that are missing are zeroes."""
        count = (k + 7) // 8
        found = self._data[self._at : self._at + count]
        self._at += count
        return int.from_bytes(found.ljust(count, b"\0"), "little") & ((1 << k) - 1)
