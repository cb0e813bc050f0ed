"""The life of a cached block. Rule: everything that changes a block's state stands in this file
(and, for compiled code, `write_open` in `datapath/native/core.c`: `open_plain`).

A block is in one `State`; an `Event` moves it to another, or to itself, as `TRANSITIONS` says. An
event in a state that the table does not name is a bug of ours, and asserted. What is stored is
not the state but the bits it is made of, in flat arrays, one bit per block of a slot, so that an
event happens to all blocks of a slot at once:

| state | valid | dirty | sent | inflight | covered |
|---|---|---|---|---|---|
| ABSENT: the cache does not have it | | | | | |
| CLEAN: the server has it, durable | x | | | | |
| DIRTY: to be sent | x | x | | | |
| SENDING: its newest content is on the way to the server | x | x | x | x | |
| REWRITTEN: older content is on the way, written to since | x | x | | x | |
| WRITTEN: the server replied, no flush covers it yet | x | x | x | | |
| FLUSHING: as WRITTEN, and the flush in flight covers it | x | x | x | | x |

Two more bits say how a block may be reached; they follow from its past, not from the table:

- `ready`: valid, believed to be in the page cache, and no read-ahead mark: a read of it is a copy
  out of the map. Anything else takes the slow path, which finds out why.
- `open`: DIRTY or REWRITTEN, not sent since it was last written, believed resident: a write to it
  is a copy into the map and changes no state.

`state` (u64 per slot: valid, dirty, and a check over both, see `layout`) is in the mapped file and
survives kill -9; the others are in memory. **Store order**: a kill -9 between any two stores must
leave a truthful file. A writer calls `write` before the data of present blocks is stored,
and `stored` after that of absent ones.
"""

from __future__ import annotations

import mmap
from enum import Enum
from typing import Final, Literal

from bridge.cache.file.layout import BITS, DIRTY_SHIFT, LOW_MASK, state_word
from bridge.datapath.cells import DIRTY_BLOCKS, DIRTY_SLOTS, RESIDENT_CELLS, cells


class State(Enum):
    """See the module's text."""

    ABSENT = "absent"
    CLEAN = "clean"
    DIRTY = "dirty"
    SENDING = "sending"
    REWRITTEN = "rewritten"
    WRITTEN = "written"
    FLUSHING = "flushing"


class Event(Enum):
    """What can happen to a block; the method of `Blocks` of the same name does it."""

    FILL = "fill"
    """The server's content of an absent block was stored."""
    WRITE = "write"
    """A write is about to change the content of a block that is there."""
    STORED = "stored"
    """A write has stored the content of an absent block."""
    SEND = "send"
    """A copy of the block goes to the server."""
    REPLY_STABLE = "reply_stable"
    """The server has what was sent, durable."""
    REPLY_VOLATILE = "reply_volatile"
    """The server has what was sent, and may lose it until a flush."""
    REPLY_LOST = "reply_lost"
    """The server refused what was sent, or it may be lost already."""
    FLUSH_SENT = "flush_sent"
    """A flush is sent, after the reply."""
    FLUSH_OK = "flush_ok"
    """The flush succeeded."""
    FLUSH_LOST = "flush_lost"
    """The flush failed, or went to a server that is gone."""
    WRITTEN_LOST = "written_lost"
    """The server may have lost all that it acknowledged."""
    DROP = "drop"
    """The cache forgets the block: evicted, discarded, or changed by another client."""


