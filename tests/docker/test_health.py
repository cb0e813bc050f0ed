"""The health checks: what they call healthy and what not."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import check_bridge
import check_storage
import control
import nbd_probe
import pytest
from certificates import ensure_certificates
from nbd_probe import Unhealthy, probe

from bridge.api.places import check_name
from tests.tools import need

TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:2A39 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1
   1: 030013AC:9C40 020013AC:2A39 01 00000000:00000000 00:00000000 00000000     0        0 2
   2: 030013AC:9C41 020013AC:2A3A 06 00000000:00000000 00:00000000 00000000     0        0 3
"""


@pytest.fixture
def control_folder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    # In /tmp: a unix socket's path has at most 107 bytes.
    with tempfile.TemporaryDirectory(prefix="nbdctl-", dir="/tmp") as folder:
        monkeypatch.setattr(control, "FOLDER", folder)
        yield Path(folder)


def health(capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """The exit status and the line of the bridge's health check."""
    try:
        check_bridge.main()
    except SystemExit as ended:
        return int(str(ended.code)), capsys.readouterr().out
    return 0, capsys.readouterr().out


@contextmanager
def control_socket(path: Path, answer: bytes) -> Iterator[None]:
    """Answers one request."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            client, _ = listener.accept()
            with client:
                client.recv(4096)
                client.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        yield
        thread.join()


def test_bridge_whose_server_is_away_is_unhealthy_with_the_reason(
    control_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    body = b'{"ready": false, "reason": "the server is down: it hung up"}'
    answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 60\r\n\r\n" + body
    with control_socket(control_folder / "disk.api", answer):
        assert health(capsys) == (1, "bridge is unhealthy: the server is down: it hung up\n")


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 200 OK\r\n\r\n", b"\0" * 9999, b"x\r\n\r\n[1]"])
def test_bridge_that_answers_something_else_is_unhealthy_in_one_line(
    control_folder: Path, capsys: pytest.CaptureFixture[str], answer: bytes
) -> None:
    with control_socket(control_folder / "disk.api", answer):
        status, said = health(capsys)

    assert status == 1
    assert said.startswith("bridge is unhealthy: it does not answer: ")
    assert said.count("\n") == 1


def test_bridge_that_is_not_there_is_unhealthy(
    control_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, said = health(capsys)

    assert status == 1
    assert "disk.api: No such file or directory" in said


@pytest.mark.nbdkit
def test_running_bridge_is_healthy(
    control_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the options that the container starts it with, as far as its control socket goes."""
    need("nbdkit")
    with nbdkit() as (host, port):
        command = [sys.executable, "-m", "bridge", "serve", f"nbd://{host}:{port}",
                   "--cache-mode=off", f"--socket-path={control_folder}/disk.sock",
                   f"--api={control.socket_path('disk')}"]  # fmt: skip
        bridge = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert bridge.stderr is not None
            for line in bridge.stderr:
                if "serving" in line:
                    break
            assert health(capsys) == (0, "it serves the disk and has its server\n")
        finally:
            bridge.terminate()
            bridge.communicate()


def test_name_of_a_bridge_is_allowed_for_every_name_of_a_volume() -> None:
    for volume in ("disk", "a+b.c", "_" + "x" * 127):
        assert check_name(control.bridge_name(volume)) == control.bridge_name(volume)


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
