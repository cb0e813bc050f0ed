"""What a storage server keeps: sectors, and what a loss of power may leave of each.

A sector's bytes are the number of the write that they came from (0: zeroes), so what is found can
be judged. Until a flush covers a sector it has several *possible* contents: the one that is surely
durable, and every one since. A flush covers what was executed when it began, or, on the worst
server, only what had been answered by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from random import Random

SECTOR = 512


class Content:
    """What one command made of one sector."""

    __slots__ = ("answered", "number")

    def __init__(self, number: int) -> None:
        self.number = number
        self.answered = False


def sector_bytes(number: int) -> bytes:
    """A sector that holds the write `number`."""
    return number.to_bytes(8, "little") * (SECTOR // 8)


def numbers_of(data: bytes | memoryview) -> list[int]:
    """Which writes the sectors of `data` hold; -1 for one that is torn or of another kind."""
    found = []
    for at in range(0, len(data), SECTOR):
        sector = bytes(data[at : at + SECTOR])
        number = sector[:8]
        found.append(int.from_bytes(number, "little") if sector == number * 64 else -1)
    return found


class Medium:
    """One volume. Ranges are in sectors."""

    def __init__(
        self, sectors: int, rng: Random, *, lost: Callable[[int, list[int]], None]
    ) -> None:
        """`lost(sector, numbers)` is told which writes are gone from a sector."""
        self._rng = rng
        self._lost = lost
        self.numbers = [0] * sectors
        """What a read finds."""
        self._open: dict[int, list[Content]] = {}
        """Sectors with more than one possible content, the durable one first."""

    @property
    def sectors(self) -> int:
        return len(self.numbers)

    def read(self, first: int, count: int) -> bytes:
        """The bytes of these sectors."""
        return b"".join(map(sector_bytes, self.numbers[first : first + count]))

    def write(self, first: int, numbers: Iterable[int], *, fua: bool) -> list[Content]:
        """Overwrite sectors from `first` on; what to mark once the command is answered."""
        made = []
        for at, number in enumerate(numbers, first):
            if fua:
                self._open.pop(at, None)
            else:
                content = Content(number)
                made.append(content)
                history = self._open.get(at)
                if history is None:
                    self._open[at] = [Content(self.numbers[at]), content]
                else:
                    history.append(content)
            self.numbers[at] = number
        return made

    def possible(self, at: int) -> list[int]:
        """What may be left of a sector after a loss of power."""
        history = self._open.get(at)
        return [self.numbers[at]] if history is None else [each.number for each in history]

    def begin_flush(self, *, answered_only: bool) -> list[tuple[int, Content]]:
        """What a flush that arrives now has to cover; for `end_flush`."""
        covered = []
        for at, history in self._open.items():
            for content in reversed(history):
                if content.answered or not answered_only:
                    covered.append((at, content))
                    break
        return covered

    def end_flush(self, covered: list[tuple[int, Content]]) -> None:
        """That is durable."""
        for at, content in covered:
            history = self._open.get(at)
            if history is not None and content in history:
                del history[: history.index(content)]
                if len(history) == 1:
                    del self._open[at]

    def lose(self) -> int:
        """Power is lost, or a flush failed: any possible content is left of each sector. How many
        sectors are not what they were."""
        changed = 0
        for at, history in self._open.items():
            left = self._rng.randrange(len(history))
            gone = [each.number for each in history[left + 1 :]]
            if gone:
                self._lost(at, gone)
                changed += 1
            self.numbers[at] = history[left].number
        self._open.clear()
        return changed

    def grow(self, numbers: list[int]) -> None:
        """More sectors, with these contents."""
        self.numbers += numbers
