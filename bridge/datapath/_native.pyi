"""See `usual`, whose functions these are, and `engine`."""

from collections.abc import Callable

from bridge.datapath.cells import Cells, Channel, Queue, Resident, Route
from bridge.datapath.rows import Rows

ABI: int
PLACES: dict[str, int]
"""Names of `cells`, and what they are in the compiled code."""

def take_hits(queue: Queue, disk: Cells[int], cache: Resident, /) -> tuple[int, int]: ...
def take_commands(
    queue: Queue, disk: Cells[int], route: Route, channel: Channel, rows: Rows, /
) -> tuple[int, int]: ...
def answers(channel: Channel, rows: Rows, start: int, end: int, /) -> tuple[int, bool]: ...
def publish(queue: Queue, /) -> bool: ...

Pieces = list[bytes | memoryview]
Wire = tuple[Channel, int, int, int, Pieces, bytes]
Side = tuple[Resident] | tuple[Route, Rows, tuple[Wire, ...]]
"""A cache; or the route, the rows, and of each connection to the server its channel, its
descriptor, where in the staging buffer what was received begins and ends, and the first two of what
an earlier call had as `cells.Unsent`."""
Place = tuple[int, int, int, int, int, tuple[Pieces, bytes, int]]
"""What is left of a connection: where in the staging buffer what was not taken begins and ends, how
many bytes were received, flags, errno, and what was not sent (`cells.Unsent`)."""

def new_turns(poll_max_ns: int, /) -> object: ...
def turns(
    state: object,
    epoll_fd: int,
    rings: tuple[tuple[Queue, int, Callable[[], None], *tuple[object, ...]], ...],
    disk: Cells[int],
    wrote: Callable[[], None] | None,
    side: Side,
    until_ns: int,
    worked: bool,
    crowded: bool,
    /,
) -> (
    tuple[
        int,
        tuple[int, ...],
        int,
        int,
        int,
        list[tuple[int, int]],
        tuple[Place, ...],
        int,
        int,
        int,
        int,
        tuple[int, ...],
        int,
        int,
    ]
    | None
): ...
