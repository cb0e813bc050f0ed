"""What the server has to keep, and what it may have lost: the truth about flushes, without I/O.

Theory. Every change that the server acknowledged without making it durable is counted: `answered`
is that count, and the caller passes it in. Three marks on it say all there is to know:

    flushed   what was answered up to here is durable, or known to be lost
    lost      what was answered up to here, and was not flushed then, may be gone
    told      a guest's flush has failed that was submitted when so much was answered

`told < lost` means that a loss is untold: the guest's next flush has to fail.

An **epoch** ends when the server may have dropped what it had only acknowledged, whoever's it was:

- a FLUSH failed, or a change with FUA: a Linux server whose fsync fails drops what was to be
  written, and says so once;
- a connection brought us to a server that cannot be shown to be the same one (`instance`).

What belongs to an older epoch is not vouched for. A change that was in flight at the end of an
epoch may have been executed before it and be answered after it, so it has to be sent again. A
flush that was in flight then vouches for nothing. A change of several commands is good if all of
them were sent in the epoch in which the last one is answered.

**Before this process.** Another process may have served the same guest and left something
unflushed. It counts as one change that was answered at the start (`BEFORE`): until a flush has
succeeded, or a guest has come that has not run before, a server that went away may have lost it.
Of which server instance that process knew
comes with the guest, as a number (`instance_mark`) that outlives a kill.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final

BEFORE: Final = 1
"""What was answered before this process, as far as anybody knows."""
_MARK_BYTES: Final = 7


def instance_mark(instance: str) -> int:
    """A number of 56 bits that stands for a server instance; 0 if the server names none."""
    if not instance:
        return 0
    return int.from_bytes(blake2b(instance.encode(), digest_size=_MARK_BYTES).digest()) or 1


class Durability:
    """See the module's text. `answered` never falls from one call to the next."""

    __slots__ = ("_flushed", "_instance", "_lost", "_told", "epoch", "keeps_unflushed")

    def __init__(self) -> None:
        self.epoch = 0
        """Raised when what was acknowledged and not flushed may be gone."""
        self.keeps_unflushed = False
        """The layer above has all that is not durable, and sends it again: no loss is untold."""
        self._instance: str | None = None
        self._flushed = 0
        self._lost = 0
        self._told = 0

    @property
    def untold(self) -> bool:
        """Something acknowledged may be gone, and no flush of the guest's has failed since."""
        return self._told < self._lost

    @property
    def instance_mark(self) -> int:
        """Of the present server instance, or the last one; 0 if it has no name."""
        return instance_mark(self._instance or "")

    def unflushed(self, answered: int) -> bool:
        """Something acknowledged is not durable yet, as far as is known."""
        return self._flushed < answered

    def connected(self, instance: str, answered: int) -> bool:
        """There is a new connection to the server `instance` ("": it does not say).

        True if something acknowledged may have been lost with the old one.
        """
        old, self._instance = self._instance, instance
        if old is None or (instance and instance == old):
            return False
        return self.failed(answered)

    def failed(self, answered: int) -> bool:
        """An epoch ends: what the server had only acknowledged may be gone.

        True if there was any of it, and the layer above does not keep it.
        """
        self.epoch += 1
        if not self.unflushed(answered):
            return False
        self._flushed = answered
        if self.keeps_unflushed:
            return False
        self._lost = answered
        return True

    def flushed(self, answered: int, epoch: int) -> bool:
        """A FLUSH succeeded that was sent in `epoch`, when so much was answered.

        False if it vouches for nothing: an epoch ended while it was in flight.
        """
        if epoch != self.epoch:
            return False
        self._flushed = max(self._flushed, answered)
        return True

    def tell(self, answered: int) -> None:
        """A flush fails that the guest submitted when so much was answered: the guest knows of
        losses so far."""
        self._told = max(self._told, answered)

    def nothing_before(self) -> None:
        """Nobody has a promise from before this process: the disk is only read, or its guest has
        just begun."""
        self._flushed = max(self._flushed, BEFORE)
        self._told = max(self._told, BEFORE)

    def is_lost(self, mark: int) -> bool:
        """Whether what was unflushed on the instance of that `mark` may be gone by now."""
        return mark not in (0, self.instance_mark)
