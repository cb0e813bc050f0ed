"""The exclusive lock of an RBD image: taken at open, kept until the session ends.

librbd's own lock would be handed over to the next client that writes, so that two hosts could write
one image in turn, each with a stale cache. A lock that was asked for by name stays.

When its holder dies, Ceph notices after the watch timeout (30 s), librbd then shuts the dead client
out (blocklists it) and takes the lock. A holder that was a process of this very machine can be seen
to be dead at once: so the holder leaves a note of itself with the image.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections.abc import Callable
from pathlib import Path

import rbd

from nbd_plugin.deadline import call_within
from nbd_plugin.errors import PluginError
from nbd_plugin.last_seen import boot_id

HOLDER_KEY = "nbd_plugin.holder"

_RETRY_S = 0.5
_LEAST_S = 1.0
"""A free lock takes a few milliseconds, one that has to be asked back from a client more."""


def take_lock(
    image: rbd.Image, name: str, timeout_s: float, look: Callable[[bool], object]
) -> None:
    """Take the lock for as long as the image is open. Raises PluginError (EBUSY).

    `look` is called right before each attempt: whether the lock still belongs to the plugin's
    client that took it last, dead or alive.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        left_s = max(deadline - time.monotonic(), _LEAST_S)
        try:
            call_within(left_s, f"locking volume {name}", lambda: _acquire(image, look))
            return
        except (rbd.ReadOnlyImage, rbd.ImageBusy, PluginError):
            if time.monotonic() >= deadline:
                raise PluginError(
                    f"volume {name} is open for writing by another Ceph client", errno.EBUSY
                ) from None
        time.sleep(_RETRY_S)


def _acquire(image: rbd.Image, look: Callable[[bool], object]) -> None:
    look(_is_as_left(image))
    _break_lock_of_the_dead(image)
    image.lock_acquire(rbd.RBD_LOCK_MODE_EXCLUSIVE)
    for owner in _owners(image):
        image.metadata_set(HOLDER_KEY, f"{_this_process()} {owner}")


def _is_as_left(image: rbd.Image) -> bool:
    try:
        return image.metadata_get(HOLDER_KEY).rpartition(" ")[2] in _owners(image)
    except KeyError:
        return False


def _break_lock_of_the_dead(image: rbd.Image) -> None:
    """Break the lock if its holder's note names a process of this machine that is gone."""
    try:
        process, _, holder = image.metadata_get(HOLDER_KEY).rpartition(" ")
    except KeyError:
        return
    if holder in _owners(image) and _is_gone(process):
        image.lock_break(rbd.RBD_LOCK_MODE_EXCLUSIVE, holder)


def _owners(image: rbd.Image) -> list[str]:
    """Ceph's names of the clients that hold the lock."""
    try:
        return [owner["owner"] for owner in image.lock_get_owners()]
    except rbd.ImageNotFound:
        return []  # librbd's way of saying that no client does


def _this_process() -> str:
    return f"{_machine()} {os.getpid()} {_start_time(os.getpid())}"


def _machine() -> str:
    """This boot of this kernel, and the space in which process numbers mean something."""
    return f"{boot_id()} {os.stat('/proc/self/ns/pid').st_ino}"


def _is_gone(process: str) -> bool:
    """Whether a note's process has ended. False when that cannot be known from here."""
    words = process.split()
    if len(words) != 4 or " ".join(words[:2]) != _machine():
        return False
    with contextlib.suppress(ValueError):
        return _start_time(int(words[2])) != words[3]
    return False


def _start_time(pid: int) -> str:
    """Tells a process from a later one with the same number; "" if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
