"""What `nbd-bridge top` shows: lines of text, each in parts that may have a style."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from bridge.cli.rates import Rates, Status, rates
from bridge.cli.wording import time_text
from bridge.units import size_text

Part = tuple[str, str]
"""Text and style: "", bold, red, green, yellow, blue, magenta or cyan."""
Line = list[Part]

_KEPT: Final = 120
"""Looks: one per second are two minutes."""
_TIMED_LOOKS: Final = 10
"""Latencies are of so many looks together: some ten requests per second are timed."""
_HEAD: Final = (
    *("DISK", "GUEST", "SERVER", "READ/S", "WRITE/S", "READ", "WRITTEN"),
    *("P50", "P99", "HITS", "DIRTY", "REQUESTS"),
)
_TEXT_COLUMNS: Final = (0, 1, 2, 11)
"""The others are figures, to the right."""
_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_PLAIN_BLOCKS: Final = "_.-=+*#@"


@dataclass
class Watched:
    """One bridge, look by look."""

    name: str
    looks: deque[tuple[float, Status]] = field(
        default_factory=lambda: deque(maxlen=_TIMED_LOOKS + 1)
    )
    history: deque[Rates] = field(default_factory=lambda: deque(maxlen=_KEPT))
    error: str = ""

    def add(self, now_s: float, status: Status) -> None:
        """One look more, at `now_s` of a monotonic clock."""
        self.error = status.get("error", "")
        if not self.error and "traffic" not in status:
            self.error = f"it is of version {status['bridge']['version']}, which says too little"
        if self.error:
            return
        started_s = status["bridge"]["started_s"]
        if self.looks and self.looks[-1][1]["bridge"]["started_s"] != started_s:
            self.looks.clear()  # Another process: it counts from 0.
        self.looks.append((now_s, status))
        if len(self.looks) > 1:
            before_s, before = self.looks[-2]
            timed_since = self.looks[0][1]
            self.history.append(rates(status, before, now_s - before_s, timed_since=timed_since))

    @property
    def status(self) -> Status | None:
        """The latest look."""
        return self.looks[-1][1] if self.looks else None


def screen(bridges: Sequence[Watched], *, width: int, unicode: bool) -> list[Line]:
    """One bridge in full, several as a table."""
    if len(bridges) == 1:
        return _one(bridges[0], width=width, unicode=unicode)
    rows = [[(name, "bold") for name in _HEAD]]
    rows += [_row(each, unicode=unicode) for each in bridges]
    # An error may be long, and is the last of its row: it makes no column wider.
    whole = [row for row in rows if len(row) == len(_HEAD)]
    whole += [[row[0]] for row in rows if len(row) < len(_HEAD)]
    widths = [
        max(len(row[column][0]) for row in whole if column < len(row))
        for column in range(len(_HEAD))
    ]
    return [list(map(_cell, range(len(_HEAD)), row, widths)) for row in rows]


def _cell(column: int, part: Part, width: int) -> Part:
    text, style = part
    return f"{text:{'<' if column in _TEXT_COLUMNS else '>'}{width}}  ", style


def _row(each: Watched, *, unicode: bool) -> Line:
    status = each.status
    if each.error or status is None:
        return [(each.name, ""), (each.error or "...", "red" if each.error else "")]
    found: Line = [(each.name, ""), (status["guest"]["state"], ""), _server(status)]
    now = each.history[-1] if each.history else None
    found += [(cell, "") for cell in (figures(now) if now else ["-"] * 8)]
    return [*found, (_line(each, "requests_per_s", 16, unicode=unicode), "blue")]


def figures(now: Rates) -> tuple[str, ...]:
    """Reads and writes per second, their bytes, median, 99 %, hits and what is dirty."""
    return (
        _count(now.reads_per_s),
        _count(now.writes_per_s),
        f"{size_text(round(now.read_bytes_per_s))}/s",
        f"{size_text(round(now.written_bytes_per_s))}/s",
        "-" if now.p50_s is None else time_text(now.p50_s),
        "-" if now.p99_s is None else time_text(now.p99_s),
        "-" if now.hit_ratio is None else f"{now.hit_ratio:.1%}",
        "-" if now.dirty_bytes is None else size_text(now.dirty_bytes),
    )


def _one(each: Watched, *, width: int, unicode: bool) -> list[Line]:
    status = each.status
    if status is None or not each.history:
        return [[(f"{each.name}: {each.error or 'looking ...'}", "red" if each.error else "")]]
    now = each.history[-1]
    reads, writes, read, written, p50, p99, hits, dirty = figures(now)
    rows = (
        ("reads", f"{reads}/s", "reads_per_s", "blue"),
        ("writes", f"{writes}/s", "writes_per_s", "magenta"),
        ("read", read, "read_bytes_per_s", "blue"),
        ("written", written, "written_bytes_per_s", "magenta"),
        ("median", p50, "p50_s", "cyan"),
        ("99 %", p99, "p99_s", "cyan"),
        ("hits", hits, "hit_ratio", "green"),
        ("dirty", dirty, "dirty_bytes", "yellow"),
        ("in flight", str(now.in_flight), "in_flight", ""),
    )
    safety = status["safe_to_reboot"]
    found: list[Line] = [
        [(f"{each.name}  ", "bold"), (f"{status['server']['uri']}  ", ""), _server(status)],
        [(f"safe to reboot this host: {safety['answer']}", _good(safety["safe"]))],
        [(each.error, "red")],
    ]
    for name, value, attribute, colour in rows:
        line = _line(each, attribute, max(8, min(_KEPT, width - 26)), unicode=unicode)
        found.append([(f"{name:10}", "bold"), (f"{value:>12}  ", ""), (line, colour)])
    return found


def _server(status: Status) -> Part:
    state = status["server"]["state"]
    return state, _good(state == "connected")


def _good(good: bool) -> str:
    return "green" if good else "red"


def _line(each: Watched, attribute: str, width: int, *, unicode: bool) -> str:
    values = [getattr(found, attribute) for found in each.history]
    return sparkline(values[-width:], unicode=unicode)


def sparkline(values: Sequence[float | None], *, unicode: bool = True) -> str:
    """A character per value, higher for a larger one; a space where there is none."""
    blocks = _BLOCKS if unicode else _PLAIN_BLOCKS
    most = max((value for value in values if value), default=0)
    last = len(blocks) - 1
    return "".join(
        " " if value is None else blocks[round(value / most * last) if most else 0]
        for value in values
    )


def _count(value: float) -> str:
    for limit, unit in ((1e6, "M"), (1e4, "k")):
        if value >= limit:
            return f"{value / (1e6 if unit == 'M' else 1e3):.1f}{unit}"
    return f"{value:.0f}"


def printed(lines: list[Line]) -> str:
    """Without styles, and without what a terminal would obey."""
    texts = ("".join(text for text, _ in line).rstrip() for line in lines)
    return "\n".join(map(clean, texts))


def clean(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(each if each.isprintable() else "?" for each in text)
