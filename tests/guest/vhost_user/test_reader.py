"""A stream cut anywhere gives the same messages, and no descriptor is lost."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import ProtocolError
from bridge.guest.vhost_user.messages import MAX_PAYLOAD_BYTES, MessageType, pack_message
from bridge.guest.vhost_user.reader import MessageReader
from tests.guest.vhost_user.fakes import eventfd, open_fds

messages = st.lists(
    st.tuples(
        st.sampled_from([int(request) for request in MessageType] + [0, 99, 0xFFFFFFFF]),
        st.binary(max_size=MAX_PAYLOAD_BYTES),
    ),
    max_size=8,
)


@given(messages, st.data())
def test_stream_split_anywhere_gives_the_same_messages(
    sent: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    stream = b"".join(pack_message(request, payload) for request, payload in sent)
    reader = MessageReader()
    received = []
    position = 0
    while position < len(stream):
        step = data.draw(st.integers(1, reader.wanted))
        message = reader.feed_untrusted(stream[position : position + step], [])
        position += len(stream[position : position + step])
        if message is not None:
            received.append((message.header.request, message.payload))

    assert received == sent
    assert reader.between_messages


@pytest.mark.parametrize("at", range(20))
def test_descriptor_with_any_byte_belongs_to_its_message(at: int, no_fd_leak: None) -> None:
    reader = MessageReader()
    stream = pack_message(MessageType.SET_VRING_CALL, bytes(8))
    fd = eventfd()
    got = None

    for position in range(len(stream)):
        got = reader.feed_untrusted(stream[position : position + 1], [fd] if position == at else [])

    assert got is not None
    assert got.fds == [fd]
    os.close(fd)


def test_message_that_never_ends_has_its_descriptors_closed(no_fd_leak: None) -> None:
    reader = MessageReader()
    reader.feed_untrusted(b"\1", [eventfd(), eventfd()])
    assert not reader.between_messages

    reader.close()


def test_more_than_8_descriptors_are_refused_and_closed(no_fd_leak: None) -> None:
    reader = MessageReader()
    reader.feed_untrusted(b"\1", [eventfd() for _ in range(8)])

    with pytest.raises(ProtocolError):
        reader.feed_untrusted(b"\0", [eventfd()])

    before = open_fds()
    reader.close()
    assert open_fds() == before - 9
