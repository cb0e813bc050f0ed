"""Waiting, in a task, for what the turn answers with a callback."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

from bridge.datapath.request import Request, Target
from bridge.datapath.turn import Turn

ANSWER_LIMIT_S = 10.0
"""How long what the cache asks of the server at the start may take."""


async def finished(target: Target, request: Request, turn: Turn) -> None:
    """Submit `request`, whose `done` is set here, and wait until it has ended."""
    ended = trio.Event()
    request.done = lambda _: ended.set()
    target.submit(request)
    turn.end()
    await ended.wait()


async def answer_of(
    start: Callable[[Callable[[int], None]], None],
    turn: Turn,
    limit_s: float = ANSWER_LIMIT_S,
    *,
    lost: trio.Event | None = None,
    hang_up: Callable[[], Awaitable[None]] | None = None,
) -> int:
    """What `start` reports, -1 if it does not within a time.

    For the start, when no task looks after the connection yet: if it is `lost`, nothing answers.
    With `hang_up`, which ends all that was asked, nothing is asked any more when this returns. What
    `start` reports then is made of a part of the answers: it counts if it is more than 0.
    """
    answer = -1
    ended = trio.Event()

    def done(value: int) -> None:
        nonlocal answer
        answer = value
        ended.set()

    start(done)
    turn.end()
    with trio.move_on_after(limit_s):
        await _either(ended, trio.Event() if lost is None else lost)
    if ended.is_set() or hang_up is None:
        return answer
    await hang_up()
    return max(answer, 0) or -1


async def _either(one: trio.Event, other: trio.Event) -> None:
    async def wait_for_other() -> None:
        await other.wait()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_for_other)
        await one.wait()
        nursery.cancel_scope.cancel()


def to_be_set(request: Request) -> None:
    """The `done` of a request for `finished`, which replaces it."""
