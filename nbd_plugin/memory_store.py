"""Volumes in memory, gone with the process: for trying things out, tests and benchmarks."""

from __future__ import annotations

import errno
import os
import threading
import uuid
from dataclasses import replace

from nbd_plugin import names
from nbd_plugin.errors import PluginError
from nbd_plugin.file_disk import FileDisk
from nbd_plugin.store import ChangeState, VolumeInfo, VolumeState


class _Volume:
    def __init__(self, size_bytes: int, read_only: bool) -> None:
        self.fd = os.memfd_create("nbd-volume", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, size_bytes)
        self.state = VolumeState(read_only=read_only)
        self.lock = threading.Lock()


class MemoryStore:
    """Volumes in memory. Each is an unnamed sparse file of the kernel's (a memfd)."""

    name = "memory"

    def __init__(self) -> None:
        self._volumes: dict[str, _Volume] = {}
        self._lock = threading.Lock()
        self._instance = uuid.uuid4()

    def check(self) -> None:
        """Nothing can fail."""

    def start(self) -> None:
        """Nothing to connect to."""

    def stop(self) -> None:
        """Nothing to disconnect from."""

    def default_volume(self) -> str:
        """See `Store`: the only volume."""
        return next(iter(self._volumes)) if len(self._volumes) == 1 else ""

    def list_volumes(self) -> list[VolumeInfo]:
        """See `Store`."""
        found = []
        for name, volume in sorted(self._volumes.items()):
            info = os.fstat(volume.fd)
            found.append(
                VolumeInfo(name, info.st_size, info.st_blocks * 512, volume.state.read_only)
            )
        return found

    def open(self, name: str, *, read_only: bool, timeout_s: float) -> MemoryDisk:
        """See `Store`. Raises PluginError (ENOENT)."""
        volume = self._find(name)
        fd = os.dup(volume.fd)
        return MemoryDisk(
            volume,
            fd,
            self._instance,
            size_bytes=os.fstat(fd).st_size,
            read_only=read_only or volume.state.read_only,
        )

    def create(self, name: str, size_bytes: int, *, read_only: bool = False) -> None:
        """See `Store`. Raises PluginError (EEXIST)."""
        names.check_volume_name(name, snapshots=False)
        with self._lock:
            if name in self._volumes:
                raise PluginError(f"volume {name} exists already", errno.EEXIST)
            self._volumes[name] = _Volume(size_bytes, read_only)

    def resize(self, name: str, size_bytes: int, *, shrink: bool = False) -> None:
        """See `Store`. Raises PluginError (ENOENT; smaller without `shrink`)."""
        volume = self._find(name)
        if size_bytes < os.fstat(volume.fd).st_size and not shrink:
            raise PluginError(f"volume {name} is larger: making it smaller loses data")
        os.ftruncate(volume.fd, size_bytes)

    def remove(self, name: str) -> None:
        """See `Store`. Open disks keep their bytes. Raises PluginError (ENOENT)."""
        with self._lock:
            os.close(self._find(name).fd)
            del self._volumes[name]

    def snapshot(self, name: str, snapshot: str) -> None:
        """There are none. Raises PluginError (EOPNOTSUPP)."""
        raise PluginError("the memory store has no snapshots", errno.EOPNOTSUPP)

    def _find(self, name: str) -> _Volume:
        try:
            return self._volumes[name]
        except KeyError:
            raise PluginError(f"volume {name} does not exist", errno.ENOENT) from None


class MemoryDisk(FileDisk):
    """A volume of a `MemoryStore`, open."""

    state_lasts = True  # as long as the volume does

    def __init__(
        self, volume: _Volume, fd: int, instance: uuid.UUID, *, size_bytes: int, read_only: bool
    ) -> None:
        super().__init__(fd, size_bytes=size_bytes, read_only=read_only)
        self._volume = volume
        self._instance = instance

    def load_state(self) -> VolumeState:
        """See `Disk`."""
        return self._volume.state

    def update_state(self, change: ChangeState) -> VolumeState:
        """See `Disk`."""
        with self._volume.lock:
            self._volume.state = change(self._volume.state)
            return self._volume.state

    def was_changed(self, state: VolumeState) -> bool:
        """Never: only this process can reach the memory."""
        return False

    def has_grown(self, state: VolumeState) -> bool:
        """Never: see `was_changed`."""
        return False

    def seen(self, *, writing: bool) -> str:
        """Nothing, since nothing can be different."""
        return ""

    def note_loss(self) -> None:
        """Count a failed flush: `instance` is another from here on."""
        self.update_state(lambda state: replace(state, losses=state.losses + 1))

    def instance(self) -> str:
        """Changes with the process: everything is gone with it. And with a failed flush."""
        return str(uuid.uuid5(self._instance, str(self.load_state().losses)))
