"""The block device, as both sides see it (virtio 1.3 §5.2). Everything is little-endian."""

from __future__ import annotations

from struct import Struct
from typing import Final

from bridge.spec.virtqueue import F_EVENT_IDX, F_INDIRECT, F_RING_PACKED

# §5.2.3, feature bits
F_SEG_MAX: Final = 1 << 2
F_RO: Final = 1 << 5
F_BLK_SIZE: Final = 1 << 6
F_FLUSH: Final = 1 << 9
F_TOPOLOGY: Final = 1 << 10
F_CONFIG_WCE: Final = 1 << 11
F_MQ: Final = 1 << 12
F_DISCARD: Final = 1 << 13
F_WRITE_ZEROES: Final = 1 << 14

FEATURE_BITS: Final[dict[str, int]] = {
    "seg_max": F_SEG_MAX,
    "blk_size": F_BLK_SIZE,
    "flush": F_FLUSH,
    "topology": F_TOPOLOGY,
    "config_wce": F_CONFIG_WCE,
    "mq": F_MQ,
    "discard": F_DISCARD,
    "write_zeroes": F_WRITE_ZEROES,
    "indirect_desc": F_INDIRECT,
    "event_idx": F_EVENT_IDX,
    "ring_packed": F_RING_PACKED,
}
"""The features that can be withheld, by the specification's names. VERSION_1 and RO cannot."""

# §5.2.4, the configuration space
CONFIG: Final = Struct("<QIIHBBIBBHIBBHIIIIIB3x")
"""60 bytes. The built-in driver has a layout of its own: `peers.disk_config` says why."""
WRITEBACK_OFFSET: Final = 32

# §5.2.6, requests
T_IN: Final = 0
T_OUT: Final = 1
T_FLUSH: Final = 4
T_GET_ID: Final = 8
T_DISCARD: Final = 11
T_WRITE_ZEROES: Final = 13

S_OK: Final = 0
S_IOERR: Final = 1
S_UNSUPP: Final = 2

ID_BYTES: Final = 20
"""§5.2.6.1: what GET_ID has room for."""

SEGMENT: Final = Struct("<QII")
"""Of DISCARD and WRITE_ZEROES: sector, sectors, flags."""
SEGMENT_UNMAP: Final = 1
