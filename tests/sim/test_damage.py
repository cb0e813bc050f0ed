"""Programs with a cache file that is damaged or removed, and that they find what is wrong then."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.app import cache_flush
from bridge.cache.index import Index
from tests.sim import campaign
from tests.sim.config import DAMAGES, Seed, script
from tests.sim.medium import Medium
from tests.sim.oracle import Oracle, Violation

_PROGRAMS = 3000
"""Of which one in fifty has such a step."""


def _damaging() -> list[int]:
    return [
        number
        for number in range(_PROGRAMS)
        if any(name in DAMAGES for _, name, _ in script(Seed(number))[1])
    ]


def test_step_that_damages_leaves_the_other_steps_and_their_numbers() -> None:
    number = _damaging()[0]
    steps = script(Seed(number))[1]
    others = tuple(at for at, name, _ in steps if name not in DAMAGES)
    assert others == tuple(range(len(steps) - 1))
    assert script(Seed(number, others))[1] == [each for each in steps if each[1] not in DAMAGES]


@pytest.mark.slow
def test_programs_that_damage_a_cache_file_lose_no_more_than_that() -> None:
    result = campaign.run_some(_damaging())
    assert not result.failures
    assert result.counts["cache file removed"]
    assert result.counts["intact part saved"]


def _nothing_is_saved(patch: pytest.MonkeyPatch) -> None:
    async def flush_to(*_: Any, **__: Any) -> int:
        return 0

    patch.setattr(cache_flush, "_flush_to", flush_to)


def _damage_is_not_refused(patch: pytest.MonkeyPatch) -> None:
    load = Index.load
    patch.setattr(Index, "load", lambda self, **_: load(self, skip_damaged=True))


@pytest.mark.parametrize("plant", [_nothing_is_saved, _damage_is_not_refused])
def test_bug_around_damaged_files_is_found(plant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = campaign.run_some(
        _damaging(), until=lambda result: bool(result.failures), plant=lambda: plant(monkeypatch)
    )
    assert "Violation" in found.failures[0][1]


def _written_through(*, at_once: bool) -> Oracle:
    """The second of two writes has come to a server, and is lost there before a flush."""
    medium = Medium(1, rng=None, lost=lambda *_: None)  # type: ignore[arg-type]
    oracle = Oracle(medium, has_cache=True)
    first = oracle.begin(0, 1)
    if not at_once:
        oracle.end(first, done=True)
    second = oracle.begin(0, 1)
    if at_once:
        oracle.end(first, done=True)
    oracle.end(second, done=True)
    oracle.server_lost(0, [second.number])
    return oracle


def test_bridge_without_its_file_that_is_killed_while_it_stops_may_have_sent_something() -> None:
    """What was under way then came to the server after the guest had begun anew."""
    assert campaign.run_some([2203865]).failures == []


def test_write_that_was_overwritten_in_the_cache_is_lost_with_what_overwrote_it() -> None:
    _written_through(at_once=True).host_lost([], written_through=True)
    with pytest.raises(Violation, match="the host has lost power"):
        _written_through(at_once=False).host_lost([], written_through=True)
