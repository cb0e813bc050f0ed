"""Memory limits of processes: control groups of the kernel's, version 2 or 1."""

from __future__ import annotations

import errno
import os
import time
from dataclasses import dataclass
from pathlib import Path

_REMOVE_TRIES = 100
_REMOVE_AGAIN_S = 0.02
_LOOSER = 1.02


class NoLimits(Exception):
    """Memory cannot be limited here; the text says why."""


@dataclass(frozen=True)
class _Files:
    """What one version calls them, and the words in them."""

    limit: str
    unlimited: str
    usage: str
    kills: str
    at_limit: str
    at_limit_word: str = ""
    """Of the line that counts; "" if the file is a number."""


VERSION_2 = _Files("memory.max", "max", "memory.current", "memory.events", "memory.events", "max")
_VERSION_1 = _Files(
    "memory.limit_in_bytes",
    "-1",
    "memory.usage_in_bytes",
    "memory.oom_control",
    "memory.failcnt",
)


class MemoryGroup:
    """What its processes use together can be limited. Made by `Hierarchy`."""

    def __init__(self, folder: Path, files: _Files) -> None:
        self._folder = folder
        self._files = files
        folder.mkdir()

    def enter(self) -> None:
        """This process, and those that it starts, belong to it from now on."""
        (self._folder / "cgroup.procs").write_text("0")

    @property
    def usage_bytes(self) -> int:
        """Its processes' own memory, and the pages of files that they were the first to use."""
        return self._number(self._files.usage, "")

    @property
    def kills(self) -> int:
        """How many processes the kernel has killed, because nothing could be taken from them."""
        return self._number(self._files.kills, "oom_kill")

    @property
    def at_limit(self) -> int:
        """How often something had to be taken from them before they got more."""
        return self._number(self._files.at_limit, self._files.at_limit_word)

    def limit(self, size_bytes: int) -> None:
        """No more than that, or than can be reached by taking pages away."""
        while True:
            try:
                self._write(str(size_bytes))
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                size_bytes = int(size_bytes * _LOOSER)
            else:
                return

    def unlimited(self) -> None:
        """As much as there is."""
        self._write(self._files.unlimited)

    def remove(self) -> None:
        """Its processes have ended. Raises OSError."""
        for last in range(_REMOVE_TRIES - 1, -1, -1):
            try:
                self._folder.rmdir()
            except OSError:
                if not last:
                    raise
                time.sleep(_REMOVE_AGAIN_S)
            else:
                return

    def _write(self, text: str) -> None:
        (self._folder / self._files.limit).write_text(text)

    def _number(self, name: str, word: str) -> int:
        text = (self._folder / name).read_text()
        if not word:
            return int(text)
        return int(dict(line.split() for line in text.splitlines())[word])


class Hierarchy:
    """Where groups with memory limits are made."""

    def __init__(self) -> None:
        """Raises NoLimits."""
        self._root, self._files = _mounted()
        try:
            self.group("probe").remove()
        except OSError as error:
            raise NoLimits(f"no control group can be made: {error}") from error

    def group(self, name: str) -> MemoryGroup:
        """A new one. Raises OSError."""
        return MemoryGroup(self._root / f"nbd-bridge-torture-{os.getpid()}-{name}", self._files)


def _mounted() -> tuple[Path, _Files]:
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, options, *_ = line.split()
        root = Path(place)
        if kind == "cgroup" and "memory" in options.split(","):
            return root, _VERSION_1
        if kind == "cgroup2" and "memory" in (root / "cgroup.subtree_control").read_text().split():
            return root, VERSION_2
    raise NoLimits("no hierarchy of control groups has the memory controller")
