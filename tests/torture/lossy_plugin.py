"""nbdkit's entry for a server that forgets: one write in so many is acknowledged and not done.

Nothing says so, not even a flush. A checker that does not find this finds nothing.
"""

import os

import nbdkit

API_VERSION = 2

_LOSES_ONE_OF = 40

_file = ""
_writes = 0


def config(key, value):
    global _file
    if key == "file":
        _file = value


def thread_model():
    return nbdkit.THREAD_MODEL_SERIALIZE_ALL_REQUESTS


def open(readonly):
    return os.open(_file, os.O_RDWR)


def close(fd):
    os.close(fd)


def get_size(fd):
    return os.stat(fd).st_size


def can_write(fd):
    return True


def can_flush(fd):
    return True


def flush(fd, flags):
    os.fdatasync(fd)


def pread(fd, buf, offset, flags):
    os.preadv(fd, [buf], offset)


def pwrite(fd, buf, offset, flags):
    global _writes
    _writes += 1
    if _writes % _LOSES_ONE_OF:
        os.pwrite(fd, buf, offset)