_S = State
TRANSITIONS: Final[dict[Event, dict[State, State]]] = {
    Event.FILL: {_S.ABSENT: _S.CLEAN},
    Event.WRITE: {
        _S.ABSENT: _S.ABSENT,  # until `stored`
        _S.CLEAN: _S.DIRTY,
        _S.DIRTY: _S.DIRTY,
        _S.SENDING: _S.REWRITTEN,
        _S.REWRITTEN: _S.REWRITTEN,
        _S.WRITTEN: _S.DIRTY,
        _S.FLUSHING: _S.DIRTY,
    },
    Event.STORED: {_S.ABSENT: _S.DIRTY},
    Event.SEND: {_S.DIRTY: _S.SENDING},
    Event.REPLY_STABLE: {_S.SENDING: _S.CLEAN, _S.REWRITTEN: _S.DIRTY},
    Event.REPLY_VOLATILE: {_S.SENDING: _S.WRITTEN, _S.REWRITTEN: _S.DIRTY},
    Event.REPLY_LOST: {_S.SENDING: _S.DIRTY, _S.REWRITTEN: _S.DIRTY},
    Event.FLUSH_SENT: {
        _S.WRITTEN: _S.FLUSHING,
        # Whatever else the slot holds is not covered.
        **{each: each for each in (_S.ABSENT, _S.CLEAN, _S.DIRTY, _S.SENDING, _S.REWRITTEN)},
    },
    # What was written to, sent or dropped since the flush was sent is no longer covered.
    Event.FLUSH_OK: {
        _S.FLUSHING: _S.CLEAN,
        **{each: each for each in State if each is not _S.FLUSHING},
    },
    Event.FLUSH_LOST: {
        _S.FLUSHING: _S.DIRTY,
        **{each: each for each in State if each is not _S.FLUSHING},
    },
    Event.WRITTEN_LOST: {
        _S.WRITTEN: _S.DIRTY,
        _S.FLUSHING: _S.DIRTY,
        **{each: each for each in (_S.ABSENT, _S.CLEAN, _S.DIRTY, _S.SENDING, _S.REWRITTEN)},
    },
    Event.DROP: dict.fromkeys((_S.ABSENT, _S.CLEAN, _S.DIRTY, _S.WRITTEN, _S.FLUSHING), _S.ABSENT),
}
"""Event → state before → state after. SENDING and REWRITTEN blocks cannot be dropped: their reply
would find other content in their place."""


def zeroed(code: Literal["B", "H", "I"], count: int) -> memoryview:
    """`count` zero items of array type `code`, resident only where touched."""
    size = {"B": 1, "H": 2, "I": 4}[code]
    return memoryview(mmap.mmap(-1, max(1, count) * size)).cast(code)[:count]


