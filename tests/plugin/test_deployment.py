"""nbdkit's own protection around the plugin, as README.md shows it: TLS, allow-list, limits."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest
import trustme

from tests.plugin.client import RawClient
from tests.plugin.server import PEERS, Nbdkit, run
from tests.ports import free_port
from tests.tools import HUNG_S, need


@pytest.fixture
def certificates(volumes: Path) -> Path:
    """A directory with what nbdkit and its clients look for, the server's name `localhost`."""
    path = volumes / "pki"
    path.mkdir()
    authority = trustme.CA()
    authority.cert_pem.write_to_path(path / "ca-cert.pem")
    for role, name in (("server", "localhost"), ("client", "client.example")):
        issued = authority.issue_cert(name)
        issued.cert_chain_pems[0].write_to_path(path / f"{role}-cert.pem")
        issued.private_key_pem.write_to_path(path / f"{role}-key.pem")
    return path


def fails(*command: str) -> None:
    done = subprocess.run(
        [need(command[0]), *command[1:]], capture_output=True, timeout=60, check=False
    )
    assert done.returncode != 0


def test_tls_required_with_client_certificates(volumes: Path, certificates: Path) -> None:
    anonymous = volumes / "anonymous"
    anonymous.mkdir()
    (anonymous / "ca-cert.pem").write_bytes((certificates / "ca-cert.pem").read_bytes())
    options = ("--tls=require", f"--tls-certificates={certificates}", "--tls-verify-peer")
    with Nbdkit(f"file={volumes}/disk", "size=1M", options=options) as server:
        path = str(server.socket)
        uri = f"nbds+unix://localhost/?socket={path}&tls-certificates="
        assert run("nbdinfo", "--size", f"{uri}{certificates}").strip() == str(1 << 20)
        fails("nbdinfo", "--size", f"{uri}{anonymous}")
        fails("nbdinfo", "--size", server.uri())


def test_limit_filter_refuses_one_client_too_many(volumes: Path) -> None:
    with (
        Nbdkit(f"file={volumes}/disk", "size=1M", "limit=2", filters=("limit",)) as server,
        RawClient(str(server.socket), "disk@readonly"),
        RawClient(str(server.socket), "disk@readonly"),
    ):
        fails("nbdinfo", "--size", server.uri("disk@readonly"))


@pytest.mark.peers
@pytest.mark.parametrize(("allowed", "served"), [("127.0.0.0/8", True), ("192.0.2.0/24", False)])
def test_ip_filter_serves_the_allowed_only(volumes: Path, allowed: str, served: bool) -> None:
    """On the newer nbdkit: the filter of Debian 12's (1.32.5) cannot parse an IPv4 address."""
    port = free_port()
    with Nbdkit(
        *(f"file={volumes}/disk", "size=1M", f"allow={allowed}", "deny=all"),
        options=("-i", "127.0.0.1", "-p", str(port)),
        filters=("ip",),
        where=PEERS,
        unix=False,
    ):
        uri = f"nbd://127.0.0.1:{port}/disk"
        if served:
            assert run("nbdinfo", "--size", uri).strip() == str(1 << 20)
        else:
            fails("nbdinfo", "--size", uri)


def test_tcp_connections_get_keep_alives(volumes: Path, where: str) -> None:
    need("ss")
    port = free_port()
    with (
        Nbdkit(
            *(f"file={volumes}/disk", "size=1M"),
            options=("-i", "127.0.0.1", "-p", str(port)),
            where=where,
            unix=False,
        ),
        RawClient(port),
    ):
        # Until the client's kernel has acknowledged the handshake, another timer runs.
        deadline = time.monotonic() + HUNG_S
        while "timer:(keepalive" not in (shown := run("ss", "-tnoH", f"sport = :{port}")):
            assert time.monotonic() < deadline, shown
            time.sleep(0.05)
