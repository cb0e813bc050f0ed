"""A headless Chromium, spoken to over its DevTools pipe."""

from __future__ import annotations

import base64
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from tempfile import TemporaryDirectory
from typing import Any

import trio

from tests.tools import HUNG_S, need


class Browser:
    """One page."""

    def __init__(self, out: trio.lowlevel.FdStream, into: trio.lowlevel.FdStream) -> None:
        self._out, self._into = out, into
        self._data = bytearray()
        self._next = 0
        self._session: str | None = None
        self.asked_for: list[str] = []
        """The URLs of all requests of the page."""
        self.complaints: list[str] = []
        """Errors of the page: exceptions, and what the console shows as such."""

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """See the Chrome DevTools Protocol."""
        self._next += 1
        number = self._next
        message: dict[str, Any] = {"id": number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        await self._out.send_all(json.dumps(message).encode() + b"\0")
        with trio.fail_after(HUNG_S):
            while True:
                found = await self._receive()
                if found.get("id") == number:
                    assert "error" not in found, found
                    return dict(found["result"])
                self._note(found)

    async def start(self) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call(
            "Target.attachToTarget", targetId=target["targetId"], flatten=True
        )
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            await self.call(f"{domain}.enable")

    async def evaluate(self, code: str) -> Any:
        """The value of a JavaScript expression."""
        found = await self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, code: str) -> Any:
        """The value of an expression, once it is true."""
        with trio.fail_after(HUNG_S):
            while not (value := await self.evaluate(code)):
                await trio.sleep(0.1)
        return value

    async def screen(self, width: int, height: int, *, dark: bool = False) -> None:
        """How large, and how the user likes it."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[scheme])

    async def picture(self) -> bytes:
        """PNG."""
        found = await self.call("Page.captureScreenshot", format="png")
        return base64.b64decode(found["data"])

    async def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._data:
            part = await self._into.receive_some()
            assert part, "the browser has ended"
            self._data += part
        line, _, rest = self._data.partition(b"\0")
        self._data = rest
        return dict(json.loads(line))

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        match event.get("method"):
            case "Network.requestWillBeSent":
                self.asked_for.append(params["request"]["url"])
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.complaints.append(params["entry"]["text"])


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    """A browser with an empty profile. (Its sandbox is no use to root, and needs what containers do
    not have.)"""
    # Processes of its own go on writing there for a moment after it has ended.
    with TemporaryDirectory(prefix="nbb-", ignore_cleanup_errors=True) as profile:
        async with _browser(profile) as found:
            yield found


@asynccontextmanager
async def _browser(profile: str) -> AsyncIterator[Browser]:
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    argv = [
        *("/bin/bash", "-c", f'exec "$@" 3<&{theirs_in} 4>&{theirs_out}', "bash", need("chromium")),
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--no-proxy-server"),
    ]
    async with trio.open_nursery() as nursery:

        async def run() -> None:
            home = {**os.environ, "HOME": profile}
            fds = (theirs_in, theirs_out)
            await trio.run_process(
                argv, pass_fds=fds, env=home, stdin=b"", capture_stderr=True, check=False
            )

        nursery.start_soon(run)
        out, into = trio.lowlevel.FdStream(ours_out), trio.lowlevel.FdStream(ours_in)
        async with out, into:
            found = Browser(out, into)
            await found.start()
            yield found
        nursery.cancel_scope.cancel()
    os.close(theirs_in)
    os.close(theirs_out)
