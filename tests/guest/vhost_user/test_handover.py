"""A conversation that goes on in another session: what that hears brings it into the same state."""

from __future__ import annotations

import os

import pytest

from bridge.guest.vhost_user.handover import Handover
from bridge.guest.vhost_user.messages import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    InflightRange,
    Message,
    MessageType,
    VringFile,
    VringState,
    message_of,
    pack_memory_table,
    pack_u64,
)
from bridge.spec.virtio_blk import F_CONFIG_WCE
from tests.guest.vhost_user.fakes import (
    F_VERSION_1,
    FakeDevice,
    Talk,
    eventfd,
    memfd,
    region,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")

FEATURES = F_VERSION_1 | F_PROTOCOL_FEATURES


async def heard_by_another(talk: Talk, bases: dict[int, int] | None = None) -> Talk:
    """Another session, of another device, that has heard what counts of this one."""
    other = Talk(FakeDevice())
    for each in talk.session.messages(bases or {}):
        copies = [os.dup(fd) for fd in each.fds]
        await other.session.handle(message_of(each.header.request, each.payload, copies))
    return other


def told(messages: list[Message]) -> list[tuple[int, bytes, list[tuple[int, int]]]]:
    """Messages to compare: which file each descriptor is of, not its number."""
    return [
        (each.header.request, each.payload, [_file(fd) for fd in each.fds]) for each in messages
    ]


def _file(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


async def full(talk: Talk) -> None:
    """Everything that a front-end says."""
    await talk.negotiate(FEATURES)
    regions = [region(0), region(1)]
    await talk.send(MessageType.SET_MEM_TABLE, pack_memory_table(regions), [memfd(), memfd()])
    inflight = InflightRange(4096, 0, 2, 128)
    await talk.send(MessageType.SET_INFLIGHT_FD, inflight.pack(), [memfd(4096)])
    mine, theirs = os.pipe()  # not a socket, to be refused
    os.close(mine)
    assert await talk.ask(MessageType.SET_BACKEND_REQ_FD, b"", [theirs]) == 1
    await talk.run_ring(0)
    await talk.run_ring(1)
    await talk.send(MessageType.SET_VRING_ERR, VringFile(1, True).pack(), [eventfd()])


async def test_rings_memory_and_region_are_the_same_and_go_on_from_their_bases() -> None:
    talk = Talk()
    await full(talk)

    other = await heard_by_another(talk, {0: 77, 1: 0x12345})

    assert sorted(other.device.rings) == [0, 1]
    for index, base in ((0, 77), (1, 0x2345)):
        before, after = talk.device.rings[index], other.device.rings[index]
        assert after.base == base
        assert after.size == before.size
        assert after.desc_user_address == before.desc_user_address
        assert after.used_user_address == before.used_user_address
    assert other.device.features == talk.device.features
    assert [each.guest_address for each in other.device.memory] == [0, 1 << 24]
    assert ("set_inflight", 0, 4096, 2, 128) in other.device.calls
    # And a third one hears the same.
    bases = {0: 77, 1: 0x2345}
    assert told(other.session.messages(bases)) == told(talk.session.messages(bases))
    await talk.session.close()
    await other.session.close()


async def test_ring_that_is_suspended_stays_so_and_one_that_waits_waits() -> None:
    talk = Talk()
    await talk.negotiate(FEATURES)
    await talk.send(MessageType.SET_MEM_TABLE, pack_memory_table([region()]), [memfd()])
    await talk.run_ring(0)
    await talk.send(MessageType.SET_VRING_ENABLE, VringState(0, 0).pack())
    await talk.set_up_ring(1)  # not enabled yet

    other = await heard_by_another(talk)

    assert other.device.suspended == {0}
    assert sorted(other.device.rings) == [0]
    await other.send(MessageType.SET_VRING_ENABLE, VringState(1, 1).pack())
    await other.send(MessageType.SET_VRING_ENABLE, VringState(0, 1).pack())
    assert sorted(other.device.rings) == [0, 1]
    assert other.device.suspended == set()
    await talk.session.close()
    await other.session.close()


async def test_ring_that_was_stopped_is_not_started() -> None:
    talk = Talk()
    await full(talk)
    await talk.send(MessageType.GET_VRING_BASE, VringState(0, 0).pack())

    other = await heard_by_another(talk, {1: 5})

    assert sorted(other.device.rings) == [1]
    # The front-end starts it again from the base that it was told, or says another.
    await other.send(MessageType.SET_VRING_KICK, VringFile(0, True).pack(), [eventfd()])
    assert other.device.rings[0].base == talk.device.stop_base
    await talk.session.close()
    await other.session.close()


async def test_regions_added_and_removed_one_by_one_are_those_that_are_there() -> None:
    talk = Talk()
    await talk.negotiate(FEATURES)
    for number in range(12):
        await talk.send(MessageType.ADD_MEM_REG, region(number).pack_single(), [memfd()])
    await talk.send(MessageType.REM_MEM_REG, region(3).pack_single())
    # Told of again, from another file.
    await talk.send(MessageType.ADD_MEM_REG, region(5).pack_single(), [memfd()])

    other = await heard_by_another(talk)

    wanted = [number << 24 for number in (0, 1, 2, 4, 6, 7, 8, 9, 10, 11, 5)]
    assert [each.guest_address for each in other.device.memory] == wanted
    assert told(other.session.messages({})) == told(talk.session.messages({}))
    await talk.session.close()
    await other.session.close()


async def test_memory_table_replaces_all_and_one_that_is_refused_leaves_nothing() -> None:
    talk = Talk()
    await talk.negotiate(FEATURES)
    await talk.send(MessageType.SET_MEM_TABLE, pack_memory_table([region(0)]), [memfd()])
    await talk.send(MessageType.SET_MEM_TABLE, pack_memory_table([region(1)]), [memfd()])
    other = await heard_by_another(talk)
    assert [each.guest_address for each in other.device.memory] == [1 << 24]
    await other.session.close()

    talk.device.refuse.add("replace_memory")
    table = pack_memory_table([region(2)])
    assert await talk.ask(MessageType.SET_MEM_TABLE, table, [memfd()]) == 1
    other = await heard_by_another(talk)
    assert other.device.memory == []
    await talk.session.close()
    await other.session.close()


async def test_device_that_was_reset_is_not_negotiated_and_has_no_region() -> None:
    talk = Talk()
    await full(talk)
    await talk.send(MessageType.RESET_DEVICE)

    other = await heard_by_another(talk)

    assert "set_inflight" not in other.device.names()
    assert not other.device.rings
    assert other.session.messages({})[0].payload == talk.session.messages({})[0].payload
    assert len(other.device.memory) == 2  # Memory stays in a reset.
    await talk.session.close()
    await other.session.close()


async def test_write_cache_that_the_guest_has_turned_off_stays_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("tests.guest.vhost_user.fakes.OFFERED", F_VERSION_1 | F_CONFIG_WCE)
    talk = Talk()
    talk.device.config = bytes(60)  # `writeback` is 0
    await talk.negotiate(FEATURES | F_CONFIG_WCE)

    other = await heard_by_another(talk)

    assert ("write_config", 32, b"\0", False) in other.device.calls
    await talk.session.close()
    await other.session.close()


async def test_migration_is_seen() -> None:
    talk = Talk()
    await talk.negotiate(FEATURES)
    assert not talk.session.is_migrating
    await talk.send(MessageType.SET_FEATURES, pack_u64(FEATURES | F_LOG_ALL))
    assert talk.session.is_migrating
    await talk.session.close()


def test_handover_is_the_same_as_json() -> None:
    messages = (
        message_of(MessageType.SET_FEATURES, pack_u64(5)),
        message_of(MessageType.SET_VRING_KICK, b"\0" * 8, [7]),
    )
    handover = Handover(6, messages)

    assert Handover.of_json(handover.as_json()) == handover
    assert handover.fds == [6, 7]
