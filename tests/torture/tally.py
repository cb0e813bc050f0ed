"""What a campaign counts, and the first thing that went wrong."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field

OWN = "our own"
"""The client that is this project's own front-end."""


@dataclass
class Tally:
    """Counts of one campaign. `problems` has one line for each thing that may not happen."""

    faults: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    """SIGKILLs that met a running process, by what it was."""
    requests: Counter[str] = field(default_factory=Counter)
    clients: Counter[str] = field(default_factory=Counter)
    """Requests that succeeded, by who made them."""
    errors: Counter[str] = field(default_factory=Counter)
    """Requests that failed while a fault explains it."""
    left_out: dict[str, str] = field(default_factory=dict)
    """Kind of fault → why it cannot be made here."""
    story: list[str] = field(default_factory=list)
    """Which fault began in which second."""
    problems: list[str] = field(default_factory=list)
    verified_bytes: int = 0
    times_at_limit: int = 0
    """How often the kernel had to take memory from a process because of its limit."""

    @property
    def killed(self) -> int:
        """Processes that were killed."""
        return sum(self.kills.values())

    def has(self, pattern: str) -> bool:
        """A problem of that kind was found."""
        return any(re.search(pattern, problem) for problem in self.problems)

    def _others(self) -> str:
        return "".join(
            f", {count} of {name}" for name, count in sorted(self.clients.items()) if name != OWN
        )

    def line(self) -> str:
        """All of it in one line."""
        return (
            f"{self.verified_bytes / 1e9:.2f} GB verified, {sum(self.requests.values())} requests"
            f"{self._others()} ({sum(self.errors.values())} failed with a reason), "
            f"{self.killed} kills, {sum(self.faults.values())} faults, "
            f"{self.times_at_limit} times at a memory limit"
        )
