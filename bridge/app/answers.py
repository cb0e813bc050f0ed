"""Waiting, in a task, for what the turn answers with a callback."""

from __future__ import annotations

from collections.abc import Callable

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
) -> int:
    """What `start` reports, -1 if it does not within a time.

    For the start, when no task looks after the connection yet: if it is lost, nothing answers.
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
        await ended.wait()
    return answer


def to_be_set(request: Request) -> None:
    """The `done` of a request for `finished`, which replaces it."""
