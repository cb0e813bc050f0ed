"""Guest memory, dirty log and in-flight region in a session.

Rules `session`, `inflight`, `dirty_log` of docs/rules/virtio.md.
"""

from __future__ import annotations

import os

import pytest

from bridge.errors import ProtocolError
from bridge.guest.vhost_user.memory_table import MAX_MEMORY_SLOTS
from bridge.guest.vhost_user.messages import (
    InflightRange,
    LogRange,
    MessageType,
    RegionPayload,
    pack_memory_table,
    unpack_u64,
)
from tests.guest.vhost_user.fakes import Talk, memfd, region

U64 = 1 << 64


async def set_table(talk: Talk, regions: list[RegionPayload]) -> int:
    """SET_MEM_TABLE with one file each; the acknowledgement."""
    return await talk.ask(
        MessageType.SET_MEM_TABLE, pack_memory_table(regions), [memfd() for _ in regions]
    )


async def test_memory_table_gives_the_device_regions_with_their_files(talk: Talk) -> None:
    await talk.negotiate()
    regions = [region(0), region(1)]

    assert await set_table(talk, regions) == 0

    got = [
        (each.guest_address, each.size_bytes, each.user_address, each.mmap_offset_bytes)
        for each in talk.device.memory
    ]
    assert got == [
        (each.guest_address, each.size_bytes, each.user_address, each.mmap_offset_bytes)
        for each in regions
    ]


async def test_memory_table_of_8_regions_is_the_most(talk: Talk) -> None:
    await talk.negotiate()

    assert await set_table(talk, [region(number) for number in range(8)]) == 0
    assert await set_table(talk, [region(number) for number in range(9)]) == 1


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(RegionPayload(0, 0, 0, 0), id="empty"),
        pytest.param(RegionPayload(U64 - 4096, 8192, 0, 0), id="guest address overflows"),
        pytest.param(RegionPayload(0, 8192, U64 - 4096, 0), id="front-end address overflows"),
        pytest.param(RegionPayload(0, 8192, 0, U64 - 4096), id="file offset overflows"),
        pytest.param(RegionPayload(0, U64 - 1, 4096, 4096), id="size overflows"),
        pytest.param(
            RegionPayload(4096, 4096, region(0).user_address + (1 << 24), 0), id="overlap guest"
        ),
        pytest.param(
            RegionPayload(1 << 24, 4096, region(0).user_address + 4096, 0), id="overlap user"
        ),
    ],
)
async def test_bad_region_is_refused_in_a_table_and_alone(talk: Talk, bad: RegionPayload) -> None:
    await talk.negotiate()
    assert await set_table(talk, [region(0)]) == 0
    talk.device.calls.clear()

    assert await talk.ask(MessageType.ADD_MEM_REG, bad.pack_single(), [memfd()]) == 1
    assert await set_table(talk, [region(0), bad]) == 1
    assert talk.device.calls == []


async def test_region_up_to_the_last_address_is_taken(talk: Talk) -> None:
    await talk.negotiate()

    assert await set_table(talk, [RegionPayload(U64 - 4096, 4096, U64 - 4096, 0)]) == 0


async def test_regions_that_touch_are_taken(talk: Talk) -> None:
    await talk.negotiate()

    regions = [RegionPayload(0, 4096, 8192, 0), RegionPayload(4096, 4096, 4096, 0)]
    assert await set_table(talk, regions) == 0


