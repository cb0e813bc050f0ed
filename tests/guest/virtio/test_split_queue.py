"""The split virtqueue against the rules, by their names (`ring`, `chain`, `notify`)."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bridge.datapath.cells import SIGNAL_ANYWAY
from bridge.datapath.usual import usual_chain
from bridge.guest.virtio.chain import NO_TYPE, Chain, QueueBroken
from bridge.guest.virtio.dirty_log import address_of
from bridge.guest.virtio.long_chains import MAX_LONG_VIEWS, LongChains
from bridge.guest.virtio.split_queue import SplitQueue
from bridge.spec.virtqueue import DESC_INDIRECT, DESC_NEXT, DESC_WRITE
from tests.guest.virtio.mock import DEVICE_WRITES, MEMORY_BYTES, QueueRig, data_of

HEADER = struct.pack("<IIQ", 1, 0, 7)


def pop_one(guest: QueueRig) -> Chain:
    [chain] = guest.queue.pop()
    return chain


def fault_of(guest: QueueRig) -> str:
    fault = pop_one(guest)[-1]
    assert fault is not None
    return fault


def usual(guest: QueueRig) -> list[tuple[int, int, int]]:
    """Header, 512 bytes to write, status."""
    return [
        (guest.alloc(HEADER), 16, 0),
        (guest.alloc(b"x" * 512), 512, 0),
        (guest.alloc(1), 1, DEVICE_WRITES),
    ]


# `ring`: indexes


@pytest.mark.parametrize("size", [1, 2, 8, 256])
def test_ring_indexes_wrap_at_65536(size: int) -> None:
    guest = QueueRig(size=max(size, 4), base=65530)
    for number in range(40):
        token = guest.put(*usual(guest))
        chain = pop_one(guest)
        assert chain[1:3] == (1, 7)
        guest.queue.push(chain[0], number)
        guest.queue.publish()
        assert guest.driver.poll() == [(token, number)]
    assert guest.driver.device_used_idx == (65530 + 40) & 0xFFFF
    assert guest.queue.close(told=True) == (65530 + 40) & 0xFFFF


@given(start=st.integers(0, 65535), batches=st.lists(st.integers(0, 4), max_size=30))
@settings(max_examples=50)
def test_ring_indexes_any_start_and_any_batches_keep_order(start: int, batches: list[int]) -> None:
    guest = QueueRig(size=4, base=start)
    header = guest.alloc(HEADER)
    for batch in batches:
        tokens = [guest.put((header, 16, DEVICE_WRITES)) for _ in range(batch)]
        chains = guest.queue.pop()
        assert len(chains) == batch == guest.queue.in_flight
        for chain in chains:
            guest.queue.push(chain[0], 1)
        guest.queue.publish()
        assert guest.driver.poll() == [(token, 1) for token in tokens]
    assert guest.queue.in_flight == 0


@pytest.mark.parametrize("jump", [17, 1000, 32768, 65535])
def test_ring_bounds_available_index_too_far_ahead_breaks_the_queue(jump: int) -> None:
    """T23-T25, T57; a step backwards is the same error."""
    guest = QueueRig(size=16)
    guest.driver.set_avail_idx(jump)
    with pytest.raises(QueueBroken, match="ring of 16"):
        guest.queue.pop()
    with pytest.raises(QueueBroken):
        guest.queue.pop()


def test_ring_bounds_in_flight_counts_against_the_size() -> None:
    """CVE-2016-5403: a driver that re-adds without waiting cannot make us hold more."""
    guest = QueueRig(size=4)
    header = guest.alloc(HEADER)
    guest.raw(0, header, 16, DESC_WRITE)
    for _ in range(4):
        guest.put_head(0)
    assert len(guest.queue.pop()) == 4
    guest.put_head(0)
    with pytest.raises(QueueBroken, match="1 available and 4 in flight"):
        guest.queue.pop()


def test_ring_bounds_base_far_from_the_used_index_bounds_the_work() -> None:
    """vm-virtio#196: a front-end's wrong base does not allow 65535 requests."""
    guest = QueueRig(size=4)
    queue = guest.make_queue(base=40000)
    guest.driver.set_avail_idx(3)
    with pytest.raises(QueueBroken):
        queue.pop()


