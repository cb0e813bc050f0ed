"""The wheel and the sdist, installed by pip as users do."""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from email.parser import HeaderParser
from pathlib import Path

import pytest

from bridge import __version__
from tests.packaging.builds import ROOT, build, install
from tests.processes import process, short_directory
from tests.tools import need


@pytest.fixture(scope="module")
def built() -> Iterator[tuple[Path, Path]]:
    with short_directory() as folder:
        yield build(folder)


@pytest.fixture(scope="module")
def installed(built: tuple[Path, Path]) -> Iterator[Path]:
    """The `bin` of an environment that has the wheel."""
    with short_directory() as folder:
        yield install(built[0], folder / "venv")


def run(program: Path, *arguments: str) -> str:
    """Its output. Elsewhere than in the checkout, whose packages must not be found."""
    done = subprocess.run(
        [str(program), *arguments],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_wheel_has_every_module_and_data_file(built: tuple[Path, Path]) -> None:
    names = set(zipfile.ZipFile(built[0]).namelist())
    for package, patterns in (("bridge", ("*.py", "*.pyi", "*.sh")), ("nbd_plugin", ("*.py",))):
        for pattern in patterns:
            for each in (ROOT / package).rglob(pattern):
                assert str(each.relative_to(ROOT)) in names


def test_metadata_says_what_it_is_and_for_which_pythons(built: tuple[Path, Path]) -> None:
    archive = zipfile.ZipFile(built[0])
    (path,) = (each for each in archive.namelist() if each.endswith(".dist-info/METADATA"))
    metadata = HeaderParser().parsestr(archive.read(path).decode())
    assert metadata["Name"] == "nbd-bridge"
    assert metadata["Version"] == __version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert "vhost-user-blk" in metadata["Keywords"]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert "Programming Language :: Python :: 3.13" in metadata.get_all("Classifier", [])


def test_sdist_has_what_a_checkout_needs(built: tuple[Path, Path]) -> None:
    with tarfile.open(built[1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"run", "pyproject.toml", "CHANGELOG.md", "docs/architecture.md"} <= names
    assert {"nbd_plugin/plugin.py", "tests/conftest.py", "docker/Dockerfile"} <= names
    assert "bridge/datapath/native/core.h" in names
    assert not {name for name in names if name.endswith((".so", ".pyc"))}


def test_installed_command_works_without_a_compiler(installed: Path) -> None:
    said = run(installed / "nbd-bridge", "--version")
    assert __version__ in said
    assert "pure" in said


@pytest.mark.nbdkit
async def test_installed_plugin_serves_in_nbdkits_own_interpreter(
    installed: Path, directory: Path
) -> None:
    plugin = run(installed / "nbd-bridge", "plugin-path").strip()
    assert Path(plugin).is_relative_to(installed.parent)
    nbd = directory / "nbd"
    argv = [need("nbdkit"), "-f", "-U", str(nbd), "python", plugin, "store=memory", "size=10MB"]
    async with process(argv, ready=nbd):
        said = run(installed / "nbd-bridge", "info", "--json", f"nbd+unix:///?socket={nbd}")
    assert '"size_bytes": 10000000' in said


@pytest.mark.nbdkit
def test_installed_demo_serves_a_disk(installed: Path) -> None:
    need("nbdkit")
    assert "PASS" in run(installed / "nbd-bridge", "demo", "--no-guest")


def test_installation_without_the_plugin_says_so(installed: Path) -> None:
    copy = installed.parent.with_name("without")
    shutil.copytree(installed.parent, copy, symlinks=True)
    (packages,) = copy.glob("lib/python*/site-packages")
    shutil.rmtree(packages / "nbd_plugin")
    done = subprocess.run(
        [copy / "bin" / "python", "-m", "bridge", "plugin-path"],
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "has no nbdkit plugin" in done.stderr
    assert done.stderr.count("\n") == 1
