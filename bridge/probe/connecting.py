"""A front-end at the socket of a device that may be anyone's, or nobody's."""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final

import trio

from bridge.errors import ConnectionLost, ProtocolError
from bridge.peers.blk_driver import BlkDriver
from bridge.peers.frontend import Refused

ANSWER_S: Final = 20.0
"""How long a device may take to be connected and started."""


@asynccontextmanager
async def connected(
    path: str, *, check: Callable[[BlkDriver], None] = lambda _: None, **options: Any
) -> AsyncIterator[BlkDriver]:
    """A driver with the `options` of `BlkDriver` on the device at `path`, its rings started.

    `check` may raise ConfigError when features and configuration are known, before that.
    Raises ConnectionLost if there is none or it does not answer, Refused, ProtocolError.
    """
    driver = BlkDriver(path, **options)
    try:
        try:
            with trio.fail_after(ANSWER_S):
                await driver.negotiate()
                check(driver)
                await driver.start_rings()
        except trio.TooSlowError:
            raise ConnectionLost(
                f"{path}: the device does not answer within {ANSWER_S:.0f} s; it may serve "
                "another guest"
            ) from None
        except struct.error:
            raise ProtocolError(f"{path}: the device's configuration space is cut short") from None
        except (ConnectionLost, ProtocolError, Refused) as error:
            raise type(error)(f"{path}: {str(error).removeprefix(f'{path}: ')}") from None
        yield driver
    finally:
        driver.close()
