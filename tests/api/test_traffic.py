"""Requests and bytes by operation, of which some are only estimated."""

from __future__ import annotations

from typing import Any

import pytest

from bridge.api.traffic import Traffic
from bridge.datapath.request import N_OPS, READ, WRITE


class FakeLive:
    """What `Traffic` reads of a disk."""

    def __init__(self) -> None:
        self.general_counts = [0] * N_OPS, [0] * N_OPS
        self.usual_counts = {READ: 0, WRITE: 0}
        self.sizes: dict[int, list[int]] = {READ: [], WRITE: []}
        self.requests_total = 0
        self.since: list[int] = []

    def usual_sizes(self, since: int) -> tuple[int, dict[int, list[int]]]:
        self.since.append(since)
        return since + 10, self.sizes


class Rig:
    def __init__(self) -> None:
        self.live: Any = FakeLive()
        self.traffic = Traffic(self.live)

    def usual(self, op: int, count: int, looked_at: list[int] | None = None) -> None:
        """So many requests go the usual way; these of them are seen."""
        self.live.usual_counts[op] += count
        self.live.requests_total += count
        if looked_at is not None:
            self.live.sizes = {READ: [], WRITE: [], op: looked_at}
            self.traffic.look()

    def bytes(self, op: str) -> int:
        return self.traffic.counts()[op].bytes_total


def test_bytes_are_as_many_as_the_requests_that_were_looked_at_let_expect() -> None:
    rig = Rig()
    rig.usual(READ, 100, [4096, 4096, 8192, 0])
    assert rig.bytes("read") == 100 * 4096
    rig.usual(READ, 50, [65536])
    assert rig.bytes("read") == 100 * 4096 + 50 * 65536
    assert rig.bytes("write") == 0


def test_bytes_never_become_fewer() -> None:
    """Prometheus would take that for a new process, and the rate for enormous."""
    rig = Rig()
    rig.usual(WRITE, 1, [65536])
    seen = [rig.bytes("write")]
    for number in range(20):
        rig.usual(WRITE, 1000)
        seen.append(rig.bytes("write"))
        rig.usual(WRITE, 1, [512 if number % 2 else 65536])
        seen.append(rig.bytes("write"))
    assert seen == sorted(seen)


def test_requests_of_an_operation_that_was_not_looked_at_wait_for_the_next_look() -> None:
    rig = Rig()
    rig.usual(READ, 10, [4096])
    rig.usual(WRITE, 10)
    assert rig.bytes("write") == 0
    rig.usual(WRITE, 1, [4096])
    assert rig.bytes("write") == 11 * 4096


def test_each_look_begins_where_the_one_before_ended() -> None:
    rig = Rig()
    for _ in range(3):
        rig.usual(READ, 1, [512])
    assert rig.live.since == [0, 10, 20]


def test_requests_of_both_ways_add_up_and_the_rest_is_other() -> None:
    rig = Rig()
    rig.usual(READ, 5, [512])
    rig.live.general_counts[0][READ] = 2
    rig.live.general_counts[1][READ] = 1000
    rig.live.requests_total += 3
    counts = rig.traffic.counts()
    assert (counts["read"].requests_total, counts["read"].bytes_total) == (7, 5 * 512 + 1000)
    assert counts["other"].requests_total == 1


@pytest.mark.parametrize("total", [0, 3])
def test_other_is_never_negative(total: int) -> None:
    rig = Rig()
    rig.live.requests_total = total
    rig.live.general_counts[0][READ] = 4
    assert rig.traffic.counts()["other"].requests_total == 0
