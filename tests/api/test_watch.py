"""Slow requests and the rate of write-out, on a clock of the test's."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import structlog.testing

from bridge.api.live import EndObserver, Live
from bridge.api.watch import Watch
from bridge.datapath.request import READ, WRITE, Request
from bridge.server.link import Phase


class FakeStats:
    writeback_bytes = 0


class FakeCache:
    def __init__(self) -> None:
        self.stats = FakeStats()
        self.waiting = {"room": 0, "fetch": 0}


class FakeLive:
    """What `Watch` reads of a disk."""

    def __init__(self) -> None:
        self.time_s = 100.0
        self.requests: dict[Request, None] = {}
        self.cache: FakeCache | None = None
        self.dirty_bytes = 0
        self.requests_total = 0
        self.phase = Phase.UP
        self.left_reason = ""
        self.at_server: set[Request] = set()
        self.waits_for_grace = False
        self.commands_in_flight = 0
        self.in_other_hands: set[Request] = set()

    def now(self) -> float:
        return self.time_s

    @property
    def in_flight(self) -> int:
        return len(self.requests)

    def unanswered(self) -> list[Request]:
        return list(self.requests)

    def is_as_it_came(self, request: Request) -> bool:
        return request not in self.in_other_hands

    def is_at_server(self, request: Request) -> bool:
        return request in self.at_server


class Rig:
    def __init__(self, *, slow_s: float = 1.0) -> None:
        self.live: Any = FakeLive()
        self.watch = Watch(self.live, None, slow_s=slow_s)  # type: ignore[arg-type]
        self.ended: list[Request] = []

    def request(self, op: int = READ, offset: int = 4096) -> Request:
        request = Request(op, offset, 512, [], self.ended.append)
        self.live.requests[request] = None
        return request

    def finish(self, request: Request, error: int = 0) -> None:
        del self.live.requests[request]
        request.error = error
        request.done(request)

    def after(self, seconds: float) -> list[Any]:
        """What is logged by a look so much later."""
        self.live.time_s += seconds
        with structlog.testing.capture_logs() as lines:
            self.watch.look(self.live.time_s)
        return lines


def test_slow_request_is_logged_once_and_again_when_it_ends() -> None:
    rig = Rig()
    request = rig.request(WRITE)
    rig.live.at_server.add(request)
    assert rig.after(0) == []
    assert rig.after(0.5) == []
    (line,) = rig.after(0.5)
    assert line["event"] == "slow request"
    assert line["log_level"] == "warning"
    assert (line["op"], line["offset"], line["length"]) == ("write", 4096, 512)
    assert line["waits_for"] == "the server's answer"
    assert rig.after(5) == []
    with structlog.testing.capture_logs() as lines:
        rig.finish(request)
    assert lines[0]["event"] == "slow request ended"
    assert lines[0]["seconds"] == 6.0
    assert rig.ended == [request]
    assert rig.watch.slow_total == 1


def test_request_that_ends_in_time_is_not_slow() -> None:
    rig = Rig()
    for _ in range(10):
        request = rig.request()
        assert rig.after(0.5) == []
        rig.finish(request)
        assert rig.after(0.5) == []
    assert rig.watch.slow_total == 0
    assert len(rig.ended) == 10


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"phase": Phase.UP, "waits_for_grace": True}, "the end of the grace time"),
        ({"commands_in_flight": 3}, "the server's answer to others"),
        ({}, "its turn"),
    ],
)
def test_slow_request_says_what_it_waits_for(state: dict[str, Any], said: str) -> None:
    rig = Rig()
    for name, value in state.items():
        setattr(rig.live, name, value)
    rig.request()
    rig.after(0)
    assert said in rig.after(1)[0]["waits_for"]


def test_slow_request_in_the_cache_says_which_queues_are_not_empty() -> None:
    rig = Rig()
    rig.live.cache = FakeCache()
    rig.live.cache.waiting["room"] = 7
    rig.request(WRITE)
    rig.after(0)
    assert rig.after(1)[0]["waits_for"] == "the cache: room 7"


def test_outage_is_not_said_again_for_each_request() -> None:
    rig = Rig()
    rig.live.phase = Phase.DOWN
    requests = [rig.request(offset=n * 512) for n in range(100)]
    rig.after(0)
    assert rig.after(10) == []
    assert rig.watch.slow_total == 100
    with structlog.testing.capture_logs() as lines:
        for request in requests:
            rig.finish(request)
    assert lines == []
    assert rig.ended == requests


def test_flood_of_slow_requests_is_counted_and_not_logged() -> None:
    rig = Rig()
    for number in range(1000):
        rig.request(offset=number * 512)
    rig.after(0)
    assert len(rig.after(1)) == 5
    assert rig.watch.slow_total == 1000
    rig.request(offset=0)
    rig.after(60)
    (line,) = rig.after(1)
    assert line["more_unsaid"] == 995


def test_no_request_is_slow_when_the_limit_is_off() -> None:
    rig = Rig(slow_s=0)
    rig.request()
    rig.after(0)
    assert rig.after(1000) == []
    assert rig.watch.slow_total == 0


def test_rate_of_write_out_is_that_of_the_last_seconds() -> None:
    rig = Rig()
    rig.live.cache = FakeCache()
    rig.after(0)
    assert rig.watch.write_out_rate is None
    for _ in range(40):
        rig.live.cache.stats.writeback_bytes += 5 << 20
        rig.after(0.5)
    assert rig.watch.write_out_rate == pytest.approx(10 << 20)
    for _ in range(40):
        rig.after(0.5)
    assert rig.watch.write_out_rate == 0


def test_last_clean_time_stands_still_while_something_is_dirty() -> None:
    rig = Rig()
    rig.after(3)
    clean_s = rig.live.time_s
    rig.live.dirty_bytes = 4096
    rig.after(3)
    assert rig.watch.last_clean_s == clean_s
    rig.live.dirty_bytes = 0
    rig.after(3)
    assert rig.watch.last_clean_s == rig.live.time_s


def test_request_whose_end_the_client_is_to_be_told_of_is_left_alone() -> None:
    """On trial it compares and puts back what is told of the end: an observer in between would be
    called by itself."""
    rig = Rig()
    request = rig.request()
    rig.live.in_other_hands.add(request)
    rig.after(0)
    assert rig.after(5) == []
    assert request.done == rig.ended.append
    rig.live.in_other_hands.clear()
    rig.after(0)
    assert [line["event"] for line in rig.after(5)] == ["slow request"]


def test_request_is_as_it_came_until_the_client_puts_something_before_the_engine() -> None:
    engine: Any = SimpleNamespace(_done=print, _large_done=repr)
    nothing: Any = None
    device: Any = SimpleNamespace(_engine=engine)
    live = Live(nothing, nothing, nothing, nothing, device)
    request: Any = Request(READ, 0, 512, [], print)
    assert live.is_as_it_came(request)
    request.done = EndObserver(EndObserver(print))
    assert live.is_as_it_came(request)
    request.done = id
    assert not live.is_as_it_came(request)
    request.done = EndObserver(id)
    assert not live.is_as_it_came(request)
