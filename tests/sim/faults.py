"""What is wrong with a server, or a host, for a while."""

from __future__ import annotations


class Faults:
    """What is wrong with the server now."""

    def __init__(self) -> None:
        self.stalls = False
        self.hangs_up_on: int | None = None
        self.no_space = False
        self.failing_flushes = 0
        self.cache_disk_full = False
