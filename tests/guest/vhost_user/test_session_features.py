"""Features, status and the configuration space in a session.

Rules `request` ("Config") and `features` of docs/rules/virtio.md.
"""

from __future__ import annotations

import pytest

from bridge.errors import ProtocolError
from bridge.guest.vhost_user.messages import (
    F_LOG_ALL,
    F_PROTOCOL_FEATURES,
    FLAG_REPLY,
    P_CONFIG,
    P_INFLIGHT_SHMFD,
    P_LOG_SHMFD,
    P_REPLY_ACK,
    ConfigAccess,
    MessageType,
    VringState,
    pack_u64,
    unpack_u64,
)
from bridge.guest.vhost_user.shapes import SHAPES
from tests.guest.vhost_user.fakes import F_VERSION_1, OFFERED, FakeDevice, Talk, eventfd, memfd

BIT_30 = F_PROTOCOL_FEATURES


async def test_offer_has_the_devices_features_and_the_sessions_own(talk: Talk) -> None:
    reply = await talk.send(MessageType.GET_FEATURES)

    assert reply is not None
    assert unpack_u64(reply.data[12:]) == OFFERED | BIT_30 | F_LOG_ALL


async def test_offer_without_log_and_inflight_support_has_neither(no_fd_leak: None) -> None:
    device = FakeDevice()
    device.supports_dirty_log = device.supports_inflight = False  # type: ignore[misc]
    talk = Talk(device)

    features = await talk.send(MessageType.GET_FEATURES)
    protocol = await talk.send(MessageType.GET_PROTOCOL_FEATURES)

    assert features is not None
    assert protocol is not None
    assert not unpack_u64(features.data[12:]) & F_LOG_ALL
    assert not unpack_u64(protocol.data[12:]) & (P_LOG_SHMFD | P_INFLIGHT_SHMFD)


async def test_reply_is_marked_as_one_and_asks_for_none(talk: Talk) -> None:
    reply = await talk.send(MessageType.GET_FEATURES, need_reply=True)

    assert reply is not None
    assert reply.data[4:8] == (1 | FLAG_REPLY).to_bytes(4, "little")


@pytest.mark.parametrize("subset", [0, F_VERSION_1, OFFERED, 1 << 29, 1 << 28])
async def test_any_subset_of_features_is_taken_without_the_sessions_bits(
    talk: Talk, subset: int
) -> None:
    await talk.send(MessageType.SET_FEATURES, pack_u64(subset | BIT_30))

    assert talk.device.calls == [("set_features", subset)]


async def test_features_not_offered_are_refused_by_rule_3_7(talk: Talk) -> None:
    await talk.negotiate()
    talk.device.calls.clear()

    assert await talk.ask(MessageType.SET_FEATURES, pack_u64(1 << 60)) == 1
    with pytest.raises(ProtocolError, match="not offered"):
        await talk.send(MessageType.SET_FEATURES, pack_u64(1 << 60))
    assert talk.device.calls == []


