"""The signals that end a command. Each asks for the same clean end; only the first counts."""

from __future__ import annotations

import signal
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import ClassVar, TypeVar

import trio

from bridge.errors import BridgeError

T = TypeVar("T")

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP)
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
    send, receive = trio.open_memory_channel[signal.Signals](len(ENDING))

    def put(number: int) -> None:
        try:
            send.send_nowait(signal.Signals(number))
        except trio.WouldBlock:
            return  # The channel is full: enough signals have asked for the end.

    def ask(number: int, _: FrameType | None) -> None:
        token.run_sync_soon(put, number, idempotent=True)

    # nohup ignores SIGHUP for the commands that it starts.
    ending = [each for each in ENDING if not _is_ignored_hangup(each)]
    for number in ending:
        signal.signal(number, ask)
    for number in _MEANINGLESS:
        signal.signal(number, _ignore)  # Not SIG_IGN, which processes that we start would inherit.
    # Those that came while this process replaced its program: see `pass_signals_on`.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING)
    try:
        yield receive
    finally:
        for number in ending:
            signal.signal(number, _Late.note if _Late.are_passed_on else signal.SIG_IGN)
        # (The channel stays open: one that came before may be on its way there.)


class _Late:
    """Signals that came too late for this program, and are for the one that replaces it."""

    are_passed_on = False
    numbers: ClassVar[set[int]] = set()

    @classmethod
    def note(cls, number: int, _: FrameType | None) -> None:
        """A handler: another thread than the main one may have got the signal."""
        cls.numbers.add(number)


def pass_signals_on() -> None:
    """From here on a signal that asks for the end is for the program that replaces this one: it
    stays pending over the execve. For the main thread."""
    _Late.are_passed_on = True
    signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)


def send_late_signals(*more: int) -> None:
    """Right before the execve: also those that a handler has taken already, and `more`."""
    for number in (*_Late.numbers, *more):
        signal.pthread_kill(threading.get_ident(), number)


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
