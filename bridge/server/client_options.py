"""How a client behaves: everything that is not in the URI."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Settings of one `Client`. Times are in seconds."""

    connect_timeout_s: float = 10.0
    """For a whole attempt: name resolution, connection, TLS and negotiation."""
    request_timeout_s: float = 60.0
    """A command unanswered for this long means that the server hangs: reconnect. 0 = never.
    (What may be slow, a flush for one, has longer: see `Silence.is_too_long`.)"""
    reconnect_timeout_s: float = 0.0
    """Fail waiting requests with EIO after this long without a connection. 0 = without a limit."""
    reconnect_first_s: float = 0.05
    reconnect_max_s: float = 5.0
    """Bounds of the exponential backoff between attempts to reconnect."""
    stale_write_grace_s: float = 5.0
    """A write that a lost connection left behind may still be executed by a server that has no
    fence. New writes that overlap one that had no answer wait this long after a reconnect; all of
    them do after a start when the process before was killed."""
    connections: int = 1
    """Sockets to use where the server allows several."""
    read_only: bool = False
    """Do not send commands that change the export."""
    structured: bool = True
    extended: bool = True
    block_status: bool = True
    """Ask for structured replies, extended headers, the base:allocation context."""

    def for_reading_and_writing(self, *, local: bool) -> ClientOptions:
        """The same for a client that asks for no block status. On a `local` socket it takes simple
        replies: they cost the server a system call and both sides a header less (8 % of all small
        reads), and the holes that structured replies leave out are cheap to send there."""
        return replace(self, structured=not local, extended=not local, block_status=False)

    tls_ca_file: str | None = None
    tls_certificate_file: str | None = None
    tls_key_file: str | None = None
    close_timeout_s: float = 5.0
    """For the replies still to come when the client hangs up."""
