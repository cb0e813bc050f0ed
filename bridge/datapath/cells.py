"""Flat state: what the usual case of a turn reads and writes.

Nothing here but numbers in rows and cells of fixed size, bytes, and views of memory. The functions
of `usual` work on it, and the general path reads and writes the same cells: there is no second
copy that could differ.

**Rows.** A guest's READ, WRITE or FLUSH that was sent to the server in the usual way is a row, not
an object: `Queue.rows` has one per head. The reply finds it by its cookie, which names queue and
head and carries the number with which the command was sent (`row_cookie`). A row's cookie has bit
63, that of a `Request` has not. `rows.Rows` turns rows into requests when anything unusual happens.
"""

from __future__ import annotations

import mmap
from array import array
from collections.abc import Callable
from struct import Struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from bridge.datapath.request import Request
    from bridge.datapath.rows import Rows

ABI: Final = 13
"""Of this layout, which compiled code knows, too (`native/core.h`): another number whenever it
changes."""

Cells = array
"""Unsigned numbers of 64 bits, or of the size that their place says. (An array is read twice as
fast as a view of one, and written four times as fast; both are plain memory.)"""


def cells(count: int) -> Cells[int]:
    """`count` cells of 64 bits, all 0."""
    return array("Q", bytes(8 * count))


# Cells of a `Queue`.
(
    SIZE,
    NEXT_AVAIL,
    NEXT_USED,
    PUBLISHED,
    IN_FLIGHT,
    SIGNAL_ANYWAY,
    EVENT_IDX,
    INDIRECT,
    NUMBER,
    NAME,
    COUNTER,
    LAST_HEAD,
    PUSHED,
    TOUCHED,
    STOPPED,
    QUEUE_CELLS,
) = range(16)
"""SIZE: entries of the ring. NEXT_AVAIL, NEXT_USED, PUBLISHED: free-running indexes of 16 bits, of
the next chain to pop, of the next element to put, and the used index that the driver can see.
IN_FLIGHT: chains popped and not pushed. SIGNAL_ANYWAY: call at the next publication. EVENT_IDX,
INDIRECT: negotiated. NUMBER: of the queue in `rows.Rows`; NAME: what the cookies of its rows have
in common. COUNTER, LAST_HEAD, PUSHED: of the in-flight region; the number of the next chain, the
head of the last batch, and how many chains were pushed since the last publication. TOUCHED:
something was pushed by `usual.answers`. STOPPED: the last look at the available ring ended at a
chain that is not usual: one of the following, which says why. 0: it did not."""

(
    STOP_RING,
    STOP_FORM,
    STOP_RANGE,
    STOP_MISS,
    STOP_WRITE,
    STOP_ROOM,
    STOP_ROUTE,
    STOP_FLUSH,
    STOPS,
) = range(1, 10)
"""RING: the driver broke the ring, or made a head available that is in flight. FORM: neither a
read nor a write nor a flush, or one of an unusual form. RANGE: too long, or not whole blocks of
the disk. MISS: the cache does not have it at hand. WRITE: it must be durable, is not allowed, or
has to wait for the cache. ROOM: too much in flight, or in one batch. ROUTE: no connection takes
it the usual way. FLUSH: a flush for which more has to be looked at, or waited for, than is
usual."""

ROW: Final = Struct("=QQQIIHHHBxIHxx")
"""Offset on the disk, where in its region the data is, where in its region the status byte is,
length of the data in bytes, number of the channel, regions of data and status, segments of the
data, operation (`request.READ`, `WRITE` or `FLUSH`), length of the command in bytes, and 1 + the
head of the next row of the same command, or 0. Data of several segments: where each is stands
in `Queue.segments`, and where the data is is 0 here. A FLUSH has no data: all of that is 0.

**A merged command** is one READ or WRITE for several rows of a queue, its *members*: each begins
where the one before ends, and has the next number. The cookie of the first is the command's, and
its row has the length of all; in the others that is 0, which says that they have no command of
their own."""
ROW_BYTES: Final = ROW.size

