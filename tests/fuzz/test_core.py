"""The compiled core under sanitizers: see `core_fuzz.c`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

_HERE = Path(__file__).parent
_NATIVE = _HERE.parent.parent / "bridge" / "datapath" / "native"
_PROGRAMS = 2000


@pytest.mark.timeout(300)
@pytest.mark.parametrize("hooks", [[], ["-DDP_TEST_FETCHES"]], ids=["", "while it changes"])
def test_nothing_that_a_guest_or_server_sends_reaches_beyond_what_the_core_was_given(
    hooks: list[str], tmp_path: Path
) -> None:
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    program = tmp_path / "core_fuzz"
    sanitizers = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g", "-O1"]
    sources = [str(_HERE / "core_fuzz.c"), str(_NATIVE / "core.c"), str(_NATIVE / "turns.c")]
    options = ["-std=c99", *sanitizers, "-D_GNU_SOURCE", "-DOWN_DRIVER", f"-I{_NATIVE}", *hooks]
    subprocess.run([compiler, *options, *sources, "-o", str(program)], check=True)
    corpus = sorted(str(each) for each in (_HERE / "corpus").iterdir())
    assert corpus
    seed = str(int.from_bytes(os.urandom(4)))
    found = subprocess.run(
        [str(program), str(_PROGRAMS), seed, *corpus], capture_output=True, text=True
    )
    assert found.returncode == 0, f"seed {seed}: {found.stderr}"
    assert found.stdout == "no fault found\n"
