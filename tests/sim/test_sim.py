"""The whole bridge in its simulation: a few hundred programs, and that the simulator itself works.

More, and one of them step by step: `./run sim` (see docs/testing.md).
"""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from contextvars import copy_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bridge.datapath.disk import Disk
from bridge.errors import BridgeError
from tests.sim import bounds, campaign, coverage, planted
from tests.sim.__main__ import main, trace
from tests.sim.config import AMID_WRITES, STEPS, VERSION, OtherVersion, Seed, script
from tests.sim.process import CURRENT, Killed, Process, _detach, observing
from tests.sim.world import World

_CHUNKS = 10
_PROGRAMS = 20
_OF_THE_FAST = 2


@pytest.mark.parametrize(
    "chunk",
    [
        *range(_OF_THE_FAST),
        *(pytest.param(n, marks=pytest.mark.slow) for n in range(_OF_THE_FAST, _CHUNKS)),
    ],
)
def test_programs_with_every_fault_keep_every_promise(chunk: int) -> None:
    first = chunk * _PROGRAMS
    result = campaign.run_some(range(first, first + _PROGRAMS))
    assert not result.failures, f"./run sim --seed {result.failures[0][0]}: {result.failures}"
    assert result.programs == _PROGRAMS


@pytest.mark.slow
def test_every_fault_happens_and_every_transition_is_exercised() -> None:
    result = campaign.run_some(range(1000, 1400))
    assert not result.failures
    # A discard, or another loss, while a flush is under way, and a full disk amid adjacent writes:
    # seen by campaigns only.
    rare = {
        *("block: drop: flushing → absent", "block: written_lost: flushing → dirty"),
        "merged: failed, done one by one",
    }
    assert set(coverage.never(result.seen)) <= rare
    assert result.counts.keys() >= set(coverage.FAULTS)


def test_bridge_that_holds_more_than_its_guest_asked_for_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert not campaign.run_some([8]).failures
    monkeypatch.setattr(bounds, "_LONG", -10_000)
    assert "items, for" in campaign.run_some([8]).failures[0][1]


def test_guest_migrates_to_another_bridge_and_goes_on_there() -> None:
    told = "".join(_told(Seed(62)))
    assert "the guest goes on at another host" in told


def _told(seed: Seed) -> list[str]:
    lines = []
    with campaign.programs():
        world = World(seed, tell=lambda *what: lines.append(f"{what}"))
        world.run()
    return lines


def test_seed_replays_exactly_also_in_another_process() -> None:
    here = [str(hash(tuple(_told(Seed(number))))) for number in (3, 7)]
    assert here == [str(hash(tuple(_told(Seed(number))))) for number in (3, 7)]
    code = (
        "from tests.sim.test_sim import _told, Seed\n"
        "for number in (3, 7): print(hash(tuple(_told(Seed(number)))))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    there, again = (
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, check=True
        ).stdout
        for _ in range(2)
    )
    assert there
    assert there == again


_KILLED_AT_LINES = (28, 79, 105)
"""Programs in which bridges are killed at a line."""


