"""The compiled engine does to the same state exactly what the pure one does: see `worlds`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from bridge.datapath import cells
from bridge.datapath.engine import PURE_ENGINE, choose
from bridge.datapath.engine_names import AUTO, COMPILED, PURE
from bridge.errors import ConfigError
from tests.datapath.engines import engine
from tests.datapath.worlds import Pair, World


@pytest.mark.parametrize("seed", range(40))
def test_every_byte_is_the_same_after_every_call_of_either_engine(seed: int) -> None:
    pair = Pair(seed, (PURE_ENGINE, engine(COMPILED)))
    pair.run(500)


def test_the_calls_that_are_compared_serve_chains_of_every_kind() -> None:
    served: dict[str, int] = {}
    for seed in range(30):
        pair = Pair(seed, (PURE_ENGINE, PURE_ENGINE))
        pair.run(500)
        for name, count in pair.served.items():
            served[name] = served.get(name, 0) + count
    assert min(served.values()) > 50, served


@pytest.mark.parametrize("what", ["take_hits", "take_commands", "answers", "publish"])
def test_an_engine_that_leaves_one_byte_different_is_found_out(what: str) -> None:
    right = getattr(PURE_ENGINE, what)

    def wrong(*arguments: Any) -> Any:
        result = right(*arguments)
        if result is True or (result and sum(result)):
            world.main[-1] ^= 1
        return result

    pairs = [Pair(seed, (PURE_ENGINE, PURE_ENGINE._replace(**{what: wrong}))) for seed in range(9)]
    problems = []
    for pair in pairs:
        world = pair.worlds[1]
        try:
            pair.run(500)
        except AssertionError as error:
            problems.append(str(error))
    assert problems
    assert all(re.match(r"seed \d+, call \d+: byte", each) for each in problems)


def test_a_ring_that_the_core_cannot_take_goes_the_general_way() -> None:
    compiled = engine(COMPILED)
    world = World(compiled, 1)
    queue = world.queues[0]
    queue.avail = memoryview(bytearray(2))  # Too short: never on a ring that the device made.
    queue.native = None
    assert compiled.take_hits(queue, world.disk, world.cache) == (0, 0)
    assert queue.cells[cells.STOPPED]
    queue.cells[cells.STOPPED] = 0
    arguments = queue, world.disk, world.route, world.channel, world.rows
    assert compiled.take_commands(*arguments) == (0, 0)
    assert queue.cells[cells.STOPPED]


def test_what_was_replaced_is_seen_by_the_compiled_engine_too() -> None:
    compiled = engine(COMPILED)
    world = World(compiled, 1)
    queue = world.queues[0]
    compiled.take_hits(queue, world.disk, world.cache)
    assert queue.native
    first = queue.native
    queue.native = None
    compiled.take_hits(queue, world.disk, world.cache)
    assert queue.native is not first


# Which engine is taken.


def test_an_engine_that_does_not_exist_is_one_line_of_error() -> None:
    with pytest.raises(ConfigError, match=r"^engine 'fast': it is one of auto, pure, compiled$"):
        choose("fast")


def test_the_environment_says_which_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBD_BRIDGE_SERVE_ENGINE", PURE)
    assert choose().name == PURE


@pytest.mark.parametrize("how", ["missing", "of another version"])
def test_a_compiled_engine_that_is_not_there_is_missed_only_where_it_is_asked_for(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how == "missing":
        monkeypatch.setitem(sys.modules, "bridge.datapath._native", None)
        monkeypatch.delattr(import_module("bridge.datapath"), "_native", raising=False)
    else:
        engine(COMPILED)
        monkeypatch.setattr("bridge.datapath.engine.ABI", cells.ABI + 1)
    assert choose(AUTO) is PURE_ENGINE
    with pytest.raises(ConfigError) as caught:
        choose(COMPILED)
    message = str(caught.value)
    assert message.startswith("engine compiled: ")
    assert "\n" not in message


@pytest.mark.parametrize(
    ("what_is_there", "said"),
    [
        (None, "this installation has none, as it was made without a C compiler"),
        (b"no library at all", "it cannot be loaded: "),
    ],
)
def test_an_installation_says_why_it_has_no_compiled_engine(
    what_is_there: bytes | None, said: str, tmp_path: Path
) -> None:
    package = Path(import_module("bridge").__file__ or "").parent
    leave_out = shutil.ignore_patterns("_native*.so", "__pycache__")
    shutil.copytree(package, tmp_path / "bridge", ignore=leave_out)
    if what_is_there is not None:
        (tmp_path / "bridge/datapath/_native.abi3.so").write_bytes(what_is_there)
    command = [sys.executable, "-m", "bridge.datapath.engine"]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.startswith(f"pure (compiled: {said}")
    assert found.stdout.count("\n") == 1
