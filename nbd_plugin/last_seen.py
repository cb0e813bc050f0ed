"""Whether another program changed a volume's file while this plugin did not have it open.

A client that cached the volume must learn of it: a difference begins another generation. What is
remembered of the file (`VolumeState.seen`) and compared at the next opening for writing:

- **Closed in order.** Inode, size and modification time, to the nanosecond. Reading or renaming
  the file, or giving it to another owner, changes none of them.
- **Open for writing, and nbdkit was killed.** Our own writes changed the modification time. So a
  page of shared memory (`Mark`, in a file beside the state, which outlives the process) says when
  the last of them began and ended, and after a flush which time the file had. The time the file
  has now must be one that we gave it. Where a write was being executed at the kill, up to
  `_UNFINISHED_NS` after its beginning are allowed for: it may have waited for its turn. It may as
  well not have come to the file yet, which then has the time of the change before.
- **The host was started anew since.** After a loss of power the file may be older than what is
  remembered: inode times reach the medium later than data. So there it may be older, but must not
  have been changed later than we can have done it; that is asked of the change time, which
  cannot be set. The mark's page reaches the medium within half a minute by itself.

What this cannot see: a change within the same tick of the kernel's clock (4 ms) as our last one, a
change that is made while we have the file open, a change after a loss of power on a host that
forgets the time, and a program that writes and then puts back the time that it found. A clock that
is set back, and a network file system with a clock of its own, make a killed nbdkit's file look
changed.

Nothing of this can be asked of a block device: it is known by what the kernel calls it, so that
another disk under the same path is another generation, and by nothing else.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path

_library = ctypes.CDLL(None)

_SECOND_NS = 1_000_000_000
_UNFINISHED_NS = _SECOND_NS
"""A busy host may keep a thread from its turn for long. Too short a time stops a disk whose bridge
holds unwritten data; too long a one misses an edit of the file right after the kill."""
_LATE_NS = 60 * _SECOND_NS
"""After a loss of power: how much older than the file's last change the mark may be."""

_COARSE = 5
"""CLOCK_REALTIME_COARSE, for which Python has no name: a file's times are of this clock."""

_BEGAN, _ENDED, _RUNNING, _EXACT, _BEFORE = range(5)
"""The words of a mark. `_BEFORE`: when the change before that of `_BEGAN` began."""
_WORDS = 5
_MARK_BYTES = mmap.PAGESIZE

_OVERWRITTEN_IN_PLACE = frozenset({0xEF53, 0x58465342, 0x01021994})
"""ext4, XFS and tmpfs, as statfs(2) has them."""

SEEN = re.compile(r"[!-~ ]{0,200}")


def boot_id() -> str:
    """A UUID that changes with every boot of the host (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()


class Mark:
    """When our last change of a file began and ended, in memory that survives a kill.

    `began` and `ended` cost half a microsecond together, where an fstat after each write would
    cost three. Changes that run at the same time may lose one another's `_RUNNING`; then the file
    looks changed after a kill, and never unchanged.

    A file system that never overwrites in place (btrfs) may have no room for a page that is stored
    to, and then the process gets SIGBUS: there the page is written with a system call, and if that
    fails, the file looks changed after a kill.
    """

    def __init__(self, path: Path) -> None:
        fd = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            os.posix_fallocate(fd, 0, _MARK_BYTES)  # no SIGBUS on a full disk
            self._is_mapped = _file_system(fd) in _OVERWRITTEN_IN_PLACE
            self._map = mmap.mmap(fd if self._is_mapped else -1, _MARK_BYTES)
            self._fd = os.dup(fd)
            self._words = memoryview(self._map).cast("q")
            words = self._words
            words[_BEGAN] = words[_ENDED] = words[_BEFORE] = time.time_ns()
            words[_RUNNING] = words[_EXACT] = 0
            self._store()
            os.fsync(fd)
        finally:
            os.close(fd)
        self._running: list[None] = []
        self._begun = 0

    def began(self) -> None:
        """A change of the file begins. From any thread."""
        words = self._words
        self._begun += 1
        if not self._running:
            words[_BEFORE] = words[_BEGAN]
        words[_BEGAN] = time.clock_gettime_ns(_COARSE)
        self._running.append(None)
        words[_RUNNING] = 1
        if not self._is_mapped:
            self._store()

    def ended(self) -> None:
        """The change has ended, whether it succeeded or not. From the same thread."""
        words = self._words
        words[_ENDED] = time.time_ns()
        words[_EXACT] = 0
        self._running.pop()
        if not self._running:
            words[_RUNNING] = 0
        if not self._is_mapped:
            self._store()

    def note_time(self, fd: int) -> None:
        """Remember the exact time that the file has, if nothing changes it now."""
        begun = self._begun
        if self._running:
            return
        exact = os.fstat(fd).st_mtime_ns
        if self._begun == begun:
            self._words[_EXACT] = exact
            if not self._is_mapped:
                self._store()

    def _store(self) -> None:
        with contextlib.suppress(OSError):
            os.pwrite(self._fd, self._words[:_WORDS], 0)

    def close(self) -> None:
        """Let go of the mark; its file stays."""
        self._words.release()
        self._map.close()
        os.close(self._fd)


def _file_system(fd: int) -> int:
    """statfs(2)'s f_type, the first word of what it returns; 0 if it fails."""
    info = ctypes.create_string_buffer(256)
    if _library.fstatfs(fd, info) != 0:
        return 0
    return int.from_bytes(info.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)


