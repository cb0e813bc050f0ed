"""Tells the operator, once, that the front-end does not share the guest's memory.

That is a common mistake. QEMU without `share=on` sends no memory at all, so that the first ring is
at an unknown address. Or it sends a file that it has mapped privately: then the guest and the
bridge look at different pages, and no error shows it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from itertools import count
from struct import Struct

import structlog

from bridge.errors import NoMemory
from bridge.guest.vhost_user.messages import RegionPayload

log = structlog.get_logger(__name__)

_PEER = Struct("3i")
"""`struct ucred`: process, user, group."""
_LOOKS_MAX = 8
"""Regions of one front-end that are checked: each check reads the list of all its mappings."""


class UnsharedMemory:
    """Checks whether the front-ends of one back-end share their memory; logs an error once."""

    def __init__(self) -> None:
        self._told = False

    def refused(self, error: Exception) -> None:
        """A message was refused with `error`."""
        if isinstance(error, NoMemory):
            self._tell("it shares none")

    def of(self, front_end: socket.socket) -> Callable[[RegionPayload, int], None]:
        """A function to call with each region of `front_end` and the descriptor of its file."""
        looks = count()

        def seen(region: RegionPayload, fd: int) -> None:
            if self._told or next(looks) >= _LOOKS_MAX:
                return
            if _maps_privately(front_end, region.user_address, fd):
                self._tell("it maps its own copy (share=off)")

        return seen

    def _tell(self, reason: str) -> None:
        if self._told:
            return
        self._told = True
        log.error(
            "the front-end does not share the guest's memory, so the disk cannot work: start QEMU "
            "with -object memory-backend-memfd,id=mem,size=SIZE,share=on and -machine "
            "memory-backend=mem; in libvirt's XML <memoryBacking><source type='memfd'/>"
            "<access mode='shared'/></memoryBacking>",
            reason=reason,
        )


def _maps_privately(front_end: socket.socket, address: int, fd: int) -> bool:
    """Whether the front-end has mapped the file `fd` privately at `address`.

    False where that cannot be read: a front-end of another user, or in another namespace.
    """
    try:
        peer = front_end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
        inode = os.fstat(fd).st_ino
        with open(
            f"/proc/{_PEER.unpack(peer)[0]}/maps", encoding="utf-8", errors="replace"
        ) as maps:
            for line in maps:
                span, access, _, _, found, *_ = line.split()
                start, end = (int(each, 16) for each in span.split("-"))
                if start <= address < end:
                    return access.endswith("p") and int(found) == inode
    except (OSError, ValueError):
        pass
    return False
