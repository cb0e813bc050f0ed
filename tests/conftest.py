"""What every test shares."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

from tests import turns

# A bridge that a test starts has no cache unless the test says so: the default one is a large
# file in the system's cache directory.
os.environ["NBD_BRIDGE_SERVE_CACHE_MODE"] = "off"
# And no control socket, which would be in the system's directory.
os.environ["NBD_BRIDGE_SERVE_API"] = "off"

# Under nohup it is ignored, and so it would be by every bridge that a test sends it to.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# No test asserts a time: on a busy machine any example may take long.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def signals_as_they_were() -> Iterator[None]:
    """A stop ignores further signals until the process has ended; here it goes on, and whatever it
    starts would ignore them as well."""
    numbers = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)


@pytest.fixture(autouse=True, scope="module")
def nothing_left_to_collect() -> Iterator[None]:
    """Tests of other files count descriptors: those of tracebacks, in cycles, go before that."""
    yield
    gc.collect()


@pytest.fixture(autouse=True)
def _fresh_turn() -> None:
    turns.forget()
