"""What an operator can get wrong: one clear line, the right exit status, no traceback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from bridge.app.cache_names import cache_path
from bridge.server.uri import parse_uri
from tests.processes import bridge_argv, unix_uri
from tests.tools import HUNG_S, need


def refused(*arguments: str, status: int) -> str:
    """The one line that `nbd-bridge serve ARGUMENTS` ends with."""
    done = subprocess.run(
        bridge_argv("serve", "--log-level", "error", *arguments),
        capture_output=True,
        timeout=60,
        check=False,
    )
    text = done.stderr.decode()
    assert "Traceback" not in text
    assert done.returncode == status, text
    lines = text.strip().splitlines()
    assert len(lines) == 1, text
    return lines[0]


@pytest.fixture
def nbd(directory: Path) -> Iterator[Path]:
    """A real server that keeps running."""
    path = directory / "nbd"
    yield from _nbdkit(path, "memory", "64M")


def _nbdkit(path: Path, *arguments: str, options: tuple[str, ...] = ()) -> Iterator[Path]:
    pid_file = path.with_suffix(".pid")
    subprocess.run(
        [need("nbdkit"), "-U", str(path), "-P", str(pid_file), *options, *arguments], check=True
    )
    yield path
    subprocess.run(["kill", pid_file.read_text().strip()], check=True)


def test_serve_no_server_names_the_socket(directory):
    line = refused(unix_uri(directory / "none"), "--socket-path", str(directory / "v"), status=1)
    assert str(directory / "none") in line
    assert "running" in line


def test_serve_port_without_server_says_refused(directory):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        uri = f"nbd://127.0.0.1:{port}"
        line = refused(uri, "--socket-path", str(directory / "v"), status=1)
    assert f"127.0.0.1:{port}" in line
    assert "refused" in line


@pytest.mark.parametrize(
    "uri", ["http://host/", "nbd+unix:///", "nbd://host:port/", "disk.img", "nbd://host/?x=1"]
)
def test_serve_bad_uri_is_a_usage_error(uri, directory):
    line = refused(uri, "--socket-path", str(directory / "v"), status=2)
    assert uri in line


def test_serve_unknown_export_names_it(directory):
    plugin = Path(__file__).parents[2] / "nbd_plugin" / "plugin.py"
    (directory / "volumes").mkdir()
    for path in _nbdkit(directory / "nbd", "python", str(plugin), f"dir={directory / 'volumes'}"):
        line = refused(unix_uri(path, "nosuch"), "--socket-path", str(directory / "v"), status=2)
        assert "nosuch" in line


def test_serve_socket_of_a_living_process_is_left_alone(nbd, directory):
    path = directory / "v"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        line = refused(unix_uri(nbd), "--socket-path", str(path), status=2)
        assert str(path) in line
        assert path.exists()


def test_serve_path_that_is_no_socket_is_left_alone(nbd, directory):
    path = directory / "v"
    path.write_text("precious")
    line = refused(unix_uri(nbd), "--socket-path", str(path), status=2)
    assert str(path) in line
    assert path.read_text() == "precious"


def test_serve_missing_directory_is_named(nbd, directory):
    line = refused(unix_uri(nbd), "--socket-path", str(directory / "no" / "v"), status=2)
    assert str(directory / "no") in line


def test_serve_neither_path_nor_descriptor_is_a_usage_error(nbd):
    assert "--socket-path" in refused(unix_uri(nbd), status=2)


def test_serve_descriptor_that_is_no_socket_is_a_usage_error(nbd):
    assert "descriptor 0" in refused(unix_uri(nbd), "--fd", "0", status=2)


def test_serve_export_smaller_than_a_sector_is_no_disk(directory):
    for path in _nbdkit(directory / "nbd", "memory", "511"):
        line = refused(unix_uri(path), "--socket-path", str(directory / "v"), status=2)
        assert "511 bytes" in line


@pytest.mark.parametrize("mode", ["off", "writeback"])
def test_serve_export_without_a_byte_is_no_disk(mode, directory):
    cache = ("--cache-mode", mode, "--cache-dir", str(directory))
    for path in _nbdkit(directory / "nbd", "memory", "0"):
        line = refused(unix_uri(path), "--socket-path", str(directory / "v"), *cache, status=2)
        assert "0 bytes" in line
        assert "there is no disk to serve" in line
    assert not list(directory.glob("*.cache"))


def test_serve_cache_file_that_is_a_fifo_does_not_wait_for_its_other_end(nbd, directory):
    path = cache_path(parse_uri(unix_uri(nbd)), str(directory))
    os.mkfifo(path)
    cache = ("--cache-mode", "writeback", "--cache-dir", str(directory))
    line = refused(unix_uri(nbd), "--socket-path", str(directory / "v"), *cache, status=2)
    assert f"{path} is not a regular file" in line


def test_serve_server_that_needs_tls_says_so(directory):
    certificates = directory / "pki"
    certificates.mkdir()
    psk = certificates / "keys.psk"
    psk.write_text("user:0123456789abcdef0123456789abcdef\n")
    options = ("--tls=require", f"--tls-psk={psk}")
    for path in _nbdkit(directory / "nbd", "memory", "64M", options=options):
        line = refused(unix_uri(path), "--socket-path", str(directory / "v"), status=2)
        assert "TLS" in line
        assert "nbds" in line


def test_serve_server_that_speaks_http_says_what_came(directory):
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()

        def answer() -> None:
            connection, _ = listening.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        port = listening.getsockname()[1]
        line = refused(f"nbd://127.0.0.1:{port}", "--socket-path", str(directory / "v"), status=1)
    assert "NBD" in line


def test_serve_serial_too_long_is_a_usage_error(nbd, directory):
    line = refused(
        unix_uri(nbd), "--socket-path", str(directory / "v"), "--serial", "x" * 21, status=2
    )
    assert "--serial" in line


def test_serve_dead_socket_is_replaced(nbd, directory):
    path = directory / "v"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    child = subprocess.Popen(
        bridge_argv("serve", unix_uri(nbd), "--socket-path", str(path)),
        stderr=subprocess.PIPE,
    )
    assert child.stderr is not None
    while b"serving" not in child.stderr.readline():
        assert child.poll() is None
    with socket.socket(socket.AF_UNIX) as front_end:
        front_end.connect(str(path))
    child.terminate()
    assert child.wait(HUNG_S) == 0
    child.stderr.close()


def test_info_list_names_every_export_with_its_description(directory):
    for name in ("vm0", "vm1"):
        (directory / "disks").mkdir(exist_ok=True)
        (directory / "disks" / name).write_bytes(bytes(65536))
    for path in _nbdkit(directory / "nbd", "file", f"dir={directory}/disks"):
        text = _info("--list", unix_uri(path))
        names = [each["export"] for each in json.loads(_info("--list", "--json", unix_uri(path)))]
        line = refused(unix_uri(path, "vm2"), "--socket-path", str(directory / "v"), status=2)
    assert sorted(text.splitlines()) == ["vm0", "vm1"]
    assert sorted(names) == ["vm0", "vm1"]
    assert "refused the export 'vm2': " in line
    assert "'vm0'" in line
    assert "(nbd-bridge info --list)" in line


def _info(*arguments: str) -> str:
    done = subprocess.run(
        bridge_argv("info", *arguments), capture_output=True, timeout=60, check=True
    )
    return done.stdout.decode()
