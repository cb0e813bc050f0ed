"""How long a link waits for its server, and how often it tries. No I/O: `now` is an argument."""

from __future__ import annotations

from random import Random
from typing import Final

from bridge.server.client_options import ClientOptions

_GOOD_CONNECTION_S: Final = 1.0


class Patience:
    """Times are in seconds of any monotonic clock."""

    def __init__(self, options: ClientOptions, random: Random) -> None:
        self.options = options
        """May be replaced."""
        self._random = random
        self._down_since_s = 0.0
        self._up_since_s = 0.0
        self.owed = False
        """The present connections began with commands that the last ones had not answered."""
        self._attempts = 0

    def connected(self, now: float) -> None:
        """There are connections."""
        self._up_since_s = now

    def lost(self, now: float, *, answered: bool) -> None:
        """They are lost; `answered`: after some command was answered on them."""
        if answered or not self.owed:
            # Otherwise it was no better than none: what waits has waited since an earlier loss.
            self._down_since_s = now
        if answered or now - self._up_since_s >= _GOOD_CONNECTION_S:
            # Only after a connection that was good for something does the backoff begin anew. A
            # server that takes connections and then drops them, or refuses every command with
            # ESHUTDOWN, must not be connected to without a pause.
            self._attempts = 0

    def begin_anew(self, now: float) -> None:
        """The connection was done without for a while, and is wanted again from now on."""
        self._down_since_s = now
        self._attempts = 0

    def try_at_once(self) -> None:
        """What kept the server from answering is known: the next attempt is not put off."""
        self._attempts = 0

    def next_delay_s(self) -> float:
        """How long to wait before the next attempt to connect."""
        attempts = self._attempts
        self._attempts += 1
        if not attempts:
            return 0.0
        options = self.options
        # Bounded before the power is: 2.0 ** 2000 would overflow.
        delay_s = options.reconnect_first_s * 2.0 ** min(attempts - 1, 30)
        return min(delay_s, options.reconnect_max_s) * self._random.uniform(0.5, 1.0)

    @property
    def ends_s(self) -> float | None:
        """When waiting for a connection ends, None: never. Only while there is none."""
        timeout_s = self.options.reconnect_timeout_s
        return self._down_since_s + timeout_s if timeout_s else None
