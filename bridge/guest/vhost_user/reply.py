"""Replies, and the type of the functions that handle a message."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from bridge.guest.vhost_user.messages import MessageType, pack_reply, pack_u64


@dataclass(slots=True)
class Reply:
    """A reply to send, with `fd` if there is one. The sender closes `fd` afterwards in any case."""

    data: bytes
    fd: int | None = None


Handler = Callable[[bytes, list[int]], Awaitable[Reply | None]]
"""Handles a message: payload (its size checked) and descriptors (their number checked).

The handler removes from the list the descriptors that it keeps; its caller closes the others.
Returns the message's own reply, if it has one. Raises ProtocolError to refuse the message.
"""


def reply_u64(request: MessageType, value: int) -> Reply:
    """A reply whose payload is one number."""
    return Reply(pack_reply(request, pack_u64(value)))
