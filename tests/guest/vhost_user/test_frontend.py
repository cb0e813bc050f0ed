"""The front-end against back-ends that break the rules, and its own way of behaving badly."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from bridge.errors import ConnectionLost, ProtocolError
from bridge.guest.vhost_user.messages import (
    F_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    P_REPLY_ACK,
    VERSION,
    ConfigAccess,
    Message,
    MessageHeader,
    MessageType,
    VringState,
    pack_message,
    pack_reply,
    pack_u64,
    unpack_u64,
)
from bridge.guest.vhost_user.transport import Transport
from bridge.peers.frontend import FrontEnd, Refused
from tests.guest.vhost_user.fakes import eventfd

pytestmark = pytest.mark.usefixtures("no_fd_leak")


class Scripted:
    """A front-end, and a back-end that says what it is told to."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.front_end = FrontEnd(ours, timeout_s=5)
        self.back_end = Transport(theirs, replies=False)

    async def hear(self) -> Message:
        """The front-end's next message."""
        message = await self.back_end.receive()
        assert message is not None
        return message


@pytest.fixture
async def both() -> AsyncIterator[Scripted]:
    """Both ends of a connection."""
    both = Scripted()
    yield both
    both.front_end.close()
    both.back_end.close()


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(pack_reply(MessageType.GET_QUEUE_NUM, bytes(8)), id="to another request"),
        pytest.param(pack_reply(MessageType.GET_FEATURES, bytes(4)), id="too short"),
        pytest.param(pack_reply(MessageType.GET_FEATURES, bytes(16)), id="too long"),
        pytest.param(pack_message(MessageType.GET_FEATURES, bytes(8)), id="no reply"),
        pytest.param(MessageHeader(1, 5, 1 << 20).pack(), id="enormous"),
    ],
)
async def test_wrong_reply_is_the_back_ends_fault(both: Scripted, answer: bytes) -> None:
    await both.back_end.send(answer)

    with pytest.raises(ProtocolError):
        await both.front_end.get_u64(MessageType.GET_FEATURES)


async def test_reply_with_unexpected_descriptors_closes_them(both: Scripted) -> None:
    fds = [eventfd(), eventfd()]
    await both.back_end.send(pack_reply(MessageType.GET_FEATURES, bytes(8)), fds)
    for fd in fds:
        os.close(fd)

    with pytest.raises(ProtocolError):
        await both.front_end.get_u64(MessageType.GET_FEATURES)


async def test_stop_reply_for_another_ring_is_the_back_ends_fault(both: Scripted) -> None:
    await both.back_end.send(pack_reply(MessageType.GET_VRING_BASE, VringState(1, 0).pack()))

    with pytest.raises(ProtocolError):
        await both.front_end.stop_ring(0)


async def test_empty_config_reply_is_a_refusal(both: Scripted) -> None:
    await both.back_end.send(pack_reply(MessageType.GET_CONFIG, b""))

    with pytest.raises(Refused):
        await both.front_end.get_config(0, 60)


async def test_inflight_reply_without_a_file_is_a_refusal(both: Scripted) -> None:
    await both.back_end.send(pack_reply(MessageType.GET_INFLIGHT_FD, bytes(24)))

    with pytest.raises(Refused):
        await both.front_end.get_inflight(1, 128)


async def test_back_end_that_hangs_up_is_a_lost_connection(both: Scripted) -> None:
    both.back_end.close()

    with pytest.raises(ConnectionLost):
        await both.front_end.get_u64(MessageType.GET_FEATURES)


async def test_back_end_that_says_nothing_is_a_lost_connection(
    both: Scripted, autojump_clock: trio.testing.MockClock
) -> None:
    with pytest.raises(ConnectionLost, match="says nothing for 5 s"):
        await both.front_end.get_u64(MessageType.GET_FEATURES)


async def test_socket_without_a_listener_is_a_lost_connection() -> None:
    with pytest.raises(ConnectionLost):
        await FrontEnd.connect("/tmp/no-such-directory/no-such-socket")


