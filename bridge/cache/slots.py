"""Taking and giving slots: the index and the evictor kept in step."""

from __future__ import annotations

from collections.abc import Callable

from bridge.cache.cold import Cold
from bridge.cache.eviction import Evictor
from bridge.cache.file.cache_file import MappedImage
from bridge.cache.file.layout import BITS, DIRTY_SHIFT
from bridge.cache.index import Index
from bridge.datapath.turn import Outcome

_DIRTY = BITS << DIRTY_SHIFT


class Slots:
    """Allocation of slots. A pinned slot is not given to another granule."""

    def __init__(self, index: Index, evictor: Evictor) -> None:
        self._index = index
        self._evictor = evictor
        self._pins: dict[int, int] = {}
        self._orphans: set[int] = set()
        """Pinned slots whose granule was dropped meanwhile."""
        self._scratch: list[memoryview] = []
        self.touched = evictor.touched

    @property
    def available(self) -> bool:
        """`obtain` may find a slot. After it found none, this is false until one is given back,
        becomes clean or is no longer pinned: only then is it worth another try."""
        return self._index.has_free or self._evictor.has_candidates

    def obtain(self, granule: int) -> int:
        """A slot bound to `granule`, evicting a clean one if need be; 0: none is clean."""
        index = self._index
        slot = index.take_free() or self._evict()
        if slot:
            index.bind(slot, granule)
            self._evictor.admit(slot, granule)
        return slot

    def _evict(self) -> int:
        """An unbound slot that was clean, or 0."""
        index, evictor = self._index, self._evictor
        while slot := evictor.candidate():
            if index.state[slot] & _DIRTY or slot in self._pins:
                evictor.park(slot)
                continue
            evictor.evict(slot, index.granule_of[slot])
            index.drop(slot, BITS)
            return slot
        return 0

    def drop(self, slot: int, bits: int) -> None:
        """Forget blocks of `slot`, dirty or not, none of them in flight."""
        if self._index.drop(slot, bits):
            self._evictor.remove(slot)
            if slot in self._pins:
                self._orphans.add(slot)
            else:
                self._index.give_back(slot)
        elif not self._index.dirty(slot) and slot not in self._pins:
            self._evictor.release(slot)

    def cleaned(self, slot: int) -> None:
        """The last dirty block of `slot` became clean."""
        if slot not in self._pins:
            self._evictor.release(slot)

    def discount_scan_hits(self, granule: int) -> None:
        """The hits on `granule` were one sequential pass: in probation they do not count."""
        slot = self._index.find(granule)
        if slot and self._evictor.on_probation(slot):
            self.touched[slot] = 0

    def load(
        self, image: MappedImage, cold: Cold, slot: int, done: Callable[[Outcome], None]
    ) -> None:
        """Have a thread read `slot` into the page cache; it is pinned until `done(outcome)`."""
        size = self._index.granule_bytes
        # One for all: only the page cache matters, the bytes are never looked at.
        scratch = self._scratch = self._scratch or [memoryview(bytearray(size))]
        self.pin(slot)

        def loaded(outcome: Outcome) -> None:
            self.unpin(slot)
            done(outcome)

        cold.run(lambda: image.read_wait(scratch, slot * size), Outcome(loaded))

    def pin(self, slot: int) -> None:
        """`slot` is read from outside the turn: it must not be evicted until `unpin`."""
        self._pins[slot] = self._pins.get(slot, 0) + 1

    def unpin(self, slot: int) -> None:
        """Undo one `pin()`."""
        self._pins[slot] -= 1
        if self._pins[slot]:
            return
        del self._pins[slot]
        if slot in self._orphans:
            self._orphans.discard(slot)
            self._index.give_back(slot)
        elif not self._index.dirty(slot):
            self._evictor.release(slot)
