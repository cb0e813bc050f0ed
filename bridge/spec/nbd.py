"""The numbers and layouts of the NBD protocol (NetworkBlockDevice/nbd, doc/proto.md).

Everything on the wire is big-endian. Names are the specification's, without the NBD_ prefix.
"""

from __future__ import annotations

import errno
from enum import IntFlag
from struct import Struct
from typing import Final

DEFAULT_PORT: Final = 10809

# "Magic values"
NBDMAGIC: Final = 0x4E42444D41474943
IHAVEOPT: Final = 0x49484156454F5054
OLDSTYLE_MAGIC: Final = 0x00420281861253
OPTION_REPLY_MAGIC: Final = 0x0003E889045565A9
REQUEST_MAGIC: Final = 0x25609513
SIMPLE_REPLY_MAGIC: Final = 0x67446698
STRUCTURED_REPLY_MAGIC: Final = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final = 0x21E41C71
EXTENDED_REPLY_MAGIC: Final = 0x6E8A278C

# "Handshake flags" and "Client flags"
FLAG_FIXED_NEWSTYLE: Final = 1 << 0
FLAG_NO_ZEROES: Final = 1 << 1

# "Option types"
OPT_EXPORT_NAME: Final = 1
OPT_ABORT: Final = 2
OPT_LIST: Final = 3
OPT_STARTTLS: Final = 5
OPT_INFO: Final = 6
OPT_GO: Final = 7
OPT_STRUCTURED_REPLY: Final = 8
OPT_LIST_META_CONTEXT: Final = 9
OPT_SET_META_CONTEXT: Final = 10
OPT_EXTENDED_HEADERS: Final = 11

OPTION_NAMES: Final = {
    OPT_EXPORT_NAME: "EXPORT_NAME",
    OPT_ABORT: "ABORT",
    OPT_LIST: "LIST",
    OPT_STARTTLS: "STARTTLS",
    OPT_INFO: "INFO",
    OPT_GO: "GO",
    OPT_STRUCTURED_REPLY: "STRUCTURED_REPLY",
    OPT_LIST_META_CONTEXT: "LIST_META_CONTEXT",
    OPT_SET_META_CONTEXT: "SET_META_CONTEXT",
    OPT_EXTENDED_HEADERS: "EXTENDED_HEADERS",
}

# "Option reply types"
REP_ACK: Final = 1
REP_SERVER: Final = 2
REP_INFO: Final = 3
REP_META_CONTEXT: Final = 4
REP_ERROR_BIT: Final = 1 << 31
REP_ERR_UNSUP: Final = REP_ERROR_BIT | 1
REP_ERR_POLICY: Final = REP_ERROR_BIT | 2
REP_ERR_INVALID: Final = REP_ERROR_BIT | 3
REP_ERR_PLATFORM: Final = REP_ERROR_BIT | 4
REP_ERR_TLS_REQD: Final = REP_ERROR_BIT | 5
REP_ERR_UNKNOWN: Final = REP_ERROR_BIT | 6
REP_ERR_SHUTDOWN: Final = REP_ERROR_BIT | 7
REP_ERR_BLOCK_SIZE_REQD: Final = REP_ERROR_BIT | 8
REP_ERR_TOO_BIG: Final = REP_ERROR_BIT | 9
REP_ERR_EXT_HEADER_REQD: Final = REP_ERROR_BIT | 10

REPLY_ERROR_NAMES: Final = {
    REP_ERR_UNSUP: "unsupported",
    REP_ERR_POLICY: "forbidden by the server's policy",
    REP_ERR_INVALID: "invalid",
    REP_ERR_PLATFORM: "not supported on the server's platform",
    REP_ERR_TLS_REQD: "TLS required",
    REP_ERR_UNKNOWN: "unknown export",
    REP_ERR_SHUTDOWN: "server is shutting down",
    REP_ERR_BLOCK_SIZE_REQD: "block size negotiation required",
    REP_ERR_TOO_BIG: "request too big",
    REP_ERR_EXT_HEADER_REQD: "extended headers required",
}

# "Option information types"
INFO_EXPORT: Final = 0
INFO_NAME: Final = 1
INFO_DESCRIPTION: Final = 2
INFO_BLOCK_SIZE: Final = 3


