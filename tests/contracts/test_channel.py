"""The promises of a `Channel`, kept by the fake of the tests and by a real connection alike."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import count

import pytest
import trio

from bridge.datapath.request import (
    DISCARD,
    FLUSH,
    FUA,
    READ,
    WRITE,
    WRITE_ZEROES,
    Request,
)
from bridge.server.link import Channel
from tests.server.helpers import served
from tests.server.test_link import FakeChannel, World
from tests.tools import HUNG_S
from tests.turns import forget

LENGTH = 4096


@dataclass
class Subject:
    """A channel, the generation it is of, and what lets its server answer."""

    channel: Channel
    generation: int
    answer: Callable[[], None]

    def __post_init__(self) -> None:
        self.cookies = count(1 << 20)
        self.ended: list[Request] = []

    def send(self, op: int, flags: int = 0) -> Request:
        length = 0 if op == FLUSH else LENGTH
        buffers = [memoryview(bytearray(b"w" * length))] if op in (READ, WRITE) else []
        request = Request(op, 0, length, buffers, self.ended.append, flags)
        request.cookie = next(self.cookies)
        self.channel.send(request)
        return request

    async def settle(self) -> None:
        """Return when every command has been answered."""
        with trio.fail_after(HUNG_S):
            while self.channel.in_flight:
                self.answer()
                await trio.lowlevel.checkpoint()


@asynccontextmanager
async def _fake() -> AsyncIterator[Subject]:
    forget()
    world = World()
    channel = FakeChannel(world.link)
    yield Subject(channel, world.link.generation + 1, channel.answer_all)


@asynccontextmanager
async def _real() -> AsyncIterator[Subject]:
    async with served() as (client, _, _):
        (connection,) = client._connections
        yield Subject(connection, client.generation, client._loop.turn.want)


@pytest.fixture(params=[_fake, _real], ids=["fake channel", "connection"])
async def subject(request: pytest.FixtureRequest) -> AsyncIterator[Subject]:
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(request.param())


async def test_commands_are_in_flight_until_they_are_answered(subject: Subject) -> None:
    sent = [subject.send(op) for op in (READ, WRITE, FLUSH)]
    assert subject.channel.in_flight == 3
    assert subject.ended == []
    await subject.settle()
    assert sorted(map(id, subject.ended)) == sorted(map(id, sent))
    assert subject.channel.in_flight == 0


async def test_changes_are_the_commands_that_change_the_export(subject: Subject) -> None:
    sent = [subject.send(op) for op in (READ, WRITE, FLUSH, DISCARD, WRITE_ZEROES)]
    assert subject.channel.changes() == [sent[1], sent[3], sent[4]]
    await subject.settle()
    assert subject.channel.changes() == []


@pytest.mark.parametrize(
    ("op", "flags", "counted"),
    [
        *((WRITE, 0, 1), (WRITE_ZEROES, 0, 1), (WRITE, FUA, 0), (WRITE_ZEROES, FUA, 0)),
        *((DISCARD, 0, 0), (DISCARD, FUA, 0), (READ, 0, 0), (FLUSH, 0, 0)),
    ],
)
async def test_answered_writes_without_fua_are_counted(
    subject: Subject, op: int, flags: int, counted: int
) -> None:
    before = subject.channel.unflushed
    subject.send(op, flags)
    assert subject.channel.unflushed == before
    await subject.settle()
    assert subject.channel.unflushed == before + counted


async def test_answer_bears_the_generation_of_its_connection(subject: Subject) -> None:
    request = subject.send(WRITE)
    await subject.settle()
    assert request.generation == subject.generation
    assert request.error == 0


@pytest.mark.parametrize("op", [READ, WRITE])
async def test_abandoned_command_lets_go_of_its_buffers_and_is_answered_all_the_same(
    subject: Subject, op: int
) -> None:
    kept = subject.send(WRITE)
    request = subject.send(op)
    buffer = request.buffers[0]
    buffer[:] = b"k" * LENGTH
    request.abandon(subject.ended.append, memoryview(bytearray(LENGTH)))
    assert subject.channel.abandon() == [request]
    assert all(view.obj is not buffer.obj for view in request.buffers)
    assert subject.channel.in_flight == 2
    await subject.settle()
    assert bytes(buffer) == b"k" * LENGTH
    assert kept.error == 0