def read_mark(path: Path) -> tuple[int, int, int, int, int]:
    """What a process that is gone left in its mark; zeroes if there is none."""
    try:
        with open(path, "rb") as file:
            words = memoryview(file.read(_WORDS * 8)).cast("q")
    except (OSError, TypeError):
        return 0, 0, 0, 0, 0
    return (*words,) if len(words) == _WORDS else (0, 0, 0, 0, 0)  # type: ignore[return-value]


def describe(fd: int, *, is_open: bool) -> str:
    """What is to be remembered of the file. `is_open`: a session writes it from here on."""
    info = os.fstat(fd)
    if stat.S_ISBLK(info.st_mode):
        return f"device {device_name(info.st_rdev)}"
    return " ".join(
        map(
            str,
            (
                "open" if is_open else "closed",
                *(boot_id(), info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns),
            ),
        )
    )


def has_changed(seen: str, fd: int, mark: Callable[[], tuple[int, int, int, int, int]]) -> bool:
    """Whether another program changed the file since `seen` was remembered. No if `seen` is ""."""
    words = seen.split(" ")
    info = os.fstat(fd)
    if not seen:
        return False
    if stat.S_ISBLK(info.st_mode):
        return seen != describe(fd, is_open=False)
    if len(words) != 6 or words[0] not in ("open", "closed"):
        return True  # it was a device
    if words[2:4] != [str(info.st_ino), str(info.st_size)]:
        return True
    same_boot = words[1] == boot_id()
    if words[0] == "closed" and words[4] == str(info.st_mtime_ns):
        return False
    if words[0] == "closed":
        return same_boot or info.st_ctime_ns > int(words[5])
    if words[4] == str(info.st_mtime_ns):
        return False  # killed before its first write
    began, ended, running, exact, before = mark()
    if not same_boot:
        return info.st_ctime_ns > ended + _LATE_NS
    if exact == info.st_mtime_ns:
        return False
    if exact and not running:
        return True
    first = began
    if running:
        # It may have waited for its turn, or not have come to the file yet. (There was no word
        # for the change before in the marks of older versions.)
        first = before or began
        ended = max(ended, began + _UNFINISHED_NS)
    return not first - _rounded_by(info.st_mtime_ns) <= info.st_mtime_ns <= ended


def _rounded_by(time_ns: int) -> int:
    """By how much the file system may have rounded down the time: two seconds on some, 10 ms or
    100 ns on others."""
    if time_ns % _SECOND_NS == 0:
        return 2 * _SECOND_NS
    return 10_000_000 if time_ns % 10_000_000 == 0 else 100


def has_grown(seen: str, fd: int) -> bool:
    """It is the file that `seen` tells of, and longer. Whether something else was changed as well
    is not known: its time is another in either case."""
    words = seen.split(" ")
    info = os.fstat(fd)
    return len(words) == 6 and words[2] == str(info.st_ino) and int(words[3]) < info.st_size


def device_name(number: int) -> str:
    """A block device's lasting name, from sysfs; where it has none, one that lasts until the
    device goes away or the host is started anew."""
    folder = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    try:
        folder = folder.resolve(strict=True)
    except OSError:
        return f"{boot_id()} {number}"
    part = ""
    if (partition := _word(folder / "partition")) and not _word(folder / "dm/uuid"):
        part = f" {partition} {_word(folder / 'start')}"
        folder = folder.parent
    for name in ("dm/uuid", "md/uuid", "wwid", "device/wwid", "device/serial", "serial"):
        if word := _word(folder / name):
            return f"{name} {word}{part}"
    if backing := _word(folder / "loop/backing_file"):
        return f"loop {backing}{part}"
    return f"{boot_id()} {number} {_word(folder / 'diskseq')}{part}"


def _word(path: Path) -> str:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return ""
    return re.sub(r"[^!-~]+", "_", text.strip())[:120]
