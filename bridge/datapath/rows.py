"""Rows in flight, and the one way out of the usual case: a row becomes the request it stands for.

`Rows` is the table of guest requests in flight that were sent in the usual way (see `cells`): every
queue that takes part has a number in it, and every channel. Whatever happens that is not usual (an
error, a reply in pieces, a lost connection, a ring that stops, memory that goes away, a failed
flush, a look at what is unanswered) first calls `adopt_all`. From then on there is what the general
path would have made: a `Request` of the ring's, pending on its channel, in the order of sending.
So nothing outside of this folder has to know of rows.

`Usual` is what a ring asks before it pops a chain itself: `FromCache` and `ToServer` join the flat
state of the disk's two sides. `Disk` has the one that fits, or none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from bridge.datapath.cells import (
    HEAD_BITS,
    MAX_HEADS,
    MAX_QUEUES,
    NAME,
    NUMBER,
    ROW,
    ROW_BYTES,
    ROWS,
    SEQUENCE_MASK,
    SIZE,
    STOPPED,
    TOUCHED,
    Cells,
    Channel,
    Queue,
    Resident,
    Route,
    RowOwner,
    cells,
    row_cookie,
    sequence_of,
)
from bridge.datapath.request import Request
from bridge.datapath.usual import take_commands, take_hits

_CHANNEL_AT: Final = 4
"""In a row: see `ROW`."""
_LAST_SEQUENCE: Final = SEQUENCE_MASK - MAX_HEADS
"""From here on there are no more rows: the next batch might not have numbers that fit."""


class PendingOwner(Protocol):
    """A channel, as rows leave it."""

    def adopted(self, requests: list[Request]) -> None:
        """These were rows sent on this channel, in the order of sending."""


class Rows:
    """See the module's text."""

    def __init__(self) -> None:
        self.cells: Cells[int] = cells(1)
        """The number of the next command, of rows and requests alike."""
        self.cells[0] = 1
        self.queues: list[Queue | None] = [None] * MAX_QUEUES
        self.touched: list[Queue] = []
        """Something was pushed in these that is not published."""
        self._channels: dict[int, tuple[Channel, PendingOwner]] = {}
        self._next_channel = 1
        self.adopted_total = 0
        """Rows that became requests."""

    # Who takes part.

    def enter(self, queue: Queue, owner: RowOwner) -> bool:
        """Let `queue` have rows; False if that is not possible."""
        if queue.cells[SIZE] > MAX_HEADS or None not in self.queues:
            return False
        number = self.queues.index(None)
        self.queues[number] = queue
        queue.cells[NUMBER] = number
        queue.cells[NAME] = row_cookie(0, number, 0)
        queue.owner = owner
        return True

    def leave(self, queue: Queue) -> None:
        """The end of `enter`: its rows are adopted."""
        number = queue.cells[NUMBER]
        if number == MAX_QUEUES:
            return
        self.adopt_all()
        self.queues[number] = None
        queue.cells[NUMBER] = MAX_QUEUES
        queue.owner = None

    def join(self, channel: Channel, owner: PendingOwner) -> int:
        """The number of a new channel."""
        number = self._next_channel
        self._next_channel += 1
        self._channels[number] = channel, owner
        return number

    def part(self, channel: Channel) -> None:
        """The end of `join`: its rows are adopted."""
        self.adopt_all()
        self._channels.pop(channel.number, None)

    # What is usual no more.

    def adopt_all(self) -> None:
        """From here on there are no rows, but requests."""
        if not any(channel.cells[ROWS] for channel, _ in self._channels.values()):
            return
        found = sorted(
            cookie
            for queue in self.queues
            if queue is not None
            for cookie in queue.cookies
            if cookie
        )
        by_channel: dict[int, list[Request]] = {}
        for cookie in found:
            number, request = self._adopt(cookie)
            by_channel.setdefault(number, []).append(request)
        for number, requests in by_channel.items():
            channel, owner = self._channels[number]
            channel.cells[ROWS] -= len(requests)
            assert not channel.cells[ROWS]
            owner.adopted(requests)

    def _adopt(self, cookie: int) -> tuple[int, Request]:
        """The number of the channel, and the request."""
        queue = self.queues[cookie >> HEAD_BITS & MAX_QUEUES - 1]
        head = cookie & MAX_HEADS - 1
        assert queue is not None
        assert queue.owner is not None
        row = ROW.unpack_from(queue.rows, ROW_BYTES * head)
        queue.cookies[head] = 0
        request: Request = queue.owner.adopt(head, cookie, row)
        request.cookie = cookie
        self.adopted_total += 1
        return row[_CHANNEL_AT], request

    def publish_touched(self) -> None:
        """Rings in which answers were pushed publish them at the end of this turn."""
        touched = self.touched
        for queue in touched:
            queue.cells[TOUCHED] = 0
            if queue.owner is not None:
                queue.owner.publish_later()
        touched.clear()

    # Numbers of commands.

    @property
    def sequence(self) -> int:
        """That of the next command."""
        return self.cells[0]


