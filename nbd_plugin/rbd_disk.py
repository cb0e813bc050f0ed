"""A disk that is a Ceph RBD image.

One blocking librbd call per request: nbdkit gives each request of a connection a thread of its own
(`-t`, 16 unless told otherwise), so that many are in flight. librbd is asynchronous inside; its
aio_… calls with a Python callback were measured too, and brought nothing to a thread that has to
wait anyway.
"""

from __future__ import annotations

import errno
import json
import threading
from collections.abc import Callable
from dataclasses import asdict

import rbd

from nbd_plugin.errors import NotSupported, PluginError
from nbd_plugin.store import (
    EXTENT_HOLE,
    EXTENT_ZERO,
    MAX_PAYLOAD_BYTES,
    ChangeState,
    Extents,
    VolumeState,
)
from nbd_plugin.volume_state import parse_state

STATE_KEY = "nbd_plugin"
"""The image-metadata key (`rbd image-meta get IMAGE nbd_plugin`) of the remembered state."""

_MAX_DISCARD_BYTES = 1 << 30
"""librbd refuses discards and zeroes of 2 GiB and more."""

_MAX_EXTENTS_RANGE_BYTES = 4 << 30
"""An answer looks at this much of the image: about 70 ms, and a short answer is allowed."""

_MAX_CACHE_BYTES = 16 << 20
_CACHE_STEP_BYTES = 4 << 20

_HOLE = EXTENT_HOLE | EXTENT_ZERO

_HEADER = "header"
"""In what is remembered: `is_untouched` can be asked."""


