"""A volume of a `FileStore` while it is open: a disk on a file, whose changes are noted."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from nbd_plugin import last_seen
from nbd_plugin.file_disk import FileDisk
from nbd_plugin.last_seen import Mark, read_mark
from nbd_plugin.store import ChangeState, VolumeState

if TYPE_CHECKING:
    from nbd_plugin.file_store import FileStore


class VolumeFile(FileDisk):
    """A volume of a `FileStore`, open."""

    def __init__(
        self, store: FileStore, name: str, fd: int, *, size_bytes: int, read_only: bool
    ) -> None:
        super().__init__(fd, size_bytes=size_bytes, read_only=read_only)
        self._store = store
        self._name = name
        self._mark: Mark | None = None

    # What changes the file is marked: `last_seen` tells why. `Session.note_write` comes first.

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        """See `Disk`."""
        mark = self._mark
        if mark is None:
            super().pwrite(buf, offset, fua)
            return
        mark.began()
        try:
            super().pwrite(buf, offset, fua)
        except OSError:
            mark.ended()
            mark.note_time(self._fd)
            raise
        mark.ended()

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """See `Disk`."""
        with self._marked():
            super().trim(offset, length, fua)

    def zero(self, offset: int, length: int, *, may_trim: bool, fua: bool, fast: bool) -> None:
        """See `Disk`."""
        with self._marked():
            super().zero(offset, length, may_trim=may_trim, fua=fua, fast=fast)

    @contextmanager
    def _marked(self) -> Iterator[None]:
        mark = self._mark
        if mark is None:
            yield
            return
        mark.began()
        try:
            yield
        finally:
            mark.ended()
            mark.note_time(self._fd)  # It may have changed nothing.

    def flush(self) -> None:
        """See `FileDisk.flush`. After a success the file's time is remembered exactly."""
        super().flush()
        if self._mark is not None:
            self._mark.note_time(self._fd)

    @property
    def state_lasts(self) -> bool:
        """See `Disk`."""
        return self._store.state_lasts(self._name)

    def load_state(self) -> VolumeState:
        """See `FileStore.load_state`."""
        return self._store.load_state(self._name)

    def update_state(self, change: ChangeState) -> VolumeState:
        """See `FileStore.update_state`."""
        return self._store.update_state(self._name, change)

    def was_changed(self, state: VolumeState) -> bool:
        """See `last_seen.has_changed`."""
        return last_seen.has_changed(state.seen, self._fd, lambda: read_mark(self._mark_path))

    def has_grown(self, state: VolumeState) -> bool:
        """See `last_seen.has_grown`."""
        return last_seen.has_grown(state.seen, self._fd)

    def seen(self, *, writing: bool) -> str:
        """See `Disk`. With `writing`, changes of a regular file are marked from here on."""
        if writing and self._mark is None and not stat.S_ISBLK(os.fstat(self._fd).st_mode):
            self._mark = Mark(self._mark_path)
        return last_seen.describe(self._fd, is_open=writing)

    @property
    def _mark_path(self) -> Path:
        return self._store.state_path(self._name).with_suffix(".mark")

    def instance(self) -> str:
        """Changes with the host's boot and with every failed flush.

        Not with nbdkit's process: what it wrote is in the page cache and outlives it. Unless
        failed flushes are remembered no longer than it lives.
        """
        try:
            losses = self.load_state().losses
        except PermissionError:
            return str(self._store.process)
        base = uuid.UUID(last_seen.boot_id()) if self.state_lasts else self._store.process
        return str(uuid.uuid5(base, str(losses)))

    def note_loss(self) -> None:
        """Count a failed flush, durably: `instance` is another from here on."""
        self.update_state(lambda state: replace(state, losses=state.losses + 1))

    def close(self) -> None:
        """See `Disk`."""
        if self._mark is not None:
            self._mark.close()
        super().close()
