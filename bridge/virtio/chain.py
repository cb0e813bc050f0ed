"""What a virtqueue hands out: descriptor chains, resolved to views of guest memory.

A chain is a plain tuple (an object per chain costs more than walking it), in this order:

    head            what the driver gets back in the used ring
    readable        views of what the driver wrote for us, in chain order
    writable        views of what we may write, in chain order
    fault           None, or what is wrong with the chain

Without a fault it is guaranteed that every view lies in guest memory and none is empty, that the
readable ones came before the writable ones (virtio 1.3 §2.7.4.2), that the lengths add up to
less than 2^32 and that the number of descriptors was within the limit of the table walked. With
a fault the lists hold what could be resolved, and `writable` is empty unless its last byte is
the chain's last writable byte: where the status goes.
"""

from __future__ import annotations

Chain = tuple[int, list[memoryview], list[memoryview], str | None]

DESC_NEXT = 1
DESC_WRITE = 2
DESC_INDIRECT = 4

DESCRIPTOR_BYTES = 16
MAX_INDIRECT_ENTRIES = 1024
"""Windows' driver sends tables of 515 whatever seg_max says; crosvm and QEMU accept 1024."""

MAX_QUEUE_SIZE = 1024
"""What QEMU's front-end allows at most; the specification's own limit is 32768."""


class QueueBroken(Exception):
    """The driver broke the ring itself: the queue can only be stopped (virtio 1.3 §2.1.2)."""
