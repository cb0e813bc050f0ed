"""Cuts a stream of bytes and file descriptors into messages, without I/O.

The reader says how many bytes it wants next (`wanted`): never more than the rest of the header or
of the payload, so that the next message's descriptors cannot arrive with the end of this one.
Descriptors may come with any byte of their message. The reader owns them until it hands out the
message; `close()` closes those of an incomplete one.
"""

from __future__ import annotations

import os

from bridge.errors import ProtocolError
from bridge.guest.vhost_user.messages import HEADER_BYTES, MAX_FDS, Message, MessageHeader


class MessageReader:
    """Bytes and descriptors in, messages out. After a ProtocolError it is dead."""

    def __init__(self, *, replies: bool = False) -> None:
        self._replies = replies
        self._header: MessageHeader | None = None
        self._data = bytearray()
        self._fds: list[int] = []
        self.wanted = HEADER_BYTES
        """How many bytes to feed next, at most; always above 0."""

    @property
    def between_messages(self) -> bool:
        """No part of a further message has arrived: the stream may end here."""
        return self._header is None and not self._data and not self._fds

    def feed_untrusted(self, data: bytes, fds: list[int]) -> Message | None:
        """Take 1 … `wanted` bytes and the descriptors that came with them.

        Returns the message if it is complete now, else None. Raises ProtocolError for a bad header
        or more descriptors than any message has; the reader still owns the descriptors.
        """
        self._fds += fds
        if len(self._fds) > MAX_FDS:
            raise ProtocolError(f"a message with more than {MAX_FDS} file descriptors")
        self._data += data
        self.wanted -= len(data)
        if self.wanted:
            return None
        if self._header is None:
            self._header = MessageHeader.unpack_untrusted(bytes(self._data), reply=self._replies)
            self._data.clear()
            self.wanted = self._header.size
            if self.wanted:
                return None
        message = Message(self._header, bytes(self._data), self._fds)
        self._header = None
        self._data.clear()
        self._fds = []
        self.wanted = HEADER_BYTES
        return message

    def close(self) -> None:
        """Close the descriptors of an incomplete message."""
        while self._fds:
            os.close(self._fds.pop())
