"""Volumes as sparse files of one directory, or one file alone.

Beside the volumes a hidden directory holds what must be remembered of each,
`.nbd_plugin/NAME.json`. A volume that is open for writing is locked with flock(2), so that a
second nbdkit, or the command line, cannot write it too; the lock dies with the process.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
import time
import uuid
from dataclasses import asdict, replace
from pathlib import Path

from nbd_plugin import names
from nbd_plugin.errors import PluginError
from nbd_plugin.file_disk import FileDisk
from nbd_plugin.sparse_copy import sparse_copy
from nbd_plugin.store import COMMAND_WAIT_S, VolumeInfo, VolumeState
from nbd_plugin.volume_state import MAX_STATE_BYTES, parse_state

_STATE_DIR = ".nbd_plugin"
_LOCK_POLL_S = 0.02


class FileStore:
    """The volumes of `directory`; with `only` just that one file of it.

    A lone file may have any file name; it is the volume of that name if that is a legal one,
    else the volume `disk`.
    """

    name = "file"

    def __init__(self, directory: Path, only: str | None = None) -> None:
        self._directory = directory
        self._only_file = only
        self._only = only if only is None or names.is_volume_name(only) else "disk"
        if not directory.is_dir():
            raise PluginError(f"directory {directory} does not exist", errno.ENOENT)

    def check(self) -> None:
        pass

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def default_volume(self) -> str:
        if self._only is not None:
            return self._only
        volumes = self.list_volumes()
        return volumes[0].name if len(volumes) == 1 else ""

    def list_volumes(self) -> list[VolumeInfo]:
        found = []
        for name in [self._only] if self._only is not None else sorted(os.listdir(self._directory)):
            if self._only is None and not names.is_volume_name(name):
                continue
            try:
                info = os.stat(self._path(name))
            except FileNotFoundError:
                continue
            if stat.S_ISREG(info.st_mode):
                read_only = "@" in name or self.load_state(name).read_only
                found.append(VolumeInfo(name, info.st_size, info.st_blocks * 512, read_only))
        return found

    def open(self, name: str, *, read_only: bool, timeout_s: float) -> VolumeFile:
        path = self._path(name)
        read_only = read_only or "@" in name or self.load_state(name).read_only
        flags = os.O_CLOEXEC | (os.O_RDONLY if read_only else os.O_RDWR)
        try:
            fd = os.open(path, flags)
        except FileNotFoundError:
            raise PluginError(f"volume {name} does not exist", errno.ENOENT) from None
        try:
            mode = os.fstat(fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise PluginError(f"volume {name} is neither a file nor a block device")
            if not read_only:
                lock_file(fd, name, timeout_s)
                self._check_still_there(fd, name)
            size_bytes = os.lseek(fd, 0, os.SEEK_END)
            return VolumeFile(self, name, fd, size_bytes=size_bytes, read_only=read_only)
        except BaseException:
            os.close(fd)
            raise

    def create(self, name: str, size_bytes: int, *, read_only: bool = False) -> None:
        try:
            fd = os.open(self._path(name), os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except FileExistsError:
            raise PluginError(f"volume {name} exists already", errno.EEXIST) from None
        try:
            os.ftruncate(fd, size_bytes)
            os.fsync(fd)
        except OSError as error:
            os.unlink(self._path(name))
            raise PluginError(
                f"volume {name}: {error.strerror}", error.errno or errno.EIO
            ) from None
        finally:
            os.close(fd)
        _sync_directory(self._directory)
        # A removed volume of the same name may have left its counters: go on from there, so that
        # nobody mistakes the new contents for the old.
        state = self.load_state(name)
        number = state.generation + 1
        self.save_state(
            name,
            replace(state, generation=number, written=number, read_only=read_only, identity=""),
        )

    def resize(self, name: str, size_bytes: int, *, shrink: bool = False) -> None:
        disk = self.open(name, read_only=False, timeout_s=COMMAND_WAIT_S)
        try:
            if disk.read_only:
                raise PluginError(f"volume {name} is read-only", errno.EROFS)
            if size_bytes < disk.size_bytes and not shrink:
                raise PluginError(
                    f"volume {name} has {disk.size_bytes} bytes: making it smaller loses data"
                )
            os.truncate(self._path(name), size_bytes)
            disk.flush()
            self._note_foreign_write(disk)
        finally:
            disk.close()

    def remove(self, name: str) -> None:
        disk = self.open(name, read_only=False, timeout_s=COMMAND_WAIT_S)
        try:
            os.unlink(self._path(name))
            _sync_directory(self._directory)
        finally:
            disk.close()

    def snapshot(self, name: str, snapshot: str) -> None:
        if "@" in name:
            raise PluginError(f"{name} is a snapshot itself")
        target = self._path(f"{name}@{snapshot}")
        if target.exists():
            raise PluginError(f"volume {name}@{snapshot} exists already", errno.EEXIST)
        disk = self.open(name, read_only=False, timeout_s=COMMAND_WAIT_S)
        partial = self._state_path(name).with_name(f"{name}@{snapshot}.{os.getpid()}.copy")
        try:
            partial.parent.mkdir(mode=0o700, exist_ok=True)
            sparse_copy(self._path(name), partial)
            os.rename(partial, target)
            _sync_directory(self._directory)
        finally:
            partial.unlink(missing_ok=True)
            disk.close()

    def load_state(self, name: str) -> VolumeState:
        """The remembered state. A damaged file is an error: guessing could hide a write."""
        path = self._state_path(name)
        try:
            with open(path, "rb") as file:
                return parse_state(file.read(MAX_STATE_BYTES + 1))
        except FileNotFoundError:
            return VolumeState()
        except ValueError:
            raise PluginError(f"{path} is damaged: remove it after a look", errno.EIO) from None

    def save_state(self, name: str, state: VolumeState) -> None:
        path = self._state_path(name)
        path.parent.mkdir(mode=0o700, exist_ok=True)
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
        _sync_directory(path.parent)

    def _note_foreign_write(self, disk: VolumeFile) -> None:
        state = disk.load_state()
        number = state.generation + 1
        disk.save_state(replace(state, generation=number, written=number))

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

    def _state_path(self, name: str) -> Path:
        return self._directory / _STATE_DIR / f"{self._path(name).name}.json"


class VolumeFile(FileDisk):
    """A volume of a `FileStore`, open."""

    def __init__(
        self, store: FileStore, name: str, fd: int, *, size_bytes: int, read_only: bool
    ) -> None:
        super().__init__(fd, size_bytes=size_bytes, read_only=read_only)
        self._store = store
        self._name = name

    def load_state(self) -> VolumeState:
        return self._store.load_state(self._name)

    def save_state(self, state: VolumeState) -> None:
        self._store.save_state(self._name, state)

    def instance(self) -> str:
        """Changes with the host's boot and with every failed flush.

        Not with nbdkit's process: what it wrote is in the page cache and outlives it.
        """
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
        return str(uuid.uuid5(uuid.UUID(boot_id), str(self.load_state().losses)))

    def note_loss(self) -> None:
        state = self.load_state()
        self.save_state(replace(state, losses=state.losses + 1))


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
