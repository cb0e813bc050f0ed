"""The first connection to the server, which may not be up yet: hosts boot in any order."""

from __future__ import annotations

from typing import Final

import structlog
import trio

from bridge.app import service_manager
from bridge.errors import ConnectionLost
from bridge.server.client import Client
from bridge.server.export import Export

_log = structlog.get_logger(__name__)

_FIRST_PAUSE_S: Final = 0.1
_LONGEST_PAUSE_S: Final = 5.0
_REMIND_S: Final = 60.0


async def first_connection(client: Client, *, wait: bool) -> Export:
    """Connect `client`. With `wait`, try again for as long as the server cannot be reached.

    Raises ConfigError and ProtocolError, which waiting would not help, and without `wait`
    ConnectionLost.
    """
    began_s = said_s = trio.current_time()
    pause_s = _FIRST_PAUSE_S
    reason = ""
    while True:
        try:
            export = await client.connect()
        except ConnectionLost as error:
            if not wait:
                raise
            now_s = trio.current_time()
            if str(error) != reason or now_s - said_s >= _REMIND_S:
                reason, said_s = str(error), now_s
                _log.warning(
                    "waiting for the server", reason=reason, seconds=round(now_s - began_s)
                )
                service_manager.waiting(f"waiting for the server: {reason}")
            await trio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, _LONGEST_PAUSE_S)
        else:
            return export
