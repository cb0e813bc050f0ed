"""The table of what is being changed, beside a plain list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bridge.datapath.cells import (
    MAX_SPANS,
    ROW_COOKIE,
    SPAN_CELLS,
    SPANS_CELLS,
    STOP_ROOM,
    STOP_WRITE,
    cells,
)
from bridge.datapath.spans import forget_rows, forget_span, note_span, row_overlaps, stop_of_span
from bridge.server.listed import Listed
from bridge.server.overlaps import Claim

_numbers = st.integers(0, 12)
"""Of keys and of bytes alike: a key may be the same number as where some span begins or ends."""
_steps = st.lists(
    st.tuples(st.sampled_from(["note", "note", "note", "forget", "rows"]), _numbers, _numbers),
    max_size=40,
)


@given(_steps)
def test_table_holds_what_was_noted_and_not_forgotten(steps: list[tuple[str, int, int]]) -> None:
    spans = cells(SPANS_CELLS)
    model: dict[int, tuple[int, int]] = {}
    for what, number, length in steps:
        key = number | (ROW_COOKIE if length % 2 else 0)
        if what == "note" and key not in model:
            model[key] = number, number + length + 1
            note_span(spans, key, *model[key])
        elif what == "forget":
            model.pop(key, None)
            forget_span(spans, key)
        elif what == "rows":
            model = {key: span for key, span in model.items() if key < ROW_COOKIE}
            forget_rows(spans)
        listed = [tuple(spans[at : at + SPAN_CELLS]) for at in range(1, 1 + 3 * spans[0], 3)]
        assert sorted(listed) == sorted((key, *span) for key, span in model.items())
        for start in range(14):
            over = [key for key, span in model.items() if start < span[1] and span[0] < start + 2]
            assert stop_of_span(spans, start, 2) == (STOP_WRITE if over else 0)
            assert row_overlaps(spans, start, start + 2) == any(key >= ROW_COOKIE for key in over)


@given(st.lists(st.integers(0, 2 * MAX_SPANS), max_size=200), st.integers(0, 3))
def test_claims_beyond_the_tables_room_are_listed_as_others_leave(
    leaving: list[int], rows: int
) -> None:
    spans = cells(SPANS_CELLS)
    for number in range(rows):
        note_span(spans, ROW_COOKIE | number, number, number + 1)
    listed = Listed(spans)
    claims = [Claim(100 + number, 101 + number) for number in range(MAX_SPANS + 20)]
    for claim in claims:
        listed.add(claim)
    assert stop_of_span(spans, 99, 1) == STOP_ROOM
    assert not listed.is_complete
    for index in leaving:
        if index < len(claims):
            listed.remove(claims.pop(index))
        assert listed.is_complete == (len(claims) + rows <= MAX_SPANS)
        assert spans[0] == min(len(claims) + rows, MAX_SPANS)
        assert listed.row_overlaps(0, 1) == (rows > 0)
        assert not listed.row_overlaps(rows, 1 << 63)
    for claim in claims:
        listed.remove(claim)
    assert spans[0] == rows


@given(st.lists(st.tuples(st.booleans(), _numbers), max_size=60))
def test_claims_are_found_where_rows_that_left_have_moved_them(
    steps: list[tuple[bool, int]],
) -> None:
    spans = cells(SPANS_CELLS)
    listed = Listed(spans)
    rows: set[int] = set()
    claims: dict[int, Claim] = {}
    for is_row, number in steps:
        if is_row and number in rows:
            rows.remove(number)
            forget_span(spans, ROW_COOKIE | number)
        elif is_row:
            rows.add(number)
            note_span(spans, ROW_COOKIE | number, number, number + 1)
        elif number in claims:
            listed.remove(claims.pop(number))
        else:
            claims[number] = Claim(100 + number, 101 + number)
            listed.add(claims[number])
        assert spans[0] == len(rows) + len(claims)
        for each in range(13):
            assert (stop_of_span(spans, each, 1) != 0) == (each in rows)
            assert (stop_of_span(spans, 100 + each, 1) != 0) == (each in claims)