async def test_memory_added_and_removed_while_rings_run(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring()

    assert await talk.ask(MessageType.ADD_MEM_REG, region(3).pack_single(), [memfd()]) == 0
    assert await talk.ask(MessageType.REM_MEM_REG, region(3).pack_single()) == 0

    assert talk.device.names()[-2:] == ["add_memory", "remove_memory"]


async def test_region_is_removed_whatever_its_file_offset_and_the_file_closed(talk: Talk) -> None:
    await talk.negotiate()
    await talk.ask(MessageType.ADD_MEM_REG, region(3).pack_single(), [memfd()])
    known = region(3)
    other_offset = RegionPayload(known.guest_address, known.size_bytes, known.user_address, 4096)

    assert await talk.ask(MessageType.REM_MEM_REG, other_offset.pack_single(), [memfd()]) == 0
    assert talk.device.memory == []


@pytest.mark.parametrize("field", ["guest_address", "size_bytes", "user_address"])
async def test_region_not_matching_in_one_field_is_not_removed(talk: Talk, field: str) -> None:
    await talk.negotiate()
    await talk.ask(MessageType.ADD_MEM_REG, region(3).pack_single(), [memfd()])
    fields = {
        name: getattr(region(3), name)
        for name in ("guest_address", "size_bytes", "user_address", "mmap_offset_bytes")
    }
    fields[field] += 4096

    assert (
        await talk.ask(MessageType.REM_MEM_REG, RegionPayload(**fields).pack_single(), [memfd()])
        == 1
    )
    assert len(talk.device.memory) == 1


async def test_region_removed_twice_is_refused(talk: Talk) -> None:
    await talk.negotiate()
    await talk.ask(MessageType.ADD_MEM_REG, region(3).pack_single(), [memfd()])

    assert await talk.ask(MessageType.REM_MEM_REG, region(3).pack_single()) == 0
    assert await talk.ask(MessageType.REM_MEM_REG, region(3).pack_single()) == 1


async def test_region_refused_by_the_device_can_be_added_later(talk: Talk) -> None:
    await talk.negotiate()
    talk.device.refuse.add("add_memory")
    assert await talk.ask(MessageType.ADD_MEM_REG, region(3).pack_single(), [memfd()]) == 1
    talk.device.refuse.clear()

    assert await talk.ask(MessageType.ADD_MEM_REG, region(3).pack_single(), [memfd()]) == 0


async def test_memory_slots_are_as_many_as_announced(talk: Talk) -> None:
    await talk.negotiate()
    reply = await talk.send(MessageType.GET_MAX_MEM_SLOTS)
    assert reply is not None
    assert unpack_u64(reply.data[12:]) == MAX_MEMORY_SLOTS

    for number in range(MAX_MEMORY_SLOTS):
        payload = region(number).pack_single()
        assert await talk.ask(MessageType.ADD_MEM_REG, payload, [memfd()]) == 0

    payload = region(MAX_MEMORY_SLOTS).pack_single()
    assert await talk.ask(MessageType.ADD_MEM_REG, payload, [memfd()]) == 1


@pytest.mark.parametrize("count", [0, 2, 8])
async def test_region_with_other_than_one_descriptor_is_refused_and_all_closed(
    talk: Talk, count: int
) -> None:
    """CVE-2019-14818: surplus descriptors were never closed."""
    await talk.negotiate()

    fds = [memfd() for _ in range(count)]
    assert await talk.ask(MessageType.ADD_MEM_REG, region().pack_single(), fds) == 1
    fds = [memfd() for _ in range(count)]
    with pytest.raises(ProtocolError):
        await talk.send(MessageType.ADD_MEM_REG, region().pack_single(), fds)


# Dirty log.


async def test_log_base_is_always_answered_once(talk: Talk) -> None:
    await talk.negotiate()

    for need_reply in (False, True):
        reply = await talk.send(
            MessageType.SET_LOG_BASE, LogRange(4096, 0).pack(), [memfd()], need_reply=need_reply
        )
        assert reply is not None
        assert len(reply.data) == 20
    assert talk.device.names()[-2:] == ["set_log", "set_log"]


@pytest.mark.parametrize(
    "log", [LogRange(0, 0), LogRange(U64 - 1, U64 - 1), LogRange(4096, U64 - 4096)]
)
async def test_log_range_that_overflows_is_refused(talk: Talk, log: LogRange) -> None:
    """CVE-2020-10722: size plus offset wrapped around."""
    await talk.negotiate()

    with pytest.raises(ProtocolError):
        await talk.send(MessageType.SET_LOG_BASE, log.pack(), [memfd()])
    assert "set_log" not in talk.device.names()


# In-flight region.


@pytest.mark.parametrize("length", [20, 24])
async def test_inflight_region_comes_with_its_file_in_the_length_asked(
    talk: Talk, length: int
) -> None:
    await talk.negotiate()

    reply = await talk.send(MessageType.GET_INFLIGHT_FD, InflightRange(0, 0, 2, 128).pack(length))

    assert reply is not None
    assert reply.fd is not None
    os.close(reply.fd)
    assert len(reply.data) == 12 + length
    assert InflightRange.unpack(reply.data[12:]) == InflightRange(4096, 0, 2, 128)
    assert talk.device.calls[-1] == ("create_inflight", 2, 128)


@pytest.mark.parametrize(
    ("num_queues", "queue_size"), [(0, 128), (5, 128), (65535, 128), (1, 0), (1, 1025)]
)
async def test_inflight_numbers_out_of_range_are_refused(
    talk: Talk, num_queues: int, queue_size: int
) -> None:
    """CVE-2021-3839: the number of queues was not checked."""
    await talk.negotiate()
    payload = InflightRange(1 << 20, 0, num_queues, queue_size).pack()

    assert await talk.ask(MessageType.SET_INFLIGHT_FD, payload, [memfd()]) == 1
    with pytest.raises(ProtocolError):
        await talk.send(MessageType.GET_INFLIGHT_FD, payload)
    assert talk.device.names() == ["set_features"]


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (U64 - 1, 2), (4096, U64 - 1)])
async def test_inflight_range_that_overflows_is_refused(talk: Talk, size: int, offset: int) -> None:
    await talk.negotiate()
    payload = InflightRange(size, offset, 1, 128).pack()

    assert await talk.ask(MessageType.SET_INFLIGHT_FD, payload, [memfd()]) == 1


