"""docker/scripts/supervise.py: what ends a container and what is tried again."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

from tests.docker.conftest import SCRIPTS
from tests.tools import HUNG_S

_QUICKLY = (
    "import sys, supervise; supervise._FIRST_PAUSE_S = supervise._LONGEST_PAUSE_S = 0.01; "
    "supervise.supervise(sys.argv[1:])"
)


def supervisor(*command: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", _QUICKLY, *command],
        env={"PYTHONPATH": str(SCRIPTS), "PATH": "/usr/bin:/bin"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_program_that_gives_up_soon_is_started_again(tmp_path: Path) -> None:
    tries = tmp_path / "tries"
    script = f"echo x >>{tries}; [ $(wc -l <{tries}) -ge 3 ]"
    process = supervisor("sh", "-c", script)
    process.communicate(timeout=HUNG_S)
    assert process.returncode == 0
    assert tries.read_text() == "x\nx\nx\n"


def test_program_that_is_killed_ends_the_container() -> None:
    process = supervisor("sh", "-c", "kill -9 $$")
    process.communicate(timeout=HUNG_S)
    assert process.returncode == 137


def test_sigterm_is_passed_on_and_the_status_is_the_program_s() -> None:
    process = supervisor("sh", "-c", "trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done")
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HUNG_S)
    assert process.returncode == 7


def test_sigterm_between_two_tries_ends_it() -> None:
    telling = (
        "import sys, signal, supervise; "
        "supervise.time.sleep = lambda pause_s: (print('pause', flush=True), signal.pause()); "
        "supervise.supervise(sys.argv[1:])"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", telling, "sh", "-c", "exit 1"],
        env={"PYTHONPATH": str(SCRIPTS), "PATH": "/usr/bin:/bin"},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "pause\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=HUNG_S)
    assert process.returncode == 0


def test_program_that_is_missing_is_named() -> None:
    process = supervisor("/nonexistent/program")
    _, said = process.communicate(timeout=HUNG_S)
    assert "SettingError: cannot run /nonexistent/program: No such file or directory" in said
