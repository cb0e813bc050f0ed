"""Where a bridge listens: sockets that a service manager passes, and whose a socket is."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import trio

from bridge.app import listening
from bridge.app.listening import gid_of, open_listener, passed_sockets, socket_path_of
from bridge.app.settings import DiskSettings
from bridge.demo.servers import is_listening
from bridge.errors import ConfigError
from bridge.guest.vhost_user.listener import Listener
from bridge.peers.blk_driver import BlkDriver
from tests.api.bridges import served
from tests.processes import bridge_argv, process, unix_uri, wait_for
from tests.tools import HUNG_S, missing, need

NOBODY = 65534
A_GROUP = 54321
"""Of no user here."""


@pytest.fixture
def passed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Two listening sockets, as if a service manager had passed them: their paths."""
    paths = [directory / "a", directory / "b"]
    with ExitStack() as stack:
        numbers = []
        for path in paths:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.bind(str(path))
            sock.listen()
            numbers.append(sock.fileno())
        # They are not the descriptors 3 and 4 of the test's process.
        monkeypatch.setattr(listening, "passed_sockets", lambda: numbers)
        monkeypatch.setattr(Listener, "from_fd", classmethod(from_copy))
        yield paths


def from_copy(cls: type[Listener], fd: int) -> Listener:
    sock = socket.socket(fileno=os.dup(fd))
    return Listener(sock, None, (0, 0))


def test_passed_socket_at_the_disks_path_is_used(passed: list[Path]) -> None:
    with open_listener(DiskSettings(socket_path=str(passed[1]))) as listener:
        assert listener.sock.getsockname() == str(passed[1])
    assert passed[1].exists()


def test_passed_sockets_without_the_disks_path_are_refused_with_theirs(passed: list[Path]) -> None:
    with pytest.raises(ConfigError, match=f"at /x, but was passed {passed[0]}, {passed[1]}: "):
        open_listener(DiskSettings(socket_path="/x"))


def test_several_passed_sockets_and_no_path_are_refused(passed: list[Path]) -> None:
    with pytest.raises(ConfigError, match="2 sockets were passed"):
        open_listener(DiskSettings())


def test_only_passed_socket_needs_no_path(
    passed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = listening.passed_sockets()
    monkeypatch.setattr(listening, "passed_sockets", lambda: numbers[:1])

    assert socket_path_of(DiskSettings()) == str(passed[0])
    with open_listener(DiskSettings()) as listener:
        assert listener.sock.getsockname() == str(passed[0])


@pytest.mark.parametrize(
    ("pid", "count", "expected"),
    [
        ("own", "2", [3, 4]),
        ("own", "0", []),
        ("1", "2", []),
        ("", "2", []),
        ("own", "", []),
        ("own", "x", []),
        ("own", "-1", []),
        ("own", "99999", []),
    ],
)
def test_sockets_are_passed_only_to_the_process_that_is_named(
    pid: str, count: str, expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()) if pid == "own" else pid)
    monkeypatch.setenv("LISTEN_FDS", count)
    assert passed_sockets() == expected


_ACTIVATE = """
import os, socket, sys
listening = socket.socket(socket.AF_UNIX)
listening.bind(sys.argv[1])
listening.listen()
os.dup2(listening.fileno(), 3)
os.set_inheritable(3, True)
os.environ.update(LISTEN_FDS="1", LISTEN_PID=str(os.getpid()))
os.execv(sys.argv[2], sys.argv[2:])
"""
"""What a service manager does."""


@pytest.mark.nbdkit
async def test_activated_bridge_serves_the_socket_that_was_there_and_leaves_it(
    directory: Path,
) -> None:
    nbd, vhost = directory / "nbd", directory / "vhost"
    async with process([need("nbdkit"), "-f", "-U", str(nbd), "memory", "64M"], ready=nbd):
        argv = [sys.executable, "-c", _ACTIVATE, str(vhost), *bridge_argv("serve", unix_uri(nbd))]
        async with process(argv, ready=vhost) as child:
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(0, b"a" * 512)
                assert await guest.read(0, 512) == b"a" * 512
            child.terminate()
            assert await wait_for(child, limit_s=HUNG_S) == 0
        assert vhost.exists()


