"""The live page in a real browser.

`PAGE_PICTURES=DIRECTORY` keeps there what it looks like, after two minutes (add `--timeout 400`):
docs/page.png is one of these.
"""

from __future__ import annotations

import os
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio

from bridge.api.exporter import Exporter, serve
from bridge.cache.cache_options import WRITEBACK
from bridge.peers.blk_driver import BlkDriver
from tests.api.bridges import served
from tests.api.chromium import Browser, browser

_ANSWER = "(document.getElementById('answer')?.textContent ?? '')"
"""Also of a page that is still being loaded."""


@asynccontextmanager
async def shown(sockets: list[Path]) -> AsyncIterator[str]:
    """The URL at which these bridges are shown."""
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(serve, Exporter(lambda: sockets), listeners))
        yield f"http://127.0.0.1:{port}"
        nursery.cancel_scope.cancel()


async def busy(guest: BlkDriver) -> None:
    """A mix of requests, until cancelled."""
    number = 0
    while True:
        number += 1
        await guest.write(number * 37 % 1000 << 13, b"a" * 8192)
        for _ in range(3):
            await guest.read(number * 37 % 1000 << 13, 4096)
        if number % 9 == 0:
            await guest.read(number * 4099 % 1000 << 13, 4096)
        if number % 400 == 0:
            await guest.flush()
        await trio.sleep(0.0005 + 0.002 * (number // 3000 % 2))


async def fits(page: Browser) -> bool:
    """Nothing sticks out to the right."""
    wide = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
    return bool(await page.evaluate(wide))


async def keep(page: Browser, name: str) -> None:
    picture = await page.picture()
    assert picture.startswith(b"\x89PNG")
    assert min(struct.unpack(">II", picture[16:24])) > 300
    if place := os.environ.get("PAGE_PICTURES"):
        (Path(place) / f"{name}.png").write_bytes(picture)


async def test_page_shows_a_living_disk_on_screens_of_any_size(directory: Path) -> None:
    async with served(directory, cache=WRITEBACK) as bridge, browser() as page:
        async with shown([bridge.control]) as url, await BlkDriver.connect(bridge.vhost) as guest:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(busy, guest)
                await page.screen(1160, 800)
                await page.call("Page.navigate", url=f"{url}/vm0/")
                await page.until("document.querySelectorAll('polyline').length === 10")
                # Each chart has a number and a line of several points.
                if place := os.environ.get("PAGE_PICTURES"):
                    assert Path(place).is_dir()
                    await trio.sleep(115)  # Until the charts are full.
                await page.until(
                    "[...document.querySelectorAll('polyline.one')].every("
                    "each => each.points.numberOfItems >= 4)"
                )
                # (Between two bursts of the guest's everything may be at the server.)
                await page.until(f"{_ANSWER}.includes('no, because')")
                said = await page.evaluate("document.body.innerText")
                assert "Safe to reboot this host: " in said
                assert "reads" in said
                assert "connected" in said
                assert "NaN" not in said
                assert "undefined" not in said
                assert await fits(page)
                await keep(page, "page")
                light = await page.evaluate("getComputedStyle(document.body).backgroundColor")
                await page.screen(1160, 800, dark=True)
                dark = await page.evaluate("getComputedStyle(document.body).backgroundColor")
                assert light != dark
                await keep(page, "page-dark")
                await page.screen(360, 740)
                assert await fits(page)
                state = "document.getElementById('state')"
                assert await page.evaluate(
                    f"{state}.getBoundingClientRect().bottom < innerHeight / 2"
                )
                assert (
                    await page.evaluate(f"{state}.innerText") == "server connected\nguest running"
                )
                await keep(page, "page-phone")
                nursery.cancel_scope.cancel()
            await guest.flush()
            await page.until(f"{_ANSWER}.includes('yes, once the guest is shut down')")
        assert page.complaints == []
        assert all(each.startswith((url, "data:,")) for each in page.asked_for)


async def test_page_of_a_host_leads_to_its_disks_and_says_when_one_is_dead(directory: Path) -> None:
    dead = directory / "dead.api"
    async with served(directory) as bridge, browser() as page:
        async with shown([bridge.control, dead]) as url:
            await page.screen(800, 600)
            await page.call("Page.navigate", url=f"{url}/")
            await page.until("document.querySelectorAll('tbody tr').length === 2")
            said = await page.evaluate("document.querySelector('tbody').innerText")
            assert "bridge dead is not running" in said
            assert "because of dead" in await page.evaluate(_ANSWER)
            await page.evaluate("document.querySelector('tbody tr:last-child a').click()")
            await page.until("location.pathname === '/vm0/'")
            await page.until(f"{_ANSWER}.includes('Safe to reboot this host: yes')")
            assert page.complaints == []


async def test_page_says_that_nobody_answers_and_goes_on_when_one_does(directory: Path) -> None:
    sockets: list[Path] = []
    async with served(directory) as bridge, browser() as page:
        sockets.append(bridge.control)
        async with shown(sockets) as url:
            await page.call("Page.navigate", url=f"{url}/vm0/")
            await page.until(f"{_ANSWER}.includes('yes')")
            sockets.clear()
            await page.until(f"{_ANSWER}.startsWith('No answer')")
            # What was true before is not said any more.
            assert await page.evaluate("document.getElementById('state').hidden")
            sockets.append(bridge.control)
            await page.until(f"{_ANSWER}.includes('yes')")


async def test_name_that_a_server_chose_stays_text(directory: Path) -> None:
    """What a server calls itself comes to the page in its URI and its reasons."""
    evil = "<img src=x onerror=\"document.title='evil'\">"
    async with served(directory) as bridge, browser() as page:
        async with shown([bridge.control]) as url:
            await page.call("Page.navigate", url=f"{url}/vm0/")
            await page.until(f"{_ANSWER}.includes('yes')")
            text = await page.evaluate(
                "(status => { status.server.uri = status.server.reason = EVIL;"
                " status.bridge.name = EVIL; show(status);"
                " return document.body.innerText })"
                "(structuredClone(past[past.length - 1].status))".replace("EVIL", repr(evil))
            )
            assert text.count("onerror") >= 3
            assert await page.evaluate("document.querySelectorAll('img').length") == 0
