"""Every legal content of every sector of one disk that real processes serve.

The rules are those of the simulation's oracle. What is different here: the server's medium is an
image file that is read, guests never pause for it, and a disk has many sectors, so that a flush
judges what it covers and not the whole disk.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from math import inf
from pathlib import Path
from random import Random

import trio

from bridge.units import SECTOR_BYTES
from tests.sim.medium import Medium
from tests.sim.oracle import Change, Oracle, Violation
from tests.torture.content import TORN, numbers_of

_PRUNE_AT = 6
"""Changes of one sector from which on the old ones are looked for."""
_SECTORS_PER_LOOK = 2048
"""How much of an image is judged before others may go on."""
_FLUSH_SAMPLE_SECTORS = 2048
"""How much of what a flush covers is looked for in the image, the newest first."""
_LOOKS = 20
"""A sector may be read while the server writes it: it has to be wrong so often in a row."""
_LOOK_AGAIN_S = 0.02


def _nothing_is_lost(at: int, numbers: list[int]) -> None:
    """The image is a file: it keeps what it has."""


class DiskOracle(Oracle):
    """What guest and server of one disk may find."""

    def __init__(
        self, disk: int, sectors: int, image: Path | None, *, has_cache: bool, keeps_completed: bool
    ) -> None:
        """`image`: None if nobody but the server can look into it. `has_cache`: the bridge sends
        again what the server lost. `keeps_completed`: whatever the guest was told is complete is in
        the image, flushed or not."""
        super().__init__(Medium(sectors, Random(0), lost=_nothing_is_lost), has_cache=has_cache)
        self.disk = disk
        self.verified_bytes = 0
        self._keeps_completed = keeps_completed
        self._image = -1 if image is None else os.open(image, os.O_RDONLY | os.O_CLOEXEC)
        self._open: list[tuple[Change, int, int]] = []
        """Changes that no flush covers yet, with first sector and count."""
        self._reading: dict[int, float] = {}
        """Since when the reads and flushes under way may look: nothing of then is forgotten."""

    def close(self) -> None:
        """Give the image back."""
        if self._image >= 0:
            os.close(self._image)

    # The guest.

    def begin(
        self, first: int, count: int, *, zeroes: bool = False, anything: bool = False
    ) -> Change:
        """See `Oracle`."""
        change = super().begin(first, count, zeroes=zeroes, anything=anything)
        self._open.append((change, first, count))
        for at in range(first, first + count):
            if len(self.sectors[at]) >= _PRUNE_AT:
                self._forget_old(at)
        return change

    @contextmanager
    def since(self) -> Iterator[int]:
        """A read or flush is submitted; the moment of that."""
        moment = self.now()
        self._reading[moment] = moment
        try:
            yield moment
        finally:
            del self._reading[moment]

    def judge_read(self, first: int, numbers: list[int], since: int) -> None:
        """See `Oracle`; what may be anything counts as not verified."""
        for at, number in enumerate(numbers, first):
            allowed = self.allowed(at, since)
            if allowed is None:
                continue
            self.verified_bytes += SECTOR_BYTES
            if number not in allowed:
                raise Violation(self._story(at, number, allowed, "the guest reads"))

    async def flush_succeeded(self, since: int) -> None:
        """A flush that was submitted at `since` has succeeded: what it covers is in the image."""
        left = _FLUSH_SAMPLE_SECTORS
        for change, first, count in reversed(self._open):
            if left <= 0:
                break
            if change.done and change.promised and change.ended < since:
                await self.judge_image_sectors(first, count, since, "promised", "a flush succeeded")
                left -= count
        self._settle(since)

    def _settle(self, since: int) -> None:
        """What was over by then is durable, or will never be."""
        for change, _, _ in self._open:
            if change.done and change.promised and change.ended < since:
                change.durable = change.visible = True
        self._open = [each for each in self._open if each[0].ended >= since]

    def flush_failed(self) -> None:
        """See `Oracle`."""
        if not self._has_cache:
            self._told()

    def _told(self) -> None:
        for change, _, _ in self._open:
            if change.done:
                change.promised = False

    # What happens to the server and the guest.

    def server_lost_power(self) -> None:
        """The server may have lost whatever no flush covers."""
        if not self._has_cache:
            for change, _, _ in self._open:
                change.visible = False

    def loss_unnoticed(self) -> None:
        """See `Oracle`."""
        for change, _, _ in self._open:
            if not change.visible:
                change.promised = False

    async def judge_frozen_image(self, when: str) -> None:
        """The server is dead: what is durable is in its image, and everything that was complete
        if completed means that."""
        mark = "visible" if self._keeps_completed else "durable"
        with self.since() as since:
            await self._judge_all(since, mark, when)

    async def judge_stopped(self, when: str) -> None:
        """The bridge has said that all is on the server."""
        with self.since() as since:
            await self._judge_all(since, "promised", when)
        self._settle(since)

    def guest_forgets(self, changes: Iterable[Change]) -> None:
        """See `Oracle`."""
        now = self.now()
        for each in changes:
            if each.ended == inf:
                each.ended, each.torn = now, True
        self.flush_failed()

    async def restart_from_image(self) -> None:
        """Nothing but the image is left. Nobody writes to it."""
        self._open.clear()
        for first in range(0, len(self.sectors), _SECTORS_PER_LOOK):
            count = min(_SECTORS_PER_LOOK, len(self.sectors) - first)
            for at, number in enumerate(self._look(first, count), first):
                change = Change(number, self.moment, zeroes=not number, anything=number == TORN)
                change.ended, change.done, change.durable = self.moment, True, True
                self.sectors[at] = [change]
            await trio.lowlevel.checkpoint()

    # Judging the image.

    async def _judge_all(self, since: int, mark: str, when: str) -> None:
        for first in range(0, len(self.sectors), _SECTORS_PER_LOOK):
            count = min(_SECTORS_PER_LOOK, len(self.sectors) - first)
            await self.judge_image_sectors(first, count, since, mark, when)

    async def judge_image_sectors(
        self, first: int, count: int, since: int, mark: str, when: str
    ) -> None:
        """Raises Violation if the image has anything illegal there, and keeps it."""
        if self._image < 0:
            return
        with self._held(since):
            for look in range(_LOOKS):
                wrong, judged = self._wrong(first, self._look(first, count), since, mark)
                if not wrong:
                    break
                if look == _LOOKS - 1:
                    at, number, allowed = wrong[0]
                    raise Violation(self._story(at, number, allowed, f"{when}, the image has"))
                await trio.sleep(_LOOK_AGAIN_S)
        self.verified_bytes += judged * SECTOR_BYTES
        await trio.lowlevel.checkpoint()

    @contextmanager
    def _held(self, since: int) -> Iterator[None]:
        """Nothing that was legal since then is forgotten meanwhile."""
        key = self.now()
        self._reading[key] = since
        try:
            yield
        finally:
            del self._reading[key]

    def _wrong(
        self, first: int, numbers: list[int], since: int, mark: str
    ) -> tuple[list[tuple[int, int, set[int]]], int]:
        """Sectors with what they hold and may hold, and how many may not hold just anything."""
        found = []
        judged = 0
        for at, number in enumerate(numbers, first):
            allowed = self.allowed(at, since, mark)
            if allowed is None:
                continue
            judged += 1
            if number not in allowed:
                found.append((at, number, allowed))
        return found, judged

    def _look(self, first: int, count: int) -> list[int]:
        data = os.pread(self._image, count * SECTOR_BYTES, first * SECTOR_BYTES)
        return numbers_of(self.disk, first, data.ljust(count * SECTOR_BYTES, b"\0"))

    def _story(self, at: int, number: int, allowed: set[int], who: str) -> str:
        what = "nothing that anybody wrote there" if number == TORN else f"write {number}"
        return (
            f"disk {self.disk}, sector {at}: {who} {what}, may be {sorted(allowed)}; "
            f"moment {self.moment}, history {self.sectors[at][-8:]}"
        )

    # Room.

    def _forget_old(self, at: int) -> None:
        """Drop what no read, flush or look at the image can find any more."""
        horizon = min(self._reading.values(), default=inf)
        changes = self.sectors[at]
        bound = min(
            max(
                (c.began for c in changes if c.done and c.ended < horizon and getattr(c, mark)),
                default=-1,
            )
            for mark in ("visible", "promised", "durable")
        )
        self.sectors[at] = [each for each in changes if each.ended >= bound]