class TransmissionFlags(IntFlag):
    """ "Transmission flags": what an export is and takes."""

    HAS_FLAGS = 1 << 0
    READ_ONLY = 1 << 1
    SEND_FLUSH = 1 << 2
    SEND_FUA = 1 << 3
    ROTATIONAL = 1 << 4
    SEND_TRIM = 1 << 5
    SEND_WRITE_ZEROES = 1 << 6
    SEND_DF = 1 << 7
    CAN_MULTI_CONN = 1 << 8
    SEND_RESIZE = 1 << 9
    SEND_CACHE = 1 << 10
    SEND_FAST_ZERO = 1 << 11
    BLOCK_STATUS_PAYLOAD = 1 << 12


# "Request types"
CMD_READ: Final = 0
CMD_WRITE: Final = 1
CMD_DISC: Final = 2
CMD_FLUSH: Final = 3
CMD_TRIM: Final = 4
CMD_CACHE: Final = 5
CMD_WRITE_ZEROES: Final = 6
CMD_BLOCK_STATUS: Final = 7

# "Command flags"
CMD_FLAG_FUA: Final = 1 << 0
CMD_FLAG_NO_HOLE: Final = 1 << 1
CMD_FLAG_DF: Final = 1 << 2
CMD_FLAG_REQ_ONE: Final = 1 << 3
CMD_FLAG_FAST_ZERO: Final = 1 << 4
CMD_FLAG_PAYLOAD_LEN: Final = 1 << 5

# "Structured reply flags" and "Structured reply types"
REPLY_FLAG_DONE: Final = 1 << 0
REPLY_TYPE_NONE: Final = 0
REPLY_TYPE_OFFSET_DATA: Final = 1
REPLY_TYPE_OFFSET_HOLE: Final = 2
REPLY_TYPE_BLOCK_STATUS: Final = 5
REPLY_TYPE_BLOCK_STATUS_EXT: Final = 6
REPLY_TYPE_ERROR_BIT: Final = 1 << 15
REPLY_TYPE_ERROR: Final = REPLY_TYPE_ERROR_BIT | 1
REPLY_TYPE_ERROR_OFFSET: Final = REPLY_TYPE_ERROR_BIT | 2

BASE_ALLOCATION: Final = "base:allocation"
STATE_HOLE: Final = 1 << 0
STATE_ZERO: Final = 1 << 1

# Layouts
GREETING: Final = Struct(">QQ")
OPTION: Final = Struct(">QII")
"""IHAVEOPT, option, length of the data that follows."""
OPTION_REPLY: Final = Struct(">QIII")
"""Magic, echoed option, reply type, length of the data that follows."""
EXPORT_INFO: Final = Struct(">QH")
"""Size in bytes, transmission flags."""
BLOCK_SIZE_INFO: Final = Struct(">III")
"""Minimum, preferred, maximum payload, in bytes."""
REQUEST: Final = Struct(">IHHQQI")
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")
SIMPLE_REPLY: Final = Struct(">IIQ")
CHUNK: Final = Struct(">IHHQI")
EXTENDED_CHUNK: Final = Struct(">IHHQQQ")
U16: Final = Struct(">H")
U32: Final = Struct(">I")
U64: Final = Struct(">Q")

NAME_MAX_BYTES: Final = 4096
""" "Values": strings longer than this must not be sent, and may be refused."""
OPTION_REPLY_MAX_BYTES: Final = 64 << 10
"""Longest option reply believed: a name and a description of 4096 bytes fit several times."""
EXPORT_NAME_PADDING_BYTES: Final = 124
PAYLOAD_DEFAULT_MAX_BYTES: Final = 32 << 20
""" "Block size constraints": payload that every server takes when none was agreed on."""
LENGTH_32_MAX: Final = 0xFFFF_FFFF
SIZE_MAX_BYTES: Final = (1 << 63) - 1
"""Sizes are signed 64-bit everywhere else in a system (libnbd CVE-2023-5215)."""

ERRNO_OF_ERROR: Final = {
    1: errno.EPERM,
    5: errno.EIO,
    12: errno.ENOMEM,
    22: errno.EINVAL,
    28: errno.ENOSPC,
    75: errno.EOVERFLOW,
    95: errno.EOPNOTSUPP,
    108: errno.ESHUTDOWN,
}
""" "Error values"; any other value means EINVAL."""

ERROR_OF_ERRNO: Final = {
    errno.EPERM: 1,
    errno.EROFS: 1,
    errno.EIO: 5,
    errno.ENOMEM: 12,
    errno.EINVAL: 22,
    errno.ENOSPC: 28,
    errno.EFBIG: 28,
    errno.EDQUOT: 28,
    errno.EOVERFLOW: 75,
    errno.EOPNOTSUPP: 95,
    errno.ESHUTDOWN: 108,
}
"""What a server answers for a local error; anything else is EIO."""
