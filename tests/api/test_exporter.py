"""All bridges of a host on one address: what it shows, and what those cost who ask."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from bridge.api.client import read
from bridge.api.exporter import CONNECTIONS_MAX, Exporter, serve
from bridge.api.http import HttpError, HttpRequest
from bridge.api.merge import merged
from bridge.cache.cache_options import WRITEBACK
from bridge.errors import BridgeError
from bridge.peers.blk_driver import BlkDriver
from tests.api.bridges import Bridge, served
from tests.ports import free_port
from tests.processes import bridge_argv
from tests.tools import HUNG_S


def metrics_of(disk: str, count: int) -> str:
    return (
        "# HELP nbd_bridge_a_total Of a.\n# TYPE nbd_bridge_a_total counter\n"
        f'nbd_bridge_a_total{{disk="{disk}"}} {count}\n'
        "# HELP nbd_bridge_b Of b.\n# TYPE nbd_bridge_b gauge\n"
        f'nbd_bridge_b{{disk="{disk}"}} 1\n'
    )


class Host:
    """Bridges that are not there, and how often each was asked."""

    def __init__(self, count: int = 10) -> None:
        self.paths = [Path(f"/run/nbd-bridge/vm{number}.api") for number in range(count)]
        self.asked: Counter[tuple[str, str]] = Counter()
        self.dead: set[str] = set()
        self.exporter = Exporter(lambda: self.paths, self.ask)

    def ask(self, path: Path, target: str) -> bytes:
        self.asked[path.stem, target] += 1
        if path.stem in self.dead:
            raise BridgeError(f"bridge {path.stem} is not running")
        if target == "/status":
            return json.dumps({"bridge": {"name": path.stem}}).encode()
        return metrics_of(path.stem, len(path.stem)).encode()

    async def get(self, path: str) -> bytes:
        return (await self.exporter.handle(HttpRequest("GET", path))).body


def samples(text: bytes) -> dict[str, list[tuple[str, float]]]:
    """Metric → (disk, value)."""
    return {
        family.name: [(each.labels["disk"], each.value) for each in family.samples]
        for family in text_string_to_metric_families(text.decode())
    }


async def test_one_answer_has_the_metrics_of_ten_disks_and_of_a_dead_one() -> None:
    host = Host()
    host.dead = {"vm3"}
    found = samples(await host.get("/metrics"))
    living = [f"vm{number}" for number in range(10) if number != 3]
    assert [disk for disk, _ in found["nbd_bridge_a"]] == living
    assert dict(found["nbd_bridge_up"]) == {**dict.fromkeys(living, 1.0), "vm3": 0.0}
    statuses = json.loads(await host.get("/status"))
    assert [each["bridge"]["name"] for each in statuses] == [f"vm{n}" for n in range(10)]
    assert "not running" in statuses[3]["error"]


async def test_host_without_bridges_has_metrics_all_the_same() -> None:
    assert b"nbd_bridge_up" in await Host(0).get("/metrics")


async def test_bridge_is_asked_once_a_second_however_many_ask(autojump_clock: Any) -> None:
    host = Host(2)
    async with trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(host.get, "/metrics")
            nursery.start_soon(host.get, "/vm0/status")
    await host.get("/status")
    assert set(host.asked.values()) == {1}
    await trio.sleep(1.1)
    await host.get("/metrics")
    assert host.asked["vm1", "/metrics"] == 2


async def test_nothing_is_kept_of_a_bridge_that_is_gone() -> None:
    host = Host(3)
    await host.get("/metrics")
    host.paths = host.paths[:1]
    assert [disk for disk, _ in samples(await host.get("/metrics"))["nbd_bridge_up"]] == ["vm0"]
    assert len(host.exporter._kept) == 1


@pytest.mark.parametrize("method", ["POST", "DELETE", "PUT", "PATCH"])
async def test_nothing_can_be_changed(method: str) -> None:
    host = Host()
    for path in ("/vm0/stop", "/vm0/flush", "/stop", "/status"):
        with pytest.raises(HttpError) as caught:
            await host.exporter.handle(HttpRequest(method, path))
        assert caught.value.status is HTTPStatus.METHOD_NOT_ALLOWED
    assert not host.asked


@pytest.mark.parametrize(
    "path", ["/vm99/status", "/../etc/passwd", "/vm0/settings", "/vm0", "/%2e%2e/", "//", "/vm0//"]
)
async def test_what_is_not_there_is_not_asked_for(path: str) -> None:
    host = Host()
    with pytest.raises(HttpError) as caught:
        await host.get(path)
    assert caught.value.status is HTTPStatus.NOT_FOUND
    assert not host.asked


def test_texts_are_merged_by_metric_in_the_form_that_prometheus_wants() -> None:
    text = merged([metrics_of("x", 1), "", metrics_of("y", 2)])
    assert text.count("# TYPE nbd_bridge_a_total counter") == 1
    found = samples(text.encode())
    assert found == {
        "nbd_bridge_a": [("x", 1.0), ("y", 2.0)],
        "nbd_bridge_b": [("x", 1.0), ("y", 1.0)],
    }


def test_two_bridges_that_call_themselves_alike_do_not_spoil_the_others() -> None:
    """Prometheus refuses an answer with the same sample twice, all of it."""
    text = merged([metrics_of("x", 1), metrics_of("x", 2), metrics_of("y", 3)])
    assert samples(text.encode())["nbd_bridge_a"] == [("x", 1.0), ("y", 3.0)]


async def test_flood_of_connections_is_bounded_and_ends() -> None:
    host = Host(1)
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, host.exporter, listeners)
        idle = [await trio.open_tcp_stream("127.0.0.1", port) for _ in range(CONNECTIONS_MAX)]
        with trio.fail_after(HUNG_S):
            async with await trio.open_tcp_stream("127.0.0.1", port) as one_more:
                assert await one_more.receive_some() == b""
            for each in idle:
                await each.aclose()
            while b"200 OK" not in await got(port, "/metrics"):
                pass  # Those that have left make room.
        nursery.cancel_scope.cancel()


async def test_command_shows_a_bridge_and_ends_cleanly(directory: Path) -> None:
    own = directory / "nbd-bridge"
    own.mkdir(mode=0o700)
    port = free_port()
    argv = bridge_argv("exporter", "--listen", f"127.0.0.1:{port}")
    name = f"here-{os.getpid()}"  # The host may have other bridges.
    async with served(directory, cache=WRITEBACK) as bridge:
        (own / f"{name}.api").symlink_to(bridge.control)
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 4096)
            async with trio.open_nursery() as nursery:
                start = partial(
                    trio.run_process,
                    argv,
                    env={**os.environ, "XDG_RUNTIME_DIR": str(directory)},
                    capture_stderr=True,
                )
                child = await nursery.start(start)
                text = b""
                with trio.fail_after(HUNG_S):
                    while f'nbd_bridge_up{{disk="{name}"}} 1'.encode() not in text:
                        text = await got(port, "/metrics")
                assert b'nbd_bridge_cache_dirty_bytes{disk="vm0"} 4096' in text
                status = json.loads((await got(port, f"/{name}/status")).partition(b"\r\n\r\n")[2])
                assert status["safe_to_reboot"]["safe"] is False
                child.send_signal(signal.SIGTERM)


async def got(port: int, path: str) -> bytes:
    """The whole answer; b"": nothing listens yet."""
    try:
        stream = await trio.open_tcp_stream("127.0.0.1", port)
    except OSError:
        await trio.sleep(0.02)
        return b""
    async with stream:
        try:
            await stream.send_all(
                f"GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode()
            )
            return b"".join([part async for part in stream])
        except trio.BrokenResourceError:
            return b""


async def test_service_manager_hears_when_the_exporter_listens(directory: Path) -> None:
    port = free_port()
    manager = trio.socket.socket(trio.socket.AF_UNIX, trio.socket.SOCK_DGRAM)
    with manager:
        await manager.bind(str(directory / "notify"))
        environment = {
            **os.environ,
            "NOTIFY_SOCKET": str(directory / "notify"),
            "NBD_BRIDGE_EXPORTER_LISTEN": f"127.0.0.1:{port}",
        }
        async with trio.open_nursery() as nursery:
            argv = bridge_argv("exporter")
            start = partial(trio.run_process, argv, env=environment, capture_stderr=True)
            child = await nursery.start(start)
            with trio.fail_after(HUNG_S):
                said = (await manager.recv(4096)).decode().splitlines()
            assert said[0] == "READY=1"
            assert said[-1] == f"STATUS=listening at http://127.0.0.1:{port}/"
            assert b" 200 " in await got(port, "/metrics")
            child.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("listen", ["9809", "host:port", "127.0.0.1:99999", "300.0.0.1:80"])
async def test_address_that_cannot_be_is_one_line_and_exit_status_2(listen: str) -> None:
    done = await trio.run_process(
        bridge_argv("exporter", "--listen", listen), capture_stderr=True, check=False, stdin=b""
    )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"--listen" in done.stderr


async def test_page_may_look_and_change_nothing(directory: Path) -> None:
    """A socket may be forwarded to a port; then any page in a browser can send requests to it."""
    async with served(directory) as bridge:
        request = b"POST /settings HTTP/1.1\r\nHost: x\r\nOrigin: http://evil.example\r\n"
        assert b" 403 " in await raw(bridge, request + b"Content-Length: 0\r\n\r\n")
        asked = b"GET / HTTP/1.1\r\nHost: x\r\nOrigin: http://x\r\nConnection: close\r\n\r\n"
        answer = await raw(bridge, asked)
        assert b" 200 " in answer
        assert b"text/html; charset=utf-8" in answer
        assert b"default-src 'none'" in answer
        call = partial(read, bridge.control, "/", timeout_s=HUNG_S)
        assert b"</html>" in await trio.to_thread.run_sync(call)


async def raw(bridge: Bridge, request: bytes) -> bytes:
    async with await trio.open_unix_socket(bridge.control) as stream:
        await stream.send_all(request.replace(b"Content", b"Connection: close\r\nContent"))
        return b"".join([part async for part in stream])