def test_ring_bounds_head_out_of_range_breaks_the_queue_after_the_good_ones() -> None:
    guest = QueueRig(size=8)
    guest.put(*usual(guest))
    guest.put_head(8)
    guest.put_head(0)
    assert len(guest.queue.pop()) == 1
    with pytest.raises(QueueBroken, match="descriptor 8 of 8"):
        guest.queue.pop()


def test_ring_heads_same_head_twice_is_answered_twice() -> None:
    """T22, T74."""
    guest = QueueRig(size=8)
    guest.raw(0, guest.alloc(1), 1, DESC_WRITE)
    guest.put_head(0)
    guest.put_head(0)
    for chain in guest.queue.pop():
        guest.queue.push(chain[0], 1)
    guest.queue.publish()
    assert guest.driver.device_used_idx == 2
    assert guest.queue.in_flight == 0


def test_ring_order_elements_are_invisible_until_published() -> None:
    guest = QueueRig()
    token = guest.put(*usual(guest))
    chain = pop_one(guest)
    guest.queue.push(chain[0], 1)
    assert guest.driver.poll() == []
    guest.queue.publish()
    assert guest.driver.poll() == [(token, 1)]


def test_pop_of_nothing_new_is_nothing() -> None:
    """T68, T69, T71: spurious kicks."""
    assert QueueRig().queue.pop() == []


# `chain`: chains


@pytest.mark.parametrize("indirect", [False, True])
def test_usual_chain_is_taken_apart(indirect: bool) -> None:
    guest = QueueRig()
    guest.put(*usual(guest), indirect=indirect)
    _, type_, sector, readable, writable, status_view, status_at, fault = pop_one(guest)
    assert (type_, sector, fault) == (1, 7, None)
    assert [bytes(view) for view in readable] == [b"x" * 512]
    assert writable == []
    assert status_view is not None
    assert status_view[status_at] == 0xEE


