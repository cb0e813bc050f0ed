"""What conftest.py does for every test."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import tiers

_LENGTH_BYTES = 1 << 20


def test_difference_between_two_pieces_of_a_disk_is_explained_in_a_few_lines() -> None:
    """Whether it runs in CI or not: a full difference would take minutes."""
    expected = bytearray(_LENGTH_BYTES)
    expected[7] = 1
    with pytest.raises(AssertionError, match="At index 7") as caught:
        assert bytes(_LENGTH_BYTES) == bytes(expected)
    assert len(str(caught.value)) < 2000


def test_fast_and_rest_are_all_tests() -> None:
    """CI runs one after the other."""

    def collected(*options: str) -> set[str]:
        argv = [sys.executable, "-m", "pytest", "-q", "-n0", "--collect-only", *options]
        told = subprocess.check_output([*argv, "tests/guest"], text=True)
        return {line for line in told.splitlines() if "::" in line}

    fast, rest = collected("--fast"), collected("--rest")
    assert fast
    assert rest
    assert not fast & rest
    assert fast | rest == collected()


@pytest.mark.parametrize("value", ["true", ""])
def test_tests_know_whether_they_run_in_ci(value: str) -> None:
    """Although the variable is gone, so that pytest does not see it."""
    program = "import os, tests.conftest, tests.tiers as t; print('CI' in os.environ, t.in_ci())"
    environment = {**os.environ, "CI": value}
    environment.pop(tiers.IN_CI, None)
    told = subprocess.check_output([sys.executable, "-c", program], env=environment, text=True)
    assert told == f"False {value == 'true'}\n"
