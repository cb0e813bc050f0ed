"""Runs commands with a time limit; what fails says so in a few lines."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
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
) -> subprocess.CompletedProcess[str]:
    """Run `command`, its output (standard error included) captured.

    Raises Failed when it takes longer than `limit_s` and, with `check`, when it fails.
    """
    name = " ".join(map(str, command))[:200]
    try:
        done = subprocess.run(
            list(map(str, command)),
            env={**os.environ, "PATH": _SEARCH_PATH, **(env or {})},
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            check=False,
            timeout=limit_s,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        tail = (said if isinstance(said, bytes) else said.encode()).decode(errors="replace")
        raise Failed(f"{name}: not done after {limit_s:.0f} s\n{tail[-2000:]}") from None
    except OSError as error:
        raise Failed(f"{name}: {error}") from None
    if check and done.returncode:
        raise Failed(f"{name}: exit status {done.returncode}\n{done.stdout[-3000:]}")
    return done


def install(packages: Sequence[str]) -> None:
    """Install Debian packages. Raises Failed without root or apt."""
    if os.geteuid() != 0 or find("apt-get") is None:
        raise Failed(f"please install {', '.join(packages)} (or run this as root)")
    quiet = {"DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "install", "-qy", "--no-install-recommends", *packages]
    if run(*command, limit_s=300, env=quiet, check=False).returncode:
        run("apt-get", "update", "-q", limit_s=120)
        run(*command, limit_s=300, env=quiet)
