"""What the plugin does, without nbdkit: settings to a store, export names to handles."""

from __future__ import annotations

import errno
import threading
from dataclasses import replace
from pathlib import Path

from nbd_plugin.errors import PluginError
from nbd_plugin.file_store import FileStore
from nbd_plugin.memory_store import MemoryStore
from nbd_plugin.names import ExportName, parse_export_name_untrusted
from nbd_plugin.session import Fence, Handle
from nbd_plugin.settings import Settings
from nbd_plugin.store import Disk, Store, VolumeInfo

MAX_LISTED = 10_000
"""nbdkit's own limit for an export list (NBD_OPT_LIST)."""


def make_store(settings: Settings) -> Store:
    """The store that checked settings ask for. Raises PluginError."""
    if settings.store == "file":
        if settings.dir:
            return FileStore(Path(settings.dir))
        path = Path(settings.file)
        return FileStore(path.parent, only=path.name)
    if settings.store == "rbd":
        # Late: the rbd store needs python3-rbd, the others need nothing.
        from nbd_plugin.rbd_store import RbdStore

        return RbdStore(settings)
    return MemoryStore()


class Service:
    """The exports of one nbdkit."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._store = make_store(settings)
        self._fences: dict[str, Fence] = {}
        self._lock = threading.Lock()

    def prepare(self) -> None:
        """Find out at start what would refuse every client later. Raises PluginError."""
        settings = self._settings
        if settings.store == "memory":
            self._store.create(settings.volume or "memory", settings.size_bytes or 0)
        elif settings.store == "rbd":
            self._store.check()
        elif settings.dir and settings.volume and settings.create == "on":
            if settings.volume not in [each.name for each in self._store.list_volumes()]:
                self._store.create(settings.volume, settings.size_bytes or 0)
        elif settings.file:
            self._prepare_file(Path(settings.file), settings.size_bytes)

    def start(self) -> None:
        self._store.start()

    def stop(self) -> None:
        self._store.stop()

    def default_export(self) -> str:
        return self._settings.volume or self._store.default_volume()

    def list_exports(self) -> list[tuple[str, str]]:
        """(name, description) of every volume."""
        volumes = self._store.list_volumes()[:MAX_LISTED]
        return [(volume.name, self._list_line(volume)) for volume in volumes]

    def open(self, export_name: str, *, read_only: bool) -> Handle:
        """Admit a connection. Raises PluginError: one line, for the operator and the client."""
        name = parse_export_name_untrusted(export_name)
        volume = name.volume or self.default_export()
        if not volume:
            raise PluginError("no export name, and no default volume", errno.ENOENT)
        name = replace(name, volume=volume)
        fence = self._settings.fence
        if read_only or name.read_only or (fence == "token" and name.session is None):
            return Handle(volume, self._open_disk(name, True, 0.0), None, None)
        if fence == "off":
            name = replace(name, session=None, connection=None)
        return self._fence(volume).enter(
            name,
            shared=fence == "off" or name.session is not None,
            timeout_s=self._settings.fence_timeout_s,
            open_disk=lambda timeout_s: self._open_disk(name, False, timeout_s),
        )

    def close(self, handle: Handle) -> None:
        """The connection is gone and its requests have ended."""
        if handle.session is None:
            handle.disk.close()
        else:
            handle.session.fence.leave(handle)

    def describe(self, handle: Handle) -> str:
        """The export's description, for people and for the bridge.

        `key=value` after the first word, separated by blanks; a reader skips keys that it does
        not know. See README.md for their meaning.
        """
        state = handle.disk.load_state()
        generation = handle.session.generation if handle.session else state.generation
        identity = f"identity={state.identity} " if state.identity else ""
        writer = f"writer={state.writer} " if state.writer else ""
        return (
            f"nbd-bridge volume={handle.volume} generation={generation} written={state.written} "
            f"{writer}{identity}instance={handle.disk.instance()} session=yes"
        )

    def _list_line(self, volume: VolumeInfo) -> str:
        mode = " read-only=yes" if volume.read_only else ""
        return f"nbd-bridge volume={volume.name} size={volume.size_bytes}{mode} session=yes"

    def _prepare_file(self, path: Path, size_bytes: int | None) -> None:
        name = self._store.default_volume()
        try:
            present = path.stat().st_size
        except FileNotFoundError:
            if size_bytes is None:
                raise PluginError(
                    f"file={path} does not exist; size= would create it", errno.ENOENT
                ) from None
            self._store.create(name, size_bytes)
            return
        if size_bytes is not None and present != size_bytes and path.is_file():
            raise PluginError(f"file={path} has {present} bytes, size={size_bytes} was asked for")

    def _open_disk(self, name: ExportName, read_only: bool, timeout_s: float) -> Disk:
        store = self._store
        try:
            return store.open(name.volume, read_only=read_only, timeout_s=timeout_s)
        except PluginError as error:
            size_bytes = self._settings.size_bytes
            creatable = self._settings.create == "on" and not read_only and "@" not in name.volume
            if error.errno != errno.ENOENT or not creatable or size_bytes is None:
                raise
        store.create(name.volume, size_bytes)
        return store.open(name.volume, read_only=read_only, timeout_s=timeout_s)

    def _fence(self, volume: str) -> Fence:
        """One fence per volume that was ever opened for writing.

        They stay: forgetting one while somebody waits in it would let two sessions in.
        """
        with self._lock:
            fence = self._fences.get(volume)
            if fence is None:
                fence = Fence(volume, takeover=self._settings.fence == "takeover")
                self._fences[volume] = fence
            return fence
