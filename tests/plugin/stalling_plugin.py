"""The plugin, with a write that gets stuck: nbdkit's entry for the fencing tests.

A write whose data begins with STALL waits, the first time, until the file in $STALL_GO exists; it
makes the file in $STALL_REACHED before.
"""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, os.environ["PLUGIN_DIRECTORY"])

import plugin as _plugin
from plugin import *  # noqa: F403

_stalled = False


class _Slow:
    """A disk that hangs where the medium would: inside the request."""

    def __init__(self, disk):
        self.__dict__["disk"] = disk

    def __getattr__(self, name):
        return getattr(self.disk, name)

    def pwrite(self, buf, offset, fua):
        global _stalled
        if not _stalled and bytes(buf[:5]) == b"STALL":
            _stalled = True
            Path(os.environ["STALL_REACHED"]).touch()
            while not os.path.exists(os.environ["STALL_GO"]):
                time.sleep(0.005)
        self.disk.pwrite(buf, offset, fua)


def open(readonly):
    handle = _plugin.open(readonly)
    handle.disk = _Slow(handle.disk)
    return handle
