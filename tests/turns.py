"""The end of a turn, in tests that play the loop.

Whatever a test does to the product (submits a request, replies to one, lets time pass, loses or
makes a connection, closes, resizes) happens within a turn of the loop. The helpers and fakes of the
tests pass through here after each such thing, so that this is the one place that knows what
happens between a request's end and its requester's hearing of it. Today that is nothing:
`Request.finish` calls the requester.
"""

from __future__ import annotations

from collections.abc import Callable

import trio
import trio.testing

from bridge.request import Request, Target


def deliver() -> None:
    """Whoever made a request that has ended has been told of it when this returns."""


def submit(target: Target, request: Request) -> None:
    """Submit `request`, in a turn of its own."""
    target.submit(request)
    deliver()


def finish(request: Request, error: int = 0) -> None:
    """End `request`, in a turn of its own, as what it was submitted to would."""
    request.finish(error)
    deliver()


async def turn_of_the_loop() -> None:
    """The product's own loop, which runs in another task, has ended a turn."""
    await trio.testing.wait_all_tasks_blocked()


def forget() -> None:
    """The process is gone: nobody is told of anything any more."""


def end_turn(put_off: list[Callable[[], None]], *, rounds: int = 1000) -> None:
    """Deliver, do what was `put_off` to the end of the turn, and so on until nothing is left."""
    deliver()
    while put_off:
        assert rounds, "the turn does not end"
        rounds -= 1
        callbacks, put_off[:] = list(put_off), []
        for callback in callbacks:
            callback()
        deliver()


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
