"""What Prometheus reads."""

from __future__ import annotations

import errno
import re
import sys
from http.client import HTTPConnection
from pathlib import Path

import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families

from bridge.api.client import _UnixConnection
from bridge.cache.cache_options import WRITEBACK
from bridge.datapath.engine_names import COMPILED, PURE
from bridge.datapath.request import OP_NAMES
from bridge.errors import RequestError
from bridge.peers.blk_driver import BlkDriver
from bridge.spec import nbd as p
from bridge.spec.virtio_blk import T_IN
from tests.api.bridges import Bridge, served
from tests.tools import HUNG_S

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


async def scrape(bridge: Bridge) -> tuple[str, Samples]:
    def get() -> str:
        connection: HTTPConnection = _UnixConnection(bridge.control, HUNG_S)
        try:
            connection.request("GET", "/metrics")
            response = connection.getresponse()
            assert response.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
            return response.read().decode()
        finally:
            connection.close()

    text = await trio.to_thread.run_sync(get)
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return text, samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"nbd_bridge_{name}", frozenset({"disk": "vm0", **labels}.items())]


async def test_merged_requests_are_counted(directory: Path) -> None:
    async with served(directory) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            ring = guest.queues[0]
            slots = {ring.submit(T_IN, 8 * block, 4096) for block in (1, 2)}
            ring.kick()
            while slots:
                await ring.wait()
                slots -= {slot for slot, _ in ring.poll()}
            _, samples = await scrape(bridge)
            assert value(samples, "server_merged_requests_total") == 1
            status = await bridge.status()
            assert status["server"]["merged_total"] == 1


async def test_counters_are_those_of_what_happened(directory: Path) -> None:
    async with served(directory, cache=WRITEBACK) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 4096)
            await guest.read(0, 4096)
            await guest.read(1 << 20, 4096)
            _, samples = await scrape(bridge)
            assert value(samples, "requests_total", op="write") == 1
            assert value(samples, "requests_total", op="read") == 2
            assert value(samples, "cache_dirty_bytes") == 4096
            assert value(samples, "safe_to_reboot") == 0
            assert value(samples, "cache_requests_total", op="read", result="hit") == 1
            assert value(samples, "cache_requests_total", op="read", result="miss") == 1
            assert value(samples, "requests_general_total", why="miss") == 1
            assert value(samples, "requests_general_total", why="flush") == 0
            assert value(samples, "guest_state", state="running") == 1
            assert value(samples, "server_state", state="connected") == 1
            await guest.flush()
            _, samples = await scrape(bridge)
            assert value(samples, "cache_dirty_bytes") == 0
            assert value(samples, "cache_writeout_bytes_total") == 4096
            assert value(samples, "flush_seconds_count", by="guest") == 1
            assert value(samples, "safe_to_reboot") == 1
        # The rings are gone, the count is not.
        await bridge.until("guest", queues=0)
        _, samples = await scrape(bridge)
        assert value(samples, "requests_general_total", why="flush") == 1
        status = await bridge.status()
        assert status["guest"]["general_total"] == {"miss": 1, "flush": 1}
        assert status["bridge"]["engine"] in (PURE, COMPILED)
        counts = [value(samples, "requests_total", op=op) for op in (*OP_NAMES[:5], "other")]
        assert counts == [2, 1, 1, 0, 0, 0]


async def test_every_metric_has_help_and_base_units(directory: Path) -> None:
    async with served(directory, cache=WRITEBACK) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.read(0, 4096)
            text, _ = await scrape(bridge)
    families = list(text_string_to_metric_families(text))
    assert len(families) > 30
    for family in families:
        assert family.name.startswith("nbd_bridge_")
        assert family.documentation, family.name
        assert not family.name.endswith(("_ms", "_kib", "_percent")), family.name
        assert all(sample.labels["disk"] == "vm0" for sample in family.samples)


async def test_disk_without_a_cache_has_no_metrics_of_one(directory: Path) -> None:
    async with served(directory) as bridge:
        text, samples = await scrape(bridge)
        assert "nbd_bridge_cache_" not in text
        assert value(samples, "safe_to_reboot") == 1


async def test_some_requests_are_timed_by_what_served_them(directory: Path) -> None:
    async with served(directory, cache=WRITEBACK) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            wanted = {"read cache", "read server", "flush server"}
            with trio.fail_after(HUNG_S):
                offset = 0
                while not wanted <= set((await bridge.status())["latency"]):
                    await guest.read(0, 4096)
                    await guest.read(offset := (offset + 65536) % (16 << 20), 512)
                    await guest.write(0, b"a" * 512)
                    await guest.flush()
            found = (await bridge.status())["latency"]["read server"]
            assert found["samples"] >= 1
            assert 0 < found["p50_s"] <= found["p99_s"]
            _, samples = await scrape(bridge)
            labels = {"op": "read", "served_by": "server"}
            count = value(samples, "request_sampled_seconds_count", **labels)
            assert count == value(samples, "request_sampled_seconds_bucket", le="+Inf", **labels)


