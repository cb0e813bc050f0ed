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

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from bridge.datapath.cells import (
    ALONE,
    ARMED,
    FLUSH_ROW,
    FLUSHES,
    HEAD_BITS,
    MAX_HEADS,
    MAX_QUEUES,
    MAY_FLUSH,
    MERGED,
    NAME,
    NAME_BITS,
    NUMBER,
    ROW,
    ROW_BYTES,
    ROWS,
    ROWS_CELLS,
    SEGMENTS,
    SEQUENCE,
    SEQUENCE_MASK,
    SIZE,
    STOP_FLUSH,
    STOP_ROUTE,
    STOPPED,
    TOUCHED,
    Cells,
    Changes,
    Channel,
    Queue,
    Resident,
    Route,
    RowOwner,
    Unsent,
    Wire,
    cells,
    row_cookie,
    sequence_of,
)
from bridge.datapath.engine import PURE_ENGINE, Engine
from bridge.datapath.flush_rows import FlushedDisk, FlushRows, TurnedFlushes
from bridge.datapath.merged import FIRST_PAUSE, LAST_PAUSE, Merged, members_of
from bridge.datapath.request import FLUSH, WRITE, Request
from bridge.datapath.spans import forget_rows
from bridge.spec.nbd import CMD_FLUSH, REQUEST, REQUEST_MAGIC

_CHANNEL_AT: Final = 4
_COMMAND_BYTES_AT: Final = 9
"""In a row: see `ROW`."""
_LAST_SEQUENCE: Final = SEQUENCE_MASK - MAX_HEADS
"""From here on there are no more rows: the next batch might not have numbers that fit."""


_LAST_SEQUENCE_OF_TURNS: Final = SEQUENCE_MASK - (1 << 24)
"""The same for compiled turns, which are some thousand commands each."""

_Place = tuple[Channel, int, int, int, list[bytes | memoryview], bytes]
Side = tuple[Resident] | tuple[Route, "Rows", tuple[_Place, ...]]
"""Where compiled turns serve chains (see `_native.pyi`)."""


class Turned(NamedTuple):
    """What compiled turns have left of a connection."""

    start: int
    """Where in the staging buffer what was received and not taken begins."""
    end: int
    received_bytes: int
    is_unusual: bool
    """What stands there has to be taken in the general way, or the connection has ended, or failed
    with `errno`."""
    ended: bool
    errno: int
    unsent: Unsent


def _never() -> bool:
    return False


class PendingOwner(Protocol):
    """A channel, as rows leave it."""

    def adopted(self, requests: list[Request]) -> None:
        """These were rows sent on this channel, in the order of sending."""


