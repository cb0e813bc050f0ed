"""All bridges of a host on one TCP address, to be looked at: `nbd-bridge exporter`.

A process of its own. It asks the bridges on their control sockets when it is asked itself, and
changes nothing: there is no request that would. Those who can reach its address are not trusted to
be few or slow: what a bridge has answered is kept for a second, so that however many ask, a bridge
is asked once a second at most.
"""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import trio

from bridge.api.client import read, said
from bridge.api.http import HttpError, HttpRequest, Reply, json_reply, serve_connection
from bridge.api.merge import merged
from bridge.api.page import page
from bridge.api.places import SUFFIX, control_sockets
from bridge.errors import BridgeError

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
CONNECTIONS_MAX: Final = 32
_BRIDGE_S: Final = 4.0
"""For a bridge's answer: Prometheus waits 10 s for all of them."""
_KEPT_S: Final = 1.0
_THREADS: Final = 16

Ask = Callable[[Path, str], bytes]


def ask_bridge(path: Path, target: str) -> bytes:
    """What the bridge at `path` answers. Raises BridgeError."""
    return read(path, target, timeout_s=_BRIDGE_S)


@dataclass
class _Kept:
    """One answer of one bridge, for a while."""

    lock: trio.Lock = field(default_factory=trio.Lock)
    until_s: float = -1.0
    data: bytes = b""
    error: str = ""


@dataclass
class Exporter:
    """Answers requests about all bridges that `sockets()` finds."""

    sockets: Callable[[], list[Path]] = control_sockets
    ask: Ask = ask_bridge
    _kept: dict[tuple[Path, str], _Kept] = field(default_factory=dict)
    _threads: trio.CapacityLimiter = field(default_factory=lambda: trio.CapacityLimiter(_THREADS))

    async def handle(self, request: HttpRequest) -> Reply:
        """Raises HttpError."""
        if request.method not in ("GET", "HEAD"):
            raise HttpError(
                HTTPStatus.METHOD_NOT_ALLOWED,
                "nothing can be changed here",
                headers=(("Allow", "GET, HEAD"),),
            )
        sockets = self._by_name()
        match request.path.removeprefix("/").split("/"):
            case [""]:
                return await page()
            case ["metrics"]:
                return Reply((await self._metrics(sockets)).encode(), content_type=CONTENT_TYPE)
            case ["status"]:
                return json_reply(await self._all(sockets, self._status))
            case [name, ""] if name in sockets:
                return await page()
            case [name, "status"] if name in sockets:
                return json_reply(await self._status(name, sockets[name]))
        raise HttpError(HTTPStatus.NOT_FOUND, f"there is no {request.path[:80]}")

    def _by_name(self) -> dict[str, Path]:
        """Of two bridges of one name, the system's: the first that the commands would find."""
        found: dict[str, Path] = {}
        for path in self.sockets():
            found.setdefault(path.name.removesuffix(SUFFIX), path)
        gone = self._kept.keys() - {
            (path, target) for path in found.values() for target in ("/metrics", "/status")
        }
        for key in gone:
            del self._kept[key]
        return found

    async def _status(self, name: str, path: Path) -> Any:
        """As `nbd-bridge list --json` has it."""
        data, error = await self._answer(path, "/status")
        found = said(data) if not error else None
        if found is None:
            return {"bridge": {"name": name}, "error": error or "it answered no JSON object"}
        return found

    async def _metrics(self, sockets: dict[str, Path]) -> str:
        async def text(name: str, path: Path) -> tuple[str, str]:
            data, error = await self._answer(path, "/metrics")
            return name, "" if error else data.decode(errors="replace")

        texts = dict(await self._all(sockets, text))
        up = "# HELP nbd_bridge_up 1: the bridge answers.\n# TYPE nbd_bridge_up gauge\n"
        for name, found in texts.items():
            up += f'nbd_bridge_up{{disk="{_escaped(name)}"}} {1 if found else 0}\n'
        return merged([up, *texts.values()])

    async def _all(
        self, sockets: dict[str, Path], ask: Callable[[str, Path], Awaitable[Any]]
    ) -> list[Any]:
        """What `ask` finds of each bridge, by name; all at the same time."""
        found: dict[str, Any] = {}

        async def one(name: str, path: Path) -> None:
            found[name] = await ask(name, path)

        async with trio.open_nursery() as nursery:
            for name, path in sockets.items():
                nursery.start_soon(one, name, path)
        return [found[name] for name in sorted(found)]

    async def _answer(self, path: Path, target: str) -> tuple[bytes, str]:
        """(answer, "") or (b"", why there is none), not older than a second."""
        kept = self._kept.setdefault((path, target), _Kept())
        async with kept.lock:
            if trio.current_time() >= kept.until_s:
                kept.data = b""
                try:
                    kept.data = await trio.to_thread.run_sync(
                        partial(self.ask, path, target), limiter=self._threads
                    )
                    kept.error = ""
                except BridgeError as error:
                    kept.error = str(error)
                kept.until_s = trio.current_time() + _KEPT_S
            return kept.data, kept.error


async def serve(
    exporter: Exporter,
    listeners: list[trio.SocketListener],
) -> None:
    """Answer on `listeners` until cancelled."""
    connected = 0

    async def one(stream: trio.SocketStream) -> None:
        nonlocal connected
        if connected >= CONNECTIONS_MAX:
            return  # It is closed.
        connected += 1
        try:
            await serve_connection(stream, exporter.handle)
        finally:
            connected -= 1

    await trio.serve_listeners(one, listeners)


def _escaped(text: str) -> str:
    """As the value of a label."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
