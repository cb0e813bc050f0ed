"""The compiled core as a target: `core_fuzz.c`, built with sanitizers, by clang for libFuzzer or by
any compiler with a driver of its own."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.fuzz.target import CORPUS, VERSION_FILE, OtherVersion

NAME = "core"
VERSION = 2
"""Raised by a change that alters what the bytes of a program mean."""

_HERE = Path(__file__).parent
_NATIVE = _HERE.parent.parent / "bridge" / "datapath" / "native"


def inputs() -> list[Path]:
    """The files of the corpus. Raises OtherVersion."""
    found = (CORPUS / NAME / VERSION_FILE).read_text().strip()
    if found != str(VERSION):
        raise OtherVersion(f"the corpus of {NAME} is of version {found}, the target of {VERSION}")
    return sorted(path for path in (CORPUS / NAME).iterdir() if path.name != VERSION_FILE)


def build_guided(program: Path, *defines: str) -> None:
    """Build the program for libFuzzer. Raises RuntimeError where there is no clang with it."""
    clang = shutil.which("clang")
    if clang is None:
        raise RuntimeError("there is no clang")
    _build(clang, program, "fuzzer,address,undefined", defines)


def build_alone(program: Path, *defines: str) -> bool:
    """Build the program that runs on its own; False if there is no compiler. Raises RuntimeError
    if it cannot be built."""
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return False
    _build(compiler, program, "address,undefined", ("OWN_DRIVER", *defines))
    return True


def _build(compiler: str, program: Path, sanitizers: str, defines: tuple[str, ...]) -> None:
    made = subprocess.run(
        [
            *(compiler, "-std=c99", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"),
            *("-g", "-O1", "-D_GNU_SOURCE", f"-I{_NATIVE}"),
            *(f"-D{each}" for each in defines),
            *(str(_HERE / "core_fuzz.c"), str(_NATIVE / "core.c"), str(_NATIVE / "turns.c")),
            str(_NATIVE / "sends.c"),
            *("-o", str(program)),
        ],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        raise RuntimeError(f"{compiler} cannot build {program.name}: {made.stderr[-500:]}")


def run_alone(
    program: Path, rounds: int, seed: int, files: list[Path]
) -> subprocess.CompletedProcess[str]:
    """These files, then so many programs made of random numbers."""
    command = [str(program), str(rounds), str(seed), *map(str, files)]
    return subprocess.run(command, capture_output=True, text=True)
