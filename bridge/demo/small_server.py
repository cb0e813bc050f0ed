"""The bridge's own small NBD server on a sparse file, for machines without nbdkit.

python -m bridge.demo.small_server IMAGE SIZE_BYTES SOCKET
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

import trio

from bridge.peers.nbd_server import Server
from bridge.peers.nbd_server_disk import FileDisk

_KEEP_SIZE = 1
_PUNCH_HOLE = 2


class SparseFileDisk(FileDisk):
    """A file in which discarded ranges become holes."""

    def __init__(self, path: str) -> None:
        """Raises OSError when the file cannot be opened for reading and writing."""
        super().__init__(path)
        self._punch_fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        libc = ctypes.CDLL(None, use_errno=True)
        self._fallocate = libc.fallocate64
        self._fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)

    def zero(self, offset: int, length: int, *, may_unmap: bool) -> None:
        """Punch a hole if the client and the file system allow it, else write zeroes."""
        mode = _PUNCH_HOLE | _KEEP_SIZE
        if not may_unmap or self._fallocate(self._punch_fd, mode, offset, length):
            super().zero(offset, length, may_unmap=may_unmap)


async def serve(image: str, size_bytes: int, socket: str) -> None:
    """Serve the file `image`, made `size_bytes` long, until SIGTERM."""
    server = Server({"": _make_disk(image, size_bytes)})
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.serve_unix, socket)
            async for _ in signals:
                nursery.cancel_scope.cancel()


def _make_disk(image: str, size_bytes: int) -> SparseFileDisk:
    with open(image, "ab") as file:
        file.truncate(size_bytes)
    return SparseFileDisk(image)


if __name__ == "__main__":
    trio.run(serve, sys.argv[1], int(sys.argv[2]), sys.argv[3])
