"""Parses the lines that a guest prints on its serial console; they decide whether it passed.

A guest's script prints, each on a line of its own:

* `REPORT key=value`: a result, a time, a rate;
* `CHECKPOINT name`: it waits until the host has checked its side and sent a line back;
* `PASS`, or `FAIL reason`: the verdict. QEMU's exit status says nothing about the guest.
"""

from __future__ import annotations

import re
from collections import deque
from dataclasses import dataclass, field

_LINE_MAX_BYTES = 4096
_VALUES_MAX = 1000
_TAIL_LINES = 40
_ESCAPES = re.compile(r"\x1b(?:\[[0-9;?=]*[A-Za-z]|[@-Z\\-_c])|[\x00-\x08\x0b-\x1f]")
_PANIC = "Kernel panic - not syncing: "


@dataclass
class GuestReport:
    """The verdict and the results of one boot."""

    passed: bool = False
    reason: str = ""
    values: dict[str, str] = field(default_factory=dict)
    tail: deque[str] = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))
    elapsed_s: float = 0.0

    def number(self, key: str) -> float:
        """The value of `key` as a number; 0 when the guest did not report one."""
        try:
            return float(self.values.get(key, "0"))
        except ValueError:
            return 0.0


class SerialParser:
    """Bytes of a serial console in, whole lines out; keeps the report up to date.

    The guest is not trusted: lines, the number of values and the kept tail are bounded.
    """

    def __init__(self) -> None:
        self.report = GuestReport()
        self._partial = b""

    def feed(self, data: bytes) -> list[str]:
        """Take bytes of the console; return the lines that they complete, without escapes."""
        *lines, self._partial = (self._partial + data).split(b"\n")
        self._partial = self._partial[-_LINE_MAX_BYTES:]
        return [self._line(line[-_LINE_MAX_BYTES:]) for line in lines]

    def finish(self) -> list[str]:
        """The console has ended: return its last line, if that has no line break."""
        return self.feed(b"\n") if self._partial else []

    def _line(self, raw: bytes) -> str:
        line = _ESCAPES.sub("", raw.decode(errors="replace")).rstrip()
        report = self.report
        if line:
            report.tail.append(line)
        if line == "PASS":
            report.passed = not report.reason
        elif line.startswith("FAIL"):
            self._fail(line.removeprefix("FAIL").strip() or "no reason given")
        elif _PANIC in line:
            self._fail(line[line.index(_PANIC) :])
        elif line.startswith("REPORT "):
            key, found, value = line.removeprefix("REPORT ").partition("=")
            if found and (key in report.values or len(report.values) < _VALUES_MAX):
                report.values[key] = value
        return line

    def _fail(self, reason: str) -> None:
        """Note a failure. The first one is kept, also after a PASS."""
        self.report.passed = False
        self.report.reason = self.report.reason or reason
