"""The packed virtqueue (virtio 1.3 §2.8)."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.errors import ProtocolError
from bridge.guest.virtio.chain import NO_TYPE, Chain, QueueBroken
from bridge.guest.virtio.packed_queue import PackedQueue
from bridge.peers.split_driver import Buffer
from bridge.spec.virtqueue import (
    DESC_AVAIL,
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_WRITE,
    EVENT_AT_DESCRIPTOR,
    EVENT_DISABLE,
    EVENT_ENABLE,
)
from tests.guest.virtio.mock import DEVICE_WRITES, QueueRig, data_of
from tests.guest.virtio.packed_driver import PackedDriver

HEADER = struct.pack("<IIQ", 1, 0, 7)


class PackedGuest(QueueRig):
    """A guest with a packed ring at address 0."""

    def __init__(
        self,
        *,
        size: int = 8,
        event_idx: bool = True,
        indirect: bool = True,
        start: int = 0,
        wrap: int = 1,
    ) -> None:
        super().__init__()
        area = self.memory.views(0, PackedDriver.area_bytes(size))[0]
        area[:] = bytes(len(area))
        self.packed = PackedDriver(area, size=size, start=start, wrap=wrap)
        at = 16 * size
        self.areas = (area[:at], area[at : at + 4], area[at + 4 : at + 8])
        self.size, self.event_idx, self.indirect = size, event_idx, indirect
        self.device = PackedQueue(
            self.memory,
            self.areas,
            size=size,
            base=self.packed.start_base,
            event_idx=event_idx,
            indirect=indirect,
        )
        self.tokens = 0

    def add(self, *buffers: Buffer, buffer_id: int | None = None) -> int:
        self.tokens += 1
        self.packed.add(self.tokens, buffers, buffer_id=buffer_id)
        return self.tokens

    def usual(self) -> list[Buffer]:
        return [
            (self.alloc(HEADER), 16, 0),
            (self.alloc(b"x" * 512), 512, 0),
            (self.alloc(1), 1, DEVICE_WRITES),
        ]

    def status(self, count: int = 1) -> list[Buffer]:
        """A chain of `count` descriptors with room for a status."""
        return [(self.alloc(1), 1, DEVICE_WRITES)] * count

    def pop_one(self) -> Chain:
        [chain] = self.device.pop()
        return chain


def test_usual_chain_is_taken_apart_and_used() -> None:
    guest = PackedGuest()
    token = guest.add(*guest.usual())
    chain = guest.pop_one()
    assert (chain[1], chain[2], chain[-1]) == (1, 7, None)
    assert data_of(chain)[0] == b"x" * 512
    guest.device.push(chain[0], 1)
    assert guest.packed.poll() == []
    guest.device.publish()
    assert guest.packed.poll() == [(token, 1)]


@given(
    size=st.integers(1, 9),
    start=st.integers(0, 8),
    wrap=st.integers(0, 1),
    lengths=st.lists(st.integers(1, 4), max_size=40),
    data=st.data(),
)
@settings(max_examples=100)
def test_any_chains_come_back_once_in_any_order(
    size: int, start: int, wrap: int, lengths: list[int], data: st.DataObject
) -> None:
    """Wrap counters of both sides flip independently; completion order is free."""
    guest = PackedGuest(size=size, start=start % size, wrap=wrap)
    waiting: list[int] = []
    expected: list[tuple[int, int]] = []
    heads: dict[int, int] = {}
    for length in lengths:
        length = min(length, size)
        while guest.packed.free < length:
            token = waiting.pop(data.draw(st.integers(0, len(waiting) - 1)))
            guest.device.push(heads.pop(token), token & 0xFF)
            expected.append((token, token & 0xFF))
            guest.device.publish()
            assert guest.packed.poll() == [expected.pop()]
        token = guest.add(*guest.status(length))
        [chain] = guest.device.pop()
        heads[token] = chain[0]
        waiting.append(token)
    for token in waiting:
        guest.device.push(heads[token], 1)
    guest.device.publish()
    assert guest.packed.poll() == [(token, 1) for token in waiting]
    assert guest.device.in_flight == 0
    end = guest.device.close(told=True)
    driver = guest.packed
    assert end == (
        driver.next_avail
        | driver.avail_wrap << 15
        | driver.next_used << 16
        | driver.used_wrap << 31
    )


def test_batch_is_invisible_until_published_then_all_is() -> None:
    guest = PackedGuest()
    tokens = [guest.add(*guest.status()) for _ in range(3)]
    for chain in guest.device.pop():
        guest.device.push(chain[0], 1)
    assert guest.packed.poll() == []
    guest.device.publish()
    assert [token for token, _ in guest.packed.poll()] == tokens


def test_indirect_table_is_used_in_order_whatever_its_next_says() -> None:
    guest = PackedGuest()
    buffers = guest.usual()
    table = guest.alloc(b"".join(struct.pack("<QIHH", a, n, 9, f) for a, n, f in buffers))
    guest.add((table, 48, DESC_INDIRECT))
    chain = guest.pop_one()
    assert chain[-1] is None
    assert data_of(chain)[0] == b"x" * 512


@pytest.mark.parametrize(
    ("buffers", "text"),
    [
        ([(0x8000, 16, 0), (0x8000, 16, DESC_INDIRECT)], "among others"),
        ([(0x8000, 16, DESC_INDIRECT), (0x8000, 1, 2)], "among others"),
        ([(0x8000, 0, DESC_INDIRECT)], "bad length"),
        ([(0x8000, 17, DESC_INDIRECT)], "bad length"),
        ([(0, 1025 * 16, DESC_INDIRECT)], "more than 1024"),
        ([(1 << 40, 16, DESC_INDIRECT)], "no memory region"),
        ([(1 << 40, 16, 0), (0x8000, 1, 2)], "no memory region"),
        ([((1 << 64) - 1, 16, 0), (0x8000, 1, 2)], "no memory region"),
        ([(0x8000, 1, 2), (0x8000, 16, 0)], "follows a writable"),
        ([(0, 0xFFFFFFFF, 0), (0, 0xFFFFFFFF, 0)], "more than 2^32"),
        ([(0x8000, 16, 0)], "without a status byte"),
    ],
)
def test_malformed_chain_has_a_fault_and_the_queue_lives(buffers: list[Buffer], text: str) -> None:
    guest = PackedGuest()
    token = guest.add(*buffers)
    chain = guest.pop_one()
    assert chain[1] == NO_TYPE
    assert text in str(chain[-1])
    guest.device.push(chain[0], 0)
    guest.device.publish()
    assert guest.packed.poll() == [(token, 0)]
    guest.add(*guest.usual())
    assert guest.pop_one()[-1] is None


def test_indirect_inside_a_table_is_malformed() -> None:
    guest = PackedGuest()
    table = guest.alloc(struct.pack("<QIHH", 0x8000, 16, 0, DESC_INDIRECT))
    guest.add((table, 16, DESC_INDIRECT))
    assert "among others" in str(guest.pop_one()[-1])


def test_indirect_without_negotiation_is_malformed() -> None:
    guest = PackedGuest(indirect=False)
    guest.add((guest.alloc(bytes(16)), 16, DESC_INDIRECT))
    assert "not negotiated" in str(guest.pop_one()[-1])


def test_chain_without_an_end_breaks_the_queue() -> None:
    """CVE-2026-16457: neither a loop nor a livelock."""
    guest = PackedGuest()
    for slot in range(8):
        struct.pack_into("=QIHH", guest.areas[0], 16 * slot, 0, 16, 0, DESC_NEXT | DESC_AVAIL)
    for _ in range(2):
        with pytest.raises(QueueBroken):
            guest.device.pop()


def test_descriptors_made_available_again_before_they_are_used_break_the_queue() -> None:
    """In-flight descriptors are bounded by the ring, whatever flags the guest writes."""
    guest = PackedGuest(size=4)
    for _ in range(4):
        guest.add(*guest.status())
    assert len(guest.device.pop()) == 4
    for slot in range(4):
        struct.pack_into("=QIHH", guest.areas[0], 16 * slot, 0, 16, 0, 1 << 15)
    with pytest.raises(QueueBroken):
        guest.device.pop()


def test_same_buffer_id_twice_is_answered_twice() -> None:
    guest = PackedGuest()
    guest.add(*guest.status(), buffer_id=3)
    guest.add(*guest.status(2), buffer_id=3)
    chains = guest.device.pop()
    for chain in chains:
        guest.device.push(chain[0], 1)
    guest.device.publish()
    assert guest.device.in_flight == 0


@pytest.mark.parametrize("base", [8, 8 << 16, 0x7FFF7FFF])
def test_base_outside_the_ring_is_refused(base: int) -> None:
    guest = PackedGuest(size=8)
    with pytest.raises(ProtocolError):
        PackedQueue(guest.memory, guest.areas, size=8, base=base, event_idx=True, indirect=True)


@given(ring=st.binary(min_size=64, max_size=64), base=st.integers(0, 3), wraps=st.integers(0, 3))
@settings(max_examples=300)
def test_random_rings_end_in_chains_or_a_broken_queue(ring: bytes, base: int, wraps: int) -> None:
    guest = PackedGuest(size=4)
    guest.areas[0][:] = ring
    base = base | base << 16 | (wraps & 1) << 15 | (wraps >> 1) << 31
    queue = PackedQueue(guest.memory, guest.areas, size=4, base=base, event_idx=True, indirect=True)
    try:
        for _ in range(5):
            for chain in queue.pop():
                queue.push(chain[0], 0)
            queue.publish()
    except QueueBroken:
        pass
    assert queue.in_flight <= 4


# Event suppression (§2.8.10)


def complete(guest: PackedGuest, count: int = 1) -> bool:
    for chain in guest.device.pop()[:count]:
        guest.device.push(chain[0], 1)
    return guest.device.publish()


def test_first_completion_after_start_always_calls() -> None:
    guest = PackedGuest()
    guest.packed.driver_event[1] = EVENT_DISABLE
    guest.add(*guest.status())
    assert complete(guest)


@pytest.mark.parametrize(("flags", "expected"), [(EVENT_ENABLE, True), (EVENT_DISABLE, False)])
@pytest.mark.parametrize("event_idx", [False, True])
def test_driver_flags_decide(flags: int, expected: bool, event_idx: bool) -> None:
    guest = PackedGuest(event_idx=event_idx)
    guest.add(*guest.status())
    complete(guest)
    guest.packed.driver_event[1] = flags
    guest.add(*guest.status())
    assert complete(guest) is expected


@given(
    start=st.integers(0, 7), wrap=st.integers(0, 1), count=st.integers(1, 8), at=st.integers(0, 7)
)
def test_driver_position_decides(start: int, wrap: int, count: int, at: int) -> None:
    """Call iff the wanted descriptor is one of those just used."""
    guest = PackedGuest(start=start, wrap=wrap)
    guest.device._signal_anyway = False
    for _ in range(count):
        guest.add(*guest.status())
    position = (start + at) % 8
    lap = wrap ^ (start + at >= 8)
    guest.packed.driver_event[0] = position | lap << 15
    guest.packed.driver_event[1] = EVENT_AT_DESCRIPTOR
    assert complete(guest, count) is (at < count)


@pytest.mark.parametrize("event_idx", [False, True])
def test_armed_the_next_chain_is_kicked_for(event_idx: bool) -> None:
    guest = PackedGuest(event_idx=event_idx, start=7)
    assert not guest.packed.wants_kick(6)  # not while it is awake
    assert not guest.device.arm()
    old = guest.packed.next_avail
    guest.add(*guest.status(2))
    assert guest.packed.wants_kick(old)
    guest.device.disarm()
    assert guest.packed.device_event[1] == EVENT_DISABLE


def test_arm_sees_a_chain_that_came_just_before() -> None:
    guest = PackedGuest()
    guest.add(*guest.status())
    assert guest.device.arm()


def test_write_flag_of_a_used_descriptor_says_that_something_was_written() -> None:
    guest = PackedGuest()
    for length in (0, 1):
        guest.add(*guest.status())
        chain = guest.pop_one()
        guest.device.push(chain[0], length)
        guest.device.publish()
    flags = [struct.unpack_from("=H", guest.areas[0], 16 * slot + 14)[0] for slot in range(2)]
    assert [bool(each & DESC_WRITE) for each in flags] == [False, True]
