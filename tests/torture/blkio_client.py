"""`python3 -m tests.torture.blkio_client FD SOCKET DISK QUEUES`: makes requests with libblkio.

It runs among the newer peers, with nothing but Python's library: see tests/torture/clients.py for
what it is told over the socket FD.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
import time
from itertools import groupby

from bridge.units import SECTOR_BYTES
from tests.torture.content import numbers_of, sectors_of

_LIB = ctypes.CDLL("libblkio.so.1")
_SLOT_BYTES = 1 << 17
_SLOTS = 32
_NO_UNMAP = 2
_CONNECT_AGAIN_S = 0.05


class _Region(ctypes.Structure):
    """struct blkio_mem_region"""

    _fields_ = (
        ("address", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("iova", ctypes.c_uint64),
        ("fd_offset", ctypes.c_int64),
        ("fd", ctypes.c_int),
        ("flags", ctypes.c_uint32),
    )


class _Completion(ctypes.Structure):
    """struct blkio_completion"""

    _fields_ = (
        ("user_data", ctypes.c_void_p),
        ("error_message", ctypes.c_char_p),
        ("status", ctypes.c_int),
        ("reserved", ctypes.c_uint8 * 12),
    )


_LIB.blkio_get_error_msg.restype = ctypes.c_char_p
_LIB.blkio_get_queue.restype = ctypes.c_void_p
_U64, _POINTER = ctypes.c_uint64, ctypes.c_void_p
_LIB.blkioq_read.argtypes = (_POINTER, _U64, _POINTER, ctypes.c_size_t, _POINTER, ctypes.c_uint32)
_LIB.blkioq_write.argtypes = _LIB.blkioq_read.argtypes
_LIB.blkioq_write_zeroes.argtypes = (_POINTER, _U64, _U64, _POINTER, ctypes.c_uint32)
_LIB.blkioq_discard.argtypes = _LIB.blkioq_write_zeroes.argtypes
_LIB.blkioq_flush.argtypes = (_POINTER, _POINTER, ctypes.c_uint32)
_LIB.blkioq_get_completion_fd.argtypes = (_POINTER,)
_LIB.blkioq_set_completion_fd_enabled.argtypes = (_POINTER, ctypes.c_bool)
_LIB.blkioq_do_io.argtypes = (_POINTER, _POINTER, ctypes.c_int, ctypes.c_int, _POINTER)


class BlkioError(Exception):
    """libblkio refused something; its own words."""


def _must(status: int) -> None:
    if status:
        raise BlkioError(_LIB.blkio_get_error_msg().decode())


def connected(socket: str, queues: int) -> ctypes.c_void_p:
    """A started blkio instance. Raises BlkioError."""
    blkio = ctypes.c_void_p()
    _must(_LIB.blkio_create(b"virtio-blk-vhost-user", ctypes.byref(blkio)))
    try:
        _must(_LIB.blkio_set_str(blkio, b"path", socket.encode()))
        _must(_LIB.blkio_connect(blkio))
        _must(_LIB.blkio_set_int(blkio, b"num-queues", queues))
        _must(_LIB.blkio_start(blkio))
    except BlkioError:
        _LIB.blkio_destroy(ctypes.byref(blkio))
        raise
    return blkio


def can_discard(blkio: ctypes.c_void_p) -> bool:
    """The disk has discards. Raises BlkioError."""
    longest = ctypes.c_uint64()
    _must(_LIB.blkio_get_uint64(blkio, b"max-discard-len", ctypes.byref(longest)))
    return longest.value > 0


class Requests:
    """Requests in flight; each has a slot of the memory that is shared with the bridge."""

    def __init__(self, blkio: ctypes.c_void_p, disk: int, queues: int) -> None:
        self._disk = disk
        self._region = _Region()
        _must(_LIB.blkio_alloc_mem_region(blkio, ctypes.byref(self._region), _SLOTS * _SLOT_BYTES))
        _must(_LIB.blkio_map_mem_region(blkio, ctypes.byref(self._region)))
        self._queues = [ctypes.c_void_p(_LIB.blkio_get_queue(blkio, n)) for n in range(queues)]
        self._free = list(range(_SLOTS))
        self._in_flight: dict[int, tuple[str, str, int, int]] = {}
        """Slot → id, kind, first sector, count."""
        self._submitted = 0
        self.fds = []
        for queue in self._queues:
            _LIB.blkioq_set_completion_fd_enabled(queue, True)
            self.fds.append(_LIB.blkioq_get_completion_fd(queue))

    def submit(self, line: str) -> None:
        """Make a request of a line."""
        identity, kind, *numbers = line.split()
        first, count, number = map(int, numbers)
        start, length = first * SECTOR_BYTES, count * SECTOR_BYTES
        slot = self._free.pop()
        self._in_flight[slot] = identity, kind, first, count
        self._submitted += 1
        queue = self._queues[self._submitted % len(self._queues)]
        buffer = self._address(slot)
        # The number of a slot is a pointer, and none of them is NULL.
        if kind == "r":
            _LIB.blkioq_read(queue, start, buffer, length, slot + 1, 0)
        elif kind == "w":
            ctypes.memmove(buffer, sectors_of(self._disk, first, count, number), length)
            _LIB.blkioq_write(queue, start, buffer, length, slot + 1, 0)
        elif kind in "zu":
            flags = _NO_UNMAP if kind == "z" else 0
            _LIB.blkioq_write_zeroes(queue, start, length, slot + 1, flags)
        elif kind == "d":
            _LIB.blkioq_discard(queue, start, length, slot + 1, 0)
        else:
            _LIB.blkioq_flush(queue, slot + 1, 0)

    def _address(self, slot: int) -> int:
        return int(self._region.address) + slot * _SLOT_BYTES

    def completed(self) -> list[str]:
        """Submit what is new, and the answers to what is complete."""
        found = []
        done = (_Completion * _SLOTS)()
        for queue in self._queues:
            count = _LIB.blkioq_do_io(queue, done, 0, _SLOTS, None)
            if count < 0:
                raise BlkioError(_LIB.blkio_get_error_msg().decode())
            found += [self._answer(each.user_data - 1, -each.status) for each in done[:count]]
        return found

    def _answer(self, slot: int, errno: int) -> str:
        identity, kind, first, count = self._in_flight.pop(slot)
        self._free.append(slot)
        words = [identity, str(errno)]
        if kind == "r" and not errno:
            data = ctypes.string_at(self._address(slot), count * SECTOR_BYTES)
            groups = groupby(numbers_of(self._disk, first, data))
            words += [f"{number}*{len(list(group))}" for number, group in groups]
        return " ".join(words) + "\n"


def serve(fd: int, requests: Requests) -> None:
    """Until the socket `fd` ends."""
    poll = select.poll()
    for each in (fd, *requests.fds):
        poll.register(each, select.POLLIN)
    buffer = b""
    while True:
        for ready, _ in poll.poll():
            data = os.read(ready, 65536)
            if ready != fd:
                continue
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                requests.submit(line.decode())
        for answer in requests.completed():
            os.write(fd, answer.encode())


def main() -> None:
    """Connect as soon as a bridge listens."""
    fd, socket, disk, queues = int(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    while True:
        try:
            blkio = connected(socket, queues)
        except BlkioError:
            time.sleep(_CONNECT_AGAIN_S)
        else:
            break
    requests = Requests(blkio, disk, queues)
    os.write(fd, f"ready {int(can_discard(blkio))}\n".encode())
    serve(fd, requests)


if __name__ == "__main__":
    main()
