"""A command of the client, and the rules by which the small server refuses one.

Source: NBD "Transmission flags", "Request types", "Block size constraints".
"""

from __future__ import annotations

import errno

from bridge.peers.nbd_server_settings import ServerSettings
from bridge.spec import nbd as p
from bridge.spec.nbd import TransmissionFlags


class Command:
    """One command of the client. `payload` is what a WRITE brought."""

    __slots__ = ("cookie", "error", "flags", "kind", "length", "offset", "payload")

    def __init__(self, kind: int, flags: int, cookie: int, offset: int, length: int) -> None:
        self.kind = kind
        self.flags = flags
        self.cookie = cookie
        self.offset = offset
        self.length = length
        self.payload = b""
        self.error = 0


_NEEDS = {
    p.CMD_READ: 0,
    p.CMD_WRITE: 0,
    p.CMD_FLUSH: TransmissionFlags.SEND_FLUSH,
    p.CMD_TRIM: TransmissionFlags.SEND_TRIM,
    p.CMD_CACHE: TransmissionFlags.SEND_CACHE,
    p.CMD_WRITE_ZEROES: TransmissionFlags.SEND_WRITE_ZEROES,
    p.CMD_BLOCK_STATUS: 0,
}
_WRITES = (p.CMD_WRITE, p.CMD_TRIM, p.CMD_WRITE_ZEROES)
_EFFECTS = (p.CMD_TRIM, p.CMD_CACHE, p.CMD_WRITE_ZEROES)
_FLAGS_ALLOWED = {
    p.CMD_READ: p.CMD_FLAG_DF,
    p.CMD_WRITE: p.CMD_FLAG_FUA | p.CMD_FLAG_PAYLOAD_LEN,
    p.CMD_FLUSH: 0,
    p.CMD_TRIM: p.CMD_FLAG_FUA,
    p.CMD_CACHE: 0,
    p.CMD_WRITE_ZEROES: p.CMD_FLAG_FUA | p.CMD_FLAG_NO_HOLE | p.CMD_FLAG_FAST_ZERO,
    p.CMD_BLOCK_STATUS: p.CMD_FLAG_REQ_ONE,
}


def refusal_of(
    command: Command, settings: ServerSettings, size_bytes: int, *, has_context: bool
) -> int:
    """The errno of a command that breaks a rule, 0 for a good one.

    `has_context`: the client chose `base:allocation`, so it may ask for BLOCK_STATUS.
    """
    flags = settings.flags
    kind = command.kind
    needed = _NEEDS.get(kind)
    if needed is None or (needed and not flags & needed):
        return errno.EINVAL
    if kind in _WRITES and flags & TransmissionFlags.READ_ONLY:
        return errno.EPERM
    if command.flags & p.CMD_FLAG_FUA and not flags & TransmissionFlags.SEND_FUA:
        return errno.EINVAL
    if command.flags & ~_FLAGS_ALLOWED[kind]:
        return errno.EINVAL
    if kind == p.CMD_FLUSH:
        return errno.EINVAL if command.offset or command.length else 0
    if not command.length:
        return errno.EINVAL
    if command.offset + command.length > size_bytes:
        return errno.ENOSPC if kind in (p.CMD_WRITE, p.CMD_WRITE_ZEROES) else errno.EINVAL
    if kind == p.CMD_READ and command.length > settings.payload_max_bytes:
        return errno.EOVERFLOW
    if kind in _EFFECTS and command.length > settings.effect_max_bytes:
        return errno.EINVAL
    if kind == p.CMD_BLOCK_STATUS and not has_context:
        return errno.EINVAL
    if settings.block_sizes and settings.enforce_block_sizes:
        return errno.EINVAL if (command.offset | command.length) % settings.block_sizes[0] else 0
    return 0
