"""Eventfds that a front-end shares: writing to one never stops the process for good."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest

from bridge.guest.eventfds import EventfdWriter, _would_block
from tests.tools import HUNG_S

FULL = (1 << 64) - 2


@pytest.fixture
def shared() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


def test_eventfd_is_signalled(shared: int) -> None:
    assert EventfdWriter().signal(shared)
    assert os.eventfd_read(shared) == 1


def test_full_eventfd_is_left_alone(shared: int) -> None:
    os.eventfd_write(shared, FULL)
    assert EventfdWriter().signal(shared)
    assert os.eventfd_read(shared) == FULL


def test_eventfd_that_blocks_is_given_up(shared: int) -> None:
    """Full, and made blocking by the front-end that shares it: the write would never end."""
    os.eventfd_write(shared, FULL)
    os.set_blocking(shared, True)

    assert not EventfdWriter(look_s=0.001).signal(shared)


@pytest.mark.parametrize("blocking", [False, True])
def test_write_that_is_only_held_up_does_not_count_as_blocking(
    shared: int, blocking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a busy machine the writing thread may stand still for longer than two looks."""
    os.set_blocking(shared, blocking)
    writer = EventfdWriter(look_s=0.001)
    write = os.eventfd_write

    def held_up(fd: int, value: int) -> None:
        seen = [threading.Event() for _ in range(4)]
        monkeypatch.setattr("bridge.guest.eventfds._would_block", noting(seen))
        for event in seen:
            assert event.wait(HUNG_S)
        write(fd, value)

    monkeypatch.setattr(os, "eventfd_write", held_up)
    assert writer.signal(shared)
    assert os.eventfd_read(shared) == 1


def noting(events: list[threading.Event]) -> Callable[[int], bool]:
    """`_would_block`, which sets one more event each time."""
    left = iter(events)

    def asked(fd: int) -> bool:
        answer = _would_block(fd)
        if (event := next(left, None)) is not None:
            event.set()
        return answer

    return asked


def test_eventfd_that_blocks_after_a_long_silence_is_given_up(shared: int) -> None:
    writer = EventfdWriter(look_s=0.0001)
    assert writer.signal(shared)
    while writer._watched:  # the thread has gone to sleep
        os.sched_yield()
    os.eventfd_write(shared, FULL - 1)
    os.set_blocking(shared, True)

    assert not writer.signal(shared)
    os.eventfd_read(shared)
    assert writer.signal(shared)  # the next write is judged by itself