async def test_bridge_that_is_not_scraped_does_not_import_the_client_library() -> None:
    code = "import sys, bridge.app.serve; print('prometheus_client' in sys.modules)"
    done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True, stdin=b"")
    assert done.stdout.strip() == b"False"


async def test_command_does_without_what_structlog_would_import_for_itself() -> None:
    """Each bridge would be 1.6 MB larger."""
    code = (
        "import sys\nfrom bridge.cli.main import main\n"
        "try: main(['serve', '--help'])\n"
        "finally: print('structlog' in sys.modules, 'asyncio' in sys.modules)"
    )
    done = await trio.run_process([sys.executable, "-c", code], capture_stdout=True, stdin=b"")
    assert done.stdout.splitlines()[-1] == b"True False"


async def test_every_metric_has_its_row_in_the_document(directory: Path) -> None:
    document = Path(__file__).parents[2] / "docs" / "operating.md"
    named = set(re.findall(r"`(nbd_bridge_\w+)`", document.read_text()))
    async with served(directory, cache=WRITEBACK) as bridge:
        text, _ = await scrape(bridge)
    types = re.findall(r"^# TYPE (\w+) \w+$", text, re.MULTILINE)
    assert named == {*types, "nbd_bridge_up"}  # That is the exporter's.


@pytest.mark.parametrize("cache", ["off", WRITEBACK])
async def test_requests_and_bytes_of_each_operation_are_counted(
    directory: Path, cache: str
) -> None:
    async with served(directory, cache=cache) as bridge:
        async with await BlkDriver.connect(bridge.vhost, request_bytes=4 << 20) as guest:
            sizes = [512, 4096, 65536, 8192, 512]
            for n_bytes in sizes:
                await guest.write(0, b"a" * n_bytes)
                await guest.read(0, n_bytes)
            await guest.read(0, 4 << 20)  # In pieces; one request all the same.
            await guest.discard([(0, 65536)])
            await guest.write_zeroes([(65536, 4096)])
            await guest.flush()
            with pytest.raises(RequestError):
                await guest.read(16 << 20, 4096)
            _, samples = await scrape(bridge)
    found = {
        op: (value(samples, "requests_total", op=op), value(samples, "request_bytes_total", op=op))
        for op in ("read", "write", "discard", "write_zeroes", "other")
    }
    assert found == {
        "read": (len(sizes) + 1, sum(sizes) + (4 << 20)),
        "write": (len(sizes), sum(sizes)),
        "discard": (1, 65536),
        "write_zeroes": (1, 4096),
        "other": (1, 0),  # It was refused.
    }
    assert value(samples, "requests_total", op="flush") == 1


async def test_request_that_fails_is_counted_by_its_error(directory: Path) -> None:
    async with served(directory) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            bridge.server.faults.errors = {p.CMD_READ: errno.ENOSPC, p.CMD_WRITE: errno.EPERM}
            for start in (guest.read(0, 512), guest.write(0, b"a" * 512)):
                with pytest.raises(RequestError):
                    await start
            _, samples = await scrape(bridge)
            found = {
                tuple(labels[name] for name in ("op", "error")): count
                for (name, pairs), count in samples.items()
                if name == "nbd_bridge_request_errors_total" and count
                for labels in (dict(pairs),)
            }
            assert sum(found.values()) == 2
            assert {op for op, _ in found} == {"read", "write"}
            assert (await bridge.status())["errors"] == {
                f"{op} {error}": count for (op, error), count in found.items()
            }


async def test_time_of_requests_is_told_by_stage(directory: Path) -> None:
    async with served(directory) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            bridge.server.faults.delay_s = 0.2
            with trio.fail_after(HUNG_S):
                while "read server" not in (await bridge.status())["latency"]:
                    await guest.read(0, 512)
            bridge.server.faults.delay_s = 0
            _, samples = await scrape(bridge)
    times = {
        stage: value(samples, "request_stage_sampled_seconds_sum", op="read", stage=stage)
        for stage in ("take", "server", "reply")
    }
    whole = value(samples, "request_sampled_seconds_sum", op="read", served_by="server")
    assert sum(times.values()) == pytest.approx(whole)
    # The server took its time, and that is what is said.
    assert times["server"] == max(times.values())
    assert not any(dict(pairs).get("stage") == "held" for _, pairs in samples)


async def test_slow_request_is_seen_and_counted(directory: Path) -> None:
    async with served(directory, slow_s=0.2) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            bridge.server.faults.delay_s = 3.0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.read, 0, 512)
                with trio.fail_after(HUNG_S):
                    while not (await bridge.status())["slow_requests_total"]:
                        await trio.sleep(0.02)
                bridge.server.faults.delay_s = 0
            _, samples = await scrape(bridge)
            assert value(samples, "slow_requests_total") == 1
