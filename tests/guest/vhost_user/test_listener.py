"""The socket's file: what may be there, what is refused, and how it goes away."""

from __future__ import annotations

import json
import os
import socket
import stat
from pathlib import Path

import pytest

from bridge.errors import ConfigError
from bridge.guest.vhost_user.listener import Listener

pytestmark = pytest.mark.usefixtures("no_fd_leak")


def bound(path: Path, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """A socket bound at `path`."""
    sock = socket.socket(socket.AF_UNIX, kind)
    sock.bind(str(path))
    return sock


def test_socket_has_mode_0600_whatever_the_umask_and_is_removed(directory: Path) -> None:
    path = directory / "s"
    before = os.umask(0)
    try:
        with Listener.at_path(path):
            status = path.stat()
            assert stat.S_ISSOCK(status.st_mode)
            assert stat.S_IMODE(status.st_mode) == 0o600
        assert os.umask(0) == 0
    finally:
        os.umask(before)
    assert not path.exists()


def test_dead_processs_socket_is_replaced(directory: Path) -> None:
    path = directory / "s"
    bound(path).close()
    assert path.exists()

    with Listener.at_path(path), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_socket_that_is_listened_on_is_refused(directory: Path) -> None:
    path = directory / "s"
    with bound(path) as sock:
        sock.listen()
        with pytest.raises(ConfigError, match="another process listens"):
            Listener.at_path(path)
    assert path.exists()


def test_socket_whose_backlog_is_full_is_refused(directory: Path) -> None:
    path = directory / "s"
    clients = []
    with bound(path) as sock:
        sock.listen(0)
        for _ in range(3):
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
            client.connect_ex(str(path))
            clients.append(client)
        with pytest.raises(ConfigError, match="another process listens"):
            Listener.at_path(path)
    for client in clients:
        client.close()


def test_datagram_socket_of_another_process_is_refused(directory: Path) -> None:
    with bound(directory / "s", socket.SOCK_DGRAM), pytest.raises(ConfigError, match="another"):
        Listener.at_path(directory / "s")


def test_path_that_is_not_a_socket_is_refused_and_kept(directory: Path) -> None:
    path = directory / "s"
    path.write_text("precious")

    with pytest.raises(ConfigError, match="is not a socket"):
        Listener.at_path(path)
    with pytest.raises(ConfigError, match="is not a socket"):
        Listener.at_path(directory)
    assert path.read_text() == "precious"


def test_missing_directory_is_named(directory: Path) -> None:
    with pytest.raises(ConfigError, match=r"directory .*/nowhere does not exist"):
        Listener.at_path(directory / "nowhere" / "s")


def test_path_through_a_file_is_refused(directory: Path) -> None:
    (directory / "f").write_text("")

    with pytest.raises(ConfigError, match="cannot listen"):
        Listener.at_path(directory / "f" / "s")


def test_path_longer_than_a_socket_address_is_refused(directory: Path) -> None:
    with pytest.raises(ConfigError, match="longer than 107 bytes"):
        Listener.at_path(directory / ("x" * 107))


def test_file_of_another_process_is_not_removed(directory: Path) -> None:
    path = directory / "s"
    listener = Listener.at_path(path)
    path.unlink()
    with bound(path):
        listener.close()
        assert path.exists()


def test_file_already_gone_at_the_end_is_not_an_error(directory: Path) -> None:
    with Listener.at_path(directory / "s"):
        (directory / "s").unlink()


def test_passed_descriptor_that_is_not_a_unix_stream_socket_is_refused(directory: Path) -> None:
    with (directory / "f").open("w") as file, pytest.raises(ConfigError, match="not a socket"):
        Listener.from_fd(file.fileno())
    with socket.socket(socket.AF_INET) as sock:
        with pytest.raises(ConfigError, match="not a unix stream socket"):
            Listener.from_fd(sock.fileno())
        assert sock.getsockname()
    with pytest.raises(ConfigError, match="not a socket"):
        Listener.from_fd(987654)


def test_passed_descriptor_is_told_listening_from_connected(directory: Path) -> None:
    sock = bound(directory / "s")
    sock.listen()
    with Listener.from_fd(sock.detach()) as listener:
        assert not listener.is_connected
    assert (directory / "s").exists()
    ours, theirs = socket.socketpair()
    with ours, Listener.from_fd(theirs.detach()) as listener:
        assert listener.is_connected


def test_directory_that_takes_no_socket_is_named() -> None:
    with pytest.raises(ConfigError, match="cannot listen on socket path /proc/s"):
        Listener.at_path("/proc/s")


def test_socket_that_is_handed_over_is_removed_by_the_next_process_alone(directory: Path) -> None:
    path = directory / "s"
    mine = Listener.at_path(path)
    copy = mine.handed_over()
    told = json.loads(json.dumps(copy.as_json()))
    mine.close()
    assert path.exists()

    # As if the descriptor had come through an execve.
    theirs = Listener.of_json(told)
    copy.sock.detach()
    assert (theirs.path, theirs.is_connected) == (str(path), False)
    assert not os.get_inheritable(theirs.sock.fileno())
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
    theirs.close()
    assert not path.exists()
