"""However many requests wait for one another, no stack grows with them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from bridge.datapath.request import DISCARD, FLUSH, FUA, READ, WRITE, WRITE_ZEROES, Request

from .fakes import BLOCK, GRANULE, FakeServer, Rig

FEW, MANY = 64, 64 * 1024
"""What 64 queues of 1024 can have in flight."""

Made = tuple[int, int, int, int]
"""Operation, offset, length, flags."""


def depth() -> int:
    frame: FrameType | None = sys._getframe()
    count = 0
    while frame is not None:
        count += 1
        frame = frame.f_back
    return count


class DeepServer(FakeServer):
    """Notes how deep the stack is when it gets something."""

    def __init__(self, size_bytes: int) -> None:
        super().__init__(size_bytes)
        self.deepest = 0

    def submit(self, request: Request) -> None:
        self.deepest = max(self.deepest, depth())
        super().submit(request)


def deepest(scenario: Callable[[int], Iterator[Made]], count: int, error: int) -> int:
    """How deep the stack gets with `count` requests in one turn, all of which end."""
    rig = Rig(granules=4096, slots=8, server=DeepServer(4096 * GRANULE))
    server = rig.server
    assert isinstance(server, DeepServer)
    ended = 0

    def done(request: Request) -> None:
        nonlocal ended
        ended += 1
        server.deepest = max(server.deepest, depth())

    scratch = memoryview(bytearray(BLOCK))
    for op, offset, length, flags in scenario(count):
        buffers = [scratch[:length]] if op in (READ, WRITE) else []
        rig.cache.submit(Request(op, offset, length, buffers, done, flags))
    rig.end_turn()
    if error:
        server.answer(error=error)
    rig.serve()
    while ended < count:
        rig.tick(rig.now + 1)  # After a failure the write-out pauses.
        rig.serve()
    return server.deepest


def reads_of_one_block(count: int) -> Iterator[Made]:
    return ((READ, 0, BLOCK, 0) for _ in range(count))


def writes_of_parts_of_one_block(count: int) -> Iterator[Made]:
    return ((WRITE, 512 * (number % 7), 512, 0) for number in range(count))


def writes_that_find_no_room(count: int) -> Iterator[Made]:
    return ((WRITE, number % 4096 * GRANULE, BLOCK, 0) for number in range(count))


def writes_that_are_to_be_durable(count: int) -> Iterator[Made]:
    return ((WRITE, number % 4096 * GRANULE, BLOCK, FUA) for number in range(count))


def discards_of_one_range(count: int) -> Iterator[Made]:
    return ((DISCARD, 0, 4 * GRANULE, 0) for _ in range(count))


def zeroes_and_reads(count: int) -> Iterator[Made]:
    return (
        (WRITE_ZEROES, BLOCK * (number % 3), 2 * BLOCK, 0) if number % 2 else (READ, 0, BLOCK, 0)
        for number in range(count)
    )


def flushes_between_writes(count: int) -> Iterator[Made]:
    return (
        (FLUSH, 0, 0, 0) if number % 2 else (WRITE, number % 512 * BLOCK, BLOCK, 0)
        for number in range(count)
    )


@pytest.mark.slow
@pytest.mark.parametrize("error", [0, 5], ids=["", "first-fails"])
@pytest.mark.parametrize(
    "scenario",
    [
        reads_of_one_block,
        writes_of_parts_of_one_block,
        writes_that_find_no_room,
        writes_that_are_to_be_durable,
        discards_of_one_range,
        zeroes_and_reads,
        flushes_between_writes,
    ],
)
def test_stack_is_as_deep_with_65536_requests_as_with_64(
    scenario: Callable[[int], Iterator[Made]], error: int
) -> None:
    assert deepest(scenario, MANY, error) == deepest(scenario, FEW, error)
