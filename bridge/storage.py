"""The NBD client as a disk's back-end: what `disk.Backend` asks for, in one place."""

from __future__ import annotations

from bridge.nbd.client import Client


class NbdBackend:
    """`client`, connected, as the storage side of a `Disk`."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.submit = client.submit  # bound once: no second call per request

    @property
    def can_flush(self) -> bool:
        """See disk.Backend."""
        return self._client.export.can_flush

    @property
    def can_fua(self) -> bool:
        """See disk.Backend."""
        return self._client.export.can_fua

    @property
    def can_write_zeroes(self) -> bool:
        """See disk.Backend."""
        return self._client.export.can_write_zeroes

    @property
    def in_flight(self) -> int:
        """See disk.Backend."""
        return self._client.in_flight

    def fail_pending(self, errno: int) -> None:
        """Finish everything unfinished with `errno`, at once: nothing is written afterwards."""
        self._client.fail_pending(errno)
