"""What the server has to keep, and what it may have lost: the truth about flushes, without I/O.

Theory. Every change that the server acknowledged without making it durable is counted: `answered`
is that count. The mark `flushed` on it says up to where nothing can be lost any more.

An **epoch** ends when the server may have dropped what it had only acknowledged, for any client:

- a FLUSH failed, or a change with FUA: a Linux server whose fsync fails drops what was to be
  written, and says so once;
- a new connection brought us to a server that may be another one, or the same without its memory.

What belongs to an older epoch is not vouched for. A change that was in flight at the end of an
epoch may have been executed before it and be answered after it, so it has to be sent again. A
flush that was in flight then vouches for nothing. A change of several commands is good if all of
them were sent in the epoch in which the last one is answered.

So the sender of a change remembers the epoch, and compares when the answer comes. What a lost
epoch leads to depends on the layer:

- `ReportingDurability`: the NBD client alone has nothing that it could send again. A loss has to be
  reported to the guest, by a flush that fails. Two more marks say whether it was:

      lost      what was answered up to here, and was not flushed then, may be gone
      told      a guest's flush has failed that was submitted when the guest knew of so much

  `told < lost` means that a loss is unreported: the guest's next flush has to fail. The guest
  learns at the end of a turn what was answered in it. A flush that was in a ring by then, even if
  it is taken in the next turn only, reports, by failing, only losses of what the guest had `seen`
  before (see `Turn.after_look`). A change that is answered in the
  turn of a failure may have been done before the failure, and must not count for the epoch after
  it: that epoch begins with the next round, and in between there is one to which nothing belongs
  (`sending_epoch`).

- `ReplayingDurability`: the cache has every block until a flush has covered it, and sends it again.
  No loss is reported, so it need not know which server a new connection leads to: each one ends an
  epoch. It must know which changes the client has sent again by itself, on the new connection
  (`done_in`).

**Before this process.** Another process may have served the same guest and left something
unflushed. It counts as one change that was answered at the start (`BEFORE`): until a flush has
succeeded, or a guest has come that has not run before, a server that went away may have lost it.
Of which server instance that process knew comes with the guest, as a number (`instance_mark`) that
outlives a kill.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import Final, Protocol

BEFORE: Final = 1
"""What was answered before this process, as far as is known."""
_MARK_BYTES: Final = 7


def instance_mark(instance: str) -> int:
    """A number of 56 bits that stands for a server instance; 0 if the server names none."""
    if not instance:
        return 0
    return int.from_bytes(blake2b(instance.encode(), digest_size=_MARK_BYTES).digest()) or 1


class Durability:
    """What every layer has to know. `answered` never falls from one call to the next."""

    __slots__ = ("_ended", "_flushed")

    def __init__(self) -> None:
        self._ended = 0
        self._flushed = 0

    @property
    def epoch(self) -> int:
        """Another number when what was acknowledged and not flushed may be gone; it only grows."""
        return self._ended

    def unflushed(self, answered: int) -> bool:
        """Something acknowledged is not durable yet, as far as is known."""
        return self._flushed < answered

    def flushed(self, answered: int, epoch: int) -> bool:
        """A FLUSH succeeded that was sent in `epoch`, when so much was answered.

        False if it vouches for nothing: an epoch ended while it was in flight.
        """
        if epoch != self.epoch:
            return False
        self._flushed = max(self._flushed, answered)
        return True


class ReportingDurability(Durability):
    """Of a layer that keeps nothing: a loss has to be reported. The caller counts what is answered.

    `flushed` also means: known to be lost.
    """

    __slots__ = (
        *("_failed_now", "_instance", "_lost", "_reported", "_settled"),
        *("keeps_unflushed", "seen"),
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen = BEFORE
        """How much was answered in turns whose end every guest had seen when it submitted what is
        taken now."""
        self._settled = BEFORE
        """The same including what a guest may not have seen yet."""
        self._failed_now = False
        """The epoch of what is sent now has not begun: see `sending_epoch`."""
        self.keeps_unflushed = False
        """The layer above has all that is not durable, and sends it again: there is no loss."""
        self._instance: str | None = None
        self._lost = 0
        self._reported = 0

    @property
    def unreported(self) -> bool:
        """Something acknowledged may be gone, and no flush of the guest's has failed since."""
        return self._reported < self._lost

    @property
    def instance_mark(self) -> int:
        """Of the present server instance, or the last one; 0 if it has no name."""
        return instance_mark(self._instance or "")

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
        self._ended += 1
        if not self.unflushed(answered):
            return False
        self._flushed = answered
        if self.keeps_unflushed:
            return False
        self._lost = answered
        return True

    def flush_failed(self, answered: int) -> bool:
        """`failed`, and the server said so in answer to something."""
        lost = self.failed(answered)
        if not self.keeps_unflushed:
            self._failed_now = True
        return lost

    @property
    def sending_epoch(self) -> int:
        """The epoch of what is sent now."""
        return self._ended + self._failed_now

    def settled(self, answered: int) -> bool:
        """The callers that waited for what has been answered were told of it.

        True if `guests_have_seen` has to be called when they have seen the end of this turn.
        """
        if self._failed_now:
            self._failed_now = False
            self._ended += 1
        if answered == self._settled:
            return False
        first = self._settled == self.seen
        self._settled = answered
        return first

    def guests_have_seen(self) -> None:
        """What is taken from now on, was submitted after the end of the last turn."""
        self.seen = self._settled

    def one_more_before(self) -> None:
        """One more change was answered before this process: see the module's text."""
        self._settled += 1
        self.seen += 1

    def reported(self, answered: int) -> None:
        """A flush fails that the guest submitted when it knew of so many answers: that reports the
        loss of any of them."""
        self._reported = max(self._reported, answered)

    def nothing_before(self) -> None:
        """The guest has no promise from before this process: the disk is only read, or the guest
        has just begun."""
        self._flushed = max(self._flushed, BEFORE)
        self._reported = max(self._reported, BEFORE)

    def is_lost(self, mark: int) -> bool:
        """Whether what was unflushed on the instance of that `mark` may be gone by now."""
        return mark not in (0, self.instance_mark)


