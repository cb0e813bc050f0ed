"""Which branches of the cores no test takes: `./run coverage`, or `python -m tests.coverage`.

The cores' own fast tests with either engine, and some of the simulation: about twenty minutes on
two idle cores. What is not taken, and why, stands in docs/testing.md.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from bridge.datapath.engine_names import COMPILED, PURE

REQUIRED_PERCENT = 95
FOLDERS = ("datapath", "cache", "guest", "server", "contracts", "fuzz")
_SIMULATION = "tests/sim/test_sim.py"
_SIMULATED = "keep_every_promise or every_fault_happens"


def main(arguments: list[str] | None = None) -> int:
    """The exit status: 1 if a test fails, 2 if there is less coverage than is required."""
    parser = argparse.ArgumentParser(prog="./run coverage", description=__doc__)
    parser.add_argument(
        "--missing", action="store_true", help="say which lines and branches are not taken"
    )
    chosen = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="nbd-bridge-coverage-") as place:
        environment = {**os.environ, "COVERAGE_FILE": str(Path(place) / "data")}
        failed = 0
        for engine in (PURE, COMPILED):
            environment["NBD_BRIDGE_SERVE_ENGINE"] = engine
            folders = [f"tests/{folder}" for folder in FOLDERS]
            failed |= _measure(environment, "--fast", "-n", "auto", *folders)
            failed |= _measure(environment, _SIMULATION, "-k", _SIMULATED)
        _coverage(environment, "combine", "--quiet")
        report = ["report", f"--fail-under={REQUIRED_PERCENT}"]
        if chosen.missing:
            report += ["--show-missing", "--skip-covered"]
        low = _coverage(environment, *report)
        return 1 if failed else low


def _measure(environment: dict[str, str], *arguments: str) -> int:
    return _coverage(environment, "run", "-m", "pytest", "-q", *arguments)


def _coverage(environment: dict[str, str], *arguments: str) -> int:
    command = [sys.executable, "-m", "coverage", *arguments]
    return subprocess.run(command, env=environment, check=False).returncode


if __name__ == "__main__":
    raise SystemExit(main())
