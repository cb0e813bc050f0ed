"""Which granule is in which slot, and with it the state of all its blocks (`blocks`).

Granules are found through `head` (a power of two of buckets, by the granule's low bits) and
`chain`. A disk with no more granules than buckets has chains of one, which is the common case;
a large one costs one more step for some, and a quarter of the memory of a direct map.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import Protocol

from bridge.cache.blocks import Blocks, zeroed
from bridge.cache.file.layout import BITS, DIRTY_SHIFT, LOW_MASK, Geometry, check_of
from bridge.datapath.buffers import Bytes
from bridge.datapath.cells import DIRTY_BLOCKS, DIRTY_SLOTS


class Image(Protocol):
    """The mapped parts of a cache file: see `cache_file.CacheFile`."""

    geometry: Geometry
    granule_of: memoryview
    """u32 per slot, from 0 on: which granule is in it."""
    state: memoryview
    """u64 per slot: see `layout`."""
    data: memoryview
    """u8: the granules' bytes, the first of slot 0 at 0."""

    def put(self, at_bytes: int, source: Bytes) -> None:
        """Store `source` into the data at `at_bytes`, in bytes. Raises OSError."""


_SLOTS_AT_A_TIME = 4096
_NO_WORDS = bytes(8 * _SLOTS_AT_A_TIME)


