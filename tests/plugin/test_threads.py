"""Time limits for calls that have none, and what threads leave behind."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest

from nbd_plugin.deadline import call_within, in_background, wait_for_background
from nbd_plugin.errors import PluginError
from tests.plugin.client import READ, RawClient
from tests.plugin.server import HOST, Nbdkit
from tests.tools import HUNG_S


def test_call_in_time_its_result_and_its_error_come_back() -> None:
    assert call_within(30, "adding", lambda: 1 + 1) == 2
    with pytest.raises(ZeroDivisionError):
        call_within(30, "dividing", lambda: 1 // 0)


def test_call_too_late_refused_and_its_result_handed_on() -> None:
    go = threading.Event()
    late: list[str] = []
    handed_on = threading.Event()

    def slow() -> str:
        go.wait(HUNG_S)
        return "an image"

    def too_late(result: str) -> None:
        late.append(result)
        handed_on.set()

    with pytest.raises(PluginError) as caught:
        call_within(0.01, "opening volume v", slow, too_late=too_late)
    assert caught.value.errno == errno.ETIMEDOUT
    assert "opening volume v" in str(caught.value)
    assert not wait_for_background(0)
    go.set()
    assert handed_on.wait(HUNG_S)
    assert late == ["an image"]
    assert wait_for_background(30)


def test_background_call_that_raises_is_over() -> None:
    in_background("failing", lambda: 1 // 0)
    assert wait_for_background(30)


def resident_kib(server: Nbdkit) -> int:
    pid = int((server.directory / "pid").read_text())
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


def visit(server: Nbdkit, requests: int) -> None:
    with RawClient(str(server.socket)) as client:
        for _ in range(requests):
            client.send(READ, 0, 512)
        for _ in range(requests):
            client.receive(16 + 512)


def test_worker_threads_that_ended_leave_no_memory_behind(volumes: Path, where: str) -> None:
    """Each worker keeps its Python thread state (20 KiB); 200 connections have 1600 workers."""
    with Nbdkit(
        f"file={volumes}/disk", "size=1M", "parallel=on", options=("-t", "8"), where=where
    ) as server:
        for _ in range(50):
            visit(server, 8)
        before = resident_kib(server)
        for _ in range(200):
            visit(server, 8)
        assert resident_kib(server) - before < 4096


def test_parallel_requests_of_many_threads_right_answers(volumes: Path, where: str) -> None:
    size = 1 << 20
    content = bytes(range(256)) * (size // 256)
    (volumes / "disk").write_bytes(content)
    with Nbdkit(f"file={volumes}/disk", "parallel=on", where=where) as server:
        threads = [threading.Thread(target=visit, args=(server, 64)) for _ in range(4)]
        for thread in threads:
            thread.start()
        with RawClient(str(server.socket), "disk@readonly") as client:
            for offset in range(0, size, 65536):
                assert client.read(offset, 4096) == content[offset : offset + 4096]
        for thread in threads:
            thread.join(HUNG_S)
        assert server.process.poll() is None


@pytest.mark.nbdkit
def test_serial_is_the_default(volumes: Path) -> None:
    """nbdkit 1.32 aborts when a client hangs up with several parallel requests in flight."""
    with Nbdkit(f"file={volumes}/disk", "size=1M", options=("-v",), where=HOST) as server:
        visit(server, 1)
        assert "thread model: serialize_requests" in server.log.replace("using ", "")