class Blocks:
    """The bits of all blocks of a cache. `bits` has bit i for block i of the slot."""

    def __init__(self, granule_of: memoryview, state: memoryview, count: int) -> None:
        """`granule_of` (u32) and `state` (u64) are the mapped arrays of `count` slots each."""
        self.granule_of = granule_of
        self.state = state
        self.ready = zeroed("H", count)
        self.open = zeroed("H", count)
        self.sent = zeroed("H", count)
        self.inflight = zeroed("H", count)
        self.covered = zeroed("H", count)
        self._zeros = bytes(2 * count)
        self.valid_blocks = 0
        self.cells = cells(RESIDENT_CELLS)
        """Of the whole cache: the other parts keep their numbers here, too."""

    # What is known of all.

    @property
    def dirty_slots(self) -> int:
        """How many slots have blocks that are neither ABSENT nor CLEAN."""
        return self.cells[DIRTY_SLOTS]

    @property
    def dirty_blocks(self) -> int:
        """How many blocks are neither ABSENT nor CLEAN."""
        return self.cells[DIRTY_BLOCKS]

    # What is known of a slot.

    def valid(self, slot: int) -> int:
        """Blocks of `slot` that are not ABSENT."""
        return self.state[slot] & BITS

    def dirty(self, slot: int) -> int:
        """Blocks of `slot` that are neither ABSENT nor CLEAN."""
        return self.state[slot] >> DIRTY_SHIFT & BITS

    def to_send(self, slot: int) -> int:
        """DIRTY blocks of `slot`."""
        dirty = self.state[slot] >> DIRTY_SHIFT & BITS
        return dirty & ~self.sent[slot] & ~self.inflight[slot]

    def sending(self, slot: int) -> int:
        """SENDING blocks of `slot`."""
        return self.sent[slot] & self.inflight[slot]

    def rewritten(self, slot: int) -> int:
        """REWRITTEN blocks of `slot`."""
        return self.inflight[slot] & ~self.sent[slot]

    def written(self, slot: int) -> int:
        """WRITTEN and FLUSHING blocks of `slot`."""
        return self.sent[slot] & ~self.inflight[slot]

    def state_of(self, slot: int, block: int) -> State:
        """The state of one block. Raises ValueError for bits that name no state."""
        bit = 1 << block
        dirty, sent, inflight, covered = (
            bool(bits & bit)
            for bits in (
                self.dirty(slot),
                self.sent[slot],
                self.inflight[slot],
                self.covered[slot],
            )
        )
        if not dirty and not (sent or inflight or covered):
            return State.CLEAN if self.valid(slot) & bit else State.ABSENT
        found = {
            (True, False, False, False): State.DIRTY,
            (True, True, True, False): State.SENDING,
            (True, False, True, False): State.REWRITTEN,
            (True, True, False, False): State.WRITTEN,
            (True, True, False, True): State.FLUSHING,
        }.get((dirty, sent, inflight, covered))
        if found is None or not self.valid(slot) & bit:
            raise ValueError(f"slot {slot}, block {block}: {dirty=} {sent=} {inflight=} {covered=}")
        return found

    # Events.

    def fill(self, slot: int, bits: int) -> None:
        """FILL, and the blocks are `ready`. To be called after their data was stored."""
        word = self.state[slot]
        assert not word & bits & BITS
        valid = word & BITS | bits
        self.state[slot] = state_word(self.granule_of[slot], valid, word >> DIRTY_SHIFT & BITS)
        self.valid_blocks += bits.bit_count()
        self.ready[slot] |= bits

    def write(self, slot: int, bits: int) -> None:
        """WRITE, of those of `bits` that are there. To be called before their data is stored."""
        # Every first write to a block comes through here: `state_word` is inline.
        was = self.state[slot] & LOW_MASK
        low = was | (bits & was & BITS) << DIRTY_SHIFT
        if low != was:
            check = (low ^ self.granule_of[slot] * 0x9E3779B1) * 0x85EBCA6B >> 7 & LOW_MASK
            self.state[slot] = low | check << 32
            cells = self.cells
            cells[DIRTY_BLOCKS] += (low ^ was).bit_count()
            if was <= BITS:
                cells[DIRTY_SLOTS] += 1
        if self.sent[slot] & bits:
            self.sent[slot] &= ~bits
            self.covered[slot] &= ~bits

    def write_open(self, slot: int, bits: int) -> None:
        """WRITE of `ready` blocks, which are `open` then."""
        self.write(slot, bits)
        self.open[slot] |= bits

    def stored(self, slot: int, bits: int, absent: int, *, keep_open: bool) -> None:
        """The data of a write to `bits` is stored: STORED of the `absent` ones. All are `ready`,
        and `open` if `keep_open`."""
        if absent:
            word = self.state[slot]
            assert not word & absent & BITS
            dirty = word >> DIRTY_SHIFT & BITS
            self.state[slot] = state_word(
                self.granule_of[slot], word & BITS | absent, dirty | absent
            )
            count = absent.bit_count()
            self.valid_blocks += count
            self.cells[DIRTY_BLOCKS] += count
            if not dirty:
                self.cells[DIRTY_SLOTS] += 1
        self.ready[slot] |= bits
        if keep_open:
            self.open[slot] |= bits

    def send(self, slot: int, bits: int) -> None:
        """SEND. The caller copies the blocks before anything else can happen to them."""
        assert not bits & ~self.to_send(slot)
        self.sent[slot] |= bits
        self.inflight[slot] |= bits
        self.open[slot] &= ~bits

    def reply_stable(self, slot: int, bits: int) -> bool:
        """REPLY_STABLE; True if that cleaned the last dirty block of `slot`."""
        self._replied_to(slot, bits)
        return self._clean(slot, bits & self.sent[slot])

    def reply_volatile(self, slot: int, bits: int) -> bool:
        """REPLY_VOLATILE; True if any of `bits` is WRITTEN now."""
        self._replied_to(slot, bits)
        return bool(bits & self.sent[slot])

    def reply_lost(self, slot: int, bits: int) -> None:
        """REPLY_LOST."""
        self._replied_to(slot, bits)
        self.sent[slot] &= ~bits

    def flush_sent(self, slot: int) -> None:
        """FLUSH_SENT."""
        assert not self.covered[slot]
        self.covered[slot] = self.sent[slot] & ~self.inflight[slot]

    def flush_ok(self, slot: int) -> bool:
        """FLUSH_OK; True if that cleaned the last dirty block of `slot`."""
        return self._clean(slot, self.covered[slot])

    def flush_lost(self, slot: int) -> int:
        """FLUSH_LOST; returns the blocks that are DIRTY again."""
        lost = self.covered[slot]
        self.sent[slot] &= ~lost
        self.covered[slot] = 0
        return lost

    def written_lost(self, slot: int) -> int:
        """WRITTEN_LOST; returns the blocks that are DIRTY again."""
        lost = self.written(slot)
        self.sent[slot] &= ~lost
        self.covered[slot] = 0
        return lost

    def drop(self, slot: int, bits: int) -> bool:
        """DROP; True if nothing of `slot` is left."""
        assert not bits & self.inflight[slot]
        word = self.state[slot]
        valid = word & BITS & ~bits
        was_dirty = word >> DIRTY_SHIFT & BITS
        dirty = was_dirty & valid
        self.state[slot] = state_word(self.granule_of[slot], valid, dirty) if valid else 0
        self.ready[slot] &= valid
        self.open[slot] &= dirty
        self.sent[slot] &= dirty
        self.covered[slot] &= dirty
        self.valid_blocks += valid.bit_count() - (word & BITS).bit_count()
        if was_dirty != dirty:
            self.cells[DIRTY_BLOCKS] -= (was_dirty ^ dirty).bit_count()
            if not dirty:
                self.cells[DIRTY_SLOTS] -= 1
        return not valid

    def skip(self, slot: int) -> None:
        """`slot`, as found in the file, is damaged: nothing of it is there."""
        self.state[slot] = 0

    def _replied_to(self, slot: int, bits: int) -> None:
        assert self.inflight[slot] & bits == bits
        self.inflight[slot] &= ~bits

    def _clean(self, slot: int, bits: int) -> bool:
        """The newest content of these blocks is durable on the server."""
        word = self.state[slot]
        was_dirty = word >> DIRTY_SHIFT & BITS
        assert not bits & ~was_dirty
        if not bits:
            return False
        dirty = was_dirty & ~bits
        self.state[slot] = state_word(self.granule_of[slot], word & BITS, dirty)
        self.sent[slot] &= dirty
        self.open[slot] &= dirty
        self.covered[slot] &= dirty
        self.cells[DIRTY_BLOCKS] -= bits.bit_count()
        if dirty:
            return False
        self.cells[DIRTY_SLOTS] -= 1
        return True

    # How blocks may be reached.

    def found_resident(self, slot: int, bits: int) -> None:
        """Those of `bits` that are there are in the page cache: they are `ready`."""
        self.ready[slot] |= bits & self.state[slot] & BITS

    def found_all_resident(self, slot: int, *, marked: int) -> None:
        """All of `slot` is in the page cache; blocks with a read-ahead mark are not `ready`."""
        self.ready[slot] = self.state[slot] & BITS & ~marked

    def mark(self, slot: int, bits: int) -> None:
        """A read of these blocks is to take the slow path, which looks for a read-ahead mark."""
        self.ready[slot] &= ~bits

    def shut(self, slot: int) -> None:
        """A write to any block of `slot` is to take the slow path: a discard holds it."""
        self.open[slot] = 0

    def forget_residency(self) -> None:
        """Nothing is believed to be in the page cache from here on."""
        # Two memory sets of 2 bytes per slot: 0.2 ms at 1.6 million slots.
        memoryview(self.ready).cast("B")[:] = self._zeros
        memoryview(self.open).cast("B")[:] = self._zeros
