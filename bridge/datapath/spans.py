"""What the changes in flight change, where two that overlap could pass each other.

Several connections share one table (`cells.Channel.spans`). Each write that is a row is listed
there under its cookie, and each change of the general path (see `server.changes`) under a key
that is no row's. No row overlaps anything else that is listed.
"""

from __future__ import annotations

from bridge.datapath.cells import (
    MAX_SPANS,
    ROW_COOKIE,
    SPAN_CELLS,
    STOP_ROOM,
    STOP_WRITE,
    Cells,
)


def stop_of_span(spans: Cells[int], offset: int, length: int) -> int:
    """Why a write of these bytes may not be a row beside what is listed; 0: it may."""
    if spans[0] == MAX_SPANS:
        return STOP_ROOM
    for at in range(1, 1 + SPAN_CELLS * spans[0], SPAN_CELLS):
        if offset < spans[at + 2] and spans[at + 1] < offset + length:
            return STOP_WRITE
    return 0


def note_span(spans: Cells[int], key: int, start: int, stop: int) -> int:
    """A change of these bytes is in flight from here on, or waits. There has to be room. Returns
    its place, which it may not keep."""
    at = 1 + SPAN_CELLS * spans[0]
    spans[at], spans[at + 1], spans[at + 2] = key, start, stop
    spans[0] += 1
    return at


def forget_span(spans: Cells[int], key: int, place: int = 0) -> int:
    """It is so no more. `place`: where it may be found. Returns where it was: the last one has that
    place now; 0: it was nowhere."""
    last = 1 + SPAN_CELLS * (spans[0] - 1)
    at = place
    if not 0 < at <= last or spans[at] != key:
        try:
            at = spans.index(key, 1)
            while at % SPAN_CELLS != 1:  # An offset that is the same number.
                at = spans.index(key, at + 1)
        except ValueError:
            return 0
    if at > last:
        return 0
    spans[at : at + SPAN_CELLS] = spans[last : last + SPAN_CELLS]
    spans[0] -= 1
    return at


def row_overlaps(spans: Cells[int], start: int, stop: int) -> bool:
    """Some of these bytes are those of a row."""
    return any(
        spans[at] & ROW_COOKIE and start < spans[at + 2] and spans[at + 1] < stop
        for at in range(1, 1 + SPAN_CELLS * spans[0], SPAN_CELLS)
    )


def forget_rows(spans: Cells[int]) -> None:
    """There are no rows any more."""
    count = spans[0]
    spans[0] = 0
    for at in range(1, 1 + SPAN_CELLS * count, SPAN_CELLS):
        key, start, stop = spans[at : at + SPAN_CELLS]
        if not key & ROW_COOKIE:
            note_span(spans, key, start, stop)
