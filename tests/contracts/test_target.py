"""The promises of a `Target`, kept by the fakes of the tests and by the real things alike.

A test of one part puts a fake in the place of the next one. What it shows holds for the product
only as far as the fake keeps the promises of what it stands for: so both go through these tests.
The real ones are the NBD client on the small server and on nbdkit, and the cache over a fake and
over the client.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from bridge.app.storage import CacheSettings, Storage
from bridge.app.targets import ServerTarget
from bridge.cache.upstream import Upstream
from bridge.datapath.loop import Loop
from bridge.datapath.request import (
    DISCARD,
    FLUSH,
    FUA,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
    Target,
)
from bridge.server.client_options import ClientOptions
from bridge.server.uri import parse_uri
from tests.cache.fakes import FakeServer, Rig
from tests.guest.memory_target import MemoryTarget
from tests.guest.virtio.mock import FakeDisk
from tests.processes import program, short_directory, unix_uri
from tests.server.helpers import cut, pattern, running_client, served
from tests.tools import HUNG_S, need
from tests.turns import deliver, forget, turn

SIZE = 1 << 20


@dataclass
class Subject:
    """A target of `SIZE` bytes. `advance` lets it work until what was submitted may have ended."""

    target: Target
    advance: Callable[[], None]
    ended: list[Request] = field(default_factory=list)

    def start(self, op: int, offset: int, length: int, buffers: list[memoryview], flags: int = 0):
        """Submit one request; nothing more."""
        request = Request(op, offset, length, buffers, self.ended.append, flags)
        self.target.submit(request)
        return request

    async def end(self, *requests: Request) -> None:
        """Return when all of `requests` have ended; fails the test if one does not."""
        with trio.fail_after(HUNG_S):
            while not all(request in self.ended for request in requests):
                self.advance()
                await trio.lowlevel.checkpoint()

    async def do(self, op: int, offset: int = 0, length: int = 0, flags: int = 0) -> int:
        """A request without data; its errno."""
        request = self.start(op, offset, length, [], flags)
        await self.end(request)
        return request.error

    async def write(self, offset: int, data: bytes, pieces: int = 1, flags: int = 0) -> int:
        buffers = cut(bytearray(data), pieces)
        request = self.start(WRITE, offset, len(data), buffers, flags)
        await self.end(request)
        return request.error

    async def read(self, offset: int, length: int, pieces: int = 1) -> bytes:
        data = bytearray(b"\xee" * length)
        request = self.start(READ, offset, length, cut(data, pieces))
        await self.end(request)
        assert request.error == 0
        return bytes(data)


@asynccontextmanager
async def _fake_server(folder: Path) -> AsyncIterator[Subject]:
    forget()
    server = FakeServer(SIZE)

    def advance() -> None:
        while server.pending:
            server.answer()

    yield Subject(server, advance)


@asynccontextmanager
async def _fake_disk(folder: Path) -> AsyncIterator[Subject]:
    forget()
    yield Subject(FakeDisk(SIZE), deliver)


@asynccontextmanager
async def _memory_target(folder: Path) -> AsyncIterator[Subject]:
    forget()
    yield Subject(MemoryTarget(turn(), SIZE), deliver)


@asynccontextmanager
async def _cache_over_fake(folder: Path) -> AsyncIterator[Subject]:
    rig = Rig(granules=SIZE // 65536)

    def advance() -> None:
        deliver()
        rig.serve()

    yield Subject(rig.cache, advance)


@asynccontextmanager
async def _client_on_small_server(folder: Path) -> AsyncIterator[Subject]:
    async with served(SIZE) as (client, _, _):
        yield Subject(ServerTarget(client), client._loop.turn.want)


@asynccontextmanager
async def _nbdkit(folder: Path) -> AsyncIterator[str]:
    """The URI of a volume in the memory of a real nbdkit."""
    with short_directory() as place:
        argv = [need("nbdkit"), "-f", "-U", str(place / "s"), "memory", str(SIZE)]
        with program(argv, ready=place / "s"):
            yield unix_uri(place / "s")


@asynccontextmanager
async def _client_on_nbdkit(folder: Path) -> AsyncIterator[Subject]:
    async with _nbdkit(folder) as uri, running_client(uri) as client:
        yield Subject(ServerTarget(client), client._loop.turn.want)


@asynccontextmanager
async def _cache_over_nbdkit(folder: Path) -> AsyncIterator[Subject]:
    loop = Loop(poll_us=0)
    settings = CacheSettings(mode="writeback", size_bytes=64 * 65536, directory=str(folder))
    async with _nbdkit(folder) as uri:
        storage = Storage(parse_uri(uri), loop, ClientOptions(), settings)
        await storage.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(loop.run)
            nursery.start_soon(storage.run)
            yield Subject(storage.target, loop.turn.want)
            await storage.close(HUNG_S)
            nursery.cancel_scope.cancel()
    loop.close()


UPSTREAMS = {
    "fake server of the cache": _fake_server,
    "client on the small server": _client_on_small_server,
    "client on nbdkit": _client_on_nbdkit,
}
"""What the cache may stand on: these are `Upstream`s, too."""
TARGETS = UPSTREAMS | {
    "fake disk": _fake_disk,
    "memory target": _memory_target,
    "cache over the fake server": _cache_over_fake,
    "cache over nbdkit": _cache_over_nbdkit,
}


def _params(subjects: Iterable[str]) -> list[Any]:
    return [
        pytest.param(name, marks=pytest.mark.nbdkit if "nbdkit" in name else ())
        for name in subjects
    ]


@pytest.fixture(params=_params(TARGETS))
async def subject(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(TARGETS[request.param](tmp_path))


@pytest.fixture(params=_params(UPSTREAMS))
async def upstream(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Subject]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(UPSTREAMS[request.param](tmp_path))


async def test_write_is_read_back_and_leaves_its_neighbours_alone(subject: Subject) -> None:
    before = await subject.read(0, 65536)
    data = pattern(8192, 12288)
    assert await subject.write(8192, data) == 0
    assert await subject.read(0, 65536) == before[:8192] + data + before[20480:]


async def test_buffers_of_any_number_are_the_same_bytes(subject: Subject) -> None:
    data = pattern(0, 24576)
    assert await subject.write(4096, data, pieces=5) == 0
    assert await subject.read(4096, len(data), pieces=3) == data
    assert await subject.read(4096, len(data)) == data


async def test_write_takes_nothing_from_its_buffers_after_its_end(subject: Subject) -> None:
    buffer = bytearray(pattern(0, 4096))
    request = subject.start(WRITE, 0, 4096, [memoryview(buffer)])
    await subject.end(request)
    buffer[:] = bytes(4096)
    assert await subject.read(0, 4096) == pattern(0, 4096)


@pytest.mark.parametrize("op", [READ, WRITE, WRITE_ZEROES, DISCARD, FLUSH])
async def test_request_never_ends_within_submit_and_ends_once(subject: Subject, op: int) -> None:
    length = 0 if op == FLUSH else 4096
    buffers = [memoryview(bytearray(length))] if op in (READ, WRITE) else []
    request = subject.start(op, 0, length, buffers)
    assert subject.ended == []
    await subject.end(request)
    await subject.do(FLUSH)
    assert subject.ended.count(request) == 1
    assert request.error == 0


async def test_many_at_once_all_end_once(subject: Subject) -> None:
    requests = [
        subject.start(WRITE, at, 4096, [memoryview(bytearray(pattern(at, 4096)))])
        for at in range(0, 64 * 4096, 4096)
    ]
    await subject.end(*requests)
    assert len(subject.ended) == len(requests)
    assert await subject.read(0, 64 * 4096) == pattern(0, 64 * 4096)


async def test_zeroes_are_read_where_they_were_written_and_nowhere_else(subject: Subject) -> None:
    data = pattern(0, 32768)
    await subject.write(0, data)
    assert await subject.do(WRITE_ZEROES, 8192, 4096) == 0
    assert await subject.read(0, 32768) == data[:8192] + bytes(4096) + data[12288:]


async def test_discard_touches_nothing_but_its_range(subject: Subject) -> None:
    data = pattern(0, 32768)
    await subject.write(0, data)
    assert await subject.do(DISCARD, 8192, 4096) == 0
    found = await subject.read(0, 32768)
    assert found[:8192] + found[12288:] == data[:8192] + data[12288:]


async def test_write_with_fua_and_a_flush_succeed(subject: Subject) -> None:
    assert await subject.write(0, pattern(0, 4096), flags=FUA) == 0
    assert await subject.do(FLUSH) == 0


# What a `Upstream` promises beyond that.


def upstream_of(subject: Subject) -> Upstream:
    """What is promised is there, and of the right kind."""
    upstream = subject.target
    for name in ("can_fua", "can_flush", "can_trim", "can_write_zeroes", "gone"):
        assert isinstance(getattr(upstream, name), bool), name
    for name in ("size_bytes", "min_block_bytes", "generation"):
        assert isinstance(getattr(upstream, name), int), name
    return upstream  # type: ignore[return-value]


async def test_upstream_says_what_it_can(upstream: Subject) -> None:
    upstream = upstream_of(upstream)
    assert upstream.size_bytes == SIZE
    assert 1 <= upstream.min_block_bytes <= 4096
    assert not upstream.gone
    assert upstream.can_flush
    assert upstream.can_fua


@pytest.mark.parametrize("op", [READ, WRITE, WRITE_ZEROES, DISCARD, FLUSH])
async def test_upstream_ends_a_request_in_the_generation_that_answered_it(
    upstream: Subject, op: int
) -> None:
    length = 0 if op == FLUSH else 4096
    buffers = [memoryview(bytearray(length))] if op in (READ, WRITE) else []
    request = upstream.start(op, 0, length, buffers)
    await upstream.end(request)
    assert request.generation == upstream_of(upstream).generation >= 1
