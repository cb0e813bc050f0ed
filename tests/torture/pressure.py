"""What the host does to a process: memory that is taken away, a clock that jumps."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

_MADV_PAGEOUT = 21
_PROCESS_MADVISE = 440
"""The same number on every architecture (Linux 5.10)."""
_LIBC = ctypes.CDLL(None, use_errno=True)
_RANGES_PER_CALL = 512


class _IoVec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def page_out(pid: int) -> int:
    """Take away all memory of the process that comes from files, as a host short of memory does:
    code, and the cache file's map. Returns the bytes that were asked for. Raises OSError."""
    ranges = _file_ranges(pid)
    fd = os.pidfd_open(pid)
    try:
        for start in range(0, len(ranges), _RANGES_PER_CALL):
            some = ranges[start : start + _RANGES_PER_CALL]
            vector = (_IoVec * len(some))(*(_IoVec(low, high - low) for low, high in some))
            if _LIBC.syscall(_PROCESS_MADVISE, fd, vector, len(some), _MADV_PAGEOUT, 0) < 0:
                raise OSError(ctypes.get_errno(), "process_madvise")
    finally:
        os.close(fd)
    return sum(high - low for low, high in ranges)


def _file_ranges(pid: int) -> list[tuple[int, int]]:
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if len(words) == 6 and words[5].startswith("/") and "memfd:" not in words[5]:
            low, high = words[0].split("-")
            found.append((int(low, 16), int(high, 16)))
    return found


class JumpingClock:
    """A wall clock of their own for the processes that are started with `environment`."""

    def __init__(self, library: Path, file: Path) -> None:
        self._file = file
        self.jump_to(0)
        self.environment = {"LD_PRELOAD": str(library), "TORTURE_CLOCK": str(file)}

    def jump_to(self, ahead_s: int) -> None:
        """From now on it is so many seconds ahead of the host's."""
        fd = os.open(self._file, os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.pwrite(fd, ahead_s.to_bytes(8, sys.byteorder, signed=True), 0)
        finally:
            os.close(fd)


def clock_library(folder: Path) -> Path | None:
    """Compile what JumpingClock needs; None without a C compiler.

    libfaketime cannot be used: with 0.9.10 Python's time.sleep() fails with EINVAL.
    """
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    library = folder / "jumping_clock.so"
    source = Path(__file__).with_name("jumping_clock.c")
    command = [compiler, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror"]
    subprocess.run([*command, "-o", str(library), str(source), "-ldl"], check=True)
    return library
