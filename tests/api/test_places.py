"""Where control sockets are, and whose."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.api import places
from bridge.api.places import control_sockets, default_name, open_control, socket_of
from bridge.app.settings import AUTO, ControlSettings
from bridge.cache.cache_options import OFF
from bridge.cli.wording import explain
from bridge.errors import ConfigError
from tests.processes import short_directory


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The system's directory for control sockets; there is no user's."""
    with short_directory() as path:
        monkeypatch.setattr(places, "SYSTEM_DIRECTORY", path / "run")
        monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
        yield path / "run"


def test_bridge_is_called_like_its_socket_unless_it_has_a_name() -> None:
    assert default_name(ControlSettings(), "/run/vm0.sock", "serial") == "vm0"
    assert default_name(ControlSettings(), None, "disk 1/a") == "disk-1-a"
    assert default_name(ControlSettings(), "/run/...", "") == "nbd"
    assert default_name(ControlSettings(name="web"), "/run/vm0.sock", "") == "web"


@pytest.mark.parametrize("name", ["../x", "a/b", ".x", "a b", "x" * 65, "\n", "ä"])
def test_name_that_is_no_file_name_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="cannot be called"):
        default_name(ControlSettings(name=name), None, "")


def test_socket_is_for_its_user_alone(system: Path) -> None:
    name, listener = open_control(ControlSettings(socket=AUTO), "vm0")
    assert name == "vm0"
    assert listener is not None
    with listener:
        path = system / "vm0.api"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        # Others may look a name up, not which there are.
        assert stat.S_IMODE(system.stat().st_mode) & 0o077 == 0o011
        assert control_sockets() == [path]
        assert socket_of("vm0") == path
    assert not path.exists()
    with pytest.raises(ConfigError, match="no bridge is called vm0"):
        socket_of("vm0")


def test_socket_of_a_dead_bridge_is_replaced(system: Path) -> None:
    system.mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(os.fspath(system / "vm0.api"))
        dead.listen()
    name, listener = open_control(ControlSettings(name="vm0", socket=AUTO), "vm0")
    assert name == "vm0"
    assert listener is not None
    listener.close()


def test_socket_of_a_living_bridge_is_an_error_that_names_it(system: Path) -> None:
    _, first = open_control(ControlSettings(socket=AUTO), "vm0")
    assert first is not None
    with first:
        for settings in (
            ControlSettings(name="vm0", socket=AUTO),
            ControlSettings(socket=str(system / "vm0.api")),
        ):
            with pytest.raises(ConfigError, match=rf"process {os.getpid()}\b"):
                open_control(settings, "vm0")
        assert (system / "vm0.api").exists()


def test_two_bridges_without_a_name_are_both_served(system: Path) -> None:
    _, first = open_control(ControlSettings(socket=AUTO), "vhost")
    name, second = open_control(ControlSettings(socket=AUTO), "vhost")
    assert first is not None
    assert second is not None
    with first, second:
        assert name == "vhost-2"
        assert [path.name for path in control_sockets()] == ["vhost-2.api", "vhost.api"]


def test_file_that_is_no_socket_is_left_alone(system: Path) -> None:
    system.mkdir()
    (system / "vm0.api").write_text("mine")
    with pytest.raises(ConfigError, match="is not a socket"):
        open_control(ControlSettings(name="vm0", socket=AUTO), "vm0")
    assert (system / "vm0.api").read_text() == "mine"


def test_disk_without_a_place_for_its_socket_is_served_without(
    system: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "SYSTEM_DIRECTORY", system / "missing" / "run")
    assert open_control(ControlSettings(socket=AUTO), "vm0") == ("vm0", None)
    assert open_control(ControlSettings(socket=OFF), "vm0") == ("vm0", None)
    # One that was asked for by name is an error.
    with pytest.raises(ConfigError) as refused:
        open_control(ControlSettings(name="vm0", socket=AUTO), "vm0")
    assert "--api off" in explain(refused.value)
    with pytest.raises(ConfigError, match="No such file"):
        open_control(ControlSettings(socket=str(system / "no" / "x.api")), "vm0")