class Connections(Protocol):
    """What knows of the connections to the server."""

    @property
    def generation(self) -> int:
        """Raised by each reconnect, before anything is sent on the new connection."""


class ReplayingDurability(Durability):
    """Of a layer that keeps all that is not durable, and sends it again when an epoch ends.

    The generation of connections is a part of the epoch, asked for each time: an answer may wait
    to be told of while the connection that brought it is replaced, and there must be no moment in
    which that answer counts for the new one.
    """

    __slots__ = ("_connections", "_ended_before", "answered")

    def __init__(self, connections: Connections) -> None:
        super().__init__()
        self.answered = BEFORE
        self._connections = connections
        self._ended_before = 0
        """`_ended` when the present connection began."""

    @property
    def epoch(self) -> int:
        """See Durability. Each of the two numbers only grows, so that no sum comes again."""
        return self._connections.generation + self._ended

    @property
    def all_flushed(self) -> bool:
        """The server holds nothing that is not durable, as far as is known."""
        return not self.unflushed(self.answered)

    def acknowledged(self) -> None:
        """The server did something that is durable after the next FLUSH only."""
        self.answered += 1

    def failed(self) -> None:
        """The server could not make something durable: an epoch ends."""
        self._ended += 1
        self.answered += 1  # What the server has of that epoch is not durable, for all we know.

    def reconnected(self) -> None:
        """The connection was replaced, which has ended an epoch."""
        self._ended_before = self._ended
        self.answered += 1  # As in `failed`.

    def done_in(self, *, sent_in: int, generation: int) -> int:
        """In which epoch a change was done, at the earliest, that was sent in the epoch `sent_in`
        and answered by a connection of that `generation`.

        What was sent before a reconnect and is answered after it, the client has sent again: it
        was done there, no earlier than in the epoch with which that connection began. An answer of
        an older connection gives an epoch that is over.
        """
        return max(sent_in, generation + self._ended_before)