SEGMENT: Final = Struct("=QIHxx")
"""Where in its region a piece of the data is, its length in bytes, its region."""
SEGMENT_BYTES: Final = SEGMENT.size
MAX_SEGMENTS: Final = 128
"""Of a usual chain: what a driver may send is 126 (`blk_config.SEG_MAX`)."""
SEGMENTS_BYTES: Final = MAX_SEGMENTS * SEGMENT_BYTES
"""Of one head."""
MAX_ROW_SEGMENTS: Final = 1 << 16
"""In flight, of all queues and connections: views of them take 13 MB when rows become requests."""
BATCH_PIECES: Final = 4096
"""Headers and segments of payload that one batch of commands may have."""
MERGED_BYTES: Final = 128 << 10
"""Of a merged command, at most. Its reply has to fit into the staging buffer: it is taken whole."""

HEAD_BITS: Final = 10
QUEUE_BITS: Final = 8
NAME_BITS: Final = HEAD_BITS + QUEUE_BITS
MAX_HEADS: Final = 1 << HEAD_BITS
MAX_QUEUES: Final = 1 << QUEUE_BITS
SEQUENCE_MASK: Final = (1 << 63 - NAME_BITS) - 1
"""45 bits: a million commands per second for a year."""
ROW_COOKIE: Final = 1 << 63


def row_cookie(sequence: int, queue: int, head: int) -> int:
    """The cookie of a row."""
    return ROW_COOKIE | sequence << NAME_BITS | queue << HEAD_BITS | head


def sequence_of(cookie: int) -> int:
    """When a command was sent: a number that only grows, also from one connection to the next."""
    return cookie >> NAME_BITS & SEQUENCE_MASK if cookie & ROW_COOKIE else cookie


_NOTHING: Final = memoryview(b"")


class RowOwner(Protocol):
    """A running ring, whose requests rows are."""

    def adopt(self, head: int, cookie: int, row: tuple[int, ...]) -> Any:
        """The request that the general path would have made instead of `row` (see `ROW`)."""

    def publish_later(self) -> None:
        """Something was pushed: publish it at the end of this turn."""

    # Of requests that `adopt` has made, which were sent in a merged command:

    def finish(self, request: Request, error: int) -> None:
        """It has ended with `error`, 0 or an errno."""

    def submit_alone(self, request: Request) -> None:
        """Their command has failed: do this one by itself."""


class Queue:
    """A split virtqueue, flat. Areas of the ring as in virtio 1.3 §2.7."""

    cells: Cells[int]
    descriptors: memoryview
    avail: memoryview
    """The available ring, 16 bits."""
    used: memoryview
    """The used ring, 16 bits."""
    elements: memoryview
    """The elements of the used ring, 32 bits."""
    regions: Cells[int]
    """Guest address and size of each region of guest memory, the largest first; at least one."""
    views: list[memoryview]
    """The bytes of the same regions."""
    rows: bytearray
    """Head → row."""
    cookies: Cells[int]
    """Head → cookie of its row; 0: the row is free."""
    segments: mmap.mmap
    """Head → segments of its data, where those are several. Resident only where it was used."""
    # This queue's part of an in-flight region; empty without one.
    tracked: memoryview
    tracked_halves: memoryview
    tracked_words: memoryview
    pushed: Cells[int]
    """Heads that were pushed since the last publication, 16 bits."""
    owner: RowOwner | None
    native: object
    """What the compiled engine keeps of all this; None, set by the code that replaces any of it.
    False: nothing is served by it."""

    def __init__(self, size: int) -> None:
        state = self.cells = cells(QUEUE_CELLS)
        state[SIZE] = size
        state[NUMBER] = MAX_QUEUES  # None yet.
        self.rows = bytearray(ROW_BYTES * size)
        self.cookies = cells(size)
        self.segments = mmap.mmap(-1, SEGMENTS_BYTES * size)
        self.tracked = self.tracked_halves = self.tracked_words = _NOTHING
        self.pushed = array("H", bytes(2 * size))
        self.owner = None
        self.native = None


