"""The wire formats of vhost-user: header, message numbers, feature bits, payloads.

Everything is in the byte order of the host ("native endian"): both sides run on one machine.
`shapes` says which message has which payload and how many file descriptors.

Source: vhost-user "Message Specification".
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntEnum

from bridge.errors import ProtocolError

VERSION = 1
FLAG_VERSION_MASK = 3
FLAG_REPLY = 4
FLAG_NEED_REPLY = 8

HEADER_BYTES = 12
MAX_PAYLOAD_BYTES = 512
"""The largest legal payload is GET_CONFIG's 12 + 256; this bounds what a message can allocate."""
MAX_FDS = 8
"""The most that one message carries: SET_MEM_TABLE with 8 regions."""
MAX_TABLE_REGIONS = 8
MAX_CONFIG_BYTES = 256

F_LOG_ALL = 1 << 26
F_PROTOCOL_FEATURES = 1 << 30

P_MQ = 1 << 0
P_LOG_SHMFD = 1 << 1
P_REPLY_ACK = 1 << 3
P_BACKEND_REQ = 1 << 5
P_CONFIG = 1 << 9
P_INFLIGHT_SHMFD = 1 << 12
P_RESET_DEVICE = 1 << 13
P_CONFIGURE_MEM_SLOTS = 1 << 15
P_STATUS = 1 << 16

VRING_INDEX_MASK = 0xFF
VRING_NO_FD = 1 << 8
VRING_LOG = 1
"""Flag of SET_VRING_ADDR: log writes to the used ring."""

U64_MAX = (1 << 64) - 1


class MessageType(IntEnum):
    """Messages of a front-end; numbers of vhost-user "Front-end message types"."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40


class BackendRequest(IntEnum):
    """Messages of a back-end, on the channel of SET_BACKEND_REQ_FD."""

    CONFIG_CHANGE = 2


_HEADER = struct.Struct("=III")
_U64 = struct.Struct("=Q")
_STATE = struct.Struct("=II")
_ADDRESS = struct.Struct("=IIQQQQ")
_TABLE_HEAD = struct.Struct("=II")
_REGION = struct.Struct("=QQQQ")
_ONE_REGION = struct.Struct("=QQQQQ")
_CONFIG = struct.Struct("=III")
_LOG = struct.Struct("=QQ")
_INFLIGHT = struct.Struct("=QQHH")

REGION_BYTES = _REGION.size
TABLE_HEAD_BYTES = _TABLE_HEAD.size
CONFIG_HEAD_BYTES = _CONFIG.size


@dataclass(frozen=True, slots=True)
class MessageHeader:
    """The 12 bytes before every payload; `size` is the payload's length in bytes."""

    request: int
    flags: int
    size: int

    @property
    def need_reply(self) -> bool:
        """The sender asks for an acknowledgement; ignored unless REPLY_ACK was negotiated."""
        return bool(self.flags & FLAG_NEED_REPLY)

    def pack(self) -> bytes:
        """The header's bytes."""
        return _HEADER.pack(self.request, self.flags, self.size)

    @classmethod
    def unpack_untrusted(cls, data: bytes, *, reply: bool) -> MessageHeader:
        """The header in `data` (12 bytes), its version, direction and size checked.

        Raises ProtocolError. The stream is then useless: the next message may start anywhere.
        """
        request, flags, size = _HEADER.unpack(data)
        if flags & FLAG_VERSION_MASK != VERSION:
            raise ProtocolError(
                f"message {request} has version {flags & FLAG_VERSION_MASK}, this is {VERSION}"
            )
        if bool(flags & FLAG_REPLY) != reply:
            what = "a reply" if flags & FLAG_REPLY else "a request"
            raise ProtocolError(f"message {request} is {what}, which is not expected here")
        if size > MAX_PAYLOAD_BYTES:
            raise ProtocolError(
                f"message {request} announces {size} bytes, the limit is {MAX_PAYLOAD_BYTES}"
            )
        return cls(request, flags, size)


@dataclass(frozen=True, slots=True)
class Message:
    """One whole message. Its holder owns the descriptors in `fds` and closes them."""

    header: MessageHeader
    payload: bytes = b""
    fds: list[int] = field(default_factory=list)


def message_of(request: int, payload: bytes = b"", fds: list[int] | None = None) -> Message:
    """A message that asks for no acknowledgement."""
    return Message(MessageHeader(request, VERSION, len(payload)), payload, list(fds or []))


def request_name(request: int) -> str:
    """The specification's name of a message, or "request NUMBER" for an unknown one."""
    try:
        return MessageType(request).name
    except ValueError:
        return f"request {request}"


def pack_message(request: int, payload: bytes = b"", *, flags: int = VERSION) -> bytes:
    """The bytes of a whole message."""
    return MessageHeader(request, flags, len(payload)).pack() + payload


def pack_reply(request: int, payload: bytes) -> bytes:
    """The bytes of the reply to `request`."""
    return pack_message(request, payload, flags=VERSION | FLAG_REPLY)


# Payloads.


def pack_u64(value: int) -> bytes:
    """A u64 payload."""
    return _U64.pack(value)


