"""That nothing grows: the size of every queue, list and table that a bridge holds."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sized
from typing import TYPE_CHECKING, Any, Final

from sortedcontainers import SortedDict, SortedList

from tests.sim.guest import MAX_SECTORS, SLOTS
from tests.sim.oracle import Violation

if TYPE_CHECKING:
    from tests.sim.bridge import Bridge

_CONTAINERS: Final = (list, dict, set, deque, SortedDict, SortedList)
_LONG: Final = 300
"""Whatever a table of names, bounds or counters may have of its own."""


def check(bridge: Bridge) -> None:
    """Raises Violation if anything of the bridge is longer than all that its guest can have asked
    for, and its cache can hold, makes necessary."""
    config = bridge.world.config
    asked = config.queues * SLOTS * MAX_SECTORS
    cached = 16 * config.slots
    for path, size in _sizes(bridge):
        if size > asked + cached + _LONG:
            raise Violation(f"{path} has {size} items, for {asked} sectors asked for at most")


def _sizes(bridge: Bridge) -> Iterator[tuple[str, int]]:
    """Of each container behind the bridge's device and storage: where it is, and its length."""
    todo: list[tuple[str, Any]] = [("device", bridge.device), ("storage", bridge.storage)]
    seen: set[int] = set()
    while todo:
        path, thing = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, _CONTAINERS):
            assert isinstance(thing, Sized)
            yield path, len(thing)
            items = thing.values() if isinstance(thing, dict) else thing
            todo += [(f"{path}[]", each) for each in items if _is_ours(each)]
        elif _is_ours(thing):
            todo += [(f"{path}.{name}", each) for name, each in _attributes(thing)]


def _is_ours(thing: object) -> bool:
    return type(thing).__module__.startswith("bridge.") or isinstance(thing, _CONTAINERS)


def _attributes(thing: object) -> Iterator[tuple[str, Any]]:
    yield from getattr(thing, "__dict__", {}).items()
    for kind in type(thing).__mro__:
        for name in getattr(kind, "__slots__", ()):
            if hasattr(thing, name):
                yield name, getattr(thing, name)