class Rows:
    """See the module's text."""

    def __init__(self, engine: Engine = PURE_ENGINE) -> None:
        self.engine = engine
        self.cells: Cells[int] = cells(ROWS_CELLS)
        self.cells[SEQUENCE] = 1
        self._unused = 0
        """Numbers that no command has."""
        self._pause = FIRST_PAUSE
        self.queues: list[Queue | None] = [None] * MAX_QUEUES
        self.touched: list[Queue] = []
        """Something was pushed in these that is not published."""
        self._channels: dict[int, tuple[Channel, PendingOwner]] = {}
        self._next_channel = 1
        self.adopted_total = 0
        """Rows that became requests."""
        self.flushes: FlushRows | None = None
        """None: no row is a flush."""
        self.changes: Changes | None = None
        """Where those go that were rows."""

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

    def oldest(self, channel: Channel) -> int:
        """The cookie of the row that was sent first on `channel`; 0: there is none."""
        number = channel.number if channel.cells[ROWS] else 0
        return min(
            (
                cookie
                for queue in self.queues
                if number and queue is not None
                for head, cookie in enumerate(queue.cookies)
                if cookie and ROW.unpack_from(queue.rows, ROW_BYTES * head)[_CHANNEL_AT] == number
            ),
            default=0,
        )

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
        for channel, _ in self._channels.values():
            if channel.spans is not None:
                forget_rows(channel.spans)  # Before their changes are listed.
                break
        by_channel: dict[int, list[list[Request]]] = {}
        for cookie in found:
            number, is_first, request = self._adopt(cookie)
            commands = by_channel.setdefault(number, [])
            if is_first:
                commands.append([request])
            else:
                commands[-1].append(request)  # The numbers of a merged command follow one another.
        for number, commands in by_channel.items():
            channel, owner = self._channels[number]
            channel.cells[ROWS] -= sum(map(len, commands))
            assert not channel.cells[ROWS]
            assert not channel.cells[FLUSH_ROW]
            channel.cells[SEGMENTS] = 0
            owner.adopted([self._command_of(requests) for requests in commands])

    def _command_of(self, requests: list[Request]) -> Request:
        """The command that was sent for `requests`."""
        first = requests[0]
        if len(requests) == 1:
            return first
        queue = self.queues[first.cookie >> HEAD_BITS & MAX_QUEUES - 1]
        assert queue is not None
        assert queue.owner is not None
        merged = Merged(requests, queue.owner, self.changes)
        merged.cookie = first.cookie
        return merged

    def _adopt(self, cookie: int) -> tuple[int, bool, Request]:
        """The number of the channel, whether a command begins there, and the request."""
        queue = self.queues[cookie >> HEAD_BITS & MAX_QUEUES - 1]
        head = cookie & MAX_HEADS - 1
        assert queue is not None
        assert queue.owner is not None
        row = ROW.unpack_from(queue.rows, ROW_BYTES * head)
        queue.cookies[head] = 0
        request: Request = queue.owner.adopt(head, cookie, row)
        number = row[_CHANNEL_AT]
        channel, _ = self._channels[number]
        if request.op == FLUSH:
            assert self.flushes is not None
            request = self.flushes.adopt(request, channel)
        elif request.op == WRITE and channel.spans is not None and self.changes is not None:
            request = self.changes.adopt(request)
        request.cookie = cookie
        self.adopted_total += 1
        return number, request.op == FLUSH or row[_COMMAND_BYTES_AT] > 0, request

    # Merging.

    @property
    def merged_total(self) -> int:
        """Requests that had no command of their own."""
        return self.cells[MERGED]

    def merging_did_not_pay(self) -> None:
        """A merged command had no usual answer: merge nothing for a while, each time for longer."""
        self.cells[ALONE] = self._pause
        self._pause = min(2 * self._pause, LAST_PAUSE)

    # Flushes.

    def send_held(self, channel: Channel) -> None:
        """Put the FLUSH that `channel` holds into the output, now with the next number: it is sent
        after what else this turn has brought, as the general path has it."""
        cookie = channel.cells[FLUSH_ROW]
        if cookie:  # (It is no row any more if it was adopted meanwhile.)
            queue = self.queues[cookie >> HEAD_BITS & MAX_QUEUES - 1]
            assert queue is not None
            head = cookie & MAX_HEADS - 1
            cookie = queue.cells[NAME] | self.cells[SEQUENCE] << NAME_BITS | head
            self.cells[SEQUENCE] += 1
            self._unused += 1  # The one that it had.
            queue.cookies[head] = channel.cells[FLUSH_ROW] = cookie
            channel.held = [REQUEST.pack(REQUEST_MAGIC, 0, CMD_FLUSH, cookie, 0, 0)]
        channel.output += channel.held
        channel.held = []

    def publish_touched(self) -> None:
        """Rings in which answers were pushed publish them at the end of this turn."""
        touched = self.touched
        for queue in touched:
            queue.cells[TOUCHED] = 0
            if queue.owner is not None:
                queue.owner.publish_later()
        touched.clear()

    # How many commands there were.

    @property
    def commands(self) -> int:
        """So many, each request in a merged one for itself."""
        return self.cells[SEQUENCE] - 1 - self._unused

    def some_answered(self, before: int, unanswered: Sequence[Request]) -> bool:
        """Since there were so many `commands`, some but those `unanswered` were sent."""
        return self.commands - before > sum(len(members_of(each)) for each in unanswered)


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
    writes: int
    """Those of them that are writes."""
    is_armed: Callable[[], bool]
    """It is known already that something is not durable: `wrote` need not be called."""
    wrote: Callable[[], None]
    """Something is not durable: called before it is sent or published."""
    engine: Engine
    answers_at_once: bool
    """What is served is pushed, and to be published at the end of this turn."""

    @property
    def flushes(self) -> int:
        """Those of the chains that are flushes."""

    def tells(self, disk: FlushedDisk) -> None:
        """Flushes of the guest of `disk` may be rows. (Without it none is.)"""

    def take(self, queue: Queue, disk: Cells[int], *, flushes: bool = True) -> int:
        """Serve what `queue` has available up to the first chain that is not usual, which its cell
        STOPPED then tells of; how many. `flushes`: also those."""

    def enter(self, queue: Queue, owner: RowOwner) -> bool:
        """Let `queue` take part; False if it cannot."""

    def leave(self, queue: Queue) -> None:
        """The end of `enter`."""

    def adopt_all(self) -> None:
        """See `Rows.adopt_all`."""

    @property
    def sequence(self) -> int:
        """A number that only grows: see `cells.sequence_of`."""

    # For compiled turns.

    def side(self) -> Side | None:
        """Where they serve chains; None: not now."""

    def took(self, reads: int, writes: int, flushes: TurnedFlushes) -> None:
        """So many chains were taken. If it was not armed, `wrote` was called before the first
        write."""

    def turned(self, places: Sequence[Turned]) -> None:
        """So they have left the connections of `side`."""

    def shown(self, unflushed: int) -> None:
        """The guest may know of so much (the cell UNFLUSHED) by now: turns have ended in which it
        was answered."""

    def unusual(self, places: Sequence[Turned]) -> None:
        """The same; on some of them the server sent something that is not usual, or they have
        ended."""


