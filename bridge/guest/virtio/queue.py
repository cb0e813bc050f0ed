"""What every kind of virtqueue can do for the ring that runs it."""

from __future__ import annotations

from typing import Protocol

from bridge.guest.virtio.chain import MAX_QUEUE_SIZE, Chain
from bridge.guest.virtio.long_chains import LongChains
from bridge.guest.virtio.memory import GuestMemory

RingAreas = tuple[memoryview, memoryview, memoryview]
"""Split: descriptor table, available ring, used ring. Packed: descriptor ring, driver's and
device's event suppression."""


class VirtQueue(Protocol):
    """The device's side of a virtqueue, split or packed, tracked in an in-flight region or not.

    The data path is `pop`, `push` and `publish`; `arm` and `disarm` are the device's half of
    notification suppression.
    """

    long: LongChains
    """What its long chains take; a device has its queues count together."""
    keeps_in_flight: bool
    """The next queue finds the chains in flight when this one is closed, and answers them."""

    @property
    def in_flight(self) -> int:
        """Chains popped (or recovered) and not yet pushed; at most as many as there are entries."""

    def recovered(self) -> list[Chain]:
        """The chains that a former process had popped and not answered, in the order in which it
        popped them; to be executed again before anything else. Asked for once, at the start."""

    def pop(self, most: int = MAX_QUEUE_SIZE) -> list[Chain]:
        """The chains that are available now, at most so many, oldest first.

        Raises QueueBroken when the driver broke the ring; chains before that come first.
        """

    def push(self, head: int, length: int, /) -> None:
        """Give a chain back, `length` bytes of it written; seen after `publish`."""

    def publish(self) -> bool:
        """Show the driver all that was pushed; True if it wants to be called."""

    def arm(self) -> bool:
        """Ask for a kick with the next chain; True if one is there already."""

    def disarm(self) -> None:
        """Kicks are not needed for now."""

    def use_memory(self, memory: GuestMemory, areas: RingAreas) -> None:
        """The guest's memory was mapped anew. Chains popped before keep their old views."""

    def close(self, *, told: bool) -> int:
        """The end: nothing more is written. The base to go on from (see RingSetup.base).

        `told`: the front-end gets it, and the next start is from what it then says.
        """

    def base_was_reported(self) -> None:
        """The front-end gets the base after all; after `close`, which was not to count on that."""
