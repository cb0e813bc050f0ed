"""Barriers that only other processors than x86 need: they are there, and stand where they have to.

Tests run on x86, which needs none of them. Here each is called all the same, and looks at what the
other side could see at that moment, or stores what it could have stored by then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from bridge.datapath import usual
from bridge.guest.virtio import inflight_packed, packed_queue, split_queue
from bridge.guest.virtio.inflight import queue_region_bytes
from bridge.guest.virtio.inflight_packed import TrackedPackedQueue
from bridge.guest.virtio.queue import VirtQueue
from bridge.spec.virtqueue import DESC_AVAIL, DESC_USED, EVENT_AT_DESCRIPTOR
from tests.guest.virtio.mock import DEVICE_WRITES, QueueRig
from tests.guest.virtio.test_packed_queue import PackedGuest

_MODULES = (usual, split_queue, packed_queue, inflight_packed)


class Barriers:
    """Those of a queue: the first one from now on calls `at`."""

    def __init__(self) -> None:
        self.seen: list[object] = []
        self.at: Callable[[], object] | None = None

    def __call__(self) -> None:
        if self.at is not None:
            at, self.at = self.at, None
            self.seen.append(at())


@pytest.fixture
def barriers(monkeypatch: pytest.MonkeyPatch) -> Iterator[Barriers]:
    found = Barriers()
    for module in _MODULES:
        monkeypatch.setattr(module, "WEAK_ORDER", True)
        monkeypatch.setattr(module, "fence", found)
    yield found
    assert found.at is None, "there was no barrier"


def _split() -> QueueRig:
    rig = QueueRig(size=4)
    rig.put((rig.alloc(1), 1, DEVICE_WRITES))
    return rig


def _packed(tracked: bool = False) -> tuple[PackedGuest, Any]:
    """A guest with two chains in its ring, and the queue."""
    guest = PackedGuest(size=4)
    guest.add(*guest.status())
    guest.add(*guest.status())
    if not tracked:
        return guest, guest.device
    region = memoryview(bytearray(queue_region_bytes(4, packed=True)))
    queue: VirtQueue = TrackedPackedQueue(
        guest.memory,
        guest.areas,
        size=4,
        base=guest.packed.start_base,
        event_idx=True,
        indirect=True,
        region=region,
        n_entries=4,
    )
    return guest, queue


@pytest.mark.parametrize("pops", ["general", "usual"])
def test_split_ring_entries_are_read_after_the_index(pops: str, barriers: Barriers) -> None:
    rig = _split()
    entries = rig.areas[1].cast("H")
    good, entries[2] = entries[2], 99  # The entry comes after the index, as on another processor.

    def arrives() -> None:
        entries[2] = good

    barriers.at = arrives
    if pops == "general":
        assert [chain[0] for chain in rig.queue.pop()] == [good]
    else:
        assert usual.available(rig.queue, 0, 0) == 1  # type: ignore[arg-type]
        assert entries[2] == good


def test_split_ring_used_elements_are_in_place_before_the_index(barriers: Barriers) -> None:
    rig = _split()
    [chain] = rig.queue.pop()
    used = rig.areas[2]
    rig.queue.push(chain[0], 1)

    barriers.at = lambda: (bytes(used[4:12]), bytes(used[2:4]))
    rig.queue.publish()

    element = chain[0].to_bytes(4, "little") + (1).to_bytes(4, "little")
    assert barriers.seen == [(element, bytes(2))]
    assert used[2:4] == b"\1\0"


@pytest.mark.parametrize("tracked", [False, True])
def test_packed_descriptor_is_read_after_its_flags(tracked: bool, barriers: Barriers) -> None:
    guest, queue = _packed(tracked)
    address = guest.packed.ring[0:8]
    good = bytes(address)
    address[:] = b"\xff" * 8

    def arrives() -> None:
        address[:] = good

    barriers.at = arrives
    first, _ = queue.pop()
    assert first[-1] == "a request without a whole header"  # Not a bad address.


def test_packed_first_descriptor_of_a_batch_is_shown_after_the_others(barriers: Barriers) -> None:
    guest, queue = _packed()
    for chain in queue.pop():
        queue.push(chain[0], 1)
    flags = guest.packed.ring.cast("H")

    barriers.at = lambda: (_is_used(flags[7]), _is_used(flags[15]))
    queue.publish()

    assert barriers.seen == [(False, True)]
    assert _is_used(flags[7])


def test_packed_descriptor_in_a_region_is_shown_after_what_a_next_process_needs(
    barriers: Barriers,
) -> None:
    guest, queue = _packed(tracked=True)
    first, _ = queue.pop()
    flags = guest.packed.ring.cast("H")

    barriers.at = lambda: (_is_used(flags[7]), queue._h[inflight_packed._USED_IDX_AT])
    queue.push(first[0], 1)

    assert barriers.seen == [(False, 1)]
    assert _is_used(flags[7])


def test_packed_position_of_a_wish_is_in_place_before_the_wish(barriers: Barriers) -> None:
    guest, queue = _packed()
    queue.pop()
    event = guest.packed.device_event
    queue.disarm()

    barriers.at = lambda: (event[0], event[1])
    queue.arm()

    ((position, wish),) = barriers.seen  # type: ignore[misc]
    assert (position, event[1]) == (2 | 1 << 15, EVENT_AT_DESCRIPTOR)
    assert wish != EVENT_AT_DESCRIPTOR


def _is_used(flags: int) -> bool:
    return bool(flags & DESC_USED) == bool(flags & DESC_AVAIL)