async def test_log_all_toggled_while_rings_run_resets_nothing(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring()
    talk.device.calls.clear()

    for _ in range(2):
        await talk.send(MessageType.SET_FEATURES, pack_u64(F_VERSION_1 | BIT_30 | F_LOG_ALL))
    await talk.send(MessageType.SET_FEATURES, pack_u64(F_VERSION_1 | BIT_30))

    assert talk.device.calls == [("set_logging", True), ("set_logging", False)]


async def test_other_features_while_rings_run_are_refused(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring()

    assert await talk.ask(MessageType.SET_FEATURES, pack_u64(BIT_30)) == 1
    assert 0 in talk.device.rings


async def test_features_without_bit_30_enable_all_rings_by_rule_3_7(talk: Talk) -> None:
    await talk.send(MessageType.SET_FEATURES, pack_u64(F_VERSION_1))
    await talk.set_up_ring()

    assert talk.device.names() == ["set_features", "start_ring", "set_call"]


async def test_ring_is_not_processed_before_features_are_set(talk: Talk) -> None:
    await talk.set_up_ring()
    assert talk.device.calls == []

    await talk.send(MessageType.SET_FEATURES, pack_u64(F_VERSION_1))
    assert talk.device.names() == ["set_features", "start_ring"]


async def test_protocol_features_not_offered_are_refused(talk: Talk) -> None:
    with pytest.raises(ProtocolError):
        await talk.send(MessageType.SET_PROTOCOL_FEATURES, pack_u64(1 << 14))


@pytest.mark.parametrize(
    "request_", [each for each, shape in SHAPES.items() if shape.feature], ids=lambda r: r.name
)
async def test_request_whose_protocol_feature_was_not_negotiated_is_refused(
    talk: Talk, request_: MessageType
) -> None:
    if request_ == MessageType.GET_CONFIG:
        # The front-end waits for a reply, and this message has one that refuses.
        reply = await talk.send(request_, bytes(24))
        assert reply is not None
        assert len(reply.data) == 12
        return
    with pytest.raises(ProtocolError):
        await talk.send(request_, bytes(24))


async def test_acknowledgement_is_sent_only_when_negotiated_and_asked_for(talk: Talk) -> None:
    assert await talk.send(MessageType.SET_OWNER, need_reply=True) is None

    await talk.send(MessageType.SET_PROTOCOL_FEATURES, pack_u64(P_REPLY_ACK))

    assert await talk.send(MessageType.SET_OWNER) is None
    assert await talk.ask(MessageType.SET_OWNER) == 0


async def test_request_with_own_reply_gets_no_acknowledgement_on_top(talk: Talk) -> None:
    await talk.negotiate()

    reply = await talk.send(MessageType.GET_QUEUE_NUM, need_reply=True)

    assert reply is not None
    assert len(reply.data) == 20
    assert unpack_u64(reply.data[12:]) == talk.device.max_queues


@pytest.mark.parametrize("number", [0, 4711, 19, 20, 22, 28, 33, 41, 42, 0xFFFFFFFF])
async def test_unknown_request_is_refused_when_asked_and_ends_it_otherwise(
    talk: Talk, number: int
) -> None:
    await talk.negotiate()

    assert await talk.ask(number, bytes(16), [eventfd(), memfd()]) == 1
    with pytest.raises(ProtocolError, match="unknown request"):
        await talk.send(number, bytes(16), [eventfd()])


@pytest.mark.parametrize(
    "message", [MessageType.SET_OWNER, MessageType.RESET_OWNER, MessageType.SET_LOG_FD]
)
async def test_owner_messages_change_nothing(talk: Talk, message: MessageType) -> None:
    await talk.negotiate()
    await talk.run_ring()
    talk.device.calls.clear()

    fds = [eventfd()] if message == MessageType.SET_LOG_FD else []
    assert await talk.ask(message, fds=fds) == 0
    assert talk.device.calls == []


# Status.


async def test_status_is_kept_and_given_back(talk: Talk) -> None:
    await talk.negotiate()

    await talk.send(MessageType.SET_STATUS, pack_u64(0xF))
    reply = await talk.send(MessageType.GET_STATUS)

    assert reply is not None
    assert unpack_u64(reply.data[12:]) == 0xF


async def test_status_zero_stops_the_rings(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring(0)
    await talk.run_ring(1)

    await talk.send(MessageType.SET_STATUS, pack_u64(0))

    assert talk.device.rings == {}


async def test_status_of_more_than_a_byte_is_refused(talk: Talk) -> None:
    await talk.negotiate()

    assert await talk.ask(MessageType.SET_STATUS, pack_u64(0x100)) == 1


async def test_status_says_no_features_ok_before_features_are_set(talk: Talk) -> None:
    await talk.send(MessageType.SET_PROTOCOL_FEATURES, pack_u64(1 << 16))
    await talk.send(MessageType.SET_STATUS, pack_u64(8 | 3))

    reply = await talk.send(MessageType.GET_STATUS)

    assert reply is not None
    assert unpack_u64(reply.data[12:]) == 3


# Configuration space.


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 60), (0, 8), (8, 4), (59, 1), (50, 100), (0, 256), (1 << 20, 4)]
)
async def test_config_reply_has_the_size_asked_for_and_zeroes_past_the_end(
    talk: Talk, offset: int, size: int
) -> None:
    await talk.negotiate()

    reply = await talk.send(
        MessageType.GET_CONFIG, ConfigAccess(offset, size, 0, bytes(size)).pack()
    )

    assert reply is not None
    answer = ConfigAccess.unpack(reply.data[12:])
    assert (answer.offset, answer.size) == (offset, size)
    assert answer.data == talk.device.config[offset : offset + size].ljust(size, b"\0")


