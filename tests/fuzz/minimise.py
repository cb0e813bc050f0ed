"""A corpus that is worth keeping: few inputs that together go everywhere all of them go."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import FrameType
from typing import Any

from tests.fuzz.target import Target

_Step = tuple[str, int, int]


def steps_of(target: Target, data: bytes) -> frozenset[_Step]:
    """From which line to which an input goes, in the target's modules."""
    found: set[_Step] = set()
    places = tuple(f"/{module.replace('.', '/')}" for module in target.modules)

    def at_call(frame: FrameType, event: str, _: Any) -> Any:
        name = frame.f_code.co_filename
        if not any(place in name for place in places):
            return None
        last = 0

        def at_line(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal last
            if event == "line":
                found.add((name, last, frame.f_lineno))
                last = frame.f_lineno
            elif event == "exception":
                found.add((name, last, -1))
            return at_line

        return at_line

    outer = sys.gettrace()
    sys.settrace(at_call)
    try:
        target.run(data)
    finally:
        sys.settrace(outer)
    return frozenset(found)


def fewest(target: Target, inputs: Iterable[bytes], *, most: int) -> list[bytes]:
    """Of `inputs` those that are kept, at most so many: always the one that adds most, the shorter
    one of two that add the same."""
    left = {data: steps_of(target, data) for data in sorted(set(inputs), key=len)}
    seen: set[_Step] = set()
    kept: list[bytes] = []
    while left and len(kept) < most:
        best = max(left, key=lambda data: (len(left[data] - seen), -len(data)))
        added = left.pop(best) - seen
        if not added:
            break
        seen |= added
        kept.append(best)
    return kept
