"""The end of a program: which stops may fail."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
import trio

from bridge.cache.cache_options import OFF, WRITEBACK
from tests.sim.ending import Ending
from tests.sim.oracle import Violation


class Scripted(Ending):
    """Stops whose ends are given: what is wrong, and whether the connection was lost meanwhile."""

    def __init__(self, *stops: tuple[str | None, bool], flushes: bool, mode: str) -> None:
        world: Any = SimpleNamespace(
            can_flush=flushes,
            config=SimpleNamespace(mode=mode, flushes=True),
            counts=Counter(),
            count=lambda fault: None,
            bridge_may_run=lambda: None,
            cache_files=list,
            oracle=SimpleNamespace(judge_whole_image=lambda when: None),
            timeline=SimpleNamespace(sleep=_no_time),
            _start_bridge=trio.Event(),
        )
        super().__init__(world)
        self.stops = list(stops)

    async def _until_quiet(self) -> None:
        """It is."""

    async def _stop(self) -> tuple[Any, bool]:
        problem, lost = self.stops.pop(0)
        return SimpleNamespace(problem=problem), lost


async def _no_time(seconds: float) -> None:
    """It passes."""


@pytest.mark.parametrize("lost", [False, True])
@pytest.mark.parametrize("flushes", [False, True])
async def test_stop_that_brings_all_is_the_last(flushes: bool, lost: bool) -> None:
    ending = Scripted((None, lost), flushes=flushes, mode=WRITEBACK)
    await ending._stop_in_order()
    assert ending.world.over


async def test_stop_of_a_guest_that_cannot_flush_may_end_before_its_session_is_replaced() -> None:
    ending = Scripted(("not in time", True), (None, False), flushes=False, mode=WRITEBACK)
    await ending._stop_in_order()
    assert not ending.stops


@pytest.mark.parametrize(
    ("flushes", "stops"),
    [
        (True, [("not in time", True)]),
        (False, [("not in time", False)]),
        (False, [("not in time", True), ("not in time", False)]),
        (False, [("not in time", True), ("not in time", True)]),
    ],
)
async def test_any_other_stop_that_fails_is_found(
    flushes: bool, stops: list[tuple[str | None, bool]]
) -> None:
    ending = Scripted(*stops, flushes=flushes, mode=WRITEBACK)
    with pytest.raises(Violation, match="the last stop failed: not in time"):
        await ending._stop_in_order()
    assert not ending.stops


async def test_bridge_without_a_cache_may_tell_a_guest_that_cannot_flush_by_its_status() -> None:
    ending = Scripted(("may not be durable", False), flushes=False, mode=OFF)
    await ending._stop_in_order()
