"""What the plugin does, without nbdkit: settings to a store, export names to handles."""

from __future__ import annotations

import errno
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from nbd_plugin.errors import PluginError, one_line
from nbd_plugin.file_store import FileStore
from nbd_plugin.memory_store import MemoryStore
from nbd_plugin.names import ExportName, parse_export_name_untrusted
from nbd_plugin.session import Fence, Handle
from nbd_plugin.settings import Settings
from nbd_plugin.store import Disk, Store, VolumeInfo

MAX_LISTED = 10_000
"""nbdkit's own limit for an export list (NBD_OPT_LIST)."""

MAX_DESCRIPTION_CHARS = 1000

REFUSED = "refused: "
"""In a volume's line of the export list, before the reason why it was not opened, to the end."""

READ_ONLY = "read-only: "
"""In a volume's description, before the reason why it could not be opened for writing, to the
end."""

REFUSAL_KEPT_S = 60.0
_MAX_REFUSALS = 1000


def make_store(settings: Settings) -> Store:
    """The store that checked settings ask for. Raises PluginError."""
    if settings.store == "file":
        state_directory = Path(settings.state) if settings.state else None
        if settings.dir:
            return FileStore(Path(settings.dir), state_directory=state_directory)
        path = Path(settings.file)
        return FileStore(path.parent, only=path.name, state_directory=state_directory)
    if settings.store == "rbd":
        # Late: the rbd store needs python3-rbd, the others need nothing.
        from nbd_plugin.rbd_store import RbdStore

        return RbdStore(settings)
    return MemoryStore()


