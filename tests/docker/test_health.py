"""The health checks: what they call healthy and what not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import check_bridge
import check_storage
import nbd_probe
import pytest
from certificates import ensure_certificates
from nbd_probe import Unhealthy, probe

from tests.tools import need

UNIX = """\
Num       RefCount Protocol Flags    Type St Inode Path
0000000000000000: 00000002 00000000 00010000 0001 01 33025 /run/nbd-bridge/disk.sock
0000000000000000: 00000003 00000000 00000000 0001 03 33026 /run/nbd-bridge/other.sock
0000000000000000: 00000003 00000000 00000000 0001 03 33027
"""
TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:2A39 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1
   1: 030013AC:9C40 020013AC:2A39 01 00000000:00000000 00:00000000 00000000     0        0 2
   2: 030013AC:9C41 020013AC:2A3A 06 00000000:00000000 00:00000000 00000000     0        0 3
"""


def test_bridge_socket_that_listens_is_seen() -> None:
    assert check_bridge.is_listening(UNIX, "/run/nbd-bridge/disk.sock")


def test_bridge_socket_that_is_only_connected_does_not_listen() -> None:
    assert not check_bridge.is_listening(UNIX, "/run/nbd-bridge/other.sock")


def test_bridge_connection_that_is_established_is_seen() -> None:
    assert check_bridge.is_connected(TCP, 10809)


def test_bridge_connection_that_is_closing_is_none() -> None:
    assert not check_bridge.is_connected(TCP, 10810)


@pytest.mark.parametrize(
    ("uri", "port"),
    [
        ("nbds://storage/disk", 10809),
        ("nbd://storage:2000/disk", 2000),
        ("nbd+unix:///disk?socket=/s", None),
    ],
)
def test_bridge_server_port_comes_from_the_uri(uri: str, port: int | None) -> None:
    assert check_bridge.server_port(uri) == port


def test_storage_port_that_listens_is_seen() -> None:
    assert check_storage.is_listening(TCP, 10809)
    assert not check_storage.is_listening(TCP, 10810)


def test_storage_probe_is_believed_for_a_while(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    mark = tmp_path / "probed"
    monkeypatch.setattr(check_storage, "_MARK", str(mark))
    assert not check_storage.was_probed()
    mark.touch()
    assert check_storage.was_probed()
    os.utime(mark, (time.time() - 60,) * 2)
    assert not check_storage.was_probed()


_ACTIVATE = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); "
    "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1'); "
    "os.execv(sys.argv[2], sys.argv[2:])"
)
"""Socket activation: descriptor 3 is the listening socket, so no other process takes its port."""


@contextmanager
def nbdkit(*options: str) -> Iterator[tuple[str, int]]:
    """nbdkit's memory plugin on a port that the kernel chose."""
    program = need("nbdkit")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        process = subprocess.Popen(
            [sys.executable, "-c", _ACTIVATE, str(listener.fileno()), program,
             "--foreground", *options, "memory", "1M"],
            pass_fds=[listener.fileno()], stderr=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        yield address
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()


@pytest.fixture
def server_certificates(tmp_path: Path) -> tuple[Path, Path]:
    need("openssl")
    server, client = tmp_path / "server", tmp_path / "client"
    server.mkdir()
    client.mkdir()
    ensure_certificates(server, client, ["localhost", "127.0.0.1"])
    return server, client


@pytest.mark.nbdkit
def test_probe_of_a_server_that_answers_passes() -> None:
    with nbdkit() as address:
        probe(address, "disk@readonly", None)


def test_probe_over_tls_passes(server_certificates: tuple[Path, Path]) -> None:
    server, client = server_certificates
    options = ("--tls=require", "--tls-verify-peer", f"--tls-certificates={server}")
    with nbdkit(*options) as address:
        probe(address, "disk@readonly", client)


def test_probe_with_a_foreign_certificate_fails(
    server_certificates: tuple[Path, Path], tmp_path: Path
) -> None:
    server, _ = server_certificates
    foreign, client = tmp_path / "foreign", tmp_path / "its-client"
    foreign.mkdir()
    client.mkdir()
    ensure_certificates(foreign, client, ["localhost"])
    options = ("--tls=require", "--tls-verify-peer", f"--tls-certificates={server}")
    with nbdkit(*options) as address, pytest.raises((Unhealthy, OSError)):
        probe(address, "disk@readonly", client)


def test_probe_without_tls_of_a_server_that_wants_it_fails(
    server_certificates: tuple[Path, Path],
) -> None:
    options = ("--tls=require", f"--tls-certificates={server_certificates[0]}")
    with nbdkit(*options) as address, pytest.raises(Unhealthy, match="refused"):
        probe(address, "disk@readonly", None)


def answering(data: bytes) -> Iterator[tuple[str, int]]:
    """A server that sends `data` to one client and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.sendall(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield listener.getsockname()
        thread.join()


@pytest.mark.parametrize("data", [b"", b"SSH-2.0-OpenSSH_9.2\r\n", b"\0" * 18])
def test_probe_of_something_else_fails(data: bytes) -> None:
    with (
        contextmanager(answering)(data) as address,
        pytest.raises((Unhealthy, ConnectionError)),
    ):
        probe(address, "disk", None)


def test_probe_of_a_silent_server_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_probe, "_LIMIT_S", 0.05)
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.raises(TimeoutError),
    ):
        probe(listener.getsockname(), "disk", None)
