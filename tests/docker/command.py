"""Runs commands with a time limit; what fails says so in a few lines."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_SEARCH_PATH = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"


class Failed(Exception):
    """The test cannot go on; the text says why."""


def find(name: str) -> str | None:
    """The path of the program `name`, also when sbin is not on the PATH."""
    return shutil.which(name, path=_SEARCH_PATH)


def run(
    *command: str | Path,
    limit_s: float,
    env: Mapping[str, str] | None = None,
    folder: Path | None = None,
    check: bool = True,
    watch: Callable[[str], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run `command`, its output (standard error included) captured.

    `watch` is called with each line of it, as it comes. Raises Failed when the command takes longer
    than `limit_s` and, with `check`, when it fails.
    """
    words = list(map(str, command))
    name = " ".join(words)[:200]
    said: list[str] = []
    try:
        process = subprocess.Popen(
            words,
            env={**os.environ, "PATH": _SEARCH_PATH, **(env or {})},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise Failed(f"{name}: {error}") from None
    # A thread, since children of a killed command may keep its output open.
    reader = threading.Thread(target=_read, args=(process, said, watch), daemon=True)
    reader.start()
    try:
        process.wait(limit_s)
    except subprocess.TimeoutExpired:
        raise Failed(f"{name}: not done after {limit_s:.0f} s\n{''.join(said)[-2000:]}") from None
    finally:
        process.kill()
        process.wait()
    reader.join(limit_s)
    output = "".join(said)
    if check and process.returncode:
        raise Failed(f"{name}: exit status {process.returncode}\n{output[-3000:]}")
    return subprocess.CompletedProcess(words, process.returncode, output)


def _read(
    process: subprocess.Popen[str], said: list[str], watch: Callable[[str], None] | None
) -> None:
    """Collect the command's lines until its output ends."""
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            said.append(line)
            if watch is not None:
                watch(line.rstrip("\n"))


def install(packages: Sequence[str]) -> None:
    """Install Debian packages. Raises Failed without root or apt."""
    if os.geteuid() != 0 or find("apt-get") is None:
        raise Failed(f"please install {', '.join(packages)} (or run this as root)")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-qy", "--no-install-recommends", *packages]
    if run(*command, limit_s=300, env=quiet, check=False).returncode:
        run("apt-get", "update", "-q", limit_s=120)
        run(*command, limit_s=300, env=quiet)
