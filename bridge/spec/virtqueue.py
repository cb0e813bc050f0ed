"""Virtqueues, as both sides see them (virtio 1.3 §2.7 split, §2.8 packed, §6 feature bits).

Fields of a ring are in the byte order of the machine: both sides run on it.
"""

from __future__ import annotations

from struct import Struct
from typing import Final

# §6, "Reserved feature bits"
F_INDIRECT: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32
F_RING_PACKED: Final = 1 << 34

# §2.7.5 and §2.8.13: address, length, and in a split ring flags, next; in a packed one id, flags
DESCRIPTOR: Final = Struct("=QIHH")
DESCRIPTOR_BYTES: Final = 16

DESC_NEXT: Final = 1
DESC_WRITE: Final = 2
DESC_INDIRECT: Final = 4

# §2.7.6, §2.7.8: flags of the available and of the used ring
AVAIL_NO_INTERRUPT: Final = 1
USED_NO_NOTIFY: Final = 1

# §2.8.1, §2.8.14: packed rings
DESC_AVAIL: Final = 1 << 7
DESC_USED: Final = 1 << 15
EVENT_ENABLE: Final = 0
EVENT_DISABLE: Final = 1
EVENT_AT_DESCRIPTOR: Final = 2
EVENT_AREA_BYTES: Final = 4
