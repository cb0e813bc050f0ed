"""One connection of the control socket: what a client may do wrong, and what that costs."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from http import HTTPStatus

import h11
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, memory_stream_pair

from bridge.api import http
from bridge.api.fields import Field, parse
from bridge.api.http import HttpError, HttpRequest, Reply, json_reply, refuse, serve_connection

Stream = trio.StapledStream[trio.testing.MemorySendStream, trio.testing.MemoryReceiveStream]


async def echo(request: HttpRequest) -> Reply:
    if request.path == "/bug":
        raise ZeroDivisionError
    if request.path == "/no":
        raise HttpError(HTTPStatus.CONFLICT, "not now", reason_code=7)
    return json_reply({"method": request.method, "body": request.body.decode("latin-1")})


@asynccontextmanager
async def client() -> AsyncIterator[Stream]:
    """The client's end of a connection that is served; it has ended when the block has."""
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, echo)
        yield ours
        await ours.aclose()


async def everything(stream: Stream) -> bytes:
    """What comes until the other end hangs up."""
    return b"".join([part async for part in stream])


async def answer(stream: Stream, request: bytes) -> tuple[int, bytes]:
    """(status, body) of the answer to a whole request."""
    connection = h11.Connection(h11.CLIENT)
    connection.send(h11.Request(method="GET", target="/", headers=[("Host", "x")]))
    connection.send(h11.EndOfMessage())
    await stream.send_all(request)
    status, body = 0, b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(bytes(await stream.receive_some()))
        elif isinstance(event, h11.Response):
            status = event.status_code
        elif isinstance(event, h11.Data):
            body += event.data
        elif isinstance(event, h11.EndOfMessage):
            return status, body


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def test_requests_on_one_connection_are_answered_one_after_the_other() -> None:
    async with client() as stream:
        for body in (b"one", b"two"):
            status, text = await answer(stream, post("/", body))
            assert status == 200
            assert json.loads(text) == {"method": "POST", "body": body.decode()}


async def test_errors_are_json_and_the_connection_goes_on() -> None:
    async with client() as stream:
        status, text = await answer(stream, post("/no", b""))
        assert status == 409
        assert json.loads(text) == {"error": "not now", "reason_code": 7}
        status, text = await answer(stream, post("/bug", b""))
        assert status == 500
        assert "internal error" in json.loads(text)["error"]
        assert (await answer(stream, post("/", b"")))[0] == 200


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0\1\2\3\r\n\r\n",
        b"GET / HTTP/x\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",  # no Host
        b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: what\r\n\r\n",
    ],
)
async def test_garbage_is_answered_with_an_error_and_hung_up_on(garbage: bytes) -> None:
    async with client() as stream:
        await stream.send_all(garbage)
        assert (await everything(stream)).split()[1] in (b"400", b"501", b"505")


async def test_long_head_is_refused_before_it_has_ended() -> None:
    async with client() as stream:
        await stream.send_all(b"GET /" + b"a" * 2 * http.HEAD_MAX_BYTES)
        assert (await everything(stream)).split()[1] in (b"400", b"431")


async def test_long_body_is_refused_before_it_has_ended() -> None:
    async with client() as stream:
        length = 100 * http.BODY_MAX_BYTES
        await stream.send_all(post("/", bytes(length))[: 2 * http.BODY_MAX_BYTES])
        assert (await everything(stream)).split()[1] == b"413"


async def test_long_body_is_refused_when_it_is_announced() -> None:
    async with client() as stream:
        await stream.send_all(post("/", bytes(http.BODY_MAX_BYTES + 1)).partition(b"\0")[0])
        assert (await everything(stream)).split()[1] == b"413"


async def test_client_that_says_nothing_or_half_a_request_is_hung_up_on(
    autojump_clock: MockClock,
) -> None:
    async with client() as stream:
        assert await everything(stream) == b""
    for said in (b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nab"):
        async with client() as stream:
            await stream.send_all(said)
            assert (await everything(stream)).split()[1] == b"408"


async def test_client_that_never_reads_is_hung_up_on(autojump_clock: MockClock) -> None:
    ours, theirs = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve_connection, theirs, echo)
        await ours.send_all(post("/", b""))
        # Nothing is received, so that nothing can be sent: the server leaves, and this ends.
    with pytest.raises(trio.BrokenResourceError):
        await ours.send_all(b"more")


async def test_head_has_no_body_and_the_next_request_follows() -> None:
    async with client() as stream:
        await stream.send_all(b"HEAD / HTTP/1.1\r\nHost: x\r\n\r\n")
        got = b""
        while b"\r\n\r\n" not in got:
            got += await stream.receive_some()
        assert got.split()[1] == b"200"
        assert got.endswith(b"\r\n\r\n")
        assert (await answer(stream, post("/", b"")))[0] == 200


def test_refusal_is_sent_without_waiting() -> None:
    ours, theirs = socket.socketpair()
    with ours:
        refuse(theirs, HTTPStatus.FORBIDDEN, "go away")
        got = ours.recv(4096)
        assert ours.recv(1) == b""
    assert got.split()[1] == b"403"
    assert b"go away" in got


@settings(max_examples=60)
@given(data=st.binary(max_size=300), pieces=st.integers(1, 7))
def test_whatever_comes_the_connection_ends_in_order(data: bytes, pieces: int) -> None:
    async def main() -> None:
        async with client() as stream:
            size = max(1, len(data) // pieces)
            with trio.move_on_after(60):
                for at in range(0, len(data), size):
                    try:
                        await stream.send_all(data[at : at + size])
                    except trio.BrokenResourceError:
                        return

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-1" + "0" * 400, "1e999", "9" * 4000])
@pytest.mark.parametrize("field", [Field(int, "", maximum=5), Field(float, "", maximum=5)])
def test_number_larger_than_any_float_is_out_of_range(field: Field, number: str) -> None:
    # `isfinite` and the format of the answer both wanted a float: an internal error.
    with pytest.raises(HttpError, match="x: ") as refused:
        parse({"x": field}, f'{{"x": {number}}}'.encode())
    assert refused.value.status == HTTPStatus.BAD_REQUEST
    assert len(refused.value.text) < 200