class RbdDisk:
    """An open image. Shared by all connections of a session: the exclusive lock belongs to the
    open image, and would wander between two of them."""

    state_lasts = True

    def __init__(
        self,
        image: rbd.Image,
        *,
        read_only: bool,
        instance: str,
        on_loss: Callable[[], object],
        is_untouched: Callable[[], bool],
        on_closed: Callable[[], object] | None = None,
    ) -> None:
        """`is_untouched`: only the plugin can have written the image since it last had it.
        `on_closed` remembers what that is asked of; None where that cannot be done."""
        self.image = image
        self._is_untouched = is_untouched
        self._on_closed = on_closed
        self._instance = instance
        self._on_loss = on_loss
        self._state_lock = threading.Lock()
        self.failed = False
        self.why_read_only = ""
        self.read_only = read_only
        self.size_bytes = image.size()
        object_bytes = image.stat()["obj_size"]
        preferred = min(max(object_bytes, 512), MAX_PAYLOAD_BYTES)  # 512: NBD's limit
        self.block_sizes = (1, preferred, MAX_PAYLOAD_BYTES)

    def pread(self, buf: memoryview, offset: int) -> None:
        """See `Disk`. Raises PluginError (EIO) when the image ends inside the volume, rbd.Error."""
        data = self.image.read(offset, len(buf))
        if len(data) != len(buf):
            raise PluginError(f"the image ends at {offset + len(data)}, inside the volume")
        buf[:] = data

    def pwrite(self, buf: memoryview, offset: int, fua: bool) -> None:
        """See `Disk`. Raises rbd.Error, and PluginError as `flush` does."""
        self.image.write(bytes(buf), offset)
        if fua:
            self.flush()

    def flush(self) -> None:
        """Write out librbd's cache. After a failure the disk has to be opened anew, see `Disk`.

        Raises rbd.Error, and PluginError (ESHUTDOWN) after a failure.
        """
        if self.failed:
            raise PluginError("an earlier flush failed: written data may be lost", errno.ESHUTDOWN)
        try:
            self.image.flush()
        except Exception:
            self.failed = True
            self._on_loss()
            raise

    def trim(self, offset: int, length: int, fua: bool) -> None:
        """See `Disk`. In pieces of at most 1 GiB, as librbd takes them."""
        for begin, count in _pieces(offset, length):
            self.image.discard(begin, count)
        if fua:
            self.flush()

    def zero(self, offset: int, length: int, *, may_trim: bool, fua: bool, fast: bool) -> None:
        """See `Disk`. Raises NotSupported if librbd would write zeroes where `fast` was asked."""
        if fast and not may_trim:
            raise NotSupported()  # librbd would write zeroes
        flags = 0 if may_trim else rbd.RBD_WRITE_ZEROES_FLAG_THICK_PROVISION
        for begin, count in _pieces(offset, length):
            self.image.write_zeroes(begin, count, flags)
        if fua:
            self.flush()

    def extents(self, offset: int, length: int, req_one: bool) -> Extents:
        """See `Disk`: librbd's diff_iterate, over a bounded part of the range."""
        end = offset + min(length, _MAX_EXTENTS_RANGE_BYTES)
        found: Extents = []

        def add(begin: int, count: int, exists: bool) -> None:
            position = found[-1][0] + found[-1][1] if found else offset
            if begin > position:
                found.append((position, begin - position, _HOLE))
            found.append((begin, count, 0 if exists else _HOLE))

        self.image.diff_iterate(offset, end - offset, None, add)
        position = found[-1][0] + found[-1][1] if found else offset
        if position < end:
            found.append((position, end - position, _HOLE))
        return found[:1] if req_one else found

    def cache(self, offset: int, length: int) -> None:
        """See `Disk`: reads the range, up to a bound, and forgets it."""
        end = offset + min(length, _MAX_CACHE_BYTES)
        for begin in range(offset, end, _CACHE_STEP_BYTES):
            self.image.read(begin, min(_CACHE_STEP_BYTES, end - begin))

    def load_state(self) -> VolumeState:
        """See `load_state`."""
        return load_state(self.image)

    def update_state(self, change: ChangeState) -> VolumeState:
        """See `Disk`. Stored in the image's metadata; the caller holds the image's lock."""
        # The caller holds the image's exclusive lock, so no other process does.
        with self._state_lock:
            state = change(self.load_state())
            self.image.metadata_set(STATE_KEY, json.dumps(asdict(state)))
            return state

    def was_changed(self, state: VolumeState) -> bool:
        """Another image has the name (copied with its metadata), it was made smaller, or another
        Ceph client had its lock."""
        if not state.seen:
            return False
        _, number, size_text, *rest = state.seen.split(" ")
        if number != self.image.id() or self.image.size() < int(size_text):
            return True
        return rest == [_HEADER] and not self._is_untouched()

    def has_grown(self, state: VolumeState) -> bool:
        """Never: growing does not make `was_changed` true here."""
        return False

    def seen(self, *, writing: bool) -> str:
        """See `Disk`: open or closed, the image's id and size in bytes, whether its header is
        looked at."""
        words = ["open" if writing else "closed", self.image.id(), str(self.image.size())]
        return " ".join(words if self._on_closed is None else [*words, _HEADER])

    def instance(self) -> str:
        """Changes with the process, and with a failed flush: librbd's cache is in memory."""
        return self._instance

    def close(self) -> None:
        """Write out the cache, give the lock back."""
        try:
            self.image.close()
        except Exception:
            self._on_loss()
            raise
        if self._on_closed is not None:
            self._on_closed()


def load_state(image: rbd.Image) -> VolumeState:
    """The remembered state of an image. Raises PluginError when it is damaged."""
    try:
        text = image.metadata_get(STATE_KEY)
    except KeyError:
        return VolumeState()
    try:
        return parse_state(text.encode())
    except ValueError:
        raise PluginError(f"the image's metadata {STATE_KEY} is damaged", errno.EIO) from None


def _pieces(offset: int, length: int) -> list[tuple[int, int]]:
    """The range in pieces that librbd takes, cut at whole GiB so that objects stay whole."""
    pieces = []
    end = offset + length
    while offset < end:
        stop = min(end, (offset // _MAX_DISCARD_BYTES + 1) * _MAX_DISCARD_BYTES)
        pieces.append((offset, stop - offset))
        offset = stop
    return pieces
