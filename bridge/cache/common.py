"""What all parts of one cache share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bridge.durability import Kept
from bridge.turn import Turn

from .backend import Backend, Stats
from .cold import Cold
from .file import MappedImage
from .index import Index
from .options import Options
from .slots import Slots


@dataclass(frozen=True, slots=True)
class Common:
    """See the module's text; `clock` returns seconds of a monotonic clock."""

    index: Index
    slots: Slots
    image: MappedImage
    backend: Backend
    options: Options
    stats: Stats
    durability: Kept
    turn: Turn
    cold: Cold
    clock: Callable[[], float]
