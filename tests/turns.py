"""The turn of the loop, in tests that play the loop.

Whatever a test does to the product (submits a request, replies to one, lets time pass, loses or
makes a connection, closes, resizes) happens within a turn. The helpers and fakes of the tests pass
through here after each such thing, so that this is the one place that ends it: requests that have
finished are told of, and every stage does what it can.

There is one turn at a time, as in a process; each test begins with a fresh one.
"""

from __future__ import annotations

import trio
import trio.testing

from bridge.datapath.request import Request, Target
from bridge.datapath.turn import Turn

Turn.checks_stages = True
_turn = Turn()


def turn() -> Turn:
    """The present one, for what the test makes."""
    return _turn


def forget() -> Turn:
    """The process is gone: nobody is told of anything any more. Returns that of the next one."""
    global _turn
    _turn = Turn()
    return _turn


def deliver() -> None:
    """End the turn, and those that it asks for: whoever made a request that has ended has been
    told of it when this returns, and guests have seen the end of the turn."""
    _turn.end()
    while _turn.pending:
        _turn.end()
    _turn.looked()


def submit(target: Target, request: Request) -> None:
    """Submit `request`, in a turn of its own."""
    target.submit(request)
    deliver()


def finish(request: Request, error: int = 0) -> None:
    """End `request`, in a turn of its own, as what it was submitted to would."""
    _turn.finish(request, error)
    deliver()


async def turn_of_the_loop() -> None:
    """The product's own loop, which runs in another task, has ended a turn."""
    await trio.testing.wait_all_tasks_blocked()


class Turns:
    """Turns that a trio task ends, for tests in which the product's own tasks make requests."""

    def __init__(self) -> None:
        self._wanted = trio.Event()

    def want(self) -> None:
        """End a turn soon. From wherever the loop would be awake."""
        self._wanted.set()

    async def run(self) -> None:
        """End turns until cancelled."""
        while True:
            await self._wanted.wait()
            self._wanted = trio.Event()
            deliver()
