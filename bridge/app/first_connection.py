"""The first connection to the server, which may not be up yet: hosts boot in any order."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Final

import structlog
import trio

from bridge.app import service_manager
from bridge.errors import ConnectionLost
from bridge.server.export import Export

_log = structlog.get_logger(__name__)

_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
_REMIND_S: Final = 60.0


async def first_connection(attempt: Callable[[], Awaitable[Export]], *, wait: bool) -> Export:
    """What `attempt` returns, which connects. With `wait`, it is made again for as long as the
    server cannot be reached, or is lost again before the disk can be served.

    Raises ConfigError and ProtocolError, which waiting would not help, and without `wait`
    ConnectionLost.
    """
    began_s = said_s = trio.current_time()
    pause_s = _FIRST_PAUSE_S
    reason = ""
    while True:
        try:
            export = await attempt()
        except ConnectionLost as error:
            if not wait:
                raise
            now_s = trio.current_time()
            if str(error) != reason or now_s - said_s >= _REMIND_S:
                reason, said_s = str(error), now_s
                _log.warning("waiting for the server", reason=error, seconds=round(now_s - began_s))
                service_manager.waiting(f"waiting for the server: {reason}")
            await trio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)
        else:
            return export
