"""Builds the wheel and the sdist from a copy of the checkout, and installs without an index."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[2]
_LEFT_OUT = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc", "*.egg-info", "wheels", ".*")

_BUILD = """
import sys
from setuptools import build_meta
folder = sys.argv[1]
print(build_meta.build_wheel(folder))
print(build_meta.build_sdist(folder))
"""


def copy_of_checkout(folder: Path) -> Path:
    """The project's files in `folder`, without what git ignores."""
    folder.mkdir()
    for each in ROOT.iterdir():
        if each.is_dir() and each.name in (
            "bridge",
            "nbd_plugin",
            "deb",
            "docs",
            "docker",
            "tests",
        ):
            shutil.copytree(each, folder / each.name, ignore=_LEFT_OUT)
        elif each.is_file() and not each.name.startswith("."):
            shutil.copy(each, folder / each.name)
    return folder


def build(folder: Path) -> tuple[Path, Path]:
    """The wheel and the sdist of this checkout, in `folder`. Without the compiled engine, as on a
    host without a compiler."""
    source = copy_of_checkout(folder / "source")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _BUILD, str(folder)],
        cwd=source,
        env={**os.environ, "CC": "false"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


def install(wheel: Path, folder: Path) -> Path:
    """An environment in `folder` in which pip has installed `wheel`; its `bin`. Dependencies are
    those of this interpreter, so that no index is needed."""
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install"]
    subprocess.run([*pip, "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    # A `.pth` file of that directory, such as the editable installation's, is not read for this.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"
