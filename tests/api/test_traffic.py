"""Requests and bytes by operation."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.api.traffic import counts
from bridge.datapath.request import N_OPS, READ, WRITE


class FakeLive:
    """What `counts` reads of a disk."""

    def __init__(self) -> None:
        self.general_counts = [0] * N_OPS, [0] * N_OPS
        self.usual_counts = {READ: 0, WRITE: 0}, {READ: 0, WRITE: 0}
        self.requests_total = 0


def test_requests_of_both_ways_add_up_and_the_rest_is_other() -> None:
    live: Any = FakeLive()
    live.usual_counts[0][READ], live.usual_counts[1][READ] = 5, 5 * 512
    live.general_counts[0][READ], live.general_counts[1][READ] = 2, 1000
    live.requests_total = 8
    found = counts(live)
    assert (found["read"].requests_total, found["read"].bytes_total) == (7, 5 * 512 + 1000)
    assert (found["write"].requests_total, found["write"].bytes_total) == (0, 0)
    assert found["other"].requests_total == 1


@pytest.mark.parametrize("total", [0, 3])
def test_other_is_never_negative(total: int) -> None:
    live: Any = FakeLive()
    live.requests_total = total
    live.general_counts[0][READ] = 4
    assert counts(live)["other"].requests_total == 0
