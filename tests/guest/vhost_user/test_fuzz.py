"""Nothing but ProtocolError leaves a session, whatever comes in, and no descriptor is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import pytest
import structlog
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.guest.vhost_user.fakes import FakeDevice, open_fds
from tests.guest.vhost_user.fuzz import RealDevice, campaign, converse

T = TypeVar("T")


class HypothesisDice:
    """Choices that Hypothesis makes, and makes smaller when something breaks."""

    def __init__(self, data: st.DataObject) -> None:
        self._draw = data.draw

    def number(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def choose(self, options: Sequence[T]) -> T:
        return self._draw(st.sampled_from(options))

    def blob(self, length: int) -> bytes:
        return self._draw(st.binary(min_size=length, max_size=length))


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Broken rings are reported as errors, which is right and too much here."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger("critical"))
    yield
    structlog.configure(**before)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_conversation_with_a_fake_device_keeps_the_rules(data: st.DataObject) -> None:
    before = open_fds()

    trio.run(_talk_to_fake, data)

    assert open_fds() == before


async def _talk_to_fake(data: st.DataObject) -> None:
    await converse(HypothesisDice(data), FakeDevice(max_queues=2), turn=lambda: None)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_conversation_with_the_real_device_keeps_the_rules(data: st.DataObject) -> None:
    before = open_fds()

    trio.run(_talk_to_real, data)

    assert open_fds() == before


async def _talk_to_real(data: st.DataObject) -> None:
    real = RealDevice()
    try:
        await converse(HypothesisDice(data), real.device, turn=real.turn)
    finally:
        real.loop.close()


async def test_three_thousand_seeded_conversations_break_nothing() -> None:
    assert await campaign(3000, seed=1_000_000) > 3000
