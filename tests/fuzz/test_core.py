"""The compiled core under sanitizers: see `core_fuzz.c`."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.fuzz import core

_PROGRAMS = 2000


def _built(directory: Path, *defines: str) -> Path:
    program = directory / "core_fuzz"
    if not core.build_alone(program, *defines):
        pytest.skip("no C compiler")
    return program


@pytest.mark.timeout(300)
@pytest.mark.parametrize("hooks", [[], ["DP_TEST_FETCHES"]], ids=["", "while it changes"])
def test_nothing_that_a_guest_or_server_sends_reaches_beyond_what_the_core_was_given(
    hooks: list[str], tmp_path: Path
) -> None:
    program = _built(tmp_path, *hooks)
    corpus = core.inputs()
    assert corpus
    seed = int.from_bytes(os.urandom(4))

    found = core.run_alone(program, _PROGRAMS, seed, corpus)

    assert found.returncode == 0, f"seed {seed}: {found.stderr}"
    assert found.stdout == "no fault found\n"


@pytest.mark.timeout(300)
def test_core_that_is_given_less_than_it_is_told_is_found_by_the_corpus(
    tmp_path: Path,
) -> None:
    found = core.run_alone(_built(tmp_path, "FUZZ_PLANTED"), 0, 1, core.inputs())

    assert found.returncode
    assert "heap-buffer-overflow" in found.stderr