@pytest.mark.parametrize(
    ("disk", "mode"),
    [
        (DiskSettings(), 0o600),
        (DiskSettings(socket_mode=0o640), 0o640),
        (DiskSettings(socket_group=str(os.getegid())), 0o660),
        (DiskSettings(socket_group=str(os.getegid()), socket_mode=0o600), 0o600),
    ],
)
def test_mode_of_the_socket_is_narrow_unless_a_group_has_it(
    disk: DiskSettings, mode: int, directory: Path
) -> None:
    path = directory / "s"
    given = DiskSettings(
        socket_path=str(path), socket_group=disk.socket_group, socket_mode=disk.socket_mode
    )
    with open_listener(given):
        assert stat.S_IMODE(path.stat().st_mode) == mode


def test_group_is_a_name_or_a_number() -> None:
    assert gid_of("root") == 0
    assert gid_of("54321") == 54321
    assert gid_of(None) is None
    with pytest.raises(ConfigError, match="there is no group no-such-group"):
        gid_of("no-such-group")


def test_group_that_we_may_not_give_it_to_is_one_line_and_no_socket_is_left(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "chown", refuse)
    with pytest.raises(ConfigError, match="cannot give it to group 54321: Operation not permitted"):
        open_listener(DiskSettings(socket_path=str(directory / "s"), socket_group="54321"))
    assert not (directory / "s").exists()


_TRY = """
import socket, sys
for path in sys.argv[1:]:
    sock = socket.socket(socket.AF_UNIX)
    try:
        sock.connect(path)
        if path.endswith("sock"):
            print("connected")
            continue
        try:
            sock.sendall(b"GET /settings HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
        except BrokenPipeError:
            pass  # The refusal came first.
        print(sock.recv(64).split()[1].decode())
    except OSError as error:
        print(error.strerror)
"""


@pytest.mark.root
@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        ((f"--regid={A_GROUP}", "--clear-groups"), ["connected", "200"]),
        ((f"--regid={NOBODY}", f"--groups={A_GROUP}"), ["connected", "200"]),
        ((f"--regid={NOBODY}", "--clear-groups"), ["Permission denied", "Permission denied"]),
        ((f"--regid={NOBODY}", "--groups=54322"), ["Permission denied", "Permission denied"]),
    ],
)
async def test_users_of_the_socket_group_may_use_the_disk_and_ask_and_others_may_not(
    groups: tuple[str, ...], expected: list[str], directory: Path
) -> None:
    assert await _tried(groups, directory) == expected


@pytest.mark.root
async def test_user_outside_the_group_is_refused_even_if_the_modes_are_open(
    directory: Path,
) -> None:
    groups = (f"--regid={NOBODY}", "--clear-groups")
    assert (await _tried(groups, directory, api_mode=0o666))[1] == "403"


async def _tried(groups: tuple[str, ...], directory: Path, api_mode: int = 0o660) -> list[str]:
    """What a process of user nobody in these groups gets on the disk's and the control socket."""
    if os.geteuid():
        missing("only root can become another user")
    directory.chmod(0o711)
    async with served(directory, socket_group=str(A_GROUP)) as bridge:
        assert bridge.control.stat().st_gid == bridge.vhost.stat().st_gid == A_GROUP
        assert stat.S_IMODE(bridge.control.stat().st_mode) == 0o660
        bridge.control.chmod(api_mode)
        argv = [need("setpriv"), f"--reuid={NOBODY}", *groups, "/usr/bin/python3", "-c", _TRY]
        done = await trio.run_process(
            [*argv, str(bridge.vhost), str(bridge.control)],
            capture_stdout=True,
            stdin=subprocess.DEVNULL,
        )
    return done.stdout.decode().splitlines()


def test_demo_waits_for_a_socket_that_listens(directory: Path) -> None:
    """One that was only bound refuses connections."""
    path = directory / "socket"
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))
        assert not is_listening(path)
        made.listen()
        assert is_listening(path)
    assert not is_listening(path)