# Cells of a disk, as its guest sees it.
(
    CAPACITY_BYTES,
    BLOCK_MASK,
    MAY_WRITE,
    CAN_FLUSH,
    READ_BYTES,
    WRITTEN_BYTES,
    DISK_CELLS,
) = range(7)
"""BLOCK_MASK: bits that offset and length must not have. MAY_WRITE: a write is allowed, and need
not be durable when it is complete. CAN_FLUSH: a flush means something. READ_BYTES, WRITTEN_BYTES:
of the usual requests that were taken so far."""

# Cells of a `Route`.
(
    MAX_READ_BYTES,
    MAX_WRITE_BYTES,
    SIZE_BYTES,
    ALIGN_MASK,
    WHOLE_READ_BYTES,
    WHOLE_WRITE_BYTES,
    ROW_SEGMENTS,
    ROUTE_CELLS,
) = range(8)
"""What is sent as it comes, at most `lanes.SMALL_BYTES`, of a read less than `LONG_BYTES`; 0 if
nothing is. ALIGN_MASK: as BLOCK_MASK is, of the server. WHOLE_READ_BYTES, WHOLE_WRITE_BYTES: the
longest that compiled turns send as one command. ROW_SEGMENTS: so many of `MAX_ROW_SEGMENTS` each
connection may have."""

# Cells of `rows.Rows`.
(SEQUENCE, MERGED, ALONE, ROWS_CELLS) = range(4)
"""SEQUENCE: the number of the next command, of rows and requests alike. MERGED: requests so far
that had no command of their own (see `ROW`). ALONE: so many chains are still to be sent each alone,
because merging did not pay."""

# Cells of a `Channel`.
(
    UNFLUSHED,
    LONG_READS,
    ROWS,
    SEGMENTS,
    DIRECT,
    DIRECT_LEFT,
    LARGE_BYTES,
    MAY_FLUSH,
    NOT_ROWS,
    ARMED,
    SEEN,
    BEFORE,
    FLUSH_ROW,
    FLUSH_COVERS,
    FLUSH_SEEN,
    FLUSH_ARMED,
    FLUSH_BEGAN_NS,
    FLUSH_TOOK_NS,
    FLUSHES,
    FLUSHED,
    COVERED,
    CHANNEL_CELLS,
) = range(22)
"""UNFLUSHED: WRITE and WRITE_ZEROES without FUA that were answered. LONG_READS: reads in flight of
`LONG_BYTES` and more. ROWS: rows in flight. SEGMENTS: of those of them that have several. Of
compiled turns only: DIRECT is the cookie of the row whose payload is being received straight into
guest memory, DIRECT_LEFT how much of it is still to come, LARGE_BYTES how many bytes are in flight
of reads of `LONG_BYTES` and more, and of writes longer than `lanes.SMALL_BYTES`.

Of flushes, which are rows only where all is well (see `server.flushes`). What is known when a
look at the rings begins: MAY_FLUSH, one may be taken; NOT_ROWS, something is in flight that is
no row; ARMED, the disk's timer is: something may not be durable; SEEN, what is there was sent by
a guest that had seen so many changes answered (see `durability`); BEFORE, so many of them were
answered by other connections. ARMED is also what the look has left it as: a write arms the
timer, a flush clears it, unless something is in flight. The one flush row that there may be:
FLUSH_ROW, its cookie, or 0; FLUSH_COVERS, the UNFLUSHED that its success makes durable;
FLUSH_SEEN and FLUSH_ARMED, what SEEN and ARMED were before; FLUSH_BEGAN_NS, when it was taken.
To be taken out by Python: FLUSHES, how many were taken; FLUSHED, how many have succeeded; of the
last of those COVERED, its FLUSH_COVERS, and, in a compiled turn, FLUSH_TOOK_NS."""

LONG_BYTES: Final = 32 << 10
"""From here on a payload is received straight into its buffers: by the general path."""