class Index(Blocks):
    """The slots of one cache file. `granule` and `slot` are numbers; 0 means none."""

    def __init__(self, image: Image) -> None:
        geometry = image.geometry
        count = geometry.slots + 1
        super().__init__(image.granule_of, image.state, count)
        self.geometry = geometry
        self.slots = geometry.slots
        self.block_bytes = geometry.block_bytes
        self.block_shift = geometry.block_bytes.bit_length() - 1
        self.granule_bytes = geometry.granule_bytes
        self.granule_shift = geometry.granule_bytes.bit_length() - 1
        self.blocks = geometry.granule_bytes // geometry.block_bytes
        self.data = image.data
        self.put = image.put
        buckets = 1 << (min(2 * count, geometry.granules) - 1).bit_length()
        self.bucket_mask = buckets - 1
        self.head = zeroed("I", buckets)
        self.chain = zeroed("I", count)
        self._free = zeroed("I", count)
        """Slots that were given back, a stack of `_free_count`; those never used come after."""
        self._free_count = 0
        self._next_unused = 1
        self.used = 0
        self.damaged_slots = 0
        """Skipped by `load`."""

    def load(self, *, skip_damaged: bool = False) -> list[int]:
        """Take over what the file holds; returns the slots that have dirty blocks.

        Raises ValueError, naming the slot, for a state that fails its check, a granule outside
        the disk or held twice, dirty blocks that are not valid. `skip_damaged`: such a slot is
        freed instead, whatever it held, and counted in `damaged_slots`.
        """
        # Up to millions of slots: local names, everything inline, `check_of` too (0.5 us, not 0.9).
        head, chain, mask = self.head, self.chain, self.bucket_mask
        granules, blocks_mask = self.geometry.granules, self.blocks_mask
        direct = granules <= mask + 1
        dirty_found: list[int] = []
        dirty_blocks = 0
        self._next_unused = 1
        for slot, word, granule in self._words():
            low = word & LOW_MASK
            valid = low & BITS
            other = head[bucket := granule & mask]
            if (
                ((low ^ granule * 0x9E3779B1) * 0x85EBCA6B >> 7) & LOW_MASK != word >> 32
                or granule >= granules
                or low >> DIRTY_SHIFT & ~valid
                or not valid
                or valid & ~blocks_mask
                or (other and (direct or self.find(granule)))
            ):
                self._damaged(slot, skip=skip_damaged)
                continue
            if other:
                chain[slot] = other
            head[bucket] = slot
            if slot != self._next_unused:
                self._leave_free(self._next_unused, slot)
            self._next_unused = slot + 1
            self.valid_blocks += valid.bit_count()
            if low > BITS:
                dirty_found.append(slot)
                dirty_blocks += (low >> DIRTY_SHIFT).bit_count()
        self.cells[DIRTY_SLOTS], self.cells[DIRTY_BLOCKS] = len(dirty_found), dirty_blocks
        self._turn_free_around()
        return dirty_found

    def _turn_free_around(self) -> None:
        """All are found: the lowest free number is to be taken first."""
        self.used = self._next_unused - 1 - self._free_count
        lowest_last = array("I", self._free[: self._free_count])
        lowest_last.reverse()
        self._free[: self._free_count] = memoryview(lowest_last)

    def _words(self) -> Iterator[tuple[int, int, int]]:
        """Number, state and granule of the slots that hold something, in order.

        A large cache is mostly empty at first: what is empty is not looked at slot by slot.
        """
        last = self.slots + 1
        for start in range(1, last, _SLOTS_AT_A_TIME):
            stop = min(last, start + _SLOTS_AT_A_TIME)
            words = self.state[start:stop]
            if words.tobytes() == _NO_WORDS[: words.nbytes]:
                continue
            pairs = zip(words, self.granule_of[start:stop], strict=True)
            for slot, (word, granule) in enumerate(pairs, start):
                if word:
                    yield slot, word, granule

    def used_slots(self) -> Iterator[int]:
        """The slots that hold something, in order."""
        return (slot for slot, _, _ in self._words())

    def _leave_free(self, first: int, end: int) -> None:
        """`load` found nothing in the slots `first` … `end`, and something after them."""
        for start in range(first, end, _SLOTS_AT_A_TIME):
            numbers = array("I", range(start, min(end, start + _SLOTS_AT_A_TIME)))
            self._free[self._free_count : self._free_count + len(numbers)] = memoryview(numbers)
            self._free_count += len(numbers)

    def _damaged(self, slot: int, *, skip: bool) -> None:
        """`load` cannot take `slot` over. Raises ValueError, or frees it to be skipped."""
        if not skip:
            raise ValueError(f"slot {slot}: {self._fault(slot)}")
        self.skip(slot)
        self.damaged_slots += 1

    def _fault(self, slot: int) -> str:
        """Why `load` cannot take `slot` over."""
        word, granule, granules = self.state[slot], self.granule_of[slot], self.geometry.granules
        low = word & LOW_MASK
        if check_of(granule, low) != word >> 32:
            return "its checksum does not match"
        valid = low & BITS
        if granule >= granules or low >> DIRTY_SHIFT & ~valid or not valid:
            return f"holds granule {granule} of {granules}"
        if valid & ~self.blocks_mask:
            return "holds blocks that no granule has"
        return f"granule {granule} is held twice"

    @property
    def blocks_mask(self) -> int:
        """One bit for each block of a whole granule."""
        return (1 << self.blocks) - 1

    def find(self, granule: int) -> int:
        """The slot that holds `granule`, or 0."""
        slot = self.head[granule & self.bucket_mask]
        granule_of = self.granule_of
        while slot and granule_of[slot] != granule:
            slot = self.chain[slot]
        return slot

    @property
    def has_free(self) -> bool:
        """There is a slot that holds nothing."""
        return self._free_count > 0 or self._next_unused <= self.slots

    def take_free(self) -> int:
        """A slot that holds nothing, or 0. `bind()` or `give_back()` must follow."""
        if self._free_count:
            self._free_count -= 1
            return self._free[self._free_count]
        if self._next_unused <= self.slots:
            self._next_unused += 1
            return self._next_unused - 1
        return 0

    def bind(self, slot: int, granule: int) -> None:
        """Let the free `slot` hold `granule`; no block of it is valid yet.

        The state is 0 until data was stored, so that the file never shows a slot without data.
        """
        self.granule_of[slot] = granule
        bucket = granule & self.bucket_mask
        self.chain[slot] = self.head[bucket]
        self.head[bucket] = slot
        self.used += 1

    def drop(self, slot: int, bits: int) -> bool:
        """See `Blocks.drop`; an empty slot is unbound."""
        empty = super().drop(slot, bits)
        if empty:
            self._unbind(slot)
        return empty

    def _unbind(self, slot: int) -> None:
        """Take `slot` out of its chain: that of its granule, as `load` and `bind` have it, whatever
        the file held. Only a file that is changed while it is mapped leads to another one."""
        bucket = self.granule_of[slot] & self.bucket_mask
        at = self.head[bucket]
        if at == slot:
            self.head[bucket] = self.chain[slot]
        else:
            while (following := self.chain[at]) != slot:
                assert following, f"slot {slot} is not in the chain of its granule"
                at = following
            self.chain[at] = self.chain[slot]
        self.chain[slot] = 0
        # The fast path compares `granule_of` of whatever `head` names, so a stale number in a
        # free slot is harmless: nothing leads to it.
        self.used -= 1

    def give_back(self, slot: int) -> None:
        """Put an unbound slot on the free stack."""
        self._free[self._free_count] = slot
        self._free_count += 1
