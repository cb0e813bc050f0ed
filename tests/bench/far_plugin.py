"""nbdkit plugin: memory, a round trip away. Every command takes a millisecond more.

nbdkit's own delay filter delays reads and writes, but no flush, which a network does as well.
"""

import time

API_VERSION = 2

_settings = {"size": "256M", "delay": "0.001"}


def config(key, value):
    _settings[key] = value


def thread_model():
    import nbdkit

    return nbdkit.THREAD_MODEL_PARALLEL


def get_ready():
    import nbdkit

    global _disk, _delay_s
    _disk = bytearray(nbdkit.parse_size(_settings["size"]))
    _delay_s = float(_settings["delay"])


def open(readonly):
    return 1


def get_size(handle):
    return len(_disk)


def can_multi_conn(handle):
    return True


def can_fua(handle):
    import nbdkit

    return nbdkit.FUA_NATIVE


def pread(handle, buffer, offset, flags):
    time.sleep(_delay_s)
    buffer[:] = memoryview(_disk)[offset : offset + len(buffer)]


def pwrite(handle, buffer, offset, flags):
    time.sleep(_delay_s)
    _disk[offset : offset + len(buffer)] = buffer


def flush(handle, flags):
    time.sleep(_delay_s)


def trim(handle, count, offset, flags):
    time.sleep(_delay_s)


def zero(handle, count, offset, flags):
    time.sleep(_delay_s)
    _disk[offset : offset + count] = bytes(count)
