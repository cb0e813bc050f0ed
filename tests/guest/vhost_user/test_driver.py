"""The guest's side of both kinds of virtqueue, against a plain device written from the text of the
specification: nothing lost, nothing twice, no wake-up missed."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.peers.packed_driver import PackedDriver
from bridge.peers.split_driver import QueueFull, SplitDriver, write_chain
from bridge.spec.virtqueue import (
    DESC_AVAIL,
    DESC_INDIRECT,
    DESC_NEXT,
    DESC_USED,
    DESC_WRITE,
    EVENT_AT_DESCRIPTOR,
    EVENT_DISABLE,
)

Chain = list[tuple[int, int, int]]


def need_event(event: int, new: int, old: int) -> bool:
    """vring_need_event of the specification."""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF


class PlainSplitDevice:
    """virtio 1.3 §2.7, one thing at a time."""

    def __init__(self, area: memoryview, driver: SplitDriver, *, event_idx: bool) -> None:
        self.size = driver.size
        self.area = area
        self.avail, self.used = driver.avail_offset, driver.used_offset
        self.event_idx = event_idx
        self.last_avail = driver.avail_idx
        self.used_idx = driver.used_idx
        self.sleep()

    def u16(self, at: int) -> int:
        return struct.unpack_from("<H", self.area, at)[0]

    def set_u16(self, at: int, value: int) -> None:
        struct.pack_into("<H", self.area, at, value & 0xFFFF)

    def sleep(self) -> bool:
        """Ask for a kick; True if there is work after all."""
        if self.event_idx:
            self.set_u16(self.used + 4 + 8 * self.size, self.last_avail)
        else:
            self.set_u16(self.used, 0)
        return self.u16(self.avail + 2) != self.last_avail

    def awake(self) -> None:
        """Ask for no kicks."""
        if not self.event_idx:
            self.set_u16(self.used, 1)

    def pop(self) -> tuple[int, Chain] | None:
        if self.u16(self.avail + 2) == self.last_avail:
            return None
        head = self.u16(self.avail + 4 + 2 * (self.last_avail % self.size))
        self.last_avail = (self.last_avail + 1) & 0xFFFF
        chain, index = [], head
        while True:
            address, length, flags, following = struct.unpack_from("<QIHH", self.area, index * 16)
            chain.append((address, length, flags & ~DESC_NEXT))
            if not flags & DESC_NEXT:
                return head, chain
            index = following

    def push(self, head: int, length: int) -> bool:
        """Use a chain; True if the driver wants to be called for it."""
        at = self.used + 4 + 8 * (self.used_idx % self.size)
        struct.pack_into("<II", self.area, at, head, length)
        old, self.used_idx = self.used_idx, (self.used_idx + 1) & 0xFFFF
        self.set_u16(self.used + 2, self.used_idx)
        if self.event_idx:
            return need_event(self.u16(self.avail + 4 + 2 * self.size), self.used_idx, old)
        return not self.u16(self.avail) & 1


class PlainPackedDevice:
    """virtio 1.3 §2.8, one thing at a time."""

    def __init__(self, area: memoryview, driver: PackedDriver, *, event_idx: bool) -> None:
        self.size = driver.size
        self.area = area
        self.driver_area, self.device_area = driver.avail_offset, driver.used_offset
        self.event_idx = event_idx
        self.avail, self.avail_wrap = 0, 1
        self.used, self.used_wrap = 0, 1
        self.counts: dict[int, int] = {}
        self.sleep()

    def sleep(self) -> bool:
        event = (
            (self.avail | self.avail_wrap << 15, EVENT_AT_DESCRIPTOR) if self.event_idx else (0, 0)
        )
        struct.pack_into("<HH", self.area, self.device_area, *event)
        return self.is_available()

    def awake(self) -> None:
        struct.pack_into("<HH", self.area, self.device_area, 0, EVENT_DISABLE)

    def is_available(self) -> bool:
        flags = struct.unpack_from("<H", self.area, self.avail * 16 + 14)[0]
        return bool(flags & DESC_AVAIL) == bool(self.avail_wrap) != bool(flags & DESC_USED)

    def pop(self) -> tuple[int, Chain] | None:
        if not self.is_available():
            return None
        chain: Chain = []
        while True:
            fields = struct.unpack_from("<QIHH", self.area, self.avail * 16)
            address, length, identity, flags = fields
            chain.append((address, length, flags & ~(DESC_NEXT | DESC_AVAIL | DESC_USED)))
            self.avail += 1
            if self.avail == self.size:
                self.avail, self.avail_wrap = 0, self.avail_wrap ^ 1
            if not flags & DESC_NEXT:
                self.counts[identity] = len(chain)
                return identity, chain

    def push(self, identity: int, length: int) -> bool:
        flags = DESC_AVAIL | DESC_USED if self.used_wrap else 0
        struct.pack_into("<QIHH", self.area, self.used * 16, 0, length, identity, flags)
        old = self.used + (0 if self.used_wrap else self.size)
        count = self.counts.pop(identity)
        self.used += count
        if self.used >= self.size:
            self.used, self.used_wrap = self.used - self.size, self.used_wrap ^ 1
        wish, mode = struct.unpack_from("<HH", self.area, self.driver_area)
        if mode != EVENT_AT_DESCRIPTOR:
            return mode != EVENT_DISABLE
        # Whether the slot that the driver named is among those just passed.
        named = (wish & 0x7FFF) + (0 if wish >> 15 else self.size)
        return (named - old) % (2 * self.size) < count


def both(
    *, packed: bool, size: int, event_idx: bool
) -> tuple[SplitDriver | PackedDriver, PlainSplitDevice | PlainPackedDevice]:
    """A driver and a plain device on the same memory."""
    if packed:
        area = memoryview(bytearray(PackedDriver.area_bytes(size)))
        packed_driver = PackedDriver(area, size=size, event_idx=event_idx)
        return packed_driver, PlainPackedDevice(area, packed_driver, event_idx=event_idx)
    area = memoryview(bytearray(SplitDriver.area_bytes(size)))
    driver = SplitDriver(area, size=size, event_idx=event_idx, base=65530)
    return driver, PlainSplitDevice(area, driver, event_idx=event_idx)


rings = st.tuples(st.booleans(), st.sampled_from([1, 2, 4, 8, 16]), st.booleans())


@settings(max_examples=200, deadline=None)
@given(rings, st.data())
def test_every_chain_arrives_as_it_was_added_and_is_used_once(
    ring: tuple[bool, int, bool], data: st.DataObject
) -> None:
    packed, size, event_idx = ring
    driver, device = both(packed=packed, size=size, event_idx=event_idx)
    sent: dict[int, Chain] = {}
    held: list[tuple[int, int]] = []
    token = 0
    for step in data.draw(st.lists(st.sampled_from("aaappuuk"), max_size=120)):
        if step == "a":
            count = data.draw(st.integers(1, min(4, size)))
            chain = [(token * 100 + n, n + 1, DESC_WRITE * (n % 2)) for n in range(count)]
            try:
                driver.add(token, chain)
            except QueueFull:
                continue
            sent[token] = chain
            token += 1
        elif step == "p":
            driver.publish()
            popped = device.pop()
            if popped is not None:
                number = popped[1][0][0] // 100
                assert popped[1] == sent[number]
                held.append((popped[0], number))
        elif step == "u" and held:
            head, number = held.pop(data.draw(st.integers(0, len(held) - 1)))
            device.push(head, number + 7)
        else:
            for number, length in driver.poll():
                assert length == number + 7
                del sent[number]
    assert driver.in_flight >= len(held)


@settings(max_examples=200, deadline=None)
@given(rings, st.data())
def test_no_kick_and_no_call_is_missed(ring: tuple[bool, int, bool], data: st.DataObject) -> None:
    """Rule `notify` from both sides: a side that sleeps after asking is woken by the next event."""
    packed, size, event_idx = ring
    driver, device = both(packed=packed, size=size, event_idx=event_idx)
    device_asleep = driver_asleep = True
    driver.arm()
    held: list[int] = []
    for step in data.draw(st.lists(st.sampled_from("aadduus"), max_size=200)):
        if step == "a" and not driver_asleep:
            try:
                for _ in range(data.draw(st.integers(1, 3))):
                    driver.add(0, [(0, 1, 0)])
            except QueueFull:
                pass
            if driver.publish():
                device_asleep = False
        elif step == "a":
            driver_asleep = False  # something else woke it
            driver.disarm()
        elif step == "d" and not device_asleep:
            device.awake()
            while (popped := device.pop()) is not None:
                held.append(popped[0])
            device_asleep = not device.sleep()
        elif step == "u" and held:
            if device.push(held.pop(), 1):
                driver_asleep = False
        elif step == "s" and not driver_asleep:
            driver.disarm()
            driver.poll()
            driver_asleep = not driver.arm()
        if device_asleep:
            assert device.pop() is None
        if driver_asleep:
            assert not driver.has_used


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
def test_indexes_run_over_their_end(packed: bool, event_idx: bool) -> None:
    """Rule `ring`.2: more than 65536 requests, and the packed ring's wrap counters."""
    driver, device = both(packed=packed, size=8, event_idx=event_idx)
    for token in range(70_000):
        driver.add(token, [(1, 2, 0), (3, 4, DESC_WRITE), (5, 6, DESC_WRITE)][: 1 + token % 3])
        driver.publish()
        popped = device.pop()
        assert popped is not None
        device.push(popped[0], token)
        assert driver.poll() == [(token, token)]


