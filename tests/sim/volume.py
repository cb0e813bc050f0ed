"""A volume of our plugin over a `Medium`: what `nbd_plugin.file_store` is over a file.

`nbd_plugin` runs in threads that wait for one another. Here nothing waits: `seam` gives its session
code a clock, and a condition whose `wait` raises `Waits`; the server makes the same call again when
something has changed. That is sound: nothing is half done where the fence waits.
"""

from __future__ import annotations

import errno
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from unittest import mock

import trio

from nbd_plugin.errors import PluginError
from nbd_plugin.file_disk import FileDisk
from nbd_plugin.store import ChangeState, VolumeInfo, VolumeState
from tests.sim.medium import SECTOR, Medium, numbers_of

if TYPE_CHECKING:
    from tests.sim.server import NbdServer
    from tests.sim.world import World

_server: NbdServer | None = None
_expired = False
_LONG_S = 1e6
_skipped_s = 0.0
"""How much later than it is the present call believes that it is."""


class Waits(BaseException):
    """The call waits for something; it is made again after `seconds` at the latest."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


@contextmanager
def seam(server: NbdServer, *, expired: bool = False) -> Iterator[None]:
    """Calls of `nbd_plugin` are of `server`'s process. `expired`: their time to wait is over."""
    global _server, _expired, _skipped_s
    before = _server, _expired, _skipped_s
    _server, _expired, _skipped_s = server, expired, 0.0
    try:
        yield
    finally:
        _server, _expired, _skipped_s = before


class _Condition:
    """threading.Condition, in a process whose threads are played one after the other."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None

    def wait(self, timeout: float) -> bool:
        if timeout <= 0 or _expired:
            return False
        raise Waits(timeout)

    def notify_all(self) -> None:
        """The server looks at what waits after each call anyway."""


class _Threading:
    Condition = _Condition
    Lock = _Condition


class _Time:
    @staticmethod
    def monotonic() -> float:
        return trio.current_time() + _skipped_s

    @staticmethod
    def sleep(seconds: float) -> None:
        global _skipped_s
        if not _expired:
            raise Waits(seconds)
        # The call, made again, has a new deadline: this ends its loop.
        _skipped_s += _LONG_S


def patches() -> list[Any]:
    """What makes `nbd_plugin` run here."""
    return [
        mock.patch("nbd_plugin.session.threading", _Threading),
        mock.patch("nbd_plugin.session.time", _Time),
        mock.patch("nbd_plugin.service.threading", _Threading),
        mock.patch("nbd_plugin.service.time", _Time),
        mock.patch("nbd_plugin.service.make_store", _make_store),
    ]


def _make_store(settings: object) -> SimStore:
    return SimStore()


class Volume:
    """What outlives the server's process: the state on the medium, and which boot this is."""

    def __init__(self) -> None:
        self.state = VolumeState()
        self.boot = 1
        self.outside_changes = 0
        self.writer: object = None
        """The process that has it open for writing: flock(2)."""


class SimStore:
    """The store of one nbdkit: one volume, `vm`."""

    name = "sim"

    def __init__(self) -> None:
        assert _server is not None
        self._server = _server
        self.world: World = _server.world

    def start(self) -> None:
        pass

    def stop(self) -> None:
        pass

    def default_volume(self) -> str:
        return "vm"

    def list_volumes(self) -> list[VolumeInfo]:
        return [VolumeInfo("vm", self.world.medium.sectors * SECTOR, None, False)]

    def open(self, name: str, *, read_only: bool, timeout_s: float) -> SimDisk:
        if name != "vm":
            raise PluginError(f"volume {name} does not exist", errno.ENOENT)
        return SimDisk(self.world, read_only=read_only)


class SimDisk(FileDisk):
    """The volume, open. What a failed flush means is `FileDisk`'s."""

    def __init__(self, world: World, *, read_only: bool) -> None:
        self._world = world
        self._volume = world.volume
        self._medium: Medium = world.medium
        self.failed = False
        self.why_read_only = ""
        self.size_bytes = self._medium.sectors * SECTOR
        self.read_only = read_only
        self.block_sizes = (world.config.min_block, 4096, 1 << 20)

    def pread(self, buf: memoryview, offset: int) -> None:
        buf[:] = self._medium.read(offset // SECTOR, len(buf) // SECTOR)

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        if fua:
            self._write_through(buf, offset)
        else:
            self.store(buf, offset)

    def store(self, buf: memoryview, offset: int, *, fua: bool = False) -> int:
        for content in self._medium.write(offset // SECTOR, numbers_of(buf), fua=fua):
            content.answered = True
        return len(buf)

    def write_durably(self, piece: memoryview, offset: int) -> int:
        if self._world.fsync_fails():
            self.store(piece, offset)
            self._world.fsync_failed()
            raise OSError(errno.EIO, "flush failed")
        return self.store(piece, offset, fua=True)

    def _takes(self, piece: memoryview, offset: int) -> bool:
        return self.store(piece, offset) > 0

    def sync(self) -> None:
        if self._world.fsync_fails():
            self._world.fsync_failed()
            raise OSError(errno.EIO, "flush failed")
        self._medium.end_flush(self._medium.begin_flush(answered_only=False))

    def trim(self, offset: int, length: int, fua: bool) -> None:
        self.store(memoryview(bytes(length)), offset)
        if fua:
            self.flush()

    def zero(self, offset: int, length: int, *, may_trim: bool, fua: bool, fast: bool) -> None:
        self.trim(offset, length, fua)

    def close(self) -> None:
        pass

    # What is remembered.

    @property
    def state_lasts(self) -> bool:
        return True

    def load_state(self) -> VolumeState:
        return self._volume.state

    def update_state(self, change: ChangeState) -> VolumeState:
        self._volume.state = change(self._volume.state)
        return self._volume.state

    def note_loss(self) -> None:
        self.update_state(lambda state: replace(state, losses=state.losses + 1))

    def instance(self) -> str:
        return str(uuid.uuid5(uuid.UUID(int=self._volume.boot), str(self.load_state().losses)))

    def seen(self, *, writing: bool) -> str:
        word = "open" if writing else "closed"
        return f"{word} {self._volume.outside_changes} {self._medium.sectors}"

    def was_changed(self, state: VolumeState) -> bool:
        return (
            bool(state.seen) and state.seen.split(" ")[1:] != self.seen(writing=False).split()[1:]
        )

    def has_grown(self, state: VolumeState) -> bool:
        return bool(state.seen) and int(state.seen.split(" ")[2]) < self._medium.sectors
