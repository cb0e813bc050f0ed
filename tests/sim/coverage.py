"""What programs exercise of the product's state machines, and what none of them did.

Transitions of a cached block: those of the table in `bridge.cache.blocks` that change the state.
States of the session: the phases of the link, from which to which, and what else it can be in.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Final
from unittest import mock

from bridge.cache.blocks import TRANSITIONS, Blocks, Event, State
from bridge.cache.file.layout import BITS
from bridge.datapath.merged import Merged
from bridge.datapath.rows import Rows
from bridge.server.channels import Channels, Phase
from bridge.server.flushes import Flushes
from bridge.server.grace import GraceSpans
from nbd_plugin.session import Fence
from tests.sim.volume import Waits

_PHASES: Final = (
    *(("new", "up"), ("up", "leaving"), ("leaving", "down"), ("down", "up")),
    *(("leaving", "closed"), ("down", "closed"), ("new", "closed")),
)
_STATES: Final = (
    *("session: commands on trial", "session: given up", "session: a flush is refused"),
    *("session: changes held for a grace time", "fence: joined", "fence: waited for"),
    *("fence: a session is broken", "fence: refused"),
    *("merged: adopted", "merged: done", "merged: failed, done one by one"),
)


FAULTS: Final = (
    *("connection cut", "silence", "connects refused", "connects hang", "server killed"),
    *("server loses power", "flush fails at the server", "no space", "hung up on", "stall"),
    *("bridge killed", "bridge killed at a line", "bridge terminated", "host loses power"),
    *("ring stops", "reset", "write cache toggled", "front-end leaves", "grown", "left behind"),
    *("cache flush by hand", "cold read", "another host writes", "migration", "migrated"),
    *("a filter loses what it held", "the cache's disk is full", "servers that cannot flush"),
    *("cache file damaged", "cache file removed", "intact part saved"),
    *("read-only disks", "resize asked for", "left behind in a shared session"),
)
"""What befalls programs, by the names under which they count it."""


def expected() -> set[str]:
    """All that is counted."""
    blocks = {
        _move(event, before, after)
        for event, moves in TRANSITIONS.items()
        for before, after in moves.items()
        if before is not after
    }
    return {*blocks, *_STATES, *(f"session: {old} → {new}" for old, new in _PHASES)}


def never(seen: Counter[str], counts: Counter[str] | None = None) -> list[str]:
    """What no program has exercised; with `counts`, also which faults have befallen none."""
    faults = [] if counts is None else [f"fault: {name}" for name in FAULTS if not counts[name]]
    return [*sorted(expected() - set(seen)), *faults]


def _move(event: Event, before: State, after: State) -> str:
    return f"block: {event.value}: {before.value} → {after.value}"


@contextmanager
def gathered(seen: Counter[str]) -> Iterator[None]:
    """What happens within is counted in `seen`."""
    with ExitStack() as stack:
        for event in Event:
            real = getattr(Blocks, event.value)
            stack.enter_context(
                mock.patch.object(Blocks, event.value, _counting(event, real, seen))
            )
        for of, name, watch in (
            *((Channels, "enter", _enter), (Flushes, "_refuse", _refuse)),
            *((GraceSpans, "hold", _hold), (Fence, "enter", _waits)),
            *((Rows, "_command_of", _command), (Merged, "end", _end_merged)),
            (Fence, "_join", _called("fence: joined")),
            (Fence, "_break", _called("fence: a session is broken")),
            (Fence, "_break_or_refuse", _called("fence: refused")),
        ):
            real = getattr(of, name)
            stack.enter_context(mock.patch.object(of, name, watch(real, seen)))
        yield


def _called(what: str) -> Callable[..., Callable[..., Any]]:
    def watch(real: Callable[..., Any], seen: Counter[str]) -> Callable[..., Any]:
        def call(*args: Any, **named: Any) -> Any:
            seen[what] += 1
            return real(*args, **named)

        return call

    return watch


def _command(real: Callable[..., Any], seen: Counter[str]) -> Callable[..., Any]:
    def command_of(self: Rows, requests: list[Any]) -> Any:
        seen["merged: adopted"] += len(requests) > 1
        return real(self, requests)

    return command_of


def _end_merged(real: Callable[..., Any], seen: Counter[str]) -> Callable[..., Any]:
    def end(self: Merged) -> None:
        seen["merged: failed, done one by one" if self.error else "merged: done"] += 1
        real(self)

    return end


def _waits(real: Callable[..., Any], seen: Counter[str]) -> Callable[..., Any]:
    def enter(*args: Any, **named: Any) -> Any:
        try:
            return real(*args, **named)
        except Waits:
            seen["fence: waited for"] += 1
            raise

    return enter


def _refuse(real: Callable[..., Any], seen: Counter[str]) -> Callable[..., Any]:
    def refuse(self: Flushes, flushes: list[Any]) -> None:
        if flushes:
            seen["session: a flush is refused"] += 1
        real(self, flushes)

    return refuse


def _hold(real: Callable[..., Any], seen: Counter[str]) -> Callable[..., Any]:
    def hold(self: GraceSpans, spans: list[Any], *args: Any) -> None:
        if spans:
            seen["session: changes held for a grace time"] += 1
        real(self, spans, *args)

    return hold


def _enter(real: Callable[..., Any], seen: Counter[str]) -> Callable[..., Any]:
    def enter(self: Channels, phase: Phase | None = None, *, on_trial: bool | None = None) -> None:
        if phase is not None:
            seen[f"session: {self.phase.value} → {phase.value}"] += 1
        if on_trial:
            seen["session: commands on trial"] += 1
        if self.given_up:
            seen["session: given up"] += 1
        real(self, phase, on_trial=on_trial)

    return enter


def _counting(event: Event, real: Callable[..., Any], seen: Counter[str]) -> Callable[..., Any]:
    """`real`, which does `event` to some blocks of a slot, with its transitions counted."""
    moves = [
        (_MASKS[before], _move(event, before, after))
        for before, after in TRANSITIONS[event].items()
        if before is not after
    ]
    is_whole, is_store = event in _WHOLE, event is Event.STORED

    def counted(self: Blocks, slot: int, bits: int = BITS, *rest: Any, **named: Any) -> Any:
        which = rest[0] if is_store else bits
        for mask, name in moves:
            if mask(self, slot) & which:
                seen[name] += 1
        if is_whole:
            return real(self, slot)
        return real(self, slot, bits, *rest, **named)

    return counted


_WHOLE: Final = (Event.FLUSH_SENT, Event.FLUSH_OK, Event.FLUSH_LOST, Event.WRITTEN_LOST)
_MASKS: Final[dict[State, Callable[[Blocks, int], int]]] = {
    State.ABSENT: lambda blocks, slot: ~blocks.valid(slot) & BITS,
    State.CLEAN: lambda blocks, slot: blocks.valid(slot) & ~blocks.dirty(slot),
    State.DIRTY: Blocks.to_send,
    State.SENDING: Blocks.sending,
    State.REWRITTEN: Blocks.rewritten,
    State.WRITTEN: lambda blocks, slot: blocks.written(slot) & ~blocks.covered[slot],
    State.FLUSHING: lambda blocks, slot: blocks.written(slot) & blocks.covered[slot],
}
"""Which blocks of a slot are in a state."""
