"""Deadlines that no call announces."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock

from bridge.datapath.deadlines import Deadlines
from bridge.datapath.loop import Loop


class Part:
    """Something with a deadline of its own."""

    def __init__(self) -> None:
        self.due_s: float | None = None
        self.ticks: list[float] = []

    def next_deadline(self) -> float | None:
        return self.due_s

    def tick(self, now: float) -> None:
        self.ticks.append(now)
        self.due_s = None


@asynccontextmanager
async def watched() -> AsyncIterator[tuple[Loop, Part]]:
    loop, part = Loop(poll_us=0), Part()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        nursery.start_soon(Deadlines(loop, part.next_deadline, part.tick).run)
        await trio.testing.wait_all_tasks_blocked()
        yield loop, part
        nursery.cancel_scope.cancel()
    loop.close()


@pytest.mark.parametrize("before_s", [None, 100.0], ids=["none-before", "later-before"])
async def test_deadline_that_a_turn_brings_is_kept(
    autojump_clock: MockClock, before_s: float | None
) -> None:
    async with watched() as (loop, part):
        start_s = trio.current_time()
        if before_s is not None:
            part.due_s = start_s + before_s
            loop.turn.want()
            await trio.testing.wait_all_tasks_blocked()
        loop.turn.at_end(lambda: setattr(part, "due_s", start_s + 10))
        await trio.sleep(20)
        assert [now - start_s for now in part.ticks] == pytest.approx([10])


async def test_deadline_that_is_put_off_is_kept_when_it_comes(autojump_clock: MockClock) -> None:
    async with watched() as (loop, part):
        start_s = trio.current_time()
        part.due_s = start_s + 10
        loop.turn.want()
        await trio.sleep(1)
        part.due_s = start_s + 50
        await trio.sleep(100)
        assert [now - start_s for now in part.ticks] == pytest.approx([50])


async def test_deadline_is_kept_by_a_loop_that_does_not_sleep(autojump_clock: MockClock) -> None:
    """The clock stands still meanwhile: what is seen is that the task waits for it."""
    async with watched() as (loop, part):
        looked = trio.Event()
        left = 1_000_000

        def work() -> None:
            nonlocal left
            if part.due_s is None:
                part.due_s = trio.current_time()
            left -= 1
            if part.ticks or not left:
                looked.set()
            else:
                loop.turn.next_turn(work)

        loop.turn.next_turn(work)
        await looked.wait()
        assert part.ticks