@pytest.mark.parametrize("number", _KILLED_AT_LINES)
def test_trace_of_a_program_that_kills_at_a_line_is_the_one_of_the_campaign(
    number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It once was another one: what printed it, and what counts transitions, runs lines, too."""
    heard: list[tuple[object, ...]] = []
    real = World.note

    def note(self: World, event: str, **fields: object) -> None:
        heard.append((self.timeline.clock.current_time(), event, str(fields.get("at"))))
        real(self, event, **fields)

    monkeypatch.setattr(World, "note", note)
    result = campaign.run_some([number])
    in_campaign, heard = heard, []
    error = trace(Seed(number))
    assert any(event == "killed" for _, event, _ in in_campaign)
    assert heard == in_campaign
    assert [why for _, why in result.failures] == (
        [] if error is None else [campaign.describe(error)]
    )


def test_lines_that_an_observer_runs_kill_no_process(tmp_path: Path) -> None:
    """An error of the product's that is printed, say."""
    world: Any = SimpleNamespace(
        directory=str(tmp_path),
        is_calm=False,
        note=lambda *_, **__: None,
        network=SimpleNamespace(process_died=lambda _: None),
    )
    process = Process(world)

    def run() -> None:
        CURRENT.set(process)
        process.kill_after_lines(1)
        with observing():
            assert str(BridgeError("told"))
        assert not process.dead
        with pytest.raises(Killed):
            str(BridgeError("its own"))

    copy_context().run(run)
    assert process.dead


def test_trace_tells_what_the_guest_did_and_what_the_server_executed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert trace(Seed(3)) is None
    told = capsys.readouterr().out
    for words in ("program", "guest asks", "guest is answered", "server executes", "bridge starts"):
        assert words in told


def test_seed_of_another_version_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert Seed.parse("17") == Seed.parse(f"sim{VERSION}:17") == Seed(17)
    assert Seed.parse(str(Seed(17, (1, 5)))) == Seed(17, (1, 5))
    assert Seed.parse(str(Seed(17, ()))) == Seed(17, ())
    with pytest.raises(OtherVersion, match="version 0, this is version"):
        Seed.parse("sim0:17")
    assert main(["--seed", "sim0:17"]) == 2
    assert "seed of version 0" in capsys.readouterr().err
    assert main(["--seed", "seventeen"]) == 2


def test_script_of_fewer_steps_has_the_same_ones() -> None:
    steps = script(Seed(5))[1]
    assert script(Seed(5, (2, 4)))[1] == [steps[2], steps[4]]
    assert {name for _, name, _ in steps} <= {*STEPS, *AMID_WRITES}


_TELL_OF_LOSSES = (758, 2392)
"""Programs in which a flush fails for a loss."""

_FAST_BUGS = ("recovered_forgotten", "replay_forgotten", "cache_evicts_dirty", "lost_call")


@pytest.mark.parametrize("bug", _FAST_BUGS)
def test_planted_bug_is_found(bug: str) -> None:
    """All of them: `./run sim --planted`."""
    found = planted.hunt_one(bug)
    assert found.seed, str(found)


_FOUND_BY = {
    "filter_believed": 348,
    "dirty_cache_over_anothers_data": 157,
    "migration_ignores_its_last_flush": 72,
    "source_believes_its_cache": 103,
    "nothing_inherited": 27,
    "failed_flush_is_no_loss": 6,
    "durable_write_trusts_any_flush": 6,
    "failed_flush_spares_what_is_in_flight": 321,
    "no_grace": 202,
    "shared_session_admits": 402140,
    "connections_of_two_sessions": 302857,
    "failed_session_is_kept": 403133,
    "samples_come_first": 624493,
    "old_answers_prove": 704819,
    "loss_is_told_without_end": 632996,
    "evicted_writes_race": 800593,
}
"""A program that finds each, in this version of the programs: `./run sim --planted` has others."""


@pytest.mark.parametrize("bug", _FOUND_BY)
def test_loss_of_before_is_found_again_and_only_with_its_bug(bug: str) -> None:
    number = _FOUND_BY[bug]
    assert not campaign.run_some([number]).failures
    with pytest.MonkeyPatch.context() as patch:
        planted_bug = (planted.asserted() | planted.RARE)[bug]
        assert campaign.run_some([number], plant=lambda: planted_bug(patch)).failures


def _killed_while_telling(patch: pytest.MonkeyPatch) -> None:
    """Each bridge is killed once, when a flush has failed for a loss, at the next line."""
    real = Disk._flush_ended
    killed: set[int] = set()

    def flush_ended(self: Disk, error: int) -> None:
        real(self, error)
        process = CURRENT.get()
        if self._told and not self.unreported and id(process) not in killed:
            killed.add(id(process))
            process.kill_after_lines(1)

    patch.setattr(Disk, "_flush_ended", flush_ended)


@pytest.mark.parametrize("is_mutated", [False, True])
def test_bridge_killed_before_its_guest_sees_that_a_flush_failed_leaves_word_of_the_loss(
    is_mutated: bool,
) -> None:
    """The next one executes that flush again. It succeeded, and nothing told of the loss."""
    with pytest.MonkeyPatch.context() as patch:

        def plant() -> None:
            _killed_while_telling(patch)
            if is_mutated:
                planted.RARE["told_before_it_is_seen"](patch)

        result = campaign.run_some(_TELL_OF_LOSSES, plant=plant)
    assert bool(result.failures) == is_mutated, result.failures


def test_failing_program_shrinks_to_one_that_fails_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.MonkeyPatch.context() as patch:
        found = campaign.run_some(
            range(500),
            until=lambda result: bool(result.failures),
            plant=lambda: planted.BUGS["replay_forgotten"](patch),
        )
        seed = Seed.parse(found.failures[0][0])
        short = campaign.shrink(seed, plant=lambda: planted.BUGS["replay_forgotten"](patch))
    assert short.kept is not None
    assert 0 < len(short.kept) < len(script(seed)[1])


def test_simulator_that_finds_nothing_in_a_mutated_product_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(planted.BUGS, "no_bug_at_all", lambda patch: None)
    monkeypatch.setattr(planted, "PROGRAMS", 3)
    assert main(["--planted", "no_bug_at_all", "--jobs", "1"]) == 1
    assert "NOT found in 3 programs" in capsys.readouterr().out
    assert main(["--planted", "absent"]) == 2


def test_dead_process_does_not_see_what_the_next_one_stores(tmp_path: Path) -> None:
    """It once saw the next one's slots in its own index, and looked for them without end."""
    path = tmp_path / "cache"
    path.write_bytes(bytes(8 * mmap.PAGESIZE))
    with path.open("r+b") as file:
        dead, alive = (mmap.mmap(file.fileno(), 0) for _ in range(2))
        _detach(dead, file.fileno(), 0)
        alive[:] = b"n" * len(alive)
        assert not any(dead[:])
        dead[:] = b"d" * len(dead)
        assert path.read_bytes() == b"n" * len(alive)