async def test_acknowledgement_is_asked_for_only_when_negotiated(both: Scripted) -> None:
    await both.front_end.tell(MessageType.SET_OWNER)
    assert not (await both.hear()).header.need_reply

    both.front_end.protocol_features = P_REPLY_ACK
    await both.back_end.send(pack_reply(MessageType.SET_OWNER, pack_u64(1)))
    with pytest.raises(Refused):
        await both.front_end.tell(MessageType.SET_OWNER)
    assert (await both.hear()).header.flags == VERSION | FLAG_NEED_REPLY


async def test_negotiation_takes_no_more_than_is_offered_and_wanted(both: Scripted) -> None:
    offered = F_PROTOCOL_FEATURES | 1 << 32 | 1 << 9
    protocol = 1 | 1 << 3 | 1 << 18
    await both.back_end.send(pack_reply(MessageType.GET_FEATURES, pack_u64(offered)))
    await both.back_end.send(pack_reply(MessageType.GET_PROTOCOL_FEATURES, pack_u64(protocol)))
    await both.back_end.send(pack_reply(MessageType.SET_OWNER, pack_u64(0)))

    taken = await both.front_end.negotiate(F_PROTOCOL_FEATURES | 1 << 32 | 1 << 5)

    assert taken == (F_PROTOCOL_FEATURES | 1 << 32, 1 | 1 << 3)
    messages = [await both.hear() for _ in range(4)]
    assert [message.header.request for message in messages] == [
        MessageType.GET_FEATURES,
        MessageType.GET_PROTOCOL_FEATURES,
        MessageType.SET_PROTOCOL_FEATURES,
        MessageType.SET_OWNER,
    ]
    assert unpack_u64(messages[2].payload) == 1 | 1 << 3


async def test_anything_can_be_sent_raw(both: Scripted) -> None:
    await both.front_end.send_raw(pack_message(4711, b"abc"))

    message = await both.hear()

    assert (message.header.request, message.payload) == (4711, b"abc")


async def test_config_written_carries_its_flags(both: Scripted) -> None:
    await both.front_end.set_config(32, b"\1", flags=2)

    assert ConfigAccess.unpack((await both.hear()).payload) == ConfigAccess(32, 1, 2, b"\1")


async def test_received_descriptors_are_not_inherited_by_children(both: Scripted) -> None:
    """Rule `message`: MSG_CMSG_CLOEXEC."""
    fd = os.eventfd(0, 0)
    await both.front_end.send_raw(pack_message(MessageType.SET_VRING_CALL, bytes(8)), [fd])
    os.close(fd)

    (received,) = (await both.hear()).fds

    assert not os.get_inheritable(received)
    os.close(received)


async def test_receive_that_was_cancelled_loses_no_byte(both: Scripted) -> None:
    data = pack_reply(MessageType.GET_FEATURES, pack_u64(7))
    await both.back_end.send(data[:9])
    with trio.move_on_after(0.001) as scope:
        await both.front_end.receive()
    assert scope.cancelled_caught

    await both.back_end.send(data[9:])

    assert unpack_u64((await both.front_end.receive()).payload) == 7


async def test_send_to_a_back_end_that_left_is_a_lost_connection(both: Scripted) -> None:
    both.back_end.close()

    with pytest.raises(ConnectionLost):
        await both.front_end.send_raw(pack_message(MessageType.GET_FEATURES))


async def test_send_to_a_peer_that_does_not_read_waits_and_can_be_cancelled(both: Scripted) -> None:
    flood = pack_message(MessageType.GET_FEATURES) * 1_000_000

    with trio.move_on_after(0.01) as scope:
        await both.front_end.send_raw(flood)

    assert scope.cancelled_caught


async def test_connecting_to_a_full_backlog_waits_for_room(directory: Path) -> None:
    path = directory / "s"
    waiting = []
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen(0)
        waiting.append(await FrontEnd.connect(path))
        with trio.move_on_after(0.03) as scope:
            await FrontEnd.connect(path)
        assert scope.cancelled_caught
        listening.accept()[0].close()
        waiting.append(await FrontEnd.connect(path))
    for front_end in waiting:
        front_end.close()


async def test_channel_says_when_the_back_end_closes_it(both: Scripted) -> None:
    with pytest.raises(RuntimeError):
        await both.front_end.config_changed()
    await both.front_end.open_channel()
    for fd in (await both.hear()).fds:
        os.close(fd)

    with pytest.raises(ConnectionLost):
        await both.front_end.config_changed()
