"""Claims in the table in which writes that are rows look for what they overlap.

The table has a bound. While claims are left out of it, no write may be a row.
"""

from __future__ import annotations

from bridge.datapath.cells import MAX_SPANS, Cells
from bridge.datapath.spans import forget_span, note_span, row_overlaps
from bridge.server.overlaps import Claim


class Listed:
    """Claims that have not ended; see `datapath.spans`."""

    def __init__(self, spans: Cells[int]) -> None:
        self._spans = spans
        self._left_out: dict[Claim, None] = {}
        self._next_key = 1
        self._places: dict[int, int] = {}
        """Where in the table keys are, or were: a row that leaves it may have moved one."""

    @property
    def is_complete(self) -> bool:
        """No claim is left out."""
        return not self._left_out

    def add(self, claim: Claim) -> None:
        """It is to be kept out of the way of: whether it may go or waits."""
        claim.key = self._next_key
        self._next_key += 1
        if self._spans[0] < MAX_SPANS:
            self._note(claim)
        else:
            self._left_out[claim] = None

    def remove(self, claim: Claim) -> None:
        """It is over, or will not go any more."""
        if claim in self._left_out:
            del self._left_out[claim]
        else:
            place = forget_span(self._spans, claim.key, self._places.pop(claim.key))
            if (moved := self._spans[place]) in self._places:
                self._places[moved] = place
        # (Rows that were answered have made room, too.)
        while self._left_out and self._spans[0] < MAX_SPANS:
            self._note(self._left_out.popitem()[0])

    def _note(self, claim: Claim) -> None:
        self._places[claim.key] = note_span(self._spans, claim.key, claim.start, claim.stop)

    def row_overlaps(self, start: int, stop: int) -> bool:
        """Some of these bytes are those of a row."""
        return self._spans[0] > len(self._places) and row_overlaps(self._spans, start, stop)
