"""Every corpus through its target, without a fuzzer; and that targets and rules can fail.

`./run fuzz` looks for more.
"""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import structlog

from tests.fuzz import __main__ as command
from tests.fuzz import cache_file, minimise, seeds, target
from tests.fuzz.dice import BytesRandom
from tests.fuzz.planted import PLANTED
from tests.fuzz.target import (
    OtherVersion,
    Target,
    TooManyLines,
    TooMuchMemory,
    check_version,
    fault_name,
    named_target,
    replay,
)
from tests.fuzz.targets import TARGETS, quiet

_FILES = 100
_LONGEST_BYTES = 20_000


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    gc.collect()  # Targets count descriptors: none that other tests have left may go meanwhile.
    before = structlog.get_config()
    quiet()
    yield
    structlog.configure(**before)


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_in_a_corpus_breaks_a_rule(name: str) -> None:
    outcomes = {replay(TARGETS[name], data) for data in seeds.of(name)}
    for path in TARGETS[name].inputs():
        try:
            outcomes.add(replay(TARGETS[name], path.read_bytes()))
        except BaseException as error:
            error.add_note(f"./run fuzz --replay {path}")
            raise
    cache_file.clear()
    # A corpus that is always refused in the same way is worth nothing.
    assert len(outcomes) > 1 or name == "rings"


@pytest.mark.parametrize("name", TARGETS)
def test_corpus_is_small(name: str) -> None:
    inputs = TARGETS[name].inputs()
    assert 3 <= len(inputs) <= _FILES
    assert max(path.stat().st_size for path in inputs) <= _LONGEST_BYTES


@pytest.mark.parametrize("name", TARGETS)
def test_planted_bug_is_found_by_the_corpus(name: str) -> None:
    inputs = [path.read_bytes() for path in TARGETS[name].inputs()] + seeds.of(name)
    with PLANTED[name]:
        assert any(map(partial(_fails, TARGETS[name]), inputs))
    cache_file.clear()


def _fails(target: Target, data: bytes) -> bool:
    try:
        target.run(data)
    except Exception:
        return True
    return False


def test_corpora_are_those_of_the_targets() -> None:
    assert {path.name for path in target.CORPUS.iterdir()} == {command.CORE, *TARGETS}
    assert set(PLANTED) == set(TARGETS)
    assert all(seeds.of(name) for name in TARGETS)


# The rules.


def _of(run: object, **rules: int) -> Target:
    return Target("size", run, **rules)  # type: ignore[arg-type]


def test_input_that_keeps_the_product_busy_is_a_fault() -> None:
    def spin(data: bytes) -> None:
        while True:
            pass

    with pytest.raises(TooManyLines):
        replay(_of(spin, most_lines=1000), b"")


def test_input_that_takes_memory_is_a_fault() -> None:
    with pytest.raises(TooMuchMemory, match="takes 1000"):
        replay(_of(lambda data: bytes(10_000_000), most_bytes=9_000_000), b"")
    replay(_of(lambda data: bytes(10_000_000), most_bytes=11_000_000), b"")


def test_corpus_of_another_version_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target, "CORPUS", tmp_path)
    (tmp_path / "size").mkdir()
    (tmp_path / "size" / "VERSION").write_text("1\n")

    check_version(Target("size", len, version=1))
    with pytest.raises(OtherVersion, match=r"of version 1, the target of version 2: .* --anew"):
        Target("size", len, version=2).inputs()


def test_input_of_another_version_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = fault_name(TARGETS["size"], b"1G")
    (tmp_path / name).write_bytes(b"1G")
    old = tmp_path / name.replace("-v1-", "-v0-")
    old.write_bytes(b"1G")

    assert named_target(name, TARGETS) is TARGETS["size"]
    assert command.main(["--replay", str(tmp_path / name)]) == 0
    assert capsys.readouterr().out.endswith(f"{name}: taken\n")
    assert command.main(["--replay", str(old)]) == 2
    assert "made for version 0 of size, this is version 1" in capsys.readouterr().err
    assert command.main(["--replay", str(tmp_path / "x")]) == 2
    assert "not the name of an input" in capsys.readouterr().err


def test_target_that_there_is_not_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["nosuch"]) == 2
    assert "no target nosuch; there are core, rings" in capsys.readouterr().out


def test_without_atheris_it_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)

    assert command.main(["size"]) == 2
    assert "fuzz size: atheris is not installed" in capsys.readouterr().err


# What makes an input.


def test_bytes_decide_every_choice_and_zeroes_come_after_them() -> None:
    made = random.Random(5).randbytes(100)

    def choices(dice: random.Random) -> list[object]:
        dice.seed(1)  # It has no say.
        return [dice.random(), dice.randrange(1000), dice.choice("abc"), dice.randbytes(3)]

    assert choices(BytesRandom(made)) == choices(BytesRandom(made))
    assert choices(BytesRandom(made)) != choices(BytesRandom(made[::-1]))
    assert choices(BytesRandom(b"")) == [0.0, 0, "a", bytes(3)]
    dice = BytesRandom(b"abc")
    assert dice.getrandbits(9) == 0x61 | (0x62 & 1) << 8
    assert (dice.left, dice.rest(), dice.left) == (1, b"c", 0)


def test_minimised_corpus_goes_everywhere_with_few_inputs() -> None:
    size = TARGETS["size"]
    inputs = [b"1G", b"2G", b"33G", b"no", b"maybe", b"1.5M"]

    kept = minimise.fewest(size, inputs, most=10)

    assert len(kept) < len(inputs)
    reached = [minimise.steps_of(size, data) for data in inputs]
    assert frozenset().union(*reached) == frozenset().union(
        *(minimise.steps_of(size, data) for data in kept)
    )
    assert len(minimise.fewest(size, inputs, most=1)) == 1
