"""Every test here must give back every descriptor."""

from __future__ import annotations

import gc
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.guest.vhost_user.fakes import Talk, open_fds


@pytest.fixture
def no_fd_leak() -> Iterator[None]:
    """Fails the test if it leaves more descriptors open than it found."""
    before = open_fds()
    yield
    if open_fds() > before:
        gc.collect()  # sockets that only wait to be collected are not a leak
    # Fewer than before: those of an earlier test were collected meanwhile.
    assert open_fds() <= before


@pytest.fixture
async def talk(no_fd_leak: None) -> AsyncIterator[Talk]:
    """A session with a fake device, closed at the end."""
    talk = Talk()
    yield talk
    await talk.session.close()
