"""The block table: the bits do what the table says, and only the table touches them."""

from __future__ import annotations

import ast
from array import array
from collections.abc import Callable
from pathlib import Path

import pytest

import bridge
from bridge.cache.blocks import TRANSITIONS, Blocks, Event, State
from bridge.cache.file.layout import state_word
from bridge.datapath.cells import DIRTY_BLOCKS, DIRTY_SLOTS

SLOT = 1
BLOCK = 3
BIT = 1 << BLOCK

_BITS_OF = {
    State.ABSENT: (0, 0, 0, 0, 0),
    State.CLEAN: (1, 0, 0, 0, 0),
    State.DIRTY: (1, 1, 0, 0, 0),
    State.SENDING: (1, 1, 1, 1, 0),
    State.REWRITTEN: (1, 1, 0, 1, 0),
    State.WRITTEN: (1, 1, 1, 0, 0),
    State.FLUSHING: (1, 1, 1, 0, 1),
}

_DO: dict[Event, Callable[[Blocks], object]] = {
    Event.FILL: lambda blocks: blocks.fill(SLOT, BIT),
    Event.WRITE: lambda blocks: blocks.write(SLOT, BIT),
    Event.STORED: lambda blocks: blocks.stored(SLOT, BIT, BIT, keep_open=True),
    Event.SEND: lambda blocks: blocks.send(SLOT, BIT),
    Event.REPLY_STABLE: lambda blocks: blocks.reply_stable(SLOT, BIT),
    Event.REPLY_VOLATILE: lambda blocks: blocks.reply_volatile(SLOT, BIT),
    Event.REPLY_LOST: lambda blocks: blocks.reply_lost(SLOT, BIT),
    Event.FLUSH_SENT: lambda blocks: blocks.flush_sent(SLOT),
    Event.FLUSH_OK: lambda blocks: blocks.flush_ok(SLOT),
    Event.FLUSH_LOST: lambda blocks: blocks.flush_lost(SLOT),
    Event.WRITTEN_LOST: lambda blocks: blocks.written_lost(SLOT),
    Event.DROP: lambda blocks: blocks.drop(SLOT, BIT),
}


def _blocks(state: State, *, beside: State | None = None) -> Blocks:
    """A slot with one block in `state`, and perhaps the next one in state `beside`."""
    blocks = Blocks(array("I", [0, 7]), array("Q", [0, 0]), 2)
    valid = dirty = 0
    for each, bit in ((state, BIT), (beside, BIT << 1)):
        if each is None:
            continue
        is_valid, is_dirty, sent, inflight, covered = _BITS_OF[each]
        valid |= bit * is_valid
        dirty |= bit * is_dirty
        blocks.sent[SLOT] |= bit * sent
        blocks.inflight[SLOT] |= bit * inflight
        blocks.covered[SLOT] |= bit * covered
    if valid:
        blocks.state[SLOT] = state_word(7, valid, dirty)
    blocks.valid_blocks = valid.bit_count()
    blocks.cells[DIRTY_BLOCKS] = dirty.bit_count()
    blocks.cells[DIRTY_SLOTS] = bool(dirty)
    return blocks


def test_table_names_every_event() -> None:
    assert set(TRANSITIONS) == set(Event) == set(_DO)


@pytest.mark.parametrize("event", Event, ids=lambda event: event.value)
@pytest.mark.parametrize("state", State, ids=lambda state: state.value)
def test_event_in_a_state_does_what_the_table_says(event: Event, state: State) -> None:
    blocks = _blocks(state)
    assert blocks.state_of(SLOT, BLOCK) is state

    after = TRANSITIONS[event].get(state)
    if after is None:
        with pytest.raises(AssertionError):
            _DO[event](blocks)
        return
    _DO[event](blocks)

    assert blocks.state_of(SLOT, BLOCK) is after
    assert blocks.valid_blocks == blocks.valid(SLOT).bit_count()
    assert blocks.dirty_blocks == blocks.dirty(SLOT).bit_count()
    assert blocks.dirty_slots == bool(blocks.dirty(SLOT))


_WHOLE_SLOT = (Event.FLUSH_SENT, Event.FLUSH_OK, Event.FLUSH_LOST, Event.WRITTEN_LOST)


@pytest.mark.parametrize("event", Event, ids=lambda event: event.value)
@pytest.mark.parametrize("beside", State, ids=lambda state: state.value)
def test_event_of_one_block_leaves_the_next_one_as_it_was(event: Event, beside: State) -> None:
    for state, after in TRANSITIONS[event].items():
        if event is Event.FLUSH_SENT and State.FLUSHING in (state, beside):
            continue  # There is one flush at a time.
        blocks = _blocks(state, beside=beside)

        _DO[event](blocks)

        assert blocks.state_of(SLOT, BLOCK) is after
        expected = TRANSITIONS[event][beside] if event in _WHOLE_SLOT else beside
        assert blocks.state_of(SLOT, BLOCK + 1) is expected


def test_invalid_state_is_named() -> None:
    blocks = _blocks(State.CLEAN)
    blocks.covered[SLOT] = BIT

    with pytest.raises(ValueError, match="block 3"):
        blocks.state_of(SLOT, BLOCK)


def test_open_blocks_are_written_without_an_event_until_they_are_sent() -> None:
    blocks = _blocks(State.CLEAN)
    blocks.write_open(SLOT, BIT)
    assert blocks.open[SLOT] == BIT

    blocks.send(SLOT, BIT)

    assert blocks.open[SLOT] == 0


def test_only_the_table_changes_the_bits_of_a_block() -> None:
    arrays = {"ready", "open", "sent", "inflight", "covered", "state"}
    arrays |= {f"_{name}" for name in arrays}
    found = []
    root = Path(bridge.__file__).parent
    for path in root.rglob("*.py"):
        if path == root / "cache" / "blocks.py":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            targets: list[ast.expr] = []
            if isinstance(node, ast.Assign):
                targets = node.targets
            elif isinstance(node, ast.AugAssign | ast.AnnAssign):
                targets = [node.target]
            for target in targets:
                if isinstance(target, ast.Subscript):
                    name = getattr(target.value, "attr", getattr(target.value, "id", ""))
                    # Elsewhere `state` is a queue's.
                    in_cache = path.is_relative_to(root / "cache")
                    if name in arrays and (in_cache or name.strip("_") != "state"):
                        found.append(f"{path.relative_to(root)}:{node.lineno} {name}")
    assert found == []
