"""Volumes as sparse files of one directory, or one file alone.

Beside the volumes a hidden directory holds what must be remembered of each,
`.nbd_plugin/NAME.json`. What belongs to a block device is not kept beside it, /dev is made anew at
each boot, but in `state=` or under /var/lib; where that cannot be written, nothing is kept, and
nothing is told that would have to be. A volume that is open for writing is locked with flock(2), so
that a second nbdkit, or the command line, cannot write it too; the lock dies with the process.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import threading
import time
import uuid
from dataclasses import asdict
from pathlib import Path

from nbd_plugin import last_seen, names
from nbd_plugin.errors import PluginError
from nbd_plugin.resizing import resizing
from nbd_plugin.sparse_copy import sparse_copy
from nbd_plugin.store import COMMAND_WAIT_S, ChangeState, VolumeInfo, VolumeState
from nbd_plugin.volume_file import VolumeFile
from nbd_plugin.volume_state import MAX_STATE_BYTES, parse_state

_STATE_DIR = ".nbd_plugin"
_DEVICE_STATE_DIR = Path("/var/lib/nbd_plugin")
_LOCK_POLL_S = 0.02
_NOT_WRITABLE = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})


class FileStore:
    """The volumes of `directory`; with `only` just that one file of it.

    A lone file may have any file name; it is the volume of that name if that is a legal one,
    else the volume `disk`.
    """

    name = "file"

    def __init__(
        self, directory: Path, only: str | None = None, state_directory: Path | None = None
    ) -> None:
        """`only`: the one file of `directory` that is served. `state_directory`: where to remember,
        if not beside the volumes. Raises PluginError (ENOENT) without that directory."""
        self._directory = directory
        self._state_directory = state_directory
        self._state_lock = threading.Lock()
        self._kept_here: dict[str, VolumeState] = {}
        """What is remembered for as long as this process lives, where it cannot be stored."""
        self.process = uuid.uuid4()
        self._only_file = only
        self._only = only if only is None or names.is_volume_name(only) else "disk"
        if not directory.is_dir():
            raise PluginError(f"directory {directory} does not exist", errno.ENOENT)

    def check(self) -> None:
        """Nothing can be found out that `__init__` has not."""

    def start(self) -> None:
        """Nothing to connect to."""

    def stop(self) -> None:
        """Nothing to disconnect from."""

    def default_volume(self) -> str:
        """See `Store`: the lone file, or the only volume of the directory."""
        if self._only is not None:
            return self._only
        volumes = self.list_volumes()
        return volumes[0].name if len(volumes) == 1 else ""

    def list_volumes(self) -> list[VolumeInfo]:
        """See `Store`. Files with other names, or of other kinds, are left out."""
        found = []
        for name in [self._only] if self._only is not None else sorted(os.listdir(self._directory)):
            if self._only is None and not names.is_volume_name(name):
                continue
            try:
                info = os.stat(self._path(name))
            except FileNotFoundError:
                continue
            if stat.S_ISREG(info.st_mode):
                read_only = "@" in name or self._is_marked_read_only(name)
                found.append(VolumeInfo(name, info.st_size, info.st_blocks * 512, read_only))
        return found

    def open(self, name: str, *, read_only: bool, timeout_s: float) -> VolumeFile:
        """See `Store`. A file that cannot be written is opened read-only, and the disk says why.
        Raises PluginError (EACCES when it cannot be read either)."""
        why_read_only = ""
        if not (read_only or "@" in name or self._is_marked_read_only(name)):
            try:
                return self._open(name, os.O_RDWR, timeout_s)
            except OSError as error:
                if error.errno not in _NOT_WRITABLE:
                    raise
                why_read_only = f"{error.filename or self._path(name)}: {error.strerror}"
        try:
            disk = self._open(name, os.O_RDONLY, timeout_s)
        except PermissionError:
            raise PluginError(
                f"volume {name}: user {os.geteuid()}, as whom nbdkit runs, may not read it",
                errno.EACCES,
            ) from None
        disk.why_read_only = why_read_only
        return disk

    def _open(self, name: str, mode: int, timeout_s: float) -> VolumeFile:
        """Raises OSError when it may not be opened so."""
        try:
            fd = os.open(self._path(name), mode | os.O_CLOEXEC)
        except FileNotFoundError:
            raise PluginError(f"volume {name} does not exist", errno.ENOENT) from None
        except IsADirectoryError:
            raise _not_a_disk(name) from None
        try:
            kind = os.fstat(fd).st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISBLK(kind)):
                raise _not_a_disk(name)
            if mode == os.O_RDWR:
                lock_file(fd, name, timeout_s)
                self._check_still_there(fd, name)
                self._check_state_directory(name)
            size_bytes = os.lseek(fd, 0, os.SEEK_END)
            read_only = mode == os.O_RDONLY
            return VolumeFile(self, name, fd, size_bytes=size_bytes, read_only=read_only)
        except BaseException:
            os.close(fd)
            raise

    def create(self, name: str, size_bytes: int, *, read_only: bool = False) -> None:
        """See `Store`. Raises PluginError (EEXIST, or the errno of the file system)."""
        try:
            fd = os.open(self._path(name), os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise PluginError(f"volume {name} exists already", errno.EEXIST) from None
        try:
            os.ftruncate(fd, size_bytes)
            os.fsync(fd)
            seen = last_seen.describe(fd, is_open=False)
        except OSError as error:
            os.unlink(self._path(name))
            raise PluginError(
                f"volume {name}: {error.strerror}", error.errno or errno.EIO
            ) from None
        finally:
            os.close(fd)
        _sync_directory(self._directory)

        # A removed volume of the same name may have left its counters: go on from there, so that
        # no client mistakes the new contents for the old.
        def made(state: VolumeState) -> VolumeState:
            number = state.generation + 1
            return VolumeState(
                generation=number,
                written=number,
                read_only=read_only,
                losses=state.losses,
                seen=seen,
            )

        self.update_state(name, made)

    def resize(self, name: str, size_bytes: int, *, shrink: bool = False) -> None:
        """See `Store`. Raises PluginError (EROFS; EBUSY; smaller without `shrink`)."""
        disk = self.open(name, read_only=False, timeout_s=COMMAND_WAIT_S)
        with resizing(disk, name, size_bytes, shrink=shrink) as opened:
            os.truncate(self._path(name), size_bytes)
            opened.flush()

    def remove(self, name: str) -> None:
        """See `Store`. Its counters stay. Raises PluginError (EBUSY, ENOENT)."""
        disk = self.open(name, read_only=False, timeout_s=COMMAND_WAIT_S)
        try:
            os.unlink(self._path(name))
            _sync_directory(self._directory)
        finally:
            disk.close()

    def snapshot(self, name: str, snapshot: str) -> None:
        """See `Store`: a sparse copy, renamed when it is complete. Raises PluginError (EEXIST;
        EBUSY; of a snapshot there is none)."""
        if "@" in name:
            raise PluginError(f"{name} is a snapshot itself")
        target = self._path(f"{name}@{snapshot}")
        if target.exists():
            raise PluginError(f"volume {name}@{snapshot} exists already", errno.EEXIST)
        disk = self.open(name, read_only=False, timeout_s=COMMAND_WAIT_S)
        # On the volumes' own file system.
        partial = self._directory / _STATE_DIR / f"{name}@{snapshot}.{os.getpid()}.copy"
        try:
            partial.parent.mkdir(mode=0o700, exist_ok=True)
            sparse_copy(self._path(name), partial)
            os.rename(partial, target)
            _sync_directory(self._directory)
        finally:
            partial.unlink(missing_ok=True)
            disk.close()

    def load_state(self, name: str) -> VolumeState:
        """The remembered state of the volume `name`.

        Raises PluginError (EIO) for a damaged file: guessing could hide a write.
        """
        if name in self._kept_here:
            return self._kept_here[name]
        path = self.state_path(name)
        try:
            with open(path, "rb") as file:
                return parse_state(file.read(MAX_STATE_BYTES + 1))
        except FileNotFoundError:
            return VolumeState()
        except (PermissionError, NotADirectoryError):
            if not self._may_forget(name):
                raise
            return self._kept_here.setdefault(name, VolumeState())
        except ValueError:
            raise PluginError(f"{path} is damaged: look at it, then remove it", errno.EIO) from None

    def update_state(self, name: str, change: ChangeState) -> VolumeState:
        """Replace the remembered state by what `change` makes of it, durably, and return that.

        One at a time, in this process and among others: none may get lost.
        """
        with self._state_lock:
            if name in self._kept_here:
                state = self._kept_here[name] = change(self._kept_here[name])
                return state
            path = self.state_path(name)
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(directory, fcntl.LOCK_EX)
                state = change(self.load_state(name))
                self._save_state(path, state)
                os.fsync(directory)
            finally:
                os.close(directory)
            return state

    def state_lasts(self, name: str) -> bool:
        """Whether what is remembered of the volume outlives this process."""
        return name not in self._kept_here

    def _is_marked_read_only(self, name: str) -> bool:
        try:
            return self.load_state(name).read_only
        except (PermissionError, NotADirectoryError):
            return False  # and a writer is refused, see `_open`

    def _save_state(self, path: Path, state: VolumeState) -> None:
        new = path.with_name(f"{path.name}.{os.getpid()}.new")
        try:
            with open(new, "w", encoding="ascii") as file:
                json.dump(asdict(state), file)
                file.flush()
                os.fsync(file.fileno())
            os.rename(new, path)
        except OSError:
            new.unlink(missing_ok=True)
            raise

    def _check_state_directory(self, name: str) -> None:
        """The volume is about to be written, which must be remembered. Raises OSError if it cannot
        be; a device may be written all the same, and is not told of then (`state_lasts`)."""
        directory = self.state_path(name).parent
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
                text = "the volume's state cannot be written there: name a directory with state="
                raise OSError(errno.EACCES, text, str(directory))
        except OSError:
            if not self._may_forget(name):
                raise
            self._kept_here.setdefault(name, VolumeState())

    def _may_forget(self, name: str) -> bool:
        return self._state_directory is None and self._is_device(name)

    def _is_device(self, name: str) -> bool:
        try:
            return stat.S_ISBLK(os.stat(self._path(name)).st_mode)
        except OSError:
            return False

    def _check_still_there(self, fd: int, name: str) -> None:
        """The lock was waited for; meanwhile its holder may have removed the file."""
        try:
            if os.path.samestat(os.fstat(fd), os.stat(self._path(name))):
                return
        except FileNotFoundError:
            pass
        raise PluginError(f"volume {name} was removed", errno.ENOENT)

    def _path(self, name: str) -> Path:
        """The volume's file. The one place where a name becomes a path."""
        if self._only_file is not None:
            if name != self._only:
                raise PluginError(f"volume {name} does not exist", errno.ENOENT)
            return self._directory / self._only_file
        return self._directory / names.check_volume_name(name)

    def state_path(self, name: str) -> Path:
        """The file in which the volume's state is remembered."""
        path = self._path(name)
        directory = self._state_directory
        if directory is None:
            if not self._is_device(name):
                return self._directory / _STATE_DIR / f"{path.name}.json"
            directory = _DEVICE_STATE_DIR
        # Volumes of several directories may be remembered there.
        readable = re.sub(r"[^A-Za-z0-9@.]+", "-", str(path)).strip("-.")[-80:]
        digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:12]
        return directory / f"{readable}-{digest}.json"


def _not_a_disk(name: str) -> PluginError:
    return PluginError(f"volume {name} is neither a file nor a block device")


def lock_file(fd: int, name: str, timeout_s: float) -> None:
    """Lock the volume against writers of other processes. Raises PluginError (EBUSY)."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise PluginError(
                    f"volume {name} is open for writing in another process", errno.EBUSY
                ) from None
            time.sleep(_LOCK_POLL_S)


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
