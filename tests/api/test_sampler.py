"""Requests that are timed: which, and at what cost."""

from __future__ import annotations

from random import Random
from typing import Any

import trio
import trio.testing

from bridge.api.histogram import BOUNDS_S, Histogram
from bridge.api.sampler import HIT, MISS, PAUSE_S, Sampler
from bridge.datapath.request import READ, WRITE, Request


class FakeLoop:
    def __init__(self) -> None:
        self.now = 0.0
        self.pollers: list[Any] = []

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

    def unanswered(self) -> list[Request]:
        return list(self.requests)


class Rig:
    def __init__(self) -> None:
        self.live: Any = FakeLive()
        self.sampler = Sampler(self.live, random=Random(1))
        self.ended: list[Request] = []

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
