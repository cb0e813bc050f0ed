"""A conversation with a front-end on its way from one process to the next.

The process after this one takes over the connection and hears again what still counts of what the
front-end has said (`FrontEndSession.messages`), from the same code that hears a front-end. So
everything is checked once more, and the front-end notices nothing but a pause.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from bridge.guest.vhost_user.messages import Message, message_of
from bridge.guest.vhost_user.session import FrontEndSession
from bridge.guest.vhost_user.transport import Transport


@dataclass(frozen=True)
class Handover:
    """A connection, and what is to be heard on it first. Owns its descriptors."""

    fd: int
    messages: tuple[Message, ...]

    @classmethod
    def of(cls, conversation: Conversation, bases: dict[int, int]) -> Handover:
        """With copies of all descriptors. See `FrontEndSession.messages`."""
        messages = tuple(
            message_of(each.header.request, each.payload, [os.dup(fd) for fd in each.fds])
            for each in conversation.session.messages(bases)
        )
        return cls(os.dup(conversation.transport.sock.fileno()), messages)

    @property
    def fds(self) -> list[int]:
        """All descriptors."""
        return [self.fd, *(fd for each in self.messages for fd in each.fds)]

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`; the next process has the same descriptors."""
        said = [[each.header.request, each.payload.hex(), each.fds] for each in self.messages]
        return {"fd": self.fd, "messages": said}

    @classmethod
    def of_json(cls, value: dict[str, Any]) -> Handover:
        """The reverse."""
        said = value["messages"]
        messages = (message_of(kind, bytes.fromhex(text), fds) for kind, text, fds in said)
        return cls(value["fd"], tuple(messages))

    def sock(self) -> socket.socket:
        """The connection, which is the caller's from here on."""
        return socket.socket(fileno=self.fd)


@dataclass(frozen=True)
class Conversation:
    """What is going on with a front-end in this process."""

    session: FrontEndSession
    transport: Transport


class Desk:
    """Where the present conversation is found while `backend.serve` runs."""

    present: Conversation | None = None

    def __init__(self, taken_over: Callable[[], None] | None = None) -> None:
        """`taken_over()` is called when a handed conversation goes on."""
        self.taken_over = taken_over or _unheard


def _unheard() -> None:
    """The default of `taken_over`."""
