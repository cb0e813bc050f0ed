"""The signals that end a command. Each asks for the same clean end; only the first counts."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

import trio

from bridge.errors import BridgeError

T = TypeVar("T")

_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
_MEANINGLESS = (signal.SIGUSR1, signal.SIGUSR2)
"""They are ignored: without a handler they would kill the process, and the guest's disk with it."""


@contextmanager
def ending_signals() -> Iterator[trio.MemoryReceiveChannel[signal.Signals]]:
    """Yields a channel of the signals that ask for the end. For the main thread, around all work.

    Signals that come after the block are ignored until the process ends. (trio's own
    `open_signal_receiver` restores the default handlers: a second SIGTERM would then decide the
    exit status.)
    """
    token = trio.lowlevel.current_trio_token()
    send, receive = trio.open_memory_channel[signal.Signals](len(_ENDING))

    def put(number: int) -> None:
        try:
            send.send_nowait(signal.Signals(number))
        except trio.WouldBlock:
            return  # The channel is full: enough signals have asked for the end.

    def ask(number: int, _: FrameType | None) -> None:
        token.run_sync_soon(put, number, idempotent=True)

    # nohup ignores SIGHUP for the commands that it starts.
    ending = [each for each in _ENDING if not _is_ignored_hangup(each)]
    for number in ending:
        signal.signal(number, ask)
    for number in _MEANINGLESS:
        signal.signal(number, _ignore)  # Not SIG_IGN, which processes that we start would inherit.
    try:
        yield receive
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_IGN)
        send.close()


def _is_ignored_hangup(number: signal.Signals) -> bool:
    return number is signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


def _ignore(number: int, _: FrameType | None) -> None:
    """The handler of signals that have no meaning here."""


def run_until_signal(function: Callable[[], Awaitable[T]]) -> T:
    """Run `function` in trio; a signal that asks for the end cancels it.

    Raises BridgeError after such a signal, else the errors of `function`, perhaps in a group.
    """

    async def main() -> T:
        with ending_signals() as signals:
            results: list[T] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_cancel_at_first, signals, nursery.cancel_scope)
                results.append(await function())
                nursery.cancel_scope.cancel()
        if not results:
            raise BridgeError("interrupted")
        return results[0]

    return trio.run(main)


async def _cancel_at_first(
    signals: trio.MemoryReceiveChannel[signal.Signals], scope: trio.CancelScope
) -> None:
    await signals.receive()
    scope.cancel()