SPAN_CELLS: Final = 3
"""Of a change: the cookie of a write that is a row, or a number below `ROW_COOKIE`; where it begins
and where it ends."""
MAX_SPANS: Final = 256
SPANS_CELLS: Final = 1 + SPAN_CELLS * MAX_SPANS
"""How many there are, then each of them."""


class Channel:
    """One connection's transmission phase, flat."""

    __slots__ = (
        *("cells", "early", "has_payload", "held", "is_closed", "native", "number"),
        *("output", "sending", "spans", "staging", "structured"),
    )

    cells: Cells[int]
    number: int
    """In rows."""
    early: list[Request]
    """Answered while part of the output was unsent; the owner finishes them once it is."""
    held: list[bytes]
    """A FLUSH that was taken: it goes into the output after what else this turn brought."""
    is_closed: bool
    """Its connection has ended."""
    output: list[bytes | memoryview]
    """Headers and payloads to be sent, in this order."""
    has_payload: bool
    """Something in the output is not a header."""
    spans: Cells[int] | None
    """What is being changed on this channel and the others (`Route.spans`): a write that overlaps
    any of that is not usual, as the two could pass each other. None: they cannot, this channel is
    alone."""
    sending: bool
    """Part of the output was not taken by the socket: an answer may come too early."""
    staging: memoryview
    """Where replies are received, outside of long payloads."""
    structured: bool
    """A READ is answered in chunks."""
    native: object
    """See `Queue`."""


class Unsent(NamedTuple):
    """What compiled turns have left of the output, because the socket was full."""

    pieces: list[bytes | memoryview]
    commands: bytes
    """Which commands these are of: for the turns that go on with it. Empty: they do not, but the
    general path does."""
    late_bytes: int
    """So much the socket took after it had been full."""


class Wire(Protocol):
    """The connection of a channel, as compiled turns have it (see `compiled`)."""

    def received(self) -> tuple[int, int, int, list[bytes | memoryview], bytes] | None:
        """Its descriptor, where in the staging buffer what was received begins and ends, and what
        the last turns have left unsent (see `Unsent`); None: something is not usual, and it has to
        be served in the general way."""

    def turned(self, start: int, end: int, received: int, unsent: Unsent) -> None:
        """So much was received; this is what stands in the staging buffer, and what was not
        sent."""

    def unusual(self, *, ended: bool, errno: int) -> None:
        """What stands in the staging buffer is not usual, or the connection has `ended`, or failed
        with `errno`."""


class Flushes(Protocol):
    """The flushes of a session, where a guest's may be a row (see `server.flushes`)."""

    def may_be_row(self) -> bool:
        """The next one may, unless there is one. From here on until anything but a row is begun or
        ends."""

    def row_taken(self) -> None:
        """One was taken in this turn. It may still be `held` by its channel."""

    def row_succeeded(self, covers: int) -> None:
        """It is answered: FLUSH_COVERS."""

    def adopt_row(self, flush: Request, covers: int, seen: int) -> Request:
        """The command that the row would have been, and what it is for; FLUSH_COVERS and
        FLUSH_SEEN."""


class Changes(Protocol):
    """What keeps changes apart that overlap (see `server.changes`)."""

    def adopt(self, request: Request) -> Request:
        """The command for the guest's write `request`, which was a row and overlaps no other change
        in flight."""

    def give_up(self, command: Request) -> Request:
        """The request of a command that `adopt` has made, and that is done with."""


class Outlet(NamedTuple):
    """One connection to the server that takes usual commands."""

    channel: Channel
    flush_later: Callable[[], None]
    """Send the output of `channel` at the end of this turn."""
    wire: Wire | None
    """The same connection, as compiled turns have it; None: they do not."""


