"""The legal form of every message: one table, and one function that checks a message against it.

`SHAPES` says, for every message that a back-end knows, how long its payload is, how many file
descriptors come with it, whether it has a reply of its own, and which protocol feature must have
been negotiated. Any other message is unknown.

Source: vhost-user "Front-end message types".
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass

from bridge.errors import ProtocolError
from bridge.guest.vhost_user.messages import (
    CONFIG_HEAD_BYTES,
    P_BACKEND_REQ,
    P_CONFIG,
    P_CONFIGURE_MEM_SLOTS,
    P_INFLIGHT_SHMFD,
    P_LOG_SHMFD,
    P_MQ,
    P_RESET_DEVICE,
    P_STATUS,
    REGION_BYTES,
    TABLE_HEAD_BYTES,
    MessageType,
    VringFile,
)

_U32 = struct.Struct("=I")


def _table_size(payload: bytes) -> int:
    """The length that SET_MEM_TABLE must have, by its number of regions."""
    if len(payload) < TABLE_HEAD_BYTES:
        return TABLE_HEAD_BYTES
    (count,) = _U32.unpack_from(payload)
    return TABLE_HEAD_BYTES + int(count) * REGION_BYTES


def _config_size(payload: bytes) -> int:
    """The length that GET_CONFIG and SET_CONFIG must have, by their size field."""
    if len(payload) < CONFIG_HEAD_BYTES:
        return CONFIG_HEAD_BYTES
    (size,) = _U32.unpack_from(payload, 4)
    return CONFIG_HEAD_BYTES + int(size)


def _table_fds(payload: bytes) -> int:
    return (len(payload) - TABLE_HEAD_BYTES) // REGION_BYTES


def _vring_fds(payload: bytes) -> int:
    return 1 if VringFile.unpack(payload).has_fd else 0


@dataclass(frozen=True, slots=True)
class Shape:
    """The form of a message: payload sizes, descriptor counts, its reply, the feature it needs."""

    sizes: tuple[int, ...] | Callable[[bytes], int] = (0,)
    """Legal lengths in bytes, or a function of the payload that gives the only legal one."""
    fds: tuple[int, ...] | Callable[[bytes], int] = (0,)
    """Legal numbers of descriptors, or a function of the (size-checked) payload."""
    replies: bool = False
    """It has a reply of its own, so that REPLY_ACK never applies."""
    feature: int = 0
    """The protocol feature that must have been negotiated; 0: none."""


_STATE_SHAPE = Shape((8,))
_VRING_FILE_SHAPE = Shape((8,), _vring_fds)

SHAPES: dict[MessageType, Shape] = {
    MessageType.GET_FEATURES: Shape(replies=True),
    MessageType.SET_FEATURES: Shape((8,)),
    MessageType.SET_OWNER: Shape(),
    MessageType.RESET_OWNER: Shape(),
    MessageType.SET_MEM_TABLE: Shape(_table_size, _table_fds),
    MessageType.SET_LOG_BASE: Shape((16,), (1,), replies=True, feature=P_LOG_SHMFD),
    MessageType.SET_LOG_FD: Shape((0,), (1,)),
    MessageType.SET_VRING_NUM: _STATE_SHAPE,
    MessageType.SET_VRING_ADDR: Shape((40,)),
    MessageType.SET_VRING_BASE: _STATE_SHAPE,
    MessageType.GET_VRING_BASE: Shape((8,), replies=True),
    MessageType.SET_VRING_KICK: _VRING_FILE_SHAPE,
    MessageType.SET_VRING_CALL: _VRING_FILE_SHAPE,
    MessageType.SET_VRING_ERR: _VRING_FILE_SHAPE,
    MessageType.GET_PROTOCOL_FEATURES: Shape(replies=True),
    MessageType.SET_PROTOCOL_FEATURES: Shape((8,)),
    MessageType.GET_QUEUE_NUM: Shape(replies=True, feature=P_MQ),
    MessageType.SET_VRING_ENABLE: _STATE_SHAPE,
    MessageType.SET_BACKEND_REQ_FD: Shape((0,), (1,), feature=P_BACKEND_REQ),
    MessageType.GET_CONFIG: Shape(_config_size, replies=True, feature=P_CONFIG),
    MessageType.SET_CONFIG: Shape(_config_size, feature=P_CONFIG),
    MessageType.GET_INFLIGHT_FD: Shape((20, 24), replies=True, feature=P_INFLIGHT_SHMFD),
    MessageType.SET_INFLIGHT_FD: Shape((20, 24), (1,), feature=P_INFLIGHT_SHMFD),
    MessageType.RESET_DEVICE: Shape(feature=P_RESET_DEVICE),
    MessageType.GET_MAX_MEM_SLOTS: Shape(replies=True, feature=P_CONFIGURE_MEM_SLOTS),
    MessageType.ADD_MEM_REG: Shape((40,), (1,), feature=P_CONFIGURE_MEM_SLOTS),
    MessageType.REM_MEM_REG: Shape((40,), (0, 1), feature=P_CONFIGURE_MEM_SLOTS),
    MessageType.SET_STATUS: Shape((8,), feature=P_STATUS),
    MessageType.GET_STATUS: Shape(replies=True, feature=P_STATUS),
}


def check_shape(request: MessageType, payload: bytes, fd_count: int) -> None:
    """Raise ProtocolError unless `request` may have this payload size and descriptor count."""
    shape = SHAPES[request]
    sizes = (shape.sizes(payload),) if callable(shape.sizes) else shape.sizes
    if len(payload) not in sizes:
        wanted = " or ".join(map(str, sizes))
        raise ProtocolError(f"{request.name} has {len(payload)} bytes, {wanted} needed")
    counts = (shape.fds(payload),) if callable(shape.fds) else shape.fds
    if fd_count not in counts:
        wanted = " or ".join(map(str, counts))
        raise ProtocolError(
            f"{request.name} came with {fd_count} file descriptors, {wanted} needed"
        )
