"""Whether something stands between nbdkit's clients and the plugin.

An nbdkit filter may hold what it has acknowledged in its own memory (`cache`, `cow`), execute old
writes later, or show other contents than the volume's. What the plugin says of the volume then does
not hold for what the client sees. A plugin is not told of the filters above it, so nbdkit's command
line is read; what cannot be read, or is not known here, counts as a filter that does all of that.
"""

from __future__ import annotations

import os
from pathlib import Path

_HARMLESS = frozenset({"delay", "exitlast", "exitwhen", "ip", "limit", "log", "pause", "rate"})
"""Filters that hand every request down and every answer up as they are."""


def may_hold_data(command_line: Path = Path("/proc/self/cmdline")) -> bool:
    """Whether a filter above the plugin may hold data or change what it sees."""
    try:
        words = command_line.read_bytes().split(b"\0")[:-1]
    except OSError:
        return True
    return not all(
        name in _HARMLESS for name in filter_names([os.fsdecode(word) for word in words])
    )


def filter_names(words: list[str]) -> list[str]:
    """All that may be the argument of `--filter`, which nbdkit (getopt_long) takes abbreviated, in
    one word or two, and anywhere on the line. A parameter's value may be taken for one."""
    if len(words) < 2:
        return ["?"]
    names = []
    for position, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option.startswith("--f") and "--filter".startswith(option):
            names.append(value if equals else "".join(words[position + 1 : position + 2]))
    return names
