"""One connection of the control socket: HTTP/1.1 with h11, and its limits.

Every peer is one of the same user or root (`service` sees to that), and still none may cost the
disk anything: what a request may hold, how long it may take to come, how long a reply may take to
be taken, and how many connections there are, is bounded. A client that breaks a limit or the
protocol gets an answer if that is possible, and is disconnected.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from typing import Any, Final

import h11
import structlog
import trio

_log = structlog.get_logger(__name__)

HEAD_MAX_BYTES: Final = 8 * 1024
BODY_MAX_BYTES: Final = 16 * 1024
_RECEIVE_BYTES: Final = 4 * 1024
_REQUEST_S: Final = 10.0
"""For a whole request to come, and for the next one on the same connection to begin."""
_REPLY_S: Final = 10.0
"""For a reply to be taken."""


class HttpError(Exception):
    """A request that gets an error as its answer, `{"error": text}`."""

    def __init__(
        self, status: HTTPStatus, text: str, headers: tuple[tuple[str, str], ...] = (), **more: Any
    ) -> None:
        super().__init__(text)
        self.status = status
        self.text = text
        self.headers = headers
        self.more = more
        """Further members of the answer."""


@dataclass(frozen=True)
class HttpRequest:
    """A whole request."""

    method: str
    path: str
    body: bytes = b""
    from_page: bool = False
    """A browser sends it for a page: it has an Origin."""


@dataclass(frozen=True)
class Reply:
    """A whole reply."""

    body: bytes
    content_type: str = "application/json"
    status: HTTPStatus = HTTPStatus.OK
    headers: tuple[tuple[str, str], ...] = ()
    then: Callable[[], None] | None = field(default=None, compare=False)
    """Called once the reply was sent."""


def json_reply(value: Any, status: HTTPStatus = HTTPStatus.OK) -> Reply:
    """`value` as JSON."""
    return Reply(json.dumps(value, indent=2).encode() + b"\n", status=status)


def error_reply(error: HttpError) -> Reply:
    """For the client: what is wrong."""
    body = json.dumps({"error": error.text, **error.more}, indent=2).encode() + b"\n"
    return Reply(body, status=error.status, headers=error.headers)


Handler = Callable[[HttpRequest], Awaitable[Reply]]


async def serve_connection(stream: trio.abc.HalfCloseableStream, handle: Handler) -> None:
    """Answer requests on `stream` until the client leaves or breaks a limit; closes it.

    `handle` may raise HttpError.
    """
    connection = h11.Connection(h11.SERVER, max_incomplete_event_size=HEAD_MAX_BYTES)
    try:
        while True:
            request = None
            try:
                with trio.fail_after(_REQUEST_S):
                    request = await _receive(connection, stream)
                if request is None:
                    return
                reply = await _handled(request, handle)
            except h11.RemoteProtocolError as error:
                status = HTTPStatus(error.error_status_hint)
                reply = error_reply(HttpError(status, f"bad request: {error}"))
            except HttpError as error:
                reply = error_reply(error)
            except trio.TooSlowError:
                if connection.their_state is h11.IDLE and not connection.trailing_data[0]:
                    return  # It has not begun to ask.
                text = f"a request has to come within {_REQUEST_S:g} s"
                reply = error_reply(HttpError(HTTPStatus.REQUEST_TIMEOUT, text))
            if not await _send(connection, stream, reply, head=_is_head(request)):
                return
            if reply.then is not None:
                reply.then()
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                return
            connection.start_next_cycle()
    except (trio.BrokenResourceError, trio.ClosedResourceError, h11.LocalProtocolError):
        return
    finally:
        with trio.move_on_after(0, shield=True):
            await stream.aclose()


def refuse(sock: socket.socket, status: HTTPStatus, text: str) -> None:
    """Send an error on `sock`, from which nothing was read, and close it; never waits."""
    reply = error_reply(HttpError(status, text))
    with sock, suppress(OSError):
        sock.send(_encode(h11.Connection(h11.SERVER), reply, head=False), socket.MSG_DONTWAIT)


def _is_head(request: HttpRequest | None) -> bool:
    return request is not None and request.method == "HEAD"


async def _receive(
    connection: h11.Connection, stream: trio.abc.HalfCloseableStream
) -> HttpRequest | None:
    """The next request; None: the client has left. Raises h11.RemoteProtocolError, HttpError."""
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            if connection.they_are_waiting_for_100_continue:
                go_on = h11.InformationalResponse(status_code=100, headers=[])
                await stream.send_all(connection.send(go_on) or b"")
            connection.receive_data(bytes(await stream.receive_some(_RECEIVE_BYTES)))
        elif isinstance(event, h11.Request):
            head = event
            _check_length(_announced(head))
        elif isinstance(event, h11.Data):
            body += event.data
            _check_length(len(body))
        elif isinstance(event, h11.EndOfMessage):
            assert head is not None
            path = head.target.decode("ascii").partition("?")[0]
            from_page = any(name == b"origin" for name, _ in head.headers)
            return HttpRequest(head.method.decode("ascii"), path, bytes(body), from_page)
        else:
            return None


def _announced(head: h11.Request) -> int:
    """How many bytes of body the client says it will send; 0: it does not say. (h11 has checked
    that it is a number.)"""
    return next((int(value) for name, value in head.headers if name == b"content-length"), 0)


def _check_length(n_bytes: int) -> None:
    """Raises HttpError."""
    if n_bytes > BODY_MAX_BYTES:
        raise HttpError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request may have {BODY_MAX_BYTES} bytes"
        )


async def _handled(request: HttpRequest, handle: Handler) -> Reply:
    """A bug of ours here must not harm the disk."""
    try:
        return await handle(request)
    except HttpError:
        raise
    except Exception as error:
        _log.error("internal error in the control socket", path=request.path, exc_info=error)
        raise HttpError(
            HTTPStatus.INTERNAL_SERVER_ERROR, "internal error: the bridge's log has more"
        ) from None


async def _send(
    connection: h11.Connection, stream: trio.abc.HalfCloseableStream, reply: Reply, *, head: bool
) -> bool:
    """False if the client does not take it."""
    with trio.move_on_after(_REPLY_S):
        await stream.send_all(_encode(connection, reply, head=head))
        return True
    return False


def _encode(connection: h11.Connection, reply: Reply, *, head: bool) -> bytes:
    headers = [
        ("Content-Type", reply.content_type),
        ("Content-Length", str(len(reply.body))),
        ("Cache-Control", "no-store"),
        *reply.headers,
    ]
    response = h11.Response(
        status_code=reply.status, headers=headers, reason=reply.status.phrase.encode()
    )
    data = connection.send(response) or b""
    if not head:
        data += connection.send(h11.Data(data=reply.body)) or b""
    return data + (connection.send(h11.EndOfMessage()) or b"")
