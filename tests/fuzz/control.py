"""A process of the bridge's own user that says anything on the control socket."""

from __future__ import annotations

from http import HTTPStatus

import trio
from trio.testing import MockClock

from bridge.api import routes
from bridge.api.fields import Fields, parse
from bridge.api.http import HttpError, HttpRequest, Reply, json_reply, serve_connection
from tests.fuzz.dice import BytesRandom

_FIELDS: dict[str, Fields] = {
    "/settings": routes._SETTINGS,
    "/cache/warm": routes._RANGE,
    "/stop": routes._STOP,
}
_ANSWERS_AT_MOST_BYTES = 1 << 20


class _Stream(trio.abc.HalfCloseableStream):
    """What the client sends comes in pieces; what it is answered is kept."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = pieces[::-1]
        self.answers = b""
        self.closed = False

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        self.answers += data

    async def wait_send_all_might_not_block(self) -> None:
        return

    async def send_eof(self) -> None:
        return

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._pieces:
            return b""
        data = self._pieces.pop()
        limit = max_bytes or len(data)
        if len(data) > limit:
            self._pieces.append(data[limit:])
        return data[:limit]

    async def aclose(self) -> None:
        self.closed = True


async def _handle(request: HttpRequest) -> Reply:
    fields = _FIELDS.get(request.path)
    if fields is None:
        raise HttpError(HTTPStatus.NOT_FOUND, f"there is no {request.path[:80]}")
    return json_reply(parse(fields, request.body))


def run(data: bytes) -> str:
    """A conversation: every request is answered, none by an internal error, and it ends."""
    random = BytesRandom(data)
    size = random.choice((1, 7, 100, 1 << 16))
    said = random.rest()
    stream = _Stream([said[at : at + size] for at in range(0, len(said), size)])
    trio.run(serve_connection, stream, _handle, clock=MockClock(autojump_threshold=0))
    assert stream.closed
    assert len(stream.answers) <= _ANSWERS_AT_MOST_BYTES
    statuses = _statuses(stream.answers)
    assert 500 not in statuses, statuses
    return f"{statuses[-1]}" if statuses else "nothing"


def _statuses(answers: bytes) -> list[int]:
    """Of the answers, which are whole."""
    found = []
    while answers:
        head, _, rest = answers.partition(b"\r\n\r\n")
        status = int(head.split(b" ")[1])
        if status == HTTPStatus.CONTINUE:
            answers = rest
            continue
        found.append(status)
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        # The answer to a HEAD has no body.
        answers = rest[length:] if not rest.startswith(b"HTTP/") else rest
    return found
