"""The compose files, the Dockerfile and the table in docker/README.md say the same."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
DOCKER = PROJECT / "docker"
_VARIABLE = re.compile(r"\$\{([A-Z_]+):-([^}]*)\}")
_ROW = re.compile(r"^\| `([A-Z_]+)` \| (?:`([^`]*)`|empty) \|", re.MULTILINE)


def version() -> str:
    return str(tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["version"])


def variables() -> dict[str, set[str]]:
    """Every variable of the compose files with its defaults."""
    found: dict[str, set[str]] = {}
    for path in (DOCKER / "compose.yaml", DOCKER / "compose.ceph.yaml"):
        for name, default in _VARIABLE.findall(path.read_text()):
            found.setdefault(name, set()).add(default)
    return found


def test_images_carry_the_project_s_version() -> None:
    for path in (DOCKER / "compose.yaml", DOCKER / "compose.ceph.yaml"):
        tags = re.findall(r"image: nbd-bridge/[a-z-]+:(\S+)", path.read_text())
        assert tags
        assert set(tags) == {version()}
    assert set(re.findall(r"^ARG VERSION=(\S+)$", (DOCKER / "Dockerfile").read_text(), re.M)) == {
        version()
    }


def test_readme_table_has_every_variable_with_its_default() -> None:
    rows = dict(_ROW.findall((DOCKER / "README.md").read_text()))
    # The ceph overlay gives the storage more memory; the table says so in words.
    defaults = {name: min(values) if name != "STORAGE_MEMORY" else "768m"
                for name, values in variables().items()}  # fmt: skip
    assert rows == defaults


def test_every_variable_has_one_default() -> None:
    several = {name for name, defaults in variables().items() if len(defaults) > 1}
    assert several == {"STORAGE_MEMORY"}


def test_settings_of_the_scripts_reach_the_containers() -> None:
    """A variable that a script reads and compose.yaml does not pass could never be set."""
    text = "".join((DOCKER / f"compose{part}.yaml").read_text() for part in ("", ".ceph"))
    passed = set(re.findall(r"^      ([A-Z_]+): ", text, re.MULTILINE))
    read: set[str] = set()
    for path in (DOCKER / "scripts").glob("start_*.py"):
        read |= set(re.findall(r"\"((?:NBD|BRIDGE|GUEST|RBD)_[A-Z_]+)\"", path.read_text()))
        read |= set(re.findall(r"'((?:NBD|BRIDGE|GUEST|RBD)_[A-Z_]+)'", path.read_text()))
    assert read - passed <= {"RBD_CONF"}


@pytest.mark.parametrize("name", ["compose.yaml", "compose.ceph.yaml"])
def test_compose_file_needs_neither_version_nor_name(name: str) -> None:
    """Both are refused or warned about by one of the two versions of Compose."""
    assert re.search(r"^(version|name):", (DOCKER / name).read_text(), re.MULTILINE) is None