@pytest.mark.parametrize("count", [0, 2])
async def test_inflight_with_other_than_one_descriptor_is_refused_and_all_closed(
    talk: Talk, count: int
) -> None:
    """CVE-2022-0669: descriptors on in-flight messages were never closed."""
    await talk.negotiate()
    fds = [memfd() for _ in range(count)]

    payload = InflightRange(4096, 0, 1, 128).pack()
    assert await talk.ask(MessageType.SET_INFLIGHT_FD, payload, fds) == 1


async def test_inflight_region_set_many_times_leaks_nothing(talk: Talk) -> None:
    """CVE-2020-10726: every GET_INFLIGHT_FD leaked a file."""
    await talk.negotiate()
    payload = InflightRange(4096, 0, 1, 128).pack()

    for _ in range(20):
        reply = await talk.send(MessageType.GET_INFLIGHT_FD, payload)
        assert reply is not None
        assert reply.fd is not None
        assert await talk.ask(MessageType.SET_INFLIGHT_FD, payload, [reply.fd]) == 0


async def test_inflight_region_cannot_change_while_rings_run(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring()
    payload = InflightRange(4096, 0, 1, 128).pack()

    assert await talk.ask(MessageType.SET_INFLIGHT_FD, payload, [memfd()]) == 1


async def test_region_that_is_here_may_come_again(talk: Talk) -> None:
    """A second device on one connection; qemu-storage-daemon accepts it, too."""
    await talk.negotiate()
    for _ in range(2):
        assert await talk.ask(MessageType.ADD_MEM_REG, region(3).pack_single(), [memfd()]) == 0

    assert await talk.ask(MessageType.REM_MEM_REG, region(3).pack_single()) == 0
    assert await talk.ask(MessageType.REM_MEM_REG, region(3).pack_single()) == 1


async def test_region_that_is_here_may_come_again_when_every_slot_is_taken(talk: Talk) -> None:
    await talk.negotiate()
    for number in range(MAX_MEMORY_SLOTS):
        payload = region(number).pack_single()
        assert await talk.ask(MessageType.ADD_MEM_REG, payload, [memfd()]) == 0

    assert await talk.ask(MessageType.ADD_MEM_REG, region(7).pack_single(), [memfd()]) == 0
    other = RegionPayload(7 << 24, 4096, 0x7000_0000_0000 + (7 << 24), 0)
    assert await talk.ask(MessageType.ADD_MEM_REG, other.pack_single(), [memfd()]) == 1
