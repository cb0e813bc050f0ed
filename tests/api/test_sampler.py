"""Requests that are timed: which, and at what cost."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import trio
import trio.testing

from bridge.api.sampler import HIT, MISS, PAUSE_S, Sampler
from bridge.datapath.histogram import BOUNDS_S, Histogram
from bridge.datapath.request import READ, WRITE, Request


class FakeTurn:
    def __init__(self) -> None:
        self.ends: list[Callable[[], None]] = []

    def at_end(self, callback: Callable[[], None]) -> None:
        self.ends.append(callback)

    def end(self) -> None:
        ends, self.ends = self.ends, []
        for each in ends:
            each()


class FakeLoop:
    def __init__(self) -> None:
        self.now = 0.0
        self.pollers: list[Any] = []
        self.turn = FakeTurn()

    def add_poller(self, poller: Any) -> None:
        self.pollers.append(poller)

    def remove_poller(self, poller: Any) -> None:
        self.pollers = [each for each in self.pollers if each is not poller]


class FakeLive:
    def __init__(self) -> None:
        self.loop = FakeLoop()
        self.requests_total = 0
        self.hits = (0, 0)
        self.ring_ids: tuple[int, ...] = (1,)
        self.requests: dict[Request, None] = {}

        self.ended: list[Request] = []
        self.at_server: set[Request] = set()

    def is_at_server(self, request: Request) -> bool:
        return request in self.at_server

    def unanswered(self) -> list[Request]:
        return list(self.requests)

    def is_as_it_came(self, request: Request) -> bool:
        return request.done == self.ended.append


class Rig:
    def __init__(self) -> None:
        self.live: Any = FakeLive()
        self.sampler = Sampler(self.live, random=Random(1))
        self.ended: list[Request] = self.live.ended

    def pop(self, *ops: int, reads_hit: int = 0, writes_hit: int = 0) -> list[Request]:
        """A turn pops these requests that are no hits, and so many hits."""
        live = self.live
        requests = [Request(op, 0, 512, [], self.ended.append) for op in ops]
        live.requests.update(dict.fromkeys(requests))
        live.hits = (live.hits[0] + reads_hit, live.hits[1] + writes_hit)
        live.requests_total += len(ops) + reads_hit + writes_hit
        for poller in live.loop.pollers:
            assert poller.poll() is False
        return requests

    def counts(self) -> dict[tuple[str, str], int]:
        return {key: each.count for key, each in self.sampler.histograms.items()}


async def test_request_whose_end_the_client_is_to_be_told_of_is_left_alone(
    autojump_clock: Any,
) -> None:
    """On trial it compares and puts back what is told of the end: a timer in between would be
    called by itself."""
    rig = Rig()
    (older,) = rig.pop(READ)
    alone: list[Request] = []
    done = older.done = alone.append
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.sampler.run)
        await trio.testing.wait_all_tasks_blocked()
        rig.live.requests_total += 1  # one that was refused
        rig.pop()
        assert older.done == done
        nursery.cancel_scope.cancel()


async def test_one_request_is_timed_and_then_none_for_a_while(autojump_clock: Any) -> None:
    rig = Rig()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.sampler.run)
        await trio.testing.wait_all_tasks_blocked()
        requests = rig.pop(READ, READ, READ)
        rig.pop(READ)
        await trio.testing.wait_all_tasks_blocked()
        assert rig.live.loop.pollers == []
        rig.pop(READ)
        for request in requests:
            request.done(request)
        assert rig.ended == requests
        assert rig.counts() == {("read", MISS): 1}
        await trio.sleep(2 * PAUSE_S)
        rig.pop(WRITE, writes_hit=0)
        for request in rig.live.requests:
            request.done(request)
        assert rig.counts() == {("read", MISS): 1, ("write", MISS): 1}
        nursery.cancel_scope.cancel()
    assert rig.live.loop.pollers == []


async def test_activity_is_seen_by_those_who_waited_before_the_start(autojump_clock: Any) -> None:
    rig = Rig()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.sampler.activity)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(rig.sampler.run)
        await trio.testing.wait_all_tasks_blocked()
        rig.pop(READ)
        with trio.fail_after(1):
            await rig.sampler.activity()
        await trio.testing.wait_all_tasks_blocked()
        assert len(nursery.child_tasks) == 1  # who waited has gone on
        nursery.cancel_scope.cancel()


async def test_idle_disk_wakes_nothing(autojump_clock: Any) -> None:
    rig = Rig()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.sampler.run)
        await trio.testing.wait_all_tasks_blocked()
        # Nothing but this sleeps: the clock jumps a day at once.
        assert trio.lowlevel.current_statistics().seconds_to_next_deadline == float("inf")
        nursery.cancel_scope.cancel()


async def test_hits_and_others_are_timed_in_proportion(autojump_clock: Any) -> None:
    rig = Rig()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.sampler.run)
        for _ in range(400):
            await trio.sleep(2 * PAUSE_S)
            for request in rig.pop(READ, reads_hit=2, writes_hit=1):
                request.done(request)
                del rig.live.requests[request]
        nursery.cancel_scope.cancel()
    counts = rig.counts()
    assert sum(counts.values()) == 400
    for key, share in {("read", HIT): 200, ("write", HIT): 100, ("read", MISS): 100}.items():
        assert abs(counts[key] - share) < 40


async def test_turn_in_which_a_ring_was_started_is_not_timed(autojump_clock: Any) -> None:
    rig = Rig()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.sampler.run)
        await trio.testing.wait_all_tasks_blocked()
        rig.live.ring_ids = (1, 2)
        for request in rig.pop(READ):
            request.done(request)
        assert rig.counts() == {}
        nursery.cancel_scope.cancel()


async def test_wait_is_the_servers_or_the_bridges_own(autojump_clock: Any) -> None:
    rig = Rig()
    turn = rig.live.loop.turn
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.sampler.run)
        for at_server in (True, False, True):
            await trio.sleep(2 * PAUSE_S)
            (request,) = rig.pop(WRITE)
            if at_server:
                rig.live.at_server.add(request)
            turn.end()
            request.done(request)
            del rig.live.requests[request]
        # One that ends in the turn that popped it has no wait.
        await trio.sleep(2 * PAUSE_S)
        (request,) = rig.pop(WRITE)
        request.done(request)
        turn.end()
        nursery.cancel_scope.cancel()
    counts = {stage: each.count for (_, stage), each in rig.sampler.stages.items()}
    assert counts == {"take": 4, "server": 2, "held": 1, "reply": 3}
    whole = rig.sampler.histograms["write", MISS]
    parts = sum(each.sum_s for each in rig.sampler.stages.values())
    assert parts == pytest.approx(whole.sum_s)


def test_histogram_counts_below_each_bound() -> None:
    histogram = Histogram()
    assert histogram.quantile(0.5) is None
    for duration_s in (0.0, 1e-6, 10e-6, 0.3, 100.0):
        histogram.add(duration_s)
    assert histogram.count == histogram.cumulative()[-1] == 5
    assert histogram.cumulative()[0] == 3
    assert histogram.quantile(0.5) == BOUNDS_S[0]
    assert histogram.quantile(0.8) == 0.5
    assert histogram.quantile(0.99) is None
