"""Hostile peers, led by coverage: `./run fuzz`, or `python -m tests.fuzz`.

    ./run fuzz                          every target for two minutes
    ./run fuzz rings uri --minutes 10   these, for so long each
    ./run fuzz rings --keep             and add to its corpus what leads somewhere new
    ./run fuzz rings --anew             make the corpus of another version of a target
    ./run fuzz --planted                a bug is put in for each target, which has to find it
    ./run fuzz --replay FILE…           inputs that failed, or of a corpus, one by one

An input that breaks a rule is left in .fuzz/faults, under a name that --replay understands.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tests.fuzz import core, minimise, seeds
from tests.fuzz.target import (
    CORPUS,
    VERSION_FILE,
    OtherVersion,
    Target,
    check_version,
    fault_name,
    named_target,
    replay,
)
from tests.fuzz.targets import TARGETS, quiet

CORE = core.NAME

FAULTS = Path(".fuzz") / "faults"
KEPT_FILES = 64
"""Of a corpus."""
FOUND_PREFIX = "found-"
"""Of an input that failed once: it stays in the corpus."""
_ONE_INPUT_S = 600
"""By the clock on the wall, and other programs may have the processors. What only takes long is
found by a replay, which counts lines."""
_MEMORY_MIB = 1024
_STATS = re.compile(r"stat::number_of_executed_units:\s*(\d+)")
_FEATURES = re.compile(r"cov: (\d+) ft: (\d+) corp: (\d+)")


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if something was found, or a planted bug was not; 2: asked wrongly."""
    parser = argparse.ArgumentParser(
        prog="./run fuzz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join((CORE, *TARGETS)))
    parser.add_argument("--minutes", type=float, default=2.0, help="for each target (2)")
    parser.add_argument("--keep", action="store_true", help="add to the corpora")
    parser.add_argument("--anew", action="store_true", help="make the corpora anew")
    parser.add_argument("--planted", action="store_true", help="look for planted bugs")
    parser.add_argument("--replay", nargs="+", type=Path, metavar="FILE", help="run these inputs")
    chosen = parser.parse_args(arguments)
    quiet()
    if chosen.replay:
        return _replay(chosen.replay)
    names = chosen.targets or [CORE, *TARGETS]
    if unknown := [name for name in names if name != CORE and name not in TARGETS]:
        print(f"fuzz: no target {unknown[0]}; there are {', '.join((CORE, *TARGETS))}")
        return 2
    found = [_fuzz(name, chosen) for name in names]
    return max(found, default=0)


def _replay(files: list[Path]) -> int:
    for path in files:
        try:
            target = (
                TARGETS.get(path.parent.name) if path.resolve().is_relative_to(CORPUS) else None
            )
            if target is None:
                target = named_target(path.name, TARGETS)
            else:
                check_version(target)
        except (OtherVersion, ValueError) as error:
            print(f"fuzz: {error}", file=sys.stderr)
            return 2
        print(f"{path}: {replay(target, path.read_bytes())}")
    return 0


def _fuzz(name: str, chosen: argparse.Namespace) -> int:
    """One target; the exit status."""
    try:
        if name != CORE and not chosen.anew:
            check_version(TARGETS[name])
        memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
        with tempfile.TemporaryDirectory(prefix="nbd-bridge-fuzz-", dir=memory) as place:
            return _run(name, chosen, Path(place))
    except (OtherVersion, RuntimeError) as error:
        print(f"fuzz {name}: {error}", file=sys.stderr)
        return 2


def _run(name: str, chosen: argparse.Namespace, place: Path) -> int:
    new, begun, faults = place / "new", place / "begun", place / "faults"
    for each in (new, begun, faults):
        each.mkdir()
    if name != CORE:
        for index, data in enumerate(seeds.of(name)):
            (begun / f"seed-{index}").write_bytes(data)
    corpora = [new, begun] if chosen.anew else [new, begun, CORPUS / name]
    command = _command(name, chosen.planted, place)
    command += [
        f"-max_total_time={round(chosen.minutes * 60)}",
        f"-timeout={_ONE_INPUT_S}",
        f"-rss_limit_mb={_MEMORY_MIB}",
        f"-artifact_prefix={faults}/",
        "-print_final_stats=1",
        "-reload=0",
    ]
    if name != CORE:
        command.append(f"-max_len={TARGETS[name].longest_bytes}")
    ended = subprocess.run(
        [*command, *map(str, corpora)],
        env={**os.environ, "TMPDIR": str(place)},
        capture_output=True,
        text=True,
        errors="replace",
    )
    failed = _tell(name, ended, faults, planted=chosen.planted)
    if (chosen.keep or chosen.anew) and name != CORE and not failed and not chosen.planted:
        _keep(TARGETS[name], corpora)
    return failed


def _command(name: str, planted: bool, place: Path) -> list[str]:
    """The program of a target. Raises RuntimeError where it cannot be had."""
    if name == CORE:
        program = place / "core_fuzz"
        core.build_guided(program, *(["FUZZ_PLANTED"] if planted else []))
        return [str(program)]
    if find_spec("atheris") is None:
        raise RuntimeError("atheris is not installed: ./run fuzz does that")
    return [sys.executable, "-m", "tests.fuzz.guided", name, name if planted else "-"]


def _tell(
    name: str, ended: subprocess.CompletedProcess[str], faults: Path, *, planted: bool
) -> int:
    """Say what came of a run, and keep the input that failed; the exit status."""
    said = ended.stderr + ended.stdout
    count = _STATS.search(said)
    runs = f"{int(count[1]):,} inputs" if count else "inputs"
    places = _FEATURES.findall(said)
    covered = f", {places[-1][1]} features" if places else ""
    if ended.returncode == 0:
        print(f"{name}: {runs}{covered}: {'THE PLANTED BUG WAS NOT FOUND' if planted else 'clean'}")
        return int(planted)
    inputs = sorted(faults.iterdir())
    if planted and inputs:
        print(f"{name}: the planted bug was found after {runs}")
        return 0
    print(said[-4000:], file=sys.stderr)
    FAULTS.mkdir(parents=True, exist_ok=True)
    for path in inputs:
        data = path.read_bytes()
        version = f"{CORE}-v1-{path.name}" if name == CORE else fault_name(TARGETS[name], data)
        shutil.copyfile(path, FAULTS / version)
        print(f"{name}: {path.name.partition('-')[0]}: {FAULTS / version}")
    if not inputs:
        print(f"{name}: ended with status {ended.returncode}")
    return 1


def _keep(target: Target, corpora: list[Path]) -> None:
    """Make the corpus of the few inputs that go everywhere that all of these go."""
    files = [path for place in corpora for path in place.iterdir() if path.name != VERSION_FILE]
    always = {path.name: path.read_bytes() for path in files if path.name.startswith(FOUND_PREFIX)}
    inputs = minimise.fewest(target, (path.read_bytes() for path in files), most=KEPT_FILES)
    shutil.rmtree(target.corpus, ignore_errors=True)
    target.corpus.mkdir(parents=True)
    for data in inputs:
        (target.corpus / hashlib.sha256(data).hexdigest()[:10]).write_bytes(data)
    for name, data in always.items():
        (target.corpus / name).write_bytes(data)
    (target.corpus / VERSION_FILE).write_text(f"{target.version}\n")
    print(f"{target.name}: {len(inputs)} of {len(files)} inputs kept")


if __name__ == "__main__":
    raise SystemExit(main())