def unpack_u64(payload: bytes) -> int:
    """The value of a u64 payload."""
    (value,) = _U64.unpack(payload)
    return int(value)


@dataclass(frozen=True, slots=True)
class VringState:
    """ "A vring state description": SET_VRING_NUM, _BASE, _ENABLE and GET_VRING_BASE."""

    index: int
    num: int

    def pack(self) -> bytes:
        """The payload's bytes."""
        return _STATE.pack(self.index, self.num)

    @classmethod
    def unpack(cls, payload: bytes) -> VringState:
        """The payload of `payload` (8 bytes)."""
        return cls(*_STATE.unpack(payload))


@dataclass(frozen=True, slots=True)
class VringFile:
    """The u64 of SET_VRING_KICK, _CALL and _ERR: a ring's index, and whether an eventfd comes."""

    index: int
    has_fd: bool

    def pack(self) -> bytes:
        """The payload's bytes."""
        return _U64.pack(self.index | (0 if self.has_fd else VRING_NO_FD))

    @classmethod
    def unpack(cls, payload: bytes) -> VringFile:
        """The payload of `payload` (8 bytes); bits above 8 are reserved and ignored."""
        value = unpack_u64(payload)
        return cls(value & VRING_INDEX_MASK, not value & VRING_NO_FD)


@dataclass(frozen=True, slots=True)
class VringAddress:
    """ "A vring address description": SET_VRING_ADDR. Front-end addresses, `log` guest-physical."""

    index: int
    flags: int
    desc: int
    used: int
    avail: int
    log: int

    def pack(self) -> bytes:
        """The payload's bytes."""
        return _ADDRESS.pack(self.index, self.flags, self.desc, self.used, self.avail, self.log)

    @classmethod
    def unpack(cls, payload: bytes) -> VringAddress:
        """The payload of `payload` (40 bytes)."""
        return cls(*_ADDRESS.unpack(payload))


@dataclass(frozen=True, slots=True)
class RegionPayload:
    """ "A region": one piece of guest memory, as a message describes it."""

    guest_address: int
    size_bytes: int
    user_address: int
    mmap_offset_bytes: int

    def pack(self) -> bytes:
        """The 32 bytes of the region."""
        return _REGION.pack(
            self.guest_address, self.size_bytes, self.user_address, self.mmap_offset_bytes
        )

    def pack_single(self) -> bytes:
        """The payload of ADD_MEM_REG and REM_MEM_REG (40 bytes)."""
        return _U64.pack(0) + self.pack()

    @classmethod
    def unpack_single(cls, payload: bytes) -> RegionPayload:
        """The region in the payload of ADD_MEM_REG or REM_MEM_REG (40 bytes)."""
        return cls(*_ONE_REGION.unpack(payload)[1:])


def pack_memory_table(regions: list[RegionPayload]) -> bytes:
    """The payload of SET_MEM_TABLE."""
    return _TABLE_HEAD.pack(len(regions), 0) + b"".join(region.pack() for region in regions)


def unpack_memory_table(payload: bytes) -> list[RegionPayload]:
    """The regions of a SET_MEM_TABLE; `shapes` has checked that its size fits their number."""
    return [RegionPayload(*fields) for fields in _REGION.iter_unpack(payload[_TABLE_HEAD.size :])]


@dataclass(frozen=True, slots=True)
class ConfigAccess:
    """ "Virtio device config space": GET_CONFIG and SET_CONFIG."""

    offset: int
    size: int
    flags: int
    data: bytes = b""

    def pack(self) -> bytes:
        """The payload's bytes."""
        return _CONFIG.pack(self.offset, self.size, self.flags) + self.data

    @classmethod
    def unpack(cls, payload: bytes) -> ConfigAccess:
        """The payload of `payload` (12 bytes and the data)."""
        offset, size, flags = _CONFIG.unpack_from(payload)
        return cls(offset, size, flags, payload[_CONFIG.size :])


@dataclass(frozen=True, slots=True)
class LogRange:
    """ "Log description": SET_LOG_BASE. The dirty bitmap's range of its file, in bytes."""

    mmap_size: int
    mmap_offset: int

    def pack(self) -> bytes:
        """The payload's bytes."""
        return _LOG.pack(self.mmap_size, self.mmap_offset)

    @classmethod
    def unpack(cls, payload: bytes) -> LogRange:
        """The payload of `payload` (16 bytes)."""
        return cls(*_LOG.unpack(payload))


@dataclass(frozen=True, slots=True)
class InflightRange:
    """ "Inflight description": GET_INFLIGHT_FD and SET_INFLIGHT_FD."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    def pack(self, length: int = 24) -> bytes:
        """The payload's bytes: 20 of fields, and the 4 bytes of padding that C compilers add."""
        fields = _INFLIGHT.pack(self.mmap_size, self.mmap_offset, self.num_queues, self.queue_size)
        return fields.ljust(length, b"\0")

    @classmethod
    def unpack(cls, payload: bytes) -> InflightRange:
        """The payload of `payload` (20 or 24 bytes)."""
        return cls(*_INFLIGHT.unpack_from(payload))
