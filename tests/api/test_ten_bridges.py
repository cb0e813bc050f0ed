"""Ten disks on one host: each command shows all of them, and so does one job of Prometheus."""

from __future__ import annotations

import json
import os
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import trio

from bridge.api.exporter import Exporter
from bridge.api.http import HttpRequest
from bridge.peers.nbd_server import Server
from bridge.peers.nbd_server_disk import MemoryDisk
from tests.processes import bridge_argv, serving, unix_uri

NAMES = [f"ten-{number}" for number in range(10)]


async def ask(directory: Path, *arguments: str) -> dict[str, Any]:
    """What a command prints of each of the ten. (The host may have others.)"""
    env = {**os.environ, "XDG_RUNTIME_DIR": str(directory)}
    done = await trio.run_process(
        bridge_argv(*arguments, "--json"), capture_stdout=True, env=env, stdin=b""
    )
    found = {each.get("name") or each["bridge"]["name"]: each for each in json.loads(done.stdout)}
    return {name: found[name] for name in NAMES}


async def test_list_top_status_and_the_exporter_show_ten_bridges(directory: Path) -> None:
    own = directory / "nbd-bridge"
    own.mkdir(mode=0o700)
    server = Server({name: MemoryDisk(1 << 20) for name in NAMES})
    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        await nursery.start(server.serve_unix, directory / "nbd")

        async def start(name: str) -> None:
            options = ("--cache-mode", "off", "--api", str(own / f"{name}.api"), "--name", name)
            uri = unix_uri(directory / "nbd", name)
            await stack.enter_async_context(serving(uri, directory / f"{name}.sock", *options))

        for name in NAMES:
            await start(name)
        for found in (await ask(directory, "list"), await ask(directory, "status")):
            assert {each["server"]["state"] for each in found.values()} == {"connected"}
            assert all(each["server"]["uri"].count(name) for name, each in found.items())
        rates = await ask(directory, "top", "--interval", "0.2")
        assert all(each["reads_per_s"] == 0 for each in rates.values())
        exporter = Exporter(lambda: [own / f"{name}.api" for name in NAMES])
        text = (await exporter.handle(HttpRequest("GET", "/metrics"))).body.decode()
        lines = text.split("\n")
        for metric in ("up", "safe_to_reboot", "requests_in_flight"):
            assert sum(line.startswith(f"nbd_bridge_{metric}{{") for line in lines) == 10
        await stack.aclose()
        nursery.cancel_scope.cancel()
