"""Which request leads where."""

from __future__ import annotations

import json
import sys
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from typing import Any, Final

import trio

from bridge.api import openapi
from bridge.api.actions import Actions, Changes, Dropped, Flushed, Resized, Stopping, Upgrading
from bridge.api.fields import Field, Fields, parse
from bridge.api.http import HttpError, HttpRequest, Reply, json_reply
from bridge.api.metrics import CONTENT_TYPE, exposition
from bridge.api.page import page
from bridge.api.view import Safety, Settings, Status, View, Warming, server_state
from bridge.app.settings import LOG_LEVELS
from bridge.cache.cache_options import WRITEBACK, WRITETHROUGH

_TIMEOUT: Final = Field(float, "Seconds that this may take.", default=60.0, maximum=3600)

_BAD: Final = HTTPStatus.BAD_REQUEST
_CONFLICT: Final = HTTPStatus.CONFLICT
_BUSY: Final = HTTPStatus.SERVICE_UNAVAILABLE
_REFUSED: Final = HTTPStatus.BAD_GATEWAY
_LATE: Final = HTTPStatus.GATEWAY_TIMEOUT


@dataclass(frozen=True)
class Ready:
    """Whether the disk can be used."""

    ready: bool
    reason: str


@dataclass(frozen=True)
class Healthy:
    """The process answers."""

    ok: bool


Run = Callable[[dict[str, Any]], Awaitable[Any]]


@dataclass(frozen=True)
class Route:
    """One method of one path."""

    method: str
    path: str
    summary: str
    run: Run
    """Takes the members of the body; returns a dataclass, or a whole `Reply`."""
    answer: Any
    """The type of what it answers; str: text, bytes: HTML."""
    fields: Fields = field(default_factory=dict)
    errors: tuple[HTTPStatus, ...] = ()


