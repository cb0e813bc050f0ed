"""What storage and bridge are started with, from their environment variables."""

from __future__ import annotations

from pathlib import Path

import click
import pytest
import start_bridge
import start_storage
from environment import SettingError

from bridge.cli.main import nbd_bridge
from bridge.server.uri import parse_uri
from nbd_plugin.settings import Settings


def plugin_settings(store: str, parameters: list[str]) -> Settings:
    """What the plugin makes of the parameters; raises if it takes them not."""
    settings = Settings()
    for parameter in [f"store={store}", *parameters]:
        settings.set(*parameter.split("=", 1))
    settings.check()
    return settings


def test_file_store_parameters_are_taken_by_the_plugin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(start_storage, "VOLUMES", tmp_path)
    settings = plugin_settings("file", start_storage.store_parameters("file", "disk"))
    assert (settings.dir, settings.volume) == (str(tmp_path), "disk")


def test_memory_store_parameters_are_taken_by_the_plugin() -> None:
    settings = plugin_settings("memory", start_storage.store_parameters("memory", "disk"))
    assert settings.size_bytes == 10 << 30


def test_rbd_store_parameters_are_taken_by_the_plugin(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    conf = tmp_path / "ceph.conf"
    conf.touch()
    monkeypatch.setenv("RBD_CONF", str(conf))
    monkeypatch.setenv("RBD_CREATE", "on")
    settings = plugin_settings("rbd", start_storage.store_parameters("rbd", "disk"))
    assert (settings.pool, settings.volume, settings.create) == ("rbd", "disk", "on")


def test_rbd_store_without_configuration_names_the_remedy(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("RBD_CONF", str(tmp_path / "none"))
    with pytest.raises(SettingError, match="mount the cluster's configuration"):
        start_storage.store_parameters("rbd", "disk")


def test_volume_that_is_missing_is_created_sparse(tmp_path: Path) -> None:
    start_storage.create_volume(tmp_path, "disk", "1G")
    status = (tmp_path / "disk").stat()
    assert status.st_size == 1 << 30
    assert status.st_blocks * 512 < 1 << 20


def test_volume_of_another_size_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "disk").write_bytes(b"x" * 4096)
    start_storage.create_volume(tmp_path, "disk", "1G")
    assert (tmp_path / "disk").read_bytes() == b"x" * 4096
    assert "has 4K, NBD_VOLUME_SIZE=1G is ignored" in capsys.readouterr().err


def test_volume_size_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="volume disk"):
        start_storage.create_volume(tmp_path, "disk", "0")


@pytest.mark.parametrize("names", ["two words!", "a;b", "x/y"])
def test_tls_name_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, names: str) -> None:
    monkeypatch.setenv("NBD_TLS_NAMES", names)
    with pytest.raises(SettingError, match="neither a host name nor an address"):
        start_storage.tls_options()


def test_tls_off_needs_no_certificates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBD_TLS", "off")
    assert start_storage.tls_options() == []
    assert start_bridge.server_uri() == "nbd://storage/disk"


@pytest.fixture
def bridge_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("SOCKET_FOLDER", "CONTROL_FOLDER", "CACHE_FOLDER", "CERTIFICATES"):
        monkeypatch.setattr(start_bridge, name, tmp_path)
    for name in ("ca-cert.pem", "client-cert.pem", "client-key.pem"):
        (tmp_path / name).touch()
    return tmp_path


def serve_context(arguments: list[str]) -> click.Context:
    """`nbd-bridge serve` with these arguments, parsed by the real command line, not run."""
    serve = nbd_bridge.get_command(click.Context(nbd_bridge), "serve")
    assert serve is not None
    return serve.make_context("serve", arguments)


@pytest.mark.parametrize("mode", ["off", "writethrough", "writeback"])
def test_bridge_options_are_taken_by_the_command_line(
    monkeypatch: pytest.MonkeyPatch, bridge_folders: Path, mode: str
) -> None:
    monkeypatch.setenv("BRIDGE_CACHE_MODE", mode)
    monkeypatch.setenv("BRIDGE_SERIAL", "vm0")
    monkeypatch.setenv("BRIDGE_READ_ONLY", "on")
    monkeypatch.setenv("BRIDGE_FEATURES", "-mq,-discard")
    chosen = serve_context([start_bridge.server_uri(), *start_bridge.options()]).params
    assert chosen["socket_path"] == str(bridge_folders / "disk.sock")
    assert chosen["name"] == "disk"
    assert (chosen["cache_mode"], chosen["serial"], chosen["read_only"]) == (mode, "vm0", True)


def test_bridge_uri_names_the_certificates(bridge_folders: Path) -> None:
    uri = parse_uri(start_bridge.server_uri())
    assert (uri.host, uri.export_name, uri.tls) == ("storage", "disk", True)
    assert uri.tls_certificates == str(bridge_folders)


def test_bridge_without_certificates_says_who_makes_them(
    bridge_folders: Path,
) -> None:
    (bridge_folders / "client-key.pem").unlink()
    with pytest.raises(SettingError, match=r"client-key.pem cannot be read .* storage makes it"):
        start_bridge.server_uri()


def test_bridge_with_a_uri_of_another_scheme_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NBD_URI", "http://storage/disk")
    with pytest.raises(SettingError, match="does not start with nbd://"):
        start_bridge.server_uri()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("BRIDGE_CACHE_MODE", "sometimes"),
        ("BRIDGE_CACHE_SIZE", "big"),
        ("BRIDGE_NUM_QUEUES", "0"),
        ("BRIDGE_BLOCK_SIZE", "1000"),
        ("BRIDGE_SERIAL", "x" * 21),
        ("BRIDGE_FEATURES", "mq; rm"),
        ("NBD_VOLUME", "../disk"),
    ],
)
def test_bridge_setting_that_is_wrong_is_named(
    monkeypatch: pytest.MonkeyPatch, bridge_folders: Path, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingError, match=name):
        start_bridge.options()


def test_bridge_folder_that_is_missing_is_named(
    monkeypatch: pytest.MonkeyPatch, bridge_folders: Path
) -> None:
    monkeypatch.setattr(start_bridge, "SOCKET_FOLDER", bridge_folders / "none")
    with pytest.raises(SettingError, match="mount a volume at it"):
        start_bridge.options()