@pytest.mark.parametrize("size", [0, 257, 400])
async def test_config_of_no_or_too_many_bytes_gets_the_empty_reply(talk: Talk, size: int) -> None:
    await talk.negotiate()

    reply = await talk.send(MessageType.GET_CONFIG, ConfigAccess(0, size, 0, bytes(size)).pack())

    assert reply is not None
    assert len(reply.data) == 12


@pytest.mark.parametrize("flags", [0, 1, 2])
async def test_config_write_of_one_byte_is_the_guests_for_qemu_and_rust_vmm(
    talk: Talk, flags: int
) -> None:
    await talk.negotiate()

    await talk.send(MessageType.SET_CONFIG, ConfigAccess(32, 1, flags, b"\1").pack())

    assert talk.device.calls[-1] == ("write_config", 32, b"\1", flags == 2)


async def test_config_write_of_migration_is_told_as_one(talk: Talk) -> None:
    await talk.negotiate()

    await talk.send(MessageType.SET_CONFIG, ConfigAccess(0, 60, 1, bytes(60)).pack())

    assert talk.device.calls[-1] == ("write_config", 0, bytes(60), True)


async def test_config_write_that_the_device_refuses_is_refused(talk: Talk) -> None:
    await talk.negotiate()
    talk.device.refuse.add("write_config")

    assert await talk.ask(MessageType.SET_CONFIG, ConfigAccess(0, 1, 0, b"\1").pack()) == 1
    assert await talk.ask(MessageType.SET_CONFIG, ConfigAccess(32, 1, 77, b"\1").pack()) == 1
    assert await talk.ask(MessageType.SET_CONFIG, ConfigAccess(32, 0, 0, b"").pack()) == 1


# The back-end's own channel.


async def test_config_change_is_sent_once_while_a_ring_runs(talk: Talk) -> None:
    await talk.negotiate()
    await talk.send(MessageType.SET_BACKEND_REQ_FD, fds=[_socket()])
    await talk.run_ring()
    assert talk.device.listener is not None

    talk.device.listener.config_changed()

    assert talk.sent == [bytes.fromhex("02000000 01000000 00000000")]


async def test_config_change_of_a_suspended_device_waits_for_a_ring(talk: Talk) -> None:
    await talk.negotiate()
    await talk.send(MessageType.SET_BACKEND_REQ_FD, fds=[_socket()])
    await talk.run_ring()
    await talk.send(MessageType.GET_VRING_BASE, VringState(0, 0).pack())
    assert talk.device.listener is not None

    talk.device.listener.config_changed()
    assert talk.sent == []

    await talk.run_ring()
    assert len(talk.sent) == 1


async def test_config_change_without_a_channel_is_not_sent(talk: Talk) -> None:
    await talk.negotiate()
    await talk.run_ring()
    assert talk.device.listener is not None

    talk.device.listener.config_changed()

    assert talk.sent == []


async def test_dead_channel_is_closed_once(talk: Talk) -> None:
    await talk.negotiate()
    await talk.send(MessageType.SET_BACKEND_REQ_FD, fds=[_socket()])
    await talk.run_ring()
    talk.channel_alive = False
    assert talk.device.listener is not None

    talk.device.listener.config_changed()
    talk.device.listener.config_changed()

    assert len(talk.sent) == 1


async def test_channel_replaced_closes_the_old_one(talk: Talk) -> None:
    await talk.negotiate()

    for _ in range(10):
        await talk.send(MessageType.SET_BACKEND_REQ_FD, fds=[_socket()])


async def test_channel_that_is_not_a_socket_is_refused(talk: Talk) -> None:
    await talk.negotiate()

    assert await talk.ask(MessageType.SET_BACKEND_REQ_FD, fds=[eventfd()]) == 1


async def test_closed_session_hears_nothing_more_of_its_device(no_fd_leak: None) -> None:
    talk = Talk()
    await talk.send(MessageType.SET_PROTOCOL_FEATURES, pack_u64(P_CONFIG))

    await talk.session.close()
    await talk.session.close()

    assert talk.device.listener is None
    assert talk.device.names() == ["disconnected"]


def _socket() -> int:
    import socket

    ours, theirs = socket.socketpair()
    ours.close()
    return theirs.detach()
