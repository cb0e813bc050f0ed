"""Giving a volume another size, whatever store it is in."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from nbd_plugin.errors import PluginError
from nbd_plugin.session import begin_generation
from nbd_plugin.store import Disk

_D = TypeVar("_D", bound=Disk)


@contextmanager
def resizing(disk: _D, name: str, size_bytes: int, *, shrink: bool) -> Iterator[_D]:
    """Within: make `disk`, just opened for writing as volume `name`, `size_bytes` long, durably.

    What the disk looks like afterwards is remembered, and the disk is closed. Raises PluginError
    before anything is changed: EROFS, or for a smaller size without `shrink`.
    """
    try:
        if disk.read_only:
            raise PluginError(f"volume {name} is read-only", errno.EROFS)
        if size_bytes < disk.size_bytes and not shrink:
            raise PluginError(
                f"volume {name} has {disk.size_bytes} bytes: making it smaller loses data"
            )
        # Growing changes nothing that a client has read of the volume.
        begin_generation(disk, writes=size_bytes < disk.size_bytes)
        yield disk
        disk.update_state(lambda state: replace(state, seen=disk.seen(writing=False)))
    finally:
        disk.close()
