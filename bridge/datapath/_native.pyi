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

Side = tuple[Resident] | tuple[Channel, int, Route, Rows, int, int, list[bytes | memoryview], bytes]
"""A cache; or a channel, its descriptor, the route and the rows, where in the staging buffer what
was received begins and ends, and the first two of what an earlier call had as `cells.Unsent`."""

def new_turns(poll_max_ns: int, /) -> object: ...
def turns(
    state: object,
    epoll_fd: int,
    rings: tuple[tuple[Queue, int, Callable[[], None], *tuple[object, ...]], ...],
    disk: Cells[int],
    may_write: bool,
    side: Side,
    until_ns: int,
    worked: bool,
    /,
) -> (
    tuple[
        int,
        tuple[int, ...],
        int,
        int,
        int,
        list[tuple[int, int]],
        tuple[list[bytes | memoryview], bytes, int],
        int,
        int,
        int,
        int,
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