def in_order(requests: list[Request]) -> list[Request]:
    """In the order of sending."""
    return sorted(requests, key=sent_at)


def sent_at(request: Request) -> int:
    """The number with which a command was sent."""
    return sequence_of(request.cookie)


class Usual(Protocol):
    """What serves the usual requests of a disk's rings."""

    served: int
    """Chains so far."""
    answers_at_once: bool
    """What is served is pushed, and to be published at the end of this turn."""

    def take(self, queue: Queue, disk: Cells[int]) -> int:
        """Serve what `queue` has available up to the first chain that is not usual, which its cell
        STOPPED then tells of; how many."""

    def enter(self, queue: Queue, owner: RowOwner) -> bool:
        """Let `queue` take part; False if it cannot."""

    def leave(self, queue: Queue) -> None:
        """The end of `enter`."""

    def adopt_all(self) -> None:
        """See `Rows.adopt_all`."""

    @property
    def sequence(self) -> int:
        """A number that only grows: see `cells.sequence_of`."""


class FromCache:
    """Hits of a cache. There are no rows: what is served is answered."""

    answers_at_once = True
    sequence = 0

    def __init__(
        self, cache: Resident, counted: Callable[[int, int], None], wrote: Callable[[], None]
    ) -> None:
        """`counted(reads, writes)` is told of hits. `wrote()`: something is not durable."""
        self.served = 0
        self._cache = cache
        self._counted = counted
        self._wrote = wrote

    def take(self, queue: Queue, disk: Cells[int]) -> int:
        """See `Usual`."""
        reads, writes = take_hits(queue, disk, self._cache)
        taken = reads + writes
        if taken:
            self.served += taken
            self._counted(reads, writes)
            if writes:
                self._wrote()
        return taken

    def enter(self, queue: Queue, owner: RowOwner) -> bool:
        """See `Usual`."""
        return True

    def leave(self, queue: Queue) -> None:
        """See `Usual`."""

    def adopt_all(self) -> None:
        """See `Usual`."""


class ToServer:
    """Commands on a route."""

    answers_at_once = False

    def __init__(self, route: Route, rows: Rows, wrote: Callable[[], None]) -> None:
        """`wrote()`: something is not durable."""
        self.served = 0
        self._route = route
        self._rows = rows
        self._wrote = wrote

    @property
    def sequence(self) -> int:
        """See `Usual`."""
        return self._rows.cells[0]

    def take(self, queue: Queue, disk: Cells[int]) -> int:
        """See `Usual`."""
        route, rows = self._route, self._rows
        channel = route.channel
        if (
            channel is None
            or channel.sending
            or channel.is_closed
            or rows.cells[0] > _LAST_SEQUENCE
        ):
            queue.cells[STOPPED] = 1
            return 0
        reads, writes = take_commands(queue, disk, route, channel, rows)
        taken = reads + writes
        if taken:
            self.served += taken
            route.flush_later()
            if writes:
                self._wrote()
        return taken

    def enter(self, queue: Queue, owner: RowOwner) -> bool:
        """See `Usual`."""
        return self._rows.enter(queue, owner)

    def leave(self, queue: Queue) -> None:
        """See `Usual`."""
        self._rows.leave(queue)

    def adopt_all(self) -> None:
        """See `Usual`."""
        self._rows.adopt_all()
