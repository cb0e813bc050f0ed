"""Writes to clean blocks of a cache, which compiled code opens by itself: the same as
`Writes.open_blocks` does, and only where that has nothing to decide."""

from __future__ import annotations

import select
import struct
import time
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest

from bridge.cache.cache_options import Options
from bridge.cache.file.cache_file import MappedImage
from bridge.cache.index import Index
from bridge.datapath.cells import BLOCK_MASK, CAPACITY_BYTES, MAY_WRITE, NEXT_AVAIL, SIGNAL_ANYWAY
from bridge.datapath.engine import Engine
from bridge.datapath.engine_names import COMPILED, PURE
from bridge.datapath.request import DISCARD, FLUSH, WRITE
from bridge.spec.virtqueue import DESC_INDIRECT
from tests.cache.fakes import BLOCK, GRANULE, Rig
from tests.datapath.engines import engine
from tests.datapath.test_compiled_stores import native, native_engine
from tests.datapath.test_usual_chains import OUT, Chains

__all__ = ["native"]

GRANULES = 16
DISK_BYTES = GRANULES * GRANULE
MARKED, CLEAN = 0, 1
"""Granules: what was written to already, and what was not."""


class Guest:
    """A guest that writes to a cached disk, all of which is clean but for one block."""

    def __init__(self, which: Engine, *, slots: int = 64, **options: object) -> None:
        self.engine = which
        self.rig = Rig(granules=GRANULES, slots=slots, **options)
        self.rig.server.image[:] = bytes(range(256)) * (DISK_BYTES // 256)
        self.cache = self.rig.cache
        self.index = self.cache.index
        for granule in range(GRANULES):
            self.rig.read(granule * GRANULE, GRANULE)
        self.rig.start(WRITE, MARKED * GRANULE, data=b"m" * BLOCK)
        self.asked: list[str] = []
        """What compiled code asked for."""
        self.resident = self.cache.hits.resident
        for name in ("may_open", "open_blocks", "store"):
            setattr(self.resident, name, self._watched(name, getattr(self.resident, name)))
        self.chains = Chains()
        disk = self.chains.disk
        disk[CAPACITY_BYTES], disk[BLOCK_MASK], disk[MAY_WRITE] = DISK_BYTES, 511, 1
        self.head = 0

    def _watched(self, name: str, function: Callable[..., bool]) -> Callable[..., bool]:
        def call(*arguments: Any) -> bool:
            self.asked.append(name)
            return function(*arguments)

        return call

    def write(self, offset: int, data: bytes) -> None:
        """Make it available."""
        rig = self.chains.rig
        header = rig.alloc(struct.pack("<IIQ", OUT, 0, offset // 512))
        links = [(header, 16, 0), (rig.alloc(data), len(data), 0), (rig.alloc(1), 1, 2)]
        table = self.chains.table(links)
        rig.raw(self.head, rig.alloc(table), len(table), DESC_INDIRECT)
        rig.put_head(self.head)
        self.head += 1

    def look(self) -> int:
        """How many of them were served."""
        self.asked.clear()
        _, writes = self.engine.take_hits(self.chains.queue, self.chains.disk, self.resident)
        return writes

    def state(self) -> list[Any]:
        """Of the cache and its file."""
        cache, index = self.cache, self.index
        ring = cache._writeback.ring
        arrays = (index.ready, index.open, index.sent, index.inflight, index.covered, ring.slots)
        found: list[Any] = [bytes(self.rig.image._whole), *(each.tobytes() for each in arrays)]
        found += [index.cells, ring.queued, ring._marks, ring._marked_s, cache._flusher.due]
        return found


def clean(guest: Guest) -> None:
    """As the guest begins."""


def dirty(guest: Guest) -> None:
    guest.rig.start(WRITE, CLEAN * GRANULE, data=b"d" * GRANULE)


def partly_dirty(guest: Guest) -> None:
    guest.rig.start(WRITE, CLEAN * GRANULE + BLOCK, data=b"d" * (3 * BLOCK))


def sending(guest: Guest) -> None:
    """What was written is on its way to the server, and the ring does not have it."""
    dirty(guest)
    guest.rig.start(FLUSH)
    assert guest.index.sending(guest.index.find(CLEAN)) == 0xFFFF
    guest.rig.start(WRITE, MARKED * GRANULE, data=b"m" * BLOCK)


def written(guest: Guest) -> None:
    """The server has it; a flush waits for other blocks."""
    sending(guest)
    at = next(n for n, each in enumerate(guest.rig.server.pending) if each.length == GRANULE)
    guest.rig.server.answer(at)
    assert guest.index.written(guest.index.find(CLEAN)) == 0xFFFF


def flushing(guest: Guest) -> None:
    """The same, and a FLUSH covers it."""
    sending(guest)
    while guest.rig.server.pending[0].op == WRITE:
        guest.rig.server.answer()
    assert guest.index.covered[guest.index.find(CLEAN)] == 0xFFFF


STATES = [clean, dirty, partly_dirty, sending, written, flushing]


@pytest.mark.parametrize("state", STATES, ids=lambda each: each.__name__)
@pytest.mark.parametrize(
    ("at", "length"), [(0, BLOCK), (0, GRANULE), (2 * BLOCK, 6 * BLOCK), (512, 512), (512, GRANULE)]
)
def test_clean_blocks_are_opened_without_python_and_as_python_opens_them(
    state: Callable[[Guest], None], at: int, length: int
) -> None:
    states = []
    for which in (PURE, COMPILED):
        guest = Guest(engine(which))
        state(guest)
        guest.write(CLEAN * GRANULE + at, b"w" * length)
        guest.write(CLEAN * GRANULE + at, b"x" * 512)
        assert guest.look() == 2
        states.append(guest.state())
        if which == COMPILED:
            assert "open_blocks" not in guest.asked
            assert guest.asked.count("may_open") <= 1
        guest.rig.serve()
        assert guest.rig.flush() == 0
        begin = CLEAN * GRANULE + at
        assert guest.rig.server.image[begin : begin + length] == b"x" * 512 + b"w" * (length - 512)
        assert guest.index.dirty_blocks == 0
    assert states[0] == states[1]


def crossed(guest: Guest) -> None:
    guest.cache.set_write_back(write_back=False)
    for slot in range(1, GRANULES + 1):
        guest.index.found_resident(slot, 0xFFFF)


def discarding(guest: Guest) -> None:
    guest.rig.start(DISCARD, 3 * GRANULE, GRANULE)


def old(guest: Guest) -> None:
    guest.rig.now += 1.0


def flushed(guest: Guest) -> None:
    assert guest.rig.flush() == 0


def waiting(guest: Guest) -> None:
    """A write waits for room."""
    for granule in range(2, GRANULES):
        guest.rig.start(WRITE, granule * GRANULE, data=b"q" * BLOCK)
    assert guest.cache.waiting["room"]


@pytest.mark.parametrize(
    "why", [crossed, discarding, old, flushed, waiting], ids=lambda each: each.__name__
)
def test_where_more_has_to_be_looked_at_python_opens_or_refuses(
    why: Callable[[Guest], None],
) -> None:
    found = []
    for which in (PURE, COMPILED):
        guest = Guest(engine(which), slots=GRANULES, roomy_ratios=None)
        why(guest)
        guest.write(CLEAN * GRANULE, b"w" * BLOCK)
        served = guest.look()
        assert "open_blocks" in guest.asked
        found.append([served, *guest.state()])
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("limit", "ratios"),
    [
        ("background", (0.25, 1.0, 1.0)),
        ("flush", (1.0, 0.25, 1.0)),
        ("hard", (1.0, 1.0, 0.25)),
    ],
)
def test_at_a_limit_of_dirty_slots_python_is_asked_and_not_before(
    limit: str, ratios: tuple[float, float, float]
) -> None:
    """The limits are those of 16 slots: four of them."""
    states = []
    for which in (PURE, COMPILED):
        guest = Guest(engine(which), slots=GRANULES, roomy_ratios=ratios)
        for granule in range(1, 5):
            guest.write(granule * GRANULE, b"w" * BLOCK)
            assert guest.look() == (limit != "hard" or granule < 4)
            assert ("open_blocks" in guest.asked) is (which == PURE or granule == 4)
            states.append([granule, guest.rig.turn.wanted, *guest.state()])
        guest.chains.queue.cells[NEXT_AVAIL] = guest.head
        guest.write(MARKED * GRANULE + BLOCK, b"w" * BLOCK)
        assert guest.look() == 1, "what is dirty already may be written to at the limit"
        assert ("open_blocks" in guest.asked) is (which == PURE)
        states.append(guest.state())
    assert states[:5] == states[5:]


def test_whoever_called_anything_asks_again() -> None:
    guest = Guest(engine(COMPILED))
    slot = guest.index.find(5)
    guest.cache._common.slots.drop(slot, 1)  # is absent from here on
    guest.write(CLEAN * GRANULE, b"a" * BLOCK)
    guest.write(CLEAN * GRANULE + BLOCK, b"b" * BLOCK)
    guest.write(5 * GRANULE, b"c" * BLOCK)
    guest.write(CLEAN * GRANULE + 2 * BLOCK, b"d" * BLOCK)
    assert guest.look() == 4
    assert guest.asked == ["may_open", "store", "may_open"]


@pytest.mark.parametrize("why", [old, flushed], ids=lambda each: each.__name__)
def test_what_python_has_opened_once_is_opened_without_it_from_there_on(
    why: Callable[[Guest], None],
) -> None:
    guest = Guest(engine(COMPILED))
    why(guest)
    for granule in (CLEAN, 5, 7):
        guest.write(granule * GRANULE, b"w" * BLOCK)
    assert guest.look() == 3
    assert guest.asked == ["may_open", "open_blocks", "may_open"]


def test_compiled_turns_ask_once_in_a_call_and_after_the_first_write_was_told_of() -> None:
    guest = Guest(engine(COMPILED))
    native = import_module("bridge.datapath._native")
    state = native.new_turns(0)
    blocks = iter(range(1, 16))

    def write() -> None:
        """The next one, in the next turn of the same call."""
        if (block := next(blocks, 0)) % 5:
            guest.write(CLEAN * GRANULE + block * BLOCK, b"w" * BLOCK)
            guest.chains.queue.cells[SIGNAL_ANYWAY] = 1

    def wrote() -> None:
        guest.asked.append("wrote")

    for told, expected in ((None, ["may_open"]), (wrote, ["wrote", "may_open"])):
        guest.asked.clear()
        write()
        with select.epoll() as epoll:
            rings = ((guest.chains.queue, -1, write),)
            arguments = state, epoll.fileno(), rings, guest.chains.disk, told, (guest.resident,)
            until_ns = time.monotonic_ns() + 10**11
            (served,) = native.turns(*arguments, until_ns, False, False)[1]
        assert (served, guest.asked) == (4, expected)


def test_error_of_what_is_asked_is_raised_and_nothing_is_opened() -> None:
    guest = Guest(engine(COMPILED))

    def fail() -> bool:
        raise RuntimeError("as the test has it")

    guest.resident.may_open = fail
    guest.write(CLEAN * GRANULE, b"a" * BLOCK)
    before = guest.state()
    with pytest.raises(RuntimeError, match="as the test has it"):
        guest.look()
    assert guest.state() == before


def found_by_the_next_process(guest: Guest) -> Index:
    """What a process makes of the file if this one dies now."""
    image = MappedImage(bytearray(guest.rig.image._whole), guest.rig.image.header)
    index = Index(image)
    index.load()
    return index


@pytest.mark.parametrize("state", STATES, ids=lambda each: each.__name__)
@pytest.mark.parametrize(("at", "length"), [(0, BLOCK), (512, GRANULE), (5 * BLOCK, 5 * BLOCK)])
def test_death_after_any_store_leaves_every_block_that_differs_from_the_server_dirty(
    native: Any, state: Callable[[Guest], None], at: int, length: int
) -> None:
    guest = Guest(native_engine(native))
    state(guest)
    guest.write(CLEAN * GRANULE + at, b"w" * length)
    guest.write(CLEAN * GRANULE + at, b"x" * 512)
    differed: list[int] = []

    def died() -> None:
        index = found_by_the_next_process(guest)
        count = 0
        for granule in (MARKED, CLEAN, CLEAN + 1):
            slot = index.find(granule)
            for block in range(GRANULE // BLOCK):
                here, there = slot * GRANULE + BLOCK * block, granule * GRANULE + BLOCK * block
                data = guest.rig.server.image[there : there + BLOCK]
                if index.data[here : here + BLOCK] != data:
                    assert index.dirty(slot) >> block & 1, (len(differed), granule, block)
                    count += 1
        differed.append(count)

    native.on_store(died)
    assert guest.look() == 2
    native.on_store(lambda: None)
    assert "open_blocks" not in guest.asked
    died()
    assert len(differed) >= 6
    assert differed[0] < differed[-1] or state is not clean


def test_limits_are_those_of_the_options() -> None:
    """What the test of limits believes."""
    limits = Options(roomy_ratios=(0.25, 1.0, 1.0)).dirty_limits(slots=16, granules=16)
    assert (limits.background, limits.flush, limits.hard) == (4, 16, 16)
