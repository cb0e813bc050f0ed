"""What the images are built from: a copy of the project's files, with wheels for the bridge.

The copy keeps a build from seeing half of an edit. The wheels are fetched by this
machine's pip with this machine's settings, so the build needs no package index and none of those
settings can get into an image.
"""

from __future__ import annotations

import shutil
import sys
import tomllib
from pathlib import Path

from tests.docker.command import run

PROJECT = Path(__file__).parents[2]
_PARTS = ("bridge", "nbd_plugin", "docker", "pyproject.toml", "setup.py", "README.md", "LICENSE",
          ".dockerignore")  # fmt: skip


def stage(folder: Path, *, wheels: Path) -> Path:
    """Copy the build's files to `folder`; `wheels` keeps the wheels from run to run.

    Returns the folder with the compose files. Raises Failed.
    """
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc", "*.so", "*.whl")
    for part in _PARTS:
        source, target = PROJECT / part, folder / part
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignore)
        else:
            shutil.copyfile(source, target)
    fetch_wheels(PROJECT / "pyproject.toml", wheels)
    for wheel in wheels.glob("*.whl"):
        shutil.copyfile(wheel, folder / "docker" / "wheels" / wheel.name)
    return folder / "docker"


def fetch_wheels(pyproject: Path, wheels: Path) -> None:
    """Get a wheel of everything that `pyproject` needs to build and to run, unless it is there."""
    stamp = wheels / "made-from"
    wanted = pyproject.read_text()
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(wheels, ignore_errors=True)
    wheels.mkdir(parents=True)
    project = tomllib.loads(wanted)
    needed = [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--wheel-dir", wheels, *needed,
        limit_s=300)  # fmt: skip
    stamp.write_text(wanted)