class UsualRing(NamedTuple):
    """A ring of which the compiled turns serve the usual chains. (The first three are for C.)"""

    queue: Queue
    kick_fd: int
    """-1: the guest sends no kicks."""
    call: Callable[[], None]
    """Call the driver."""
    took: Callable[[int], None]
    """So many chains were taken."""
    publish_later: Callable[[], None]
    """Something was pushed: publish it at the end of this turn."""
    limits: Cells[int]
    """Of the disk."""
    usual: Usual


class MaybeUsual(Protocol):
    """A poller of the loop."""

    def usual_ring(self) -> UsualRing | tuple[()] | None:
        """What of it compiled turns may serve; (): nothing, but it need not be polled in every turn
        either; None: it has to be."""


class FromCache:
    """Hits of a cache. There are no rows: what is served is answered."""

    answers_at_once = True
    sequence = 0

    def __init__(
        self,
        cache: Resident,
        counted: Callable[[int, int], None],
        wrote: Callable[[], None],
        engine: Engine = PURE_ENGINE,
    ) -> None:
        """`counted(reads, writes)` is told of hits. `wrote()`: something is not durable."""
        self.served = 0
        self.writes = self.flushes = 0
        self.is_armed: Callable[[], bool] = _never
        self.engine = engine
        self._take_hits = engine.take_hits
        self._side = (cache,)
        self._cache = cache
        self._counted = counted
        self.wrote = wrote

    def take(self, queue: Queue, disk: Cells[int], *, flushes: bool = True) -> int:
        """See `Usual`. A flush has to look at all of the cache: none is usual."""
        reads, writes = self._take_hits(queue, disk, self._cache)
        taken = reads + writes
        if taken:
            self.served += taken
            self._counted(reads, writes)
            if writes:
                self.writes += writes
                self.wrote()
        return taken

    def tells(self, disk: FlushedDisk) -> None:
        """See `Usual`. There are no rows here."""

    def side(self) -> Side | None:
        """See `Usual`."""
        return self._side

    def took(self, reads: int, writes: int, flushes: TurnedFlushes) -> None:
        """See `Usual`."""
        self.served += reads + writes
        self.writes += writes
        self._counted(reads, writes)

    def turned(self, places: Sequence[Turned]) -> None:
        """See `Usual`. There is no connection here."""

    def shown(self, unflushed: int) -> None:
        """See `Usual`."""

    def unusual(self, places: Sequence[Turned]) -> None:
        """See `Usual`."""

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
        self.writes = 0
        self.is_armed: Callable[[], bool] = _never
        self.engine = rows.engine
        self._take_commands = rows.engine.take_commands
        self._route = route
        self._rows = rows
        self.wrote = wrote
        self._wires: tuple[Wire, ...] = ()
        """Those of `side`."""
        self._flushes = rows.flushes = FlushRows(route)
        rows.changes = route.changes
        route.rows = rows

    def tells(self, disk: FlushedDisk) -> None:
        """See `Usual`."""
        self._flushes.disk = disk

    @property
    def flushes(self) -> int:
        """See `Usual`."""
        return self._flushes.taken

    @property
    def sequence(self) -> int:
        """See `Usual`."""
        return self._rows.cells[SEQUENCE]

    def take(self, queue: Queue, disk: Cells[int], *, flushes: bool = True) -> int:
        """See `Usual`."""
        route, rows = self._route, self._rows
        outlet = route.least_busy()
        if outlet is None or rows.cells[SEQUENCE] > _LAST_SEQUENCE:
            queue.cells[STOPPED] = STOP_ROUTE
            return 0
        channel = outlet.channel
        flat = channel.cells
        flat[MAY_FLUSH], flat[ARMED] = 0, self.is_armed()
        reads, writes = self._take_commands(queue, disk, route, channel, rows)
        is_flush = queue.cells[STOPPED] == STOP_FLUSH and channel is route.alone
        if flushes and is_flush and not flat[FLUSH_ROW]:
            self._flushes.look(channel)
            if flat[MAY_FLUSH]:
                queue.cells[STOPPED] = 0
                more_reads, more_writes = self._take_commands(queue, disk, route, channel, rows)
                reads += more_reads
                writes += more_writes
        taken = reads + writes + flat[FLUSHES]
        if taken:
            self.served += taken
            self.writes += writes
            outlet.flush_later()
            if flat[FLUSHES]:
                self._flushes.took(channel)
            elif writes:
                self.wrote()
        return taken

    def side(self) -> Side | None:
        """See `Usual`."""
        route, rows = self._route, self._rows
        if not route.outlets or rows.cells[SEQUENCE] > _LAST_SEQUENCE_OF_TURNS:
            return None
        wires: list[Wire] = []
        places: list[_Place] = []
        for channel, _, wire in route.outlets:
            received = wire.received() if wire is not None else None
            if wire is None or received is None:
                return None
            wires.append(wire)
            places.append((channel, *received))
        self._wires = tuple(wires)
        for channel, *_ in places:
            channel.cells[MAY_FLUSH], channel.cells[ARMED] = 0, self.is_armed()
        if route.alone is not None:
            self._flushes.begin_turns(route.alone)
        return route, rows, tuple(places)

    def took(self, reads: int, writes: int, flushes: TurnedFlushes) -> None:
        """See `Usual`."""
        self.served += reads + writes + flushes.taken
        self.writes += writes
        if self._route.alone is not None:
            self._flushes.turned(self._route.alone, flushes)

    def turned(self, places: Sequence[Turned]) -> None:
        """See `Usual`."""
        for wire, place in zip(self._wires, places, strict=True):
            wire.turned(place.start, place.end, place.received_bytes, place.unsent)
        if self._route.alone is not None:
            self._flushes.go_on(self._route.alone)

    def shown(self, unflushed: int) -> None:
        """See `Usual`."""
        self._route.shown(unflushed)

    def unusual(self, places: Sequence[Turned]) -> None:
        """See `Usual`."""
        for wire, place in zip(self._wires, places, strict=True):
            if place.is_unusual:
                wire.unusual(ended=place.ended, errno=place.errno)

    def enter(self, queue: Queue, owner: RowOwner) -> bool:
        """See `Usual`."""
        return self._rows.enter(queue, owner)

    def leave(self, queue: Queue) -> None:
        """See `Usual`."""
        self._rows.leave(queue)

    def adopt_all(self) -> None:
        """See `Usual`."""
        self._rows.adopt_all()
