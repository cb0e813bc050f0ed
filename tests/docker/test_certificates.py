"""docker/scripts/certificates.py: made once, renewed in time, the operator's own left alone."""

from __future__ import annotations

import subprocess
from pathlib import Path

import certificates
import pytest
from certificates import ensure_certificates
from environment import SettingError

from tests.tools import need

NAMES = ("storage", "localhost", "127.0.0.1")


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    need("openssl")
    server, client = tmp_path / "server", tmp_path / "client"
    server.mkdir()
    client.mkdir()
    return server, client


def contents(*folders: Path) -> dict[str, bytes]:
    return {f"{path.parent.name}/{path.name}": path.read_bytes()
            for folder in folders for path in folder.iterdir()}  # fmt: skip


def shown(certificate: Path) -> str:
    return subprocess.run(
        ["openssl", "x509", "-in", certificate, "-noout", "-text"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip


def test_first_start_makes_what_both_sides_need(folders: tuple[Path, Path]) -> None:
    server, client = folders
    assert ensure_certificates(server, client, NAMES)
    assert sorted(contents(server, client)) == [
        "client/ca-cert.pem", "client/client-cert.pem", "client/client-key.pem",
        "server/ca-cert.pem", "server/ca-key.pem", "server/server-cert.pem",
        "server/server-key.pem",
    ]  # fmt: skip


def test_private_keys_are_not_for_others(folders: tuple[Path, Path]) -> None:
    server, client = folders
    ensure_certificates(server, client, NAMES)
    modes = {path.name: path.stat().st_mode & 0o777
             for folder in folders for path in folder.glob("*-key.pem")}  # fmt: skip
    assert modes == {"ca-key.pem": 0o600, "server-key.pem": 0o600, "client-key.pem": 0o640}


def test_roles_and_names_are_in_the_certificates(folders: tuple[Path, Path]) -> None:
    server, client = folders
    ensure_certificates(server, client, [*NAMES, "nas.example", "2001:db8::1"])
    of_server, of_client = shown(server / "server-cert.pem"), shown(client / "client-cert.pem")
    assert "DNS:storage" in of_server
    assert "DNS:nas.example" in of_server
    assert "IP Address:127.0.0.1" in of_server
    assert "IP Address:2001:DB8:0:0:0:0:0:1" in of_server
    assert "TLS Web Server Authentication" in of_server
    assert "TLS Web Client Authentication" in of_client
    assert "TLS Web Server Authentication" not in of_client


def test_second_start_changes_nothing(folders: tuple[Path, Path]) -> None:
    ensure_certificates(*folders, NAMES)
    before = contents(*folders)
    assert not ensure_certificates(*folders, NAMES)
    assert contents(*folders) == before


def test_further_name_renews_the_server_only(folders: tuple[Path, Path]) -> None:
    ensure_certificates(*folders, NAMES)
    before = contents(*folders)
    assert ensure_certificates(*folders, [*NAMES, "nas.example"])
    changed = {name for name, data in contents(*folders).items() if data != before[name]}
    assert changed == {"server/server-cert.pem", "server/server-key.pem"}


def test_certificate_about_to_expire_is_renewed(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(certificates, "LEAF_DAYS", certificates.RENEW_DAYS - 1)
    ensure_certificates(*folders, NAMES)
    before = contents(*folders)
    monkeypatch.undo()
    assert ensure_certificates(*folders, NAMES)
    changed = {name for name, data in contents(*folders).items() if data != before[name]}
    assert changed == {"server/server-cert.pem", "server/server-key.pem",
                       "client/client-cert.pem", "client/client-key.pem"}  # fmt: skip


def test_client_of_another_authority_is_made_again(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    server, client = folders
    other = tmp_path / "other"
    other.mkdir()
    ensure_certificates(other, client, NAMES)
    assert ensure_certificates(server, client, NAMES)
    assert (client / "ca-cert.pem").read_bytes() == (server / "ca-cert.pem").read_bytes()
    assert not ensure_certificates(server, client, NAMES)


@pytest.mark.parametrize("name", ["server-cert.pem", "server-key.pem", "ca-cert.pem"])
def test_damaged_file_is_made_again(folders: tuple[Path, Path], name: str) -> None:
    server, client = folders
    ensure_certificates(server, client, NAMES)
    (server / name).write_text("damaged")
    assert ensure_certificates(server, client, NAMES)
    assert not ensure_certificates(server, client, NAMES)


def test_own_certificates_are_left_alone(folders: tuple[Path, Path]) -> None:
    server, client = folders
    (server / "server-cert.pem").write_text("mine")
    assert not ensure_certificates(server, client, NAMES)
    assert contents(server, client) == {"server/server-cert.pem": b"mine"}


def test_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="is not there: mount a volume"):
        ensure_certificates(tmp_path / "none", tmp_path, NAMES)
