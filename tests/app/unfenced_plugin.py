"""nbdkit's entry for a server without a fence, on the file `disk` in the folder `folder=`.

A write whose data begins with STALL waits, the first time, until the file `go` exists; it makes
the file `reached` before, and the file `done` when it was executed.
"""

import os
import time

import nbdkit

API_VERSION = 2

_folder = ""
_stalled = False


def config(key, value):
    global _folder
    if key == "folder":
        _folder = value


def thread_model():
    return nbdkit.THREAD_MODEL_PARALLEL


def open(readonly):
    return os.open(_path("disk"), os.O_RDWR)


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
    global _stalled
    stalls = not _stalled and bytes(buf[:5]) == b"STALL"
    if stalls:
        _stalled = True
        _touch("reached")
        while not os.path.exists(_path("go")):
            time.sleep(0.005)
    os.pwrite(fd, buf, offset)
    if stalls:
        _touch("done")


def _path(name):
    return os.path.join(_folder, name)


def _touch(name):
    os.close(os.open(_path(name), os.O_CREAT | os.O_WRONLY))
