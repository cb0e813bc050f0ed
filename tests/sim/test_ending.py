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

LATE = "the server did not take everything in time"
UNKNOWN = "the guest does not know of a loss"


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is dirty in a cache file."""
    monkeypatch.setattr("tests.sim.ending.show", lambda path: SimpleNamespace(dirty_bytes=512))


class Scripted(Ending):
    """Stops whose ends are given: what is wrong, and whether the connection was lost meanwhile."""

    def __init__(self, *stops: tuple[str | None, bool], flushes: bool, mode: str) -> None:
        world: Any = SimpleNamespace(
            can_flush=flushes,
            config=SimpleNamespace(mode=mode, flushes=True),
            counts=Counter(),
            count=lambda fault: None,
            bridge_may_run=lambda: None,
            cache_files=lambda: ["dirty"] if self.is_dirty else [],
            oracle=SimpleNamespace(judge_whole_image=lambda when: None),
            timeline=SimpleNamespace(sleep=_no_time),
            _start_bridge=trio.Event(),
        )
        super().__init__(world)
        self.is_dirty = False
        self.stops = list(stops)

    async def _until_quiet(self) -> None:
        """It is."""

    async def _stop(self) -> tuple[Any, bool]:
        problem, lost = self.stops.pop(0)
        self.is_dirty = problem == LATE
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
    ending = Scripted((LATE, True), (None, False), flushes=False, mode=WRITEBACK)
    await ending._stop_in_order()
    assert not ending.stops


@pytest.mark.parametrize(
    ("flushes", "stops"),
    [
        (True, [(LATE, True)]),
        (True, [(UNKNOWN, True)]),
        (False, [(LATE, False)]),
        (False, [(LATE, True), (LATE, False)]),
        (False, [(LATE, True), (LATE, True)]),
    ],
)
async def test_any_other_stop_that_fails_is_found(
    flushes: bool, stops: list[tuple[str | None, bool]]
) -> None:
    ending = Scripted(*stops, flushes=flushes, mode=WRITEBACK)
    with pytest.raises(Violation, match="the last stop failed" if flushes else "has dirty data"):
        await ending._stop_in_order()
    assert not ending.stops


@pytest.mark.parametrize("mode", [OFF, WRITEBACK])
async def test_bridge_may_tell_by_its_status_what_a_guest_that_cannot_flush_is_not_told(
    mode: str,
) -> None:
    ending = Scripted((UNKNOWN, False), flushes=False, mode=mode)
    await ending._stop_in_order()
