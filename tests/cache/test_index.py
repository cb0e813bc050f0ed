"""The index: chains, states, and what a kill leaves."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.cache.file.cache_file import MappedImage
from bridge.cache.file.layout import Geometry, Identity, check_of, new_header, state_word
from bridge.cache.index import Index

from .fakes import BLOCK, GRANULE


def _index(granules: int, slots: int) -> Index:
    geometry = Geometry(granules * GRANULE, BLOCK, GRANULE, slots)
    header = new_header(geometry, Identity("", ""), bytes(16), 0)
    index = Index(MappedImage(bytearray(geometry.file_bytes), header))
    index.load()
    return index


def test_granules_of_one_bucket_are_all_found() -> None:
    index = _index(1 << 20, 64)
    buckets = index.bucket_mask + 1
    slots = {}
    for number in range(10):
        slot = index.take_free()
        index.bind(slot, 5 + number * buckets)
        index.fill(slot, 1)
        slots[5 + number * buckets] = slot

    index.drop(slots.pop(5 + 4 * buckets), 1)

    assert all(index.find(granule) == slot for granule, slot in slots.items())
    assert index.find(5 + 4 * buckets) == 0


@given(st.lists(st.integers(0, 63), max_size=60))
def test_slots_are_used_once_and_come_back(granules: list[int]) -> None:
    index = _index(64, 16)
    held: dict[int, int] = {}
    for granule in granules:
        if granule in held:
            slot = held.pop(granule)
            assert index.drop(slot, 0xFFFF)
            index.give_back(slot)
        elif slot := index.take_free():
            index.bind(slot, granule)
            index.fill(slot, 1)
            held[granule] = slot
        else:
            assert len(held) == 16
    assert len(set(held.values())) == len(held)
    assert all(index.find(granule) == held.get(granule, 0) for granule in range(64))
    assert index.used == len(held)


_word = st.tuples(st.integers(0, 40), st.integers(0, 0xFFFF), st.integers(0, 0xFFFF), st.booleans())


@given(st.integers(1, 40), st.lists(_word, max_size=16))
def test_whatever_a_file_holds_its_slots_are_found_and_can_be_dropped(
    granules: int, words: list[tuple[int, int, int, bool]]
) -> None:
    geometry = Geometry(granules * GRANULE, BLOCK, GRANULE, 16)
    header = new_header(geometry, Identity("", ""), bytes(16), 0)
    image = MappedImage(bytearray(geometry.file_bytes), header)
    for slot, (granule, valid, dirty, is_damaged) in enumerate(words, 1):
        image.granule_of[slot] = granule
        image.state[slot] = state_word(granule, valid, dirty) ^ is_damaged
    index = Index(image)

    index.load(skip_damaged=True)
    held = list(index.used_slots())
    found = [index.find(image.granule_of[slot]) for slot in held]
    emptied = [index.drop(slot, 0xFFFF) for slot in reversed(held)]

    assert found == held
    assert all(emptied)
    assert (index.used, index.valid_blocks, index.dirty_slots) == (0, 0, 0)


@pytest.mark.parametrize("becomes", [7, 8])
def test_file_that_was_changed_while_it_is_mapped_ends_the_process_instead_of_its_turns(
    becomes: int,
) -> None:
    """Nothing can be believed any more then; but the loop must not go round for ever."""
    index = _index(64, 16)
    for granule in (6, 7):
        slot = index.take_free()
        index.bind(slot, granule)
        index.fill(slot, 1)
    index.granule_of[index.find(6)] = becomes

    with pytest.raises(AssertionError, match="is not in the chain"):
        index.drop(1, 1)


@given(st.integers(0, 0xFFFFFFFE), st.integers(0, 0xFFFFFFFF), st.integers(0, 63))
def test_check_changes_with_every_bit_of_granule_and_state(
    granule: int, low: int, bit: int
) -> None:
    flipped = (granule ^ 1 << bit, low) if bit < 32 else (granule, low ^ 1 << bit - 32)

    assert check_of(*flipped) != check_of(granule, low)


def test_load_finds_what_was_stored() -> None:
    index = _index(64, 16)
    for slot, granule in ((1, 60), (2, 3), (5, 9)):
        index.granule_of[slot] = granule
        index.state[slot] = state_word(granule, 0b111, 0b10 if slot == 2 else 0)

    again = Index.__new__(Index)
    again.__init__(_ImageOf(index))  # type: ignore[misc]
    dirty = again.load()

    assert dirty == [2]
    assert (again.used, again.valid_blocks, again.dirty_blocks) == (3, 9, 1)
    assert [again.take_free() for _ in range(13)] == [3, 4, *range(6, 17)]
    assert again.take_free() == 0


class _ImageOf:
    """The image that an index was made from."""

    def __init__(self, index: Index) -> None:
        self.geometry = index.geometry
        self.granule_of = index.granule_of
        self.state = index.state
        self.data = index.data
        self.put = index.put
