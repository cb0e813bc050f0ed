"""What `docs/monitoring` offers, in a real Prometheus that scrapes a running bridge."""

from __future__ import annotations

import errno
import json
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
import trio

from bridge.api.exporter import Exporter, serve
from bridge.cache.cache_options import WRITEBACK
from bridge.errors import RequestError
from bridge.peers.blk_driver import BlkDriver
from bridge.spec import nbd as p
from tests.api.bridges import Bridge, served
from tests.ports import free_port
from tests.processes import program
from tests.tools import HUNG_S, need

MONITORING = Path(__file__).parents[2] / "docs" / "monitoring"
RULES = MONITORING / "nbd-bridge-alerts.yml"

ABSENT = "NbdBridgeGuestFaults"
"""Its metric is not there before there was a fault."""


def panels() -> Iterator[tuple[str, str]]:
    """(title, query) of everything on the dashboard."""
    dashboard = json.loads((MONITORING / "grafana-dashboard.json").read_text())
    for panel in dashboard["panels"]:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]


class Prometheus:
    """One that scrapes the exporter once a second."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1/"

    async def get(self, what: str, **query: str) -> Any:
        url = f"{self._url}{what}?{urllib.parse.urlencode(query)}"

        def ask() -> Any:
            try:
                with urllib.request.urlopen(url, timeout=HUNG_S) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code == HTTPStatus.SERVICE_UNAVAILABLE:
                        return None
                    return {"status": error.read()}

        with trio.fail_after(HUNG_S):
            while (found := await trio.to_thread.run_sync(ask)) is None:
                await trio.sleep(0.1)  # It listens, and does not answer yet.
        assert found["status"] == "success", found
        return found["data"]

    async def query(self, text: str) -> list[Any]:
        return list((await self.get("query", query=text))["result"])

    async def until(self, text: str) -> list[Any]:
        """The first answer that is not empty."""
        with trio.move_on_after(HUNG_S):
            while not (found := await self.query(text)):
                await trio.sleep(0.2)
            return found
        raise AssertionError(f"no answer to {text}")


@asynccontextmanager
async def watched(directory: Path, bridge: Bridge) -> AsyncIterator[Prometheus]:
    """`bridge`, an exporter and a Prometheus that has the documented configuration."""
    # In this process: the command would also find what else runs on this host.
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    exporter, port = listeners[0].socket.getsockname()[1], free_port()
    config = (MONITORING / "prometheus.yml").read_text()
    config = config.replace('"host1.example:9809", "host2.example:9809"', f'"127.0.0.1:{exporter}"')
    config = config.replace("15s", "1s").replace(RULES.name, str(RULES))
    (directory / "prometheus.yml").write_text(f"global: {{evaluation_interval: 1s}}\n{config}")
    argv = [
        need("prometheus"),
        f"--config.file={directory}/prometheus.yml",
        f"--storage.tsdb.path={directory}/tsdb",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve, Exporter(lambda: [bridge.control]), listeners)
        with program(argv, ready=port):
            yield Prometheus(port)
        nursery.cancel_scope.cancel()


async def busy(guest: BlkDriver) -> None:
    """A little of everything, until cancelled."""
    number = 0
    while True:
        number += 1
        await guest.write(number % 64 << 16, b"a" * 4096)
        await guest.read(number % 64 << 16, 4096)
        await guest.read(number * 12345 % 3000 << 12, 4096)
        if not number % 20:
            await guest.flush()
        await trio.sleep(0.005)


async def test_rules_are_right_by_promtool() -> None:
    await trio.run_process([need("promtool"), "check", "rules", str(RULES)], capture_stdout=True)


async def test_every_query_of_the_dashboard_and_every_alert_finds_what_it_asks_for(
    directory: Path,
) -> None:
    async with served(directory, cache=WRITEBACK, flush_interval_s=0.5) as bridge:
        async with watched(directory, bridge) as prometheus:
            async with await BlkDriver.connect(bridge.vhost) as guest:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(busy, guest)
                    await prometheus.until('rate(nbd_bridge_requests_total{op="flush"}[30s]) > 0')
                    await prometheus.until("rate(nbd_bridge_cache_writeout_bytes_total[30s]) > 0")
                    await prometheus.until(
                        "rate(nbd_bridge_request_stage_sampled_seconds_count[30s]) > 0"
                    )
                    for title, query in panels():
                        text = query.replace("$__rate_interval", "30s").replace("$disk", ".*")
                        if title == "Errors and slow requests":
                            await prometheus.query(text)  # Those that never were are absent.
                            continue
                        # What is clean has no time until it is, and no write-out has no rate.
                        found = await prometheus.until(text)
                        assert all(each["metric"]["disk"] == "vm0" for each in found), title
                    nursery.cancel_scope.cancel()
                rules = (await prometheus.get("rules"))["groups"][0]["rules"]
                assert len(rules) == RULES.read_text().count("- alert:")
                for rule in rules:
                    assert rule["health"] in ("ok", "unknown"), rule
                    # Without its threshold an expression has a value: its metrics exist.
                    if rule["name"] != ABSENT:
                        value = rule["query"].rpartition(" ")[0].rpartition(" ")[0]
                        await prometheus.until(re.sub(r"\[\d+m", "[30s", value))
            await fires(prometheus, bridge)


async def fires(prometheus: Prometheus, bridge: Bridge) -> None:
    """The server refuses a guest's requests, and the alert of it goes off."""
    async with await BlkDriver.connect(bridge.vhost) as guest:
        bridge.server.faults.errors = {p.CMD_READ: errno.EIO}
        with pytest.raises(RequestError):
            await guest.read(15 << 20, 4096)
        bridge.server.faults.errors = {}
        await prometheus.until('ALERTS{alertname="NbdBridgeRequestErrors", severity="page"}')
