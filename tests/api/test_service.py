"""Who may speak on the control socket, and what a flood of them costs."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import sys
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest
import trio
from openapi_schema_validator import OAS31Validator
from openapi_spec_validator import validate

from bridge.api.service import CONNECTIONS_MAX, Service
from bridge.cache.cache_options import WRITEBACK
from bridge.errors import BridgeError
from bridge.peers.blk_driver import BlkDriver
from tests.api.bridges import served
from tests.tools import HUNG_S, missing, need

NOBODY = 65534


def connected(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(HUNG_S)
    sock.connect(os.fspath(path))
    return sock


def rest_of(sock: socket.socket) -> bytes:
    """What comes until the other end hangs up."""
    data = b""
    try:
        while part := sock.recv(65536):
            data += part
    except ConnectionError:
        pass
    return data


async def off(call):  # type: ignore[no-untyped-def]
    """In a thread: the bridge runs in this one."""
    return await trio.to_thread.run_sync(call)


async def test_flood_of_connections_is_refused_and_the_disk_goes_on(directory: Path) -> None:
    async with served(directory) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            with ExitStack() as open_ones:
                for _ in range(CONNECTIONS_MAX):
                    open_ones.enter_context(await off(partial(connected, bridge.control)))
                for _ in range(3 * CONNECTIONS_MAX):
                    with await off(partial(connected, bridge.control)) as refused:
                        assert b" 503 " in await off(partial(rest_of, refused))
                await guest.write(0, b"a" * 512)
                assert await guest.read(0, 512) == b"a" * 512
        # Those that have left make room.
        with trio.fail_after(HUNG_S):
            while True:
                try:
                    assert (await bridge.status())["guest"]["requests_total"] == 2
                    return
                except Exception as error:
                    # Refused, or hung up on while it was still asking.
                    if not re.search("too many|Broken pipe|reset by peer", str(error)):
                        raise
                    await trio.sleep(0.01)


async def test_another_users_process_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if the bridge were somebody else's: the kernel's word on the peer is what counts.
    made = Service.__init__

    def for_another(self: Service, *args: object, **kwargs: object) -> None:
        made(self, *args, **kwargs, users=frozenset({os.geteuid() + 1}))  # type: ignore[arg-type]

    monkeypatch.setattr(Service, "__init__", for_another)
    async with served(directory) as bridge:
        with await off(partial(connected, bridge.control)) as sock:
            assert b" 403 " in await off(partial(rest_of, sock))


@pytest.mark.root
async def test_unprivileged_user_can_neither_read_nor_change_anything(directory: Path) -> None:
    if os.geteuid():
        missing("only root can become another user")
    setpriv = need("setpriv")
    python = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
    directory.chmod(0o711)
    # The worst case: somebody has opened the socket's mode.
    async with served(directory) as bridge:
        for mode in (0o600, 0o666):
            bridge.control.chmod(mode)
            argv = [
                *(setpriv, f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
                *(python, "-c", _SPEAK, str(bridge.control)),
            ]
            done = await trio.run_process(argv, capture_stdout=True, stdin=b"")
            assert done.stdout.decode().strip() in ("EACCES", "403"), mode
        bridge.control.chmod(0o600)
        assert (await bridge.ask("GET", "/settings"))["slow_ms"] == 1000


_SPEAK = """
import errno, socket, sys
sock = socket.socket(socket.AF_UNIX)
try:
    sock.connect(sys.argv[1])
    head = 'POST /settings HTTP/1.1\\r\\nHost: x\\r\\nContent-Length: 14\\r\\n\\r\\n'
    sock.sendall(head.encode() + b'{"slow_ms": 1}')
except OSError as error:
    if error.errno == errno.EACCES:
        print("EACCES")
        sys.exit()
print(sock.recv(4096).split()[1].decode())
"""


async def test_status_can_be_asked_for_while_the_disk_stops(directory: Path) -> None:
    async with served(directory, cache=WRITEBACK) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 4096)
            bridge.server.faults.delay_s = 0.5
            signal.raise_signal(signal.SIGTERM)
            found = await bridge.until("bridge", state="stopping")
            assert found["cache"]["dirty_bytes"] == 4096
            with pytest.raises(BridgeError, match="is stopping"):
                await bridge.ask("POST", "/flush")
            bridge.server.faults.delay_s = 0
        with trio.fail_after(HUNG_S):
            while bridge.vhost.exists():
                await trio.sleep(0.01)


async def test_description_names_what_there_is_and_is_valid(
    directory: Path,
) -> None:
    async with served(directory) as bridge:
        assert (await bridge.status())["bridge"]["name"] == "vm0"
        described = await bridge.ask("GET", "/openapi.json")
        assert described["openapi"].startswith("3.1")
        assert set(described["paths"]) >= {"/status", "/metrics", "/flush", "/cache/warm"}
        validate(described)


async def test_answers_are_what_the_description_says(directory: Path) -> None:
    async with served(directory, cache=WRITEBACK) as bridge:
        described = await bridge.ask("GET", "/openapi.json")
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 4096)
            for method, target in (
                *(("GET", "/status"), ("GET", "/settings"), ("GET", "/ready"), ("GET", "/health")),
                *(("POST", "/flush"), ("POST", "/detach"), ("POST", "/resize")),
                *(("POST", "/cache/drop-clean"), ("POST", "/settings"), ("POST", "/cache/warm")),
            ):
                answer = await bridge.ask(method, target)
                operation = described["paths"][target][method.lower()]
                schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
                whole = {**schema, "components": described["components"]}
                OAS31Validator(whole).validate(answer)