class Route:
    """Where commands go: the limits of the export, and the connections that take them."""

    __slots__ = ("alone", "cells", "changes", "flushes", "outlets", "rows", "shown", "spans")

    def __init__(self) -> None:
        self.cells = cells(ROUTE_CELLS)
        self.cells[ROW_SEGMENTS] = MAX_ROW_SEGMENTS
        self.outlets: tuple[Outlet, ...] = ()
        """None of them: commands must go the general way."""
        self.alone: Channel | None = None
        """That of the one outlet there is; None: there are several, or none."""
        self.shown: Callable[[int], None] = _nobody
        """The guest may know that the channels have answered so much (UNFLUSHED, of all of them
        together): a turn has ended."""
        self.flushes: Flushes | None = None
        """None: none is a row."""
        self.changes: Changes | None = None
        """None: writes cannot pass each other."""
        self.rows: Rows | None = None
        """What is usual on this route; None: nothing is."""
        self.spans = cells(SPANS_CELLS)
        """Of the writes that are rows on one of several channels, and of the changes of the general
        path (see `spans`)."""

    def lead(self, outlets: tuple[Outlet, ...]) -> None:
        """From here on commands go there."""
        self.outlets = outlets
        self.cells[ROW_SEGMENTS] = MAX_ROW_SEGMENTS // max(len(outlets), 1)
        self.alone = outlets[0].channel if len(outlets) == 1 else None

    def least_busy(self) -> Outlet | None:
        """Where the next commands go: to the connection with the fewest rows that has sent all that
        it was given."""
        least: Outlet | None = None
        for outlet in self.outlets:
            channel = outlet.channel
            if channel.sending or channel.is_closed:
                continue
            if least is None or channel.cells[ROWS] < least.channel.cells[ROWS]:
                least = outlet
        return least


def _nobody(unflushed: int) -> None:
    raise AssertionError("answers without a session")


# Cells of a `Resident`: of the whole cache.
(
    DIRTY_SLOTS,
    DIRTY_BLOCKS,
    CHANGES,
    RING_HEAD,
    RING_TAIL,
    RING_GOAL,
    HARD_SLOTS,
    FLUSH_SLOTS,
    BACKGROUND_SLOTS,
    RESIDENT_CELLS,
) = range(10)
"""DIRTY_SLOTS, DIRTY_BLOCKS: how many slots have blocks that are neither absent nor clean, and how
many such blocks there are. CHANGES: raised by every write that changes which blocks are dirty or
sent, and by every discard. RING_HEAD, RING_TAIL, RING_GOAL: positions of `cache.dirty_ring`.
HARD_SLOTS, FLUSH_SLOTS, BACKGROUND_SLOTS: see `cache.cache_options.DirtyLimits`."""


class Resident:
    """What a cache has at hand, flat: see `cache.index` and `cache.blocks`."""

    __slots__ = (
        *("block_shift", "bucket_mask", "cells", "covered", "data", "granule_of"),
        *("granule_shift", "head", "may_open", "native", "open", "open_blocks", "queued"),
        *("ready", "ring", "sent", "state", "store", "touched", "up"),
    )

    granule_shift: int
    block_shift: int
    bucket_mask: int
    head: memoryview
    """Bucket → slot, 32 bits."""
    granule_of: memoryview
    """Slot → granule, 32 bits."""
    ready: memoryview
    """Slot → blocks that a read may copy, 16 bits."""
    open: memoryview
    """Slot → blocks that a write may change, 16 bits."""
    data: memoryview
    touched: bytearray
    """Slot → how often it was hit."""
    up: bytes
    """The next value of that."""
    cells: Cells[int]
    state: memoryview
    """Slot → its state, 64 bits, in the cache file: see `cache.file.layout`."""
    sent: memoryview
    covered: memoryview
    """Slot → blocks, 16 bits."""
    queued: bytearray
    """Slot → 1: it stands in the ring."""
    ring: memoryview
    """Slots, 32 bits."""
    open_blocks: Callable[[int, int], bool]
    """Make blocks of a slot, all `ready`, open, marked dirty first; False: not now."""
    may_open: Callable[[], bool]
    """Compiled code may do what `open_blocks` does, until it has called anything or waited: but not
    what is beyond a limit, or has more dirty than should be."""
    store: Callable[[int, int, list[memoryview]], bool]
    """Store a write (offset, length, data) whose blocks are not there, or not at hand; False: that
    has to wait, and some of it may be stored. The data is only lent."""
    native: object
    """See `Queue`."""