class Service:
    """The exports of one nbdkit."""

    def __init__(self, settings: Settings, *, is_filtered: bool = False) -> None:
        """`is_filtered`: what clients see may not be what the plugin does, see `filters`."""
        self._settings = settings
        self._is_filtered = is_filtered
        self._process = uuid.uuid4()
        self._store = make_store(settings)
        self._fences: dict[str, Fence] = {}
        self._refusals: dict[str, tuple[float, str]] = {}
        self._connections = 0
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
        """Connect to the store. Raises PluginError."""
        self._store.start()

    def stop(self) -> None:
        """Disconnect from the store."""
        self._store.stop()

    def default_export(self) -> str:
        """The volume of an export without a name; "" for none."""
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
        try:
            self._count_connection()
            try:
                handle = self._admit(replace(name, volume=volume), read_only=read_only)
            except BaseException:
                self._uncount_connection()
                raise
        except Exception as error:
            self._note_refusal(volume, error)
            raise
        if reason := handle.disk.why_read_only:
            self._refusals[volume] = (time.monotonic(), f"{READ_ONLY}{reason}")
            with suppress(OSError):  # its reader may be gone
                print(f"nbdkit: volume {volume} is served read-only: {reason}", file=sys.stderr)
        elif handle.session is not None:
            self._refusals.pop(volume, None)
        return handle

    def _count_connection(self) -> None:
        """Each connection may make nbdkit hold a request of 64 MiB, which it reads before it asks
        the plugin, and the reply to one: only a bound on their number bounds its memory."""
        limit = self._settings.max_connections
        with self._lock:
            if limit and self._connections >= limit:
                raise PluginError(
                    f"{self._connections} connections are open already (connections={limit})",
                    errno.EBUSY,
                )
            self._connections += 1

    def _uncount_connection(self) -> None:
        with self._lock:
            self._connections -= 1

    def _admit(self, name: ExportName, *, read_only: bool) -> Handle:
        volume = name.volume
        setting = self._settings.fence
        if read_only or name.read_only or (setting == "token" and name.session is None):
            return Handle(volume, self._open_disk(name, True, 0.0), None, None)
        if setting == "off":
            name = replace(name, session=None, connection=None)
        with self._fence(volume) as fence:
            return fence.enter(
                name,
                shared=setting == "off" or name.session is not None,
                timeout_s=self._settings.fence_timeout_s,
                open_disk=lambda timeout_s: self._open_disk(name, False, timeout_s),
            )

    def close(self, handle: Handle) -> None:
        """The connection is gone and its requests have ended."""
        self._uncount_connection()
        if handle.session is None:
            handle.disk.close()
        else:
            # The volume may have another fence by now: the session was broken, and the one that
            # replaced it has ended, while this connection was still there.
            with self._fence(handle.volume):
                handle.session.fence.leave(handle)

    def describe(self, handle: Handle) -> str:
        """The export's description, for people and for the bridge.

        `key=value` after the first word, separated by blanks; a reader skips keys that it does
        not know. See README.md for their meaning.

        With a filter that may hold data nothing is known of what the client sees: its writes may
        come to the plugin late, out of order, never, or after others have begun to write. What is
        left to say is that things may be lost with this process.
        """
        instance = handle.disk.instance()
        if self._is_filtered:
            text = (
                f"nbd-bridge volume={handle.volume} instance={uuid.uuid5(self._process, instance)}"
            )
        else:
            counters = _counters(handle)
            text = f"nbd-bridge volume={handle.volume} {counters}instance={instance} session=yes"
        if why := handle.disk.why_read_only:
            text += f" {READ_ONLY}{why}"
        return text[:MAX_DESCRIPTION_CHARS]

    def _list_line(self, volume: VolumeInfo) -> str:
        mode = " read-only=yes" if volume.read_only else ""
        session = "" if self._is_filtered else " session=yes"
        line = f"nbd-bridge volume={volume.name} size={volume.size_bytes}{mode}{session}"
        noted_s, reason = self._refusals.get(volume.name, (0.0, ""))
        if reason and time.monotonic() - noted_s < REFUSAL_KEPT_S:
            line += f" {REFUSED}{reason}"
        return line[:MAX_DESCRIPTION_CHARS]

    def _note_refusal(self, volume: str, error: Exception) -> None:
        """Keep the reason for the next client that lists the exports: nbdkit before 1.42 does not
        tell the client that is refused. Nothing is kept of volumes that do not exist."""
        if getattr(error, "errno", None) == errno.ENOENT:
            return
        while len(self._refusals) >= _MAX_REFUSALS:
            self._refusals.pop(next(iter(self._refusals)), None)
        self._refusals[volume] = (time.monotonic(), one_line(error))

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
        if path.is_dir():
            raise PluginError(f"file={path} is a directory: dir= serves the files in it")
        if not (path.is_file() or path.is_block_device()):
            raise PluginError(f"file={path} is neither a file nor a block device")
        if not os.access(path, os.R_OK, effective_ids=True):
            raise PluginError(f"file={path}: user {os.geteuid()} may not read it", errno.EACCES)
        if size_bytes is not None and present != size_bytes and path.is_file():
            raise PluginError(f"file={path} has {present} bytes, but size={size_bytes} is given")

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

    @contextmanager
    def _fence(self, volume: str) -> Iterator[Fence]:
        """The volume's one fence, to be used within. It is forgotten when it is unused and
        has no session: a client may ask for any number of names."""
        with self._lock:
            fence = self._fences.get(volume)
            if fence is None:
                fence = Fence(volume, takeover=self._settings.fence == "takeover")
                self._fences[volume] = fence
            fence.users += 1
        try:
            yield fence
        finally:
            with self._lock:
                fence.users -= 1
                if not fence.users and fence.is_empty:
                    del self._fences[volume]


def _counters(handle: Handle) -> str:
    """What holds of the volume's contents: nothing if that is not remembered; nothing for a reader
    while a session writes the volume, or after it was changed past the plugin."""
    disk = handle.disk
    try:
        state = disk.load_state()
    except PermissionError:
        return ""
    if not disk.state_lasts:
        return ""
    if handle.session is None and (state.is_open or disk.was_changed(state)):
        return ""
    generation = handle.session.generation if handle.session else state.generation
    identity = f"identity={state.identity} " if state.identity else ""
    grown = f"grown_from={state.grown_from} " if state.only_grew else ""
    writer = f"writer={state.writer} " if state.writer else ""
    return f"generation={generation} written={state.written} {grown}{writer}{identity}"
