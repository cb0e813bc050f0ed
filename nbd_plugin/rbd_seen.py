"""Whether another Ceph client could have written an RBD image since this plugin last had it open.

A writer of an image with the exclusive-lock feature holds that lock, and to take it or give it back
is a write to the image's header object, whose version RADOS counts. (Opening an image, reading it
and `rbd info` leave the version alone.) So the version that the header has after our own closing is
remembered, and compared before we lock the image again. It is kept as an attribute of the object
that leads from the image's name to its number: in the image's metadata, which are in the header,
remembering it would change it, and an object of our own would outlive the image.

After a kill there is no such version. But then the lock still belongs to the client that was ours
(`rbd_lock` leaves a note of it), unless another client has taken it away from the dead.

What goes unnoticed: a client that locks, writes and unlocks the image in the milliseconds between
our look and our lock. What looks like a change and is none: any lock, be it for a snapshot.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import rados

_ATTRIBUTE = "nbd_plugin.header"
_OPEN = b"open"

_CLOSING_S = 0.5
"""Between giving the lock back and remembering: a few milliseconds."""
_LOOK_EVERY_S = 0.01

OpenPool = Callable[[], rados.Ioctx]
"""A pool of one's own: RADOS tells a version for the last operation of a pool handle."""


class HeaderVersion:
    """Of one image. The methods raise what RADOS raises, and wait for it without a limit."""

    def __init__(self, open_pool: OpenPool, image: str) -> None:
        self._open_pool = open_pool
        self._name = f"rbd_id.{image}"

    def is_as_remembered(self) -> bool:
        """The header has the version that `remember` saw.

        A session that gave the image back a moment ago may be about to remember: wait for that.
        """
        pool = self._open_pool()
        try:
            try:
                remembered = pool.get_xattr(self._name, _ATTRIBUTE)
                deadline_s = time.monotonic() + _CLOSING_S
                while remembered == _OPEN and time.monotonic() < deadline_s:
                    time.sleep(_LOOK_EVERY_S)
                    remembered = pool.get_xattr(self._name, _ATTRIBUTE)
            except rados.NoData:
                return False
            return remembered == self._version(pool)
        finally:
            pool.close()

    def remember(self) -> None:
        """Remember the header as it is now; this plugin has no session with the image open."""
        pool = self._open_pool()
        try:
            pool.set_xattr(self._name, _ATTRIBUTE, self._version(pool))
        finally:
            pool.close()

    def forget(self) -> None:
        """The image is about to be written. Says by an error that we may not remember at all."""
        pool = self._open_pool()
        try:
            pool.set_xattr(self._name, _ATTRIBUTE, _OPEN)
        finally:
            pool.close()

    def _version(self, pool: rados.Ioctx) -> bytes:
        data = pool.read(self._name)
        number = data[4 : 4 + int.from_bytes(data[:4], "little")]
        pool.stat(f"rbd_header.{number.decode()}")
        return b"%s %d" % (number, pool.get_last_version())
