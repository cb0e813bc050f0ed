"""Eventfds that a front-end shares: writing to one never stops the process for good."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from bridge.eventfds import EventfdWriter

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
    """Full, and made blocking by whoever shares it: the write would never end."""
    os.eventfd_write(shared, FULL)
    os.set_blocking(shared, True)

    assert not EventfdWriter(look_s=0.001).signal(shared)


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
