"""What a long command says, shown while it runs: its steps, and now and then its latest line."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field

_STEP = re.compile(r"Step \d+/\d+ : |#\d+ \[|Building \w|I: (Resolving|Unpacking the base)")
"""Docker's classic builder, BuildKit, Compose, debootstrap."""
_ESCAPE = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_QUIET_S = 5.0
_WIDTH = 100


@dataclass
class Progress:
    """Takes the lines of a command; says the few that tell how far it is."""

    say: Callable[[str], None]
    word: str
    """What each line begins with, such as `build`."""
    now_s: Callable[[], float] = time.monotonic
    _began_s: float = field(init=False)
    _said_s: float = field(init=False)

    def __post_init__(self) -> None:
        self._began_s = self._said_s = self.now_s()

    def __call__(self, line: str) -> None:
        text = _ESCAPE.sub("", line.rpartition("\r")[2]).strip()
        now_s = self.now_s()
        if text and (_STEP.match(text) or now_s - self._said_s >= _QUIET_S):
            self._said_s = now_s
            self.say(f"{self.word:<8} {now_s - self._began_s:3.0f} s  {text[:_WIDTH]}")
