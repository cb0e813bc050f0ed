"""What all parts of one cache share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from bridge.cache.cache_options import Options
from bridge.cache.cold import Cold
from bridge.cache.file.cache_file import MappedImage
from bridge.cache.index import Index
from bridge.cache.slots import Slots
from bridge.cache.upstream import Stats, Upstream
from bridge.datapath.durability import ReplayingDurability
from bridge.datapath.turn import Turn


@dataclass(frozen=True, slots=True)
class Common:
    """See the module's text; `clock` returns seconds of a monotonic clock."""

    index: Index
    slots: Slots
    image: MappedImage
    upstream: Upstream
    options: Options
    stats: Stats
    durability: ReplayingDurability
    turn: Turn
    cold: Cold
    clock: Callable[[], float]