def test_packed_ring_size_needs_no_power_of_two() -> None:
    driver, device = both(packed=True, size=7, event_idx=True)
    for token in range(100):
        driver.add(token, [(token, 1, 0)] * 3)
        popped = device.pop()
        assert popped is not None
        assert len(popped[1]) == 3
        device.push(popped[0], 1)
        assert driver.poll() == [(token, 1)]


@pytest.mark.parametrize("packed", [False, True])
def test_base_says_where_to_go_on(packed: bool) -> None:
    driver, device = both(packed=packed, size=4, event_idx=False)
    start = 0x8000_8000 if packed else 65530
    assert driver.base == driver.restore_base == start

    for token in range(3):
        driver.add(token, [(1, 2, 0)])
    driver.publish()
    popped = device.pop()
    assert popped is not None
    device.push(popped[0], 1)

    if packed:
        assert driver.base == 0x8000_8003
        assert driver.restore_base == 0x8001_8001
        driver.poll()
        assert driver.base == 0x8001_8003
        assert driver.restore_base == 0x8001_8001
    else:
        assert driver.base == 65533
        assert driver.restore_base == 65531


@pytest.mark.parametrize("packed", [False, True])
def test_completion_of_a_chain_that_is_not_in_flight_is_noticed(packed: bool) -> None:
    driver, device = both(packed=packed, size=4, event_idx=False)
    driver.add(1, [(1, 2, 0)])
    driver.publish()
    popped = device.pop()
    assert popped is not None
    device.push(popped[0], 1)
    driver.poll()
    if isinstance(device, PlainPackedDevice):
        device.counts[popped[0]] = 1
    device.push(popped[0], 1)

    with pytest.raises(ValueError, match="not given"):
        driver.poll()


def test_indirect_table_holds_the_chain() -> None:
    table = memoryview(bytearray(48))

    assert write_chain(table, [(1, 2, 0), (3, 4, DESC_WRITE), (5, 6, DESC_WRITE)]) == 48
    assert list(struct.iter_unpack("<QIHH", table)) == [
        (1, 2, DESC_NEXT, 1),
        (3, 4, DESC_WRITE | DESC_NEXT, 2),
        (5, 6, DESC_WRITE, 0),
    ]
    assert DESC_INDIRECT == 4


def test_area_parts_are_aligned_and_apart() -> None:
    for size in (1, 2, 4, 8, 128, 1024, 32768):
        driver = SplitDriver(memoryview(bytearray(SplitDriver.area_bytes(size))), size=size)
        assert driver.avail_offset == 16 * size
        assert driver.used_offset % 4 == 0
        assert driver.used_offset >= driver.avail_offset + 6 + 2 * size
        assert SplitDriver.area_bytes(size) >= driver.used_offset + 6 + 8 * size
