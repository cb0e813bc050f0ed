"""What a handler of requests gives back, and what it looks like."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from bridge.guest.vhost_user.messages import MessageType, pack_reply, pack_u64


@dataclass(slots=True)
class Reply:
    """What to send. `fd` goes along; whoever sends it closes it afterwards, sent or not."""

    data: bytes
    fd: int | None = None


Handler = Callable[[bytes, list[int]], Awaitable[Reply | None]]
"""Does what a request asks: payload (its size checked) and descriptors (their number checked).

The handler removes from the list what it keeps; whoever called it closes the rest. Returns the
request's own reply, if it has one. Raises ProtocolError to refuse it.
"""


def reply_u64(request: MessageType, value: int) -> Reply:
    """The reply that is one number."""
    return Reply(pack_reply(request, pack_u64(value)))
