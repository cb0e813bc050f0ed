"""What `nbd-bridge top` does: look, show, wait for a key."""

from __future__ import annotations

import curses
import json
import locale
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any, Final

from bridge.api.client import ask
from bridge.api.places import SUFFIX, control_sockets
from bridge.app.command_settings import TopChoices
from bridge.cli import common
from bridge.cli.control import LOOK_S, look_at_all
from bridge.cli.top_screen import Line, Watched, clean, printed, screen
from bridge.errors import ConfigError

_QUIT: Final = tuple(map(ord, "qQ\x04"))
_COLOURS: Final = {
    "red": curses.COLOR_RED,
    "green": curses.COLOR_GREEN,
    "yellow": curses.COLOR_YELLOW,
    "blue": curses.COLOR_BLUE,
    "magenta": curses.COLOR_MAGENTA,
    "cyan": curses.COLOR_CYAN,
}


def run(view: TopChoices, only: Path | None) -> None:
    """Watch the bridge at the control socket `only`, or all. Raises BridgeError."""
    bridges = _Bridges(only)
    if view.once or view.as_json or not sys.stdout.isatty():
        _once(bridges, view.interval_s, as_json=view.as_json)
    else:
        _watch(bridges, view.interval_s)


class _Bridges:
    """Those that are watched; they come and go."""

    def __init__(self, only: Path | None) -> None:
        self._only = only
        self._watched: dict[Path, Watched] = {}
        if only is not None:
            ask(only, "GET", "/status", timeout_s=LOOK_S)  # It is there, or that is an error.
        elif not control_sockets():
            raise ConfigError("no bridge is running that this user may ask")

    def look(self, pool: ThreadPoolExecutor) -> list[Watched]:
        """One look more at each."""
        paths = [self._only] if self._only else control_sockets()
        for path, status in zip(paths, look_at_all(paths, pool), strict=True):
            watched = self._watched.get(path) or Watched(path.name.removesuffix(SUFFIX))
            watched.add(time.monotonic(), status)
            self._watched[path] = watched
        self._watched = {path: self._watched[path] for path in paths}
        return list(self._watched.values())


def _once(bridges: _Bridges, interval_s: float, *, as_json: bool) -> None:
    with ThreadPoolExecutor() as pool:
        bridges.look(pool)
        time.sleep(interval_s)
        found = bridges.look(pool)
    if as_json:
        common.print_result(json.dumps([_as_json(each) for each in found], indent=2))
        return
    width = shutil.get_terminal_size().columns
    lines = screen(found, width=width, unicode=_has_unicode(sys.stdout.encoding))
    common.print_result(printed(lines))


def _as_json(each: Watched) -> dict[str, Any]:
    if each.error or not each.history:
        return {"name": each.name, "error": each.error or "it has just been started"}
    return {"name": each.name, **asdict(each.history[-1])}


def _watch(bridges: _Bridges, interval_s: float) -> None:
    locale.setlocale(locale.LC_ALL, "")  # curses writes in that encoding.
    unicode = _has_unicode(locale.getpreferredencoding(do_setlocale=False))
    with ThreadPoolExecutor() as pool, _ended_in_order(), suppress(KeyboardInterrupt):
        try:
            with _window() as window:
                _show(window, bridges, pool, interval_s, unicode)
        except curses.error as error:
            raise ConfigError(f"this terminal cannot show it ({error}): use --once") from None


@contextmanager
def _window() -> Iterator[curses.window]:
    """The whole terminal, until the end of the block. (`curses.wrapper` sets colours, always.)"""
    window = curses.initscr()
    try:
        curses.noecho()
        curses.cbreak()
        window.keypad(True)
        yield window
    finally:
        curses.endwin()


def _show(
    window: curses.window,
    bridges: _Bridges,
    pool: ThreadPoolExecutor,
    interval_s: float,
    unicode: bool,
) -> None:
    """Until a key is pressed that quits."""
    styles = _styles()
    with suppress(curses.error):
        curses.curs_set(0)
    lines: list[Line] = []
    due_s = time.monotonic()
    while True:
        if (left_s := due_s - time.monotonic()) <= 0:
            due_s = time.monotonic() + interval_s
            width = window.getmaxyx()[1]
            lines = screen(bridges.look(pool), width=width, unicode=unicode)
            continue
        _draw(window, lines, styles)
        window.timeout(max(1, round(left_s * 1000)))
        if window.getch() in _QUIT:
            return


def _draw(window: curses.window, lines: list[Line], styles: dict[str, int]) -> None:
    height, width = window.getmaxyx()
    window.erase()
    for row, line in enumerate(lines[:height]):
        column = 0
        for text, style in line:
            # curses refuses what it cannot show in the last corner, having written it.
            with suppress(curses.error):
                window.addnstr(row, column, clean(text), max(0, width - column), styles[style])
            column = min(column + len(text), width)
    window.refresh()


def _styles() -> dict[str, int]:
    """Style → attributes of curses; no colours where there are none, or none are wanted."""
    styles = {"": curses.A_NORMAL, "bold": curses.A_BOLD}
    in_colour = not os.environ.get("NO_COLOR") and curses.has_colors()
    if in_colour:
        curses.start_color()
        curses.use_default_colors()
    for number, (name, colour) in enumerate(_COLOURS.items(), 1):
        if in_colour:
            curses.init_pair(number, colour, -1)
        styles[name] = curses.color_pair(number) if in_colour else curses.A_NORMAL
    return styles


def _has_unicode(encoding: str | None) -> bool:
    return (encoding or "").lower().startswith("utf")


@contextmanager
def _ended_in_order() -> Iterator[None]:
    """A signal leaves the terminal as it was, too."""

    def end(number: int, _: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = {each: signal.signal(each, end) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