@given(data=st.data())
@settings(max_examples=200)
def test_short_cut_and_walk_agree(data: st.DataObject) -> None:
    """`usual_chain` is only faster: whatever it accepts, `_walk` resolves to the same."""
    half = MEMORY_BYTES // 2
    regions = [(0, 0, MEMORY_BYTES)]
    if data.draw(st.booleans()):
        regions = [(0, 0, half), (half, half, half // 2), (1 << 32, half + half // 2, half // 2)]
    guest = QueueRig(size=8, regions=regions)
    edges = (0x20000, half, half + half // 2, MEMORY_BYTES, 1 << 32, (1 << 32) + half // 2)
    near = [edge + by for edge in edges for by in (-512, -16, -1, 0)]
    address = st.sampled_from([0, 64, *near, 1 << 63, (1 << 64) - 1])
    length = st.sampled_from([0, 1, 16, 48, 512, 4096])
    flags = st.sampled_from([0, 1, 2, 3, 4, 5])
    table = guest.alloc(
        b"".join(
            struct.pack("<QIHH", data.draw(address), data.draw(length), data.draw(flags), following)
            for following in (1, 2, data.draw(st.integers(0, 3)))
        )
    )
    for index in range(3):
        guest.raw(index, data.draw(address), data.draw(length), data.draw(flags), index + 1)
    if data.draw(st.booleans()):
        guest.raw(0, table, 48, DESC_INDIRECT)
    queue = guest.queue
    assert isinstance(queue, SplitQueue)
    short = usual_chain(queue, 0, 7, queue.regions[0], queue.regions[1])
    if short is None:
        return
    type_, sector, data_region, data_at, length, status_region, status_at, segments = short
    _, *fields, readable, writable, status_view, walked_at, fault = queue._walk(0)
    assert [type_, sector, None] == [*fields, fault]
    assert bool(readable) is (type_ == 1)
    views = [
        queue.views[region][at : at + n_bytes]
        for region, at, n_bytes in segments or [(data_region, data_at, length)]
    ]
    found, walked = (
        [(address_of(view), len(view)) for view in each] for each in (views, readable or writable)
    )
    assert found == walked
    assert sum(n_bytes for _, n_bytes in found) == length
    status = queue.views[status_region][status_at : status_at + 1]
    assert status_view is not None
    assert address_of(status) == address_of(status_view) + walked_at


@pytest.mark.parametrize(
    ("number", "descriptors", "text"),
    [
        ("T1 loop", [(0, 16, DESC_NEXT, 0)], "longer than its table of 8"),
        (
            "T21 loop of two",
            [(0, 16, DESC_NEXT, 1), (0, 16, DESC_NEXT, 0)],
            "longer than its table of 8",
        ),
        ("T3 next out of range", [(0, 16, DESC_NEXT, 8)], "descriptor 8 of a table of 8"),
        ("T3 next far out of range", [(0, 16, DESC_NEXT, 65535)], "descriptor 65535"),
        ("T18 indirect length 0", [(0x8000, 0, DESC_INDIRECT, 0)], "bad length: 0 bytes"),
        ("T19 indirect length 17", [(0x8000, 17, DESC_INDIRECT, 0)], "bad length: 17 bytes"),
        ("T64 indirect too long", [(0, 1025 * 16, DESC_INDIRECT, 0)], "more than 1024"),
        ("T99 indirect far too long", [(0, 0xFFFFFFF0, DESC_INDIRECT, 0)], "more than 1024"),
        ("T17 indirect and next", [(0, 16, DESC_INDIRECT | DESC_NEXT, 1)], "with a next one"),
        ("indirect outside", [(1 << 40, 16, DESC_INDIRECT, 0)], "in no memory region"),
        (
            "T53 readable after writable",
            [(0x8000, 1, 3, 1), (0x8000, 16, 0, 0)],
            "readable descriptor follows",
        ),
        ("T8 wrap", [((1 << 64) - 8, 16, DESC_NEXT, 1), (0x8000, 1, 2, 0)], "in no memory region"),
        ("T5 outside", [(1 << 40, 16, DESC_NEXT, 1), (0x8000, 1, 2, 0)], "in no memory region"),
        (
            "T7 past the end",
            [(MEMORY_BYTES - 8, 16, DESC_NEXT, 1), (0x8000, 1, 2, 0)],
            "in no memory region",
        ),
    ],
)
def test_chain_malformed_chain_has_a_fault(
    number: str, descriptors: list[tuple[int, int, int, int]], text: str
) -> None:
    guest = QueueRig(size=8)
    for index, (address, length, flags, following) in enumerate(descriptors):
        guest.raw(index, address, length, flags, following)
    guest.put_head(0)
    assert text in fault_of(guest)
    token = guest.put(*usual(guest))
    assert token  # the queue lives on
    assert pop_one(guest)[-1] is None


def test_chain_indirect_without_negotiation_is_malformed() -> None:
    """T15."""
    guest = QueueRig(indirect=False)
    guest.put(*usual(guest), indirect=True)
    assert "not negotiated" in fault_of(guest)


def test_chain_indirect_inside_indirect_is_malformed() -> None:
    """T16."""
    guest = QueueRig()
    inner = guest.alloc(struct.pack("<QIHH", 0x8000, 1, DESC_WRITE, 0))
    outer = guest.alloc(struct.pack("<QIHH", inner, 16, DESC_INDIRECT, 0))
    guest.raw(0, outer, 16, DESC_INDIRECT)
    guest.put_head(0)
    assert "inside an indirect table" in fault_of(guest)


@pytest.mark.parametrize("n_direct", [1, 2])
def test_chain_direct_then_indirect_is_one_chain(n_direct: int) -> None:
    """The device MUST handle it (virtio 1.3 §2.7.5.3.1); QEMU and libvhost-user do not."""
    guest = QueueRig()
    buffers = usual(guest)
    table = guest.alloc(bytes(16 * (3 - n_direct)))
    rest = buffers[n_direct:]
    for index, (address, length, flags) in enumerate(rest):
        last = index == len(rest) - 1
        guest.write(
            table + 16 * index,
            struct.pack("<QIHH", address, length, flags | (0 if last else DESC_NEXT), index + 1),
        )
    guest.put(*buffers[:n_direct], (table, 16 * len(rest), DESC_INDIRECT))
    chain = pop_one(guest)
    assert chain[-1] is None
    assert chain[1:3] == (1, 7)
    assert data_of(chain)[0] == b"x" * 512


def test_chain_write_flag_on_the_indirect_pointer_is_ignored() -> None:
    """T67, T89."""
    guest = QueueRig()
    guest.put(*usual(guest), indirect=True)
    address, length, _, _ = struct.unpack("<QIHH", bytes(guest.areas[0][16 * 15 :][:16]))
    guest.raw(15, address, length, DESC_INDIRECT | DESC_WRITE)
    assert pop_one(guest)[-1] is None


@pytest.mark.parametrize("entries", [515, 1024])
def test_chain_long_indirect_table_is_accepted(entries: int) -> None:
    """T2, T54, B51: Windows sends 515 entries whatever the queue's size."""
    guest = QueueRig(size=4)
    buffers = [(guest.alloc(HEADER), 16, 0)]
    buffers += [(guest.alloc(b"y" * 8), 8, 0)] * (entries - 2)
    buffers.append((guest.alloc(1), 1, DEVICE_WRITES))
    guest.put(*buffers, indirect=True)
    chain = pop_one(guest)
    assert chain[-1] is None
    assert data_of(chain)[0] == b"y" * 8 * (entries - 2)


def test_chain_indirect_table_unaligned_and_over_two_regions_is_read() -> None:
    """T58, T76."""
    guest = QueueRig(regions=((0, 0, 0x10000), (0x10000, 0x20000, 0x10000)))
    guest.alloc(64)  # room for the table's end
    buffers = usual(guest)
    table = 0x10000 - 25
    guest.write(
        table,
        b"".join(
            struct.pack(
                "<QIHH", address, length, flags | (DESC_NEXT if index < 2 else 0), index + 1
            )
            for index, (address, length, flags) in enumerate(buffers)
        ),
    )
    guest.raw(0, table, 48, DESC_INDIRECT)
    guest.put_head(0)
    chain = pop_one(guest)
    assert chain[-1] is None
    assert data_of(chain)[0] == b"x" * 512


def test_chain_buffer_over_two_regions_comes_in_order() -> None:
    """CVE-2019-18960."""
    guest = QueueRig(regions=((0, 0x20000, 0x20000), (0x20000, 0, 0x20000)))
    guest.write(0x20000 - 4, b"abcdefgh")
    guest.put((guest.alloc(HEADER), 16, 0), (0x20000 - 4, 8, 0), (guest.alloc(1), 1, DEVICE_WRITES))
    chain = pop_one(guest)
    assert [bytes(view) for view in chain[3]] == [b"abcd", b"efgh"]


def test_chain_zero_length_descriptors_are_skipped() -> None:
    """T6, T61, B27; CVE-2016-6490: bounded like any other."""
    guest = QueueRig()
    header, data, status = usual(guest)
    guest.put((0, 0, 0), header, (1 << 50, 0, 0), data, (5, 0, DEVICE_WRITES), status)
    chain = pop_one(guest)
    assert chain[-1] is None
    assert data_of(chain)[0] == b"x" * 512


def test_chain_more_than_4_gib_is_malformed() -> None:
    """T77. The sum, of lengths that are each possible."""
    guest = QueueRig(size=8)
    guest.memory.regions[0].size_bytes = 1 << 32  # a region big enough, for the bounds check
    assert isinstance(guest.queue, SplitQueue)
    guest.queue.use_memory(guest.memory, guest.areas)
    for index in range(2):
        guest.raw(index, 0, 0x80000000, DESC_NEXT, index + 1)
    guest.raw(2, 0x8000, 1, DESC_WRITE)
    guest.put_head(0)
    assert "more than 2^32" in fault_of(guest)


def test_chain_rings_as_buffers_do_not_crash() -> None:
    """T70."""
    guest = QueueRig()
    guest.put((0, 16, 0), (guest.driver.used_offset, 64, DEVICE_WRITES))
    chain = pop_one(guest)
    assert chain[-1] is None
    assert chain[5] is not None


def test_chain_descriptors_changed_after_the_pop_do_not_matter() -> None:
    """T51, T56, T75; CVE-2020-14375: everything is fetched once."""
    guest = QueueRig()
    guest.put(*usual(guest), indirect=True)
    chain = pop_one(guest)
    for index in range(16):
        guest.raw(index, 1 << 50, 0xFFFFFFFF, 0xFFFF, 0xFFFF)
    assert data_of(chain)[0] == b"x" * 512


def test_chain_fault_keeps_the_status_byte_if_it_is_known() -> None:
    guest = QueueRig()
    status = guest.alloc(1)
    guest.put((1 << 50, 16, 0), (status, 1, DEVICE_WRITES))
    chain = pop_one(guest)
    assert chain[1] == NO_TYPE
    assert chain[5] is not None
    chain[5][chain[6]] = 1
    assert guest.read(status, 1) == b"\1"


def test_chain_fault_in_the_last_writable_descriptor_has_no_status_byte() -> None:
    """The byte before it is data: nothing may be written there as a status."""
    guest = QueueRig()
    guest.put(
        (guest.alloc(HEADER), 16, 0),
        (guest.alloc(9), 9, DEVICE_WRITES),
        (1 << 50, 1, DEVICE_WRITES),
    )
    chain = pop_one(guest)
    assert chain[-1] is not None
    assert chain[5] is None


@given(
    table=st.binary(min_size=16 * 8, max_size=16 * 8),
    heads=st.lists(st.integers(0, 9), max_size=8),
)
@settings(max_examples=300)
def test_random_tables_end_in_chains_or_a_broken_queue(table: bytes, heads: list[int]) -> None:
    guest = QueueRig(size=8)
    guest.areas[0][:] = table
    for head in heads:
        guest.put_head(head)
    try:
        for chain in guest.queue.pop():
            assert (chain[-1] is None) == (chain[1] != NO_TYPE)
            guest.queue.push(chain[0], 0)
        guest.queue.publish()
    except QueueBroken:
        pass
    assert guest.queue.in_flight == 0


def test_long_chains_in_flight_are_bounded_and_the_rest_waits() -> None:
    """A view takes 200 bytes here: 1024 tables of 1024 entries would be 200 MB."""
    guest = QueueRig(size=256)
    entries = 1024
    table = guest.alloc(
        b"".join(
            struct.pack("<QIHH", 0x8000, 1, DESC_WRITE | (DESC_NEXT if n < 1023 else 0), n + 1)
            for n in range(entries)
        )
    )
    for _ in range(256):
        guest.put((table, 16 * entries, DESC_INDIRECT))
    first = guest.queue.pop()
    assert len(first) == MAX_LONG_VIEWS // entries + 1
    assert guest.queue.pop() == []
    assert not guest.queue.arm()  # nothing to be awake for until something ends
    for chain in first[:2]:
        guest.queue.push(chain[0], 1)
    assert guest.queue.arm()
    assert len(guest.queue.pop()) == 2
    assert guest.queue.in_flight == len(first)


def test_long_chains_of_one_head_are_all_counted() -> None:
    counted = LongChains()
    for _ in range(3):
        counted.popped(7, 1000)
    counted.pushed(1)
    counted.pushed(7)
    assert counted.views == 2000
    counted.pushed(7)
    counted.pushed(7)
    counted.pushed(7)
    assert counted.views == 0


# `notify`: notifications


def complete_one(guest: QueueRig) -> bool:
    guest.queue.push(pop_one(guest)[0], 1)
    return guest.queue.publish()


@pytest.mark.parametrize("event_idx", [False, True])
def test_notify_first_completion_after_start_always_calls(event_idx: bool) -> None:
    """SPDK#3150: used_event is the one of another life."""
    guest = QueueRig(event_idx=event_idx)
    guest.driver.set_avail_flags(1)
    guest.driver.set_used_event(30000)
    guest.put(*usual(guest))
    assert complete_one(guest)


@pytest.mark.parametrize(
    ("used_event", "expected"), [(1, True), (2, False), (0, False), (65535, False)]
)
def test_notify_event_idx_calls_when_the_wanted_index_is_passed(
    used_event: int, expected: bool
) -> None:
    guest = QueueRig(event_idx=True)
    guest.put(*usual(guest))
    complete_one(guest)
    guest.driver.poll()
    guest.driver.set_used_event(used_event)
    guest.driver.set_avail_flags(1)  # MUST be ignored with EVENT_IDX
    guest.put(*usual(guest))
    assert complete_one(guest) is expected


@given(old=st.integers(0, 65535), count=st.integers(1, 8), event=st.integers(0, 65535))
def test_notify_event_idx_over_any_batch_is_the_definition(
    old: int, count: int, event: int
) -> None:
    """Call iff `event` is one of the indexes old … old + count - 1 just published."""
    guest = QueueRig(size=8, base=old)
    header = guest.alloc(HEADER)
    queue = guest.queue
    assert isinstance(queue, SplitQueue)
    queue.cells[SIGNAL_ANYWAY] = 0
    for _ in range(count):
        guest.put((header, 16, DEVICE_WRITES))
    for chain in queue.pop():
        queue.push(chain[0], 1)
    guest.driver.set_used_event(event)
    assert queue.publish() is ((event - old) & 0xFFFF < count)


@pytest.mark.parametrize(("flags", "expected"), [(0, True), (1, False)])
def test_notify_without_event_idx_the_flag_decides(flags: int, expected: bool) -> None:
    guest = QueueRig(event_idx=False)
    guest.put(*usual(guest))
    complete_one(guest)
    guest.driver.poll()
    guest.driver.set_avail_flags(flags)
    guest.driver.set_used_event(1)  # to be ignored
    guest.put(*usual(guest))
    assert complete_one(guest) is expected


def test_notify_nothing_published_sends_no_call() -> None:
    assert not QueueRig().queue.publish()


def test_notify_armed_with_event_idx_the_next_chain_is_kicked_for() -> None:
    guest = QueueRig(event_idx=True)
    assert not guest.queue.arm()
    assert guest.driver.device_used_flags == 0
    guest.driver.add(1, usual(guest))
    assert guest.driver.publish()
    guest.queue.disarm()
    guest.driver.add(2, usual(guest))
    assert not guest.driver.publish()
    assert guest.driver.device_used_flags == 0


def test_notify_without_event_idx_the_flag_suppresses_kicks() -> None:
    guest = QueueRig(event_idx=False)
    assert guest.driver.device_used_flags == 1
    guest.queue.arm()
    assert guest.driver.device_used_flags == 0
    guest.queue.disarm()
    assert guest.driver.device_used_flags == 1


@pytest.mark.parametrize("event_idx", [False, True])
def test_ring_rearm_arm_sees_a_chain_that_came_just_before(event_idx: bool) -> None:
    """CH#897: the driver added it while the device asked for no kick."""
    guest = QueueRig(event_idx=event_idx)
    guest.put(*usual(guest))
    assert guest.queue.arm()