class Router:
    """All routes of one bridge."""

    def __init__(self, view: View, actions: Actions) -> None:
        self._view = view
        self._actions = actions
        self._changes = Changes(view)
        self.routes = (*self._looks(), *self._asks_of_server(), *self._asks_here())
        self._by_path: dict[str, dict[str, Route]] = {}
        for route in self.routes:
            self._by_path.setdefault(route.path, {})[route.method] = route

    async def handle(self, request: HttpRequest) -> Reply:
        """Answer `request`. Raises HttpError."""
        methods = self._by_path.get(request.path)
        if methods is None:
            raise HttpError(
                HTTPStatus.NOT_FOUND,
                f"there is no {request.path[:80]}: /openapi.json says what there is",
            )
        route = methods.get("GET" if request.method == "HEAD" else request.method)
        if route is None:
            allowed = ", ".join(sorted(methods))
            raise HttpError(
                HTTPStatus.METHOD_NOT_ALLOWED,
                f"{request.path} takes {allowed}",
                headers=(("Allow", allowed),),
            )
        if request.from_page and route.method != "GET":
            # The socket may be forwarded to where a browser reaches it; our own page changes
            # nothing, and any other may ask the browser to.
            raise HttpError(HTTPStatus.FORBIDDEN, "pages may look, and change nothing")
        answer = await route.run(parse(route.fields, request.body))
        return answer if isinstance(answer, Reply) else json_reply(asdict(answer))

    def _looks(self) -> tuple[Route, ...]:
        return (
            Route("GET", "/", "The same as a page, kept up to date.", self._page, bytes),
            Route("GET", "/status", "What this disk looks like now.", self._status, Status),
            Route("GET", "/metrics", "The same for Prometheus.", self._metrics, str),
            Route("GET", "/health", "The process answers.", self._health, Healthy),
            Route("GET", "/ready", "The disk can be used.", self._ready, Ready, errors=(_BUSY,)),
            Route("GET", "/settings", "What can be changed.", self._settings, Settings),
            Route("GET", "/openapi.json", "This description.", self._openapi, dict[str, str]),
        )

    def _asks_of_server(self) -> tuple[Route, ...]:
        timeout, sends = {"timeout_s": _TIMEOUT}, (_BAD, _CONFLICT, _REFUSED, _BUSY, _LATE)
        return (
            Route(
                "POST",
                "/flush",
                "Bring everything to the server, durable. What is cached stays.",
                lambda body: self._actions.flush(**body),
                Flushed,
                timeout,
                sends,
            ),
            Route(
                "POST",
                "/detach",
                "Flush, and say that the bridge may be stopped, or why not.",
                lambda body: self._actions.detach(**body),
                Safety,
                timeout,
                sends,
            ),
            Route(
                "POST",
                "/stop",
                "End the process, as SIGTERM does.",
                self._stop,
                Stopping,
                {**timeout, **_STOP},
                sends,
            ),
            Route(
                "POST",
                "/resize",
                "Ask the server for the size, and take a larger one over.",
                lambda body: self._actions.resize(**body),
                Resized,
                timeout,
                sends,
            ),
        )

    def _asks_here(self) -> tuple[Route, ...]:
        refuses = (_BAD, _CONFLICT, _BUSY)
        return (
            Route(
                "POST",
                "/upgrade",
                "Have the installed program take over from the running one. If it does, the "
                "connection ends without an answer, and the next program answers /status.",
                lambda _: self._actions.upgrade(),
                Upgrading,
                {},
                refuses,
            ),
            Route(
                "POST",
                "/cache/drop-clean",
                "Forget every clean block of the cache.",
                lambda _: self._actions.drop_clean(),
                Dropped,
                {},
                refuses,
            ),
            Route(
                "POST",
                "/cache/warm",
                "Begin to read a range of the disk into the cache.",
                lambda body: self._actions.warm(**body),
                Warming,
                _RANGE,
                refuses,
            ),
            Route(
                "DELETE",
                "/cache/warm",
                "Read nothing more into the cache.",
                lambda _: self._actions.cancel_warming(),
                Warming,
                {},
                (_CONFLICT,),
            ),
            Route(
                "POST",
                "/settings",
                "Change some settings until the process ends.",
                self._set,
                Settings,
                _SETTINGS,
                (_BAD, _CONFLICT),
            ),
        )

    async def _status(self, _: dict[str, Any]) -> Status:
        return self._view.status(self._changes.now())

    async def _metrics(self, _: dict[str, Any]) -> Reply:
        if "prometheus_client" not in sys.modules:
            # In a thread: it takes 30 ms.
            await trio.to_thread.run_sync(_import_prometheus)
        return Reply(exposition(self._view), content_type=CONTENT_TYPE)

    async def _page(self, _: dict[str, Any]) -> Reply:
        return await page()

    async def _health(self, _: dict[str, Any]) -> Healthy:
        return Healthy(True)

    async def _ready(self, _: dict[str, Any]) -> Reply:
        live = self._view.live
        reason = ""
        if self._view.stopping:
            reason = "stopping"
        elif (state := server_state(live)) != "connected":
            reason = f"the server is not connected ({state})"
        elif live.left_reason:
            reason = live.left_reason
        ready = asdict(Ready(not reason, reason))
        return json_reply(ready, _BUSY if reason else HTTPStatus.OK)

    async def _settings(self, _: dict[str, Any]) -> Settings:
        return self._changes.now()

    async def _set(self, body: dict[str, Any]) -> Settings:
        return await self._changes.change(body)

    async def _stop(self, body: dict[str, Any]) -> Reply:
        stopping = await self._actions.stop(**body)
        text = json.dumps(asdict(stopping), indent=2).encode() + b"\n"
        return Reply(text, then=self._actions.end)

    async def _openapi(self, _: dict[str, Any]) -> Reply:
        return json_reply(openapi.document(self.routes))


def _import_prometheus() -> None:
    import prometheus_client  # noqa: F401


_STOP: Final[Fields] = {
    "when_clean": Field(bool, "Only if nothing is left behind.", default=True),
    "even_with_guest": Field(bool, "Also while a guest uses the disk.", default=False),
}
_RANGE: Final[Fields] = {
    "offset": Field(int, "Where to begin, in bytes.", default=0, maximum=(1 << 63) - 1),
    "length": Field(int, "How many bytes; 0: all.", default=0, maximum=(1 << 63) - 1),
}
_SETTINGS: Final[Fields] = {
    "cache_mode": Field(str, "When a write is complete.", choices=(WRITETHROUGH, WRITEBACK)),
    "flush_interval_s": Field(
        float, "Flush that long after a write at the latest; 0: never.", maximum=1e6
    ),
    "drain_timeout_s": Field(float, "For the answer to a guest's stop.", maximum=1e6),
    "slow_ms": Field(float, "Log requests that take longer; 0: none.", maximum=1e9),
    "connections": Field(int, "To the server, where it allows several.", minimum=1, maximum=16),
    "request_timeout_s": Field(
        float, "Reconnect when the server is silent for that long; 0: never.", maximum=1e6
    ),
    "reconnect_timeout_s": Field(
        float, "Fail requests after that long without a server; 0: they wait.", maximum=1e6
    ),
    "log_level": Field(str, "What is logged.", choices=LOG_LEVELS),
}
