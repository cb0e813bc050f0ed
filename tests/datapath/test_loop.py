"""The data path's loop: turns, sleeping and waking without losing anything."""

from __future__ import annotations

import itertools
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from bridge.datapath.loop import EPOLLET, EPOLLIN, EPOLLOUT, Loop
from bridge.datapath.request import READ, Request


@asynccontextmanager
async def running(*, poll_us: float = 0) -> AsyncIterator[Loop]:
    loop = Loop(poll_us=poll_us)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(loop.run)
        await settled()
        yield loop
        nursery.cancel_scope.cancel()
    loop.close()


async def settled() -> None:
    """The loop has nothing more to do."""
    await wait_all_tasks_blocked()


@pytest.fixture
def eventfd() -> Iterator[int]:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    yield fd
    os.close(fd)


class Box:
    """A poller over a list of work that a producer fills, with wake-ups on request only."""

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.work: list[int] = []
        self.done: list[int] = []
        self.armed = False
        self.log: list[str] = []
        self.before_arm: list[int] = []

    def put(self, item: int) -> None:
        """What a guest does: kick only if asked to."""
        self.work.append(item)
        if self.armed:
            self.armed = False
            self.loop.wake()

    def poll(self) -> bool:
        if not self.work:
            return False
        self.done += self.work
        self.work.clear()
        return True

    def arm(self) -> bool:
        self.work += self.before_arm
        self.before_arm = []
        self.armed = True
        self.log.append("arm")
        return bool(self.work)

    def disarm(self) -> None:
        self.armed = False
        self.log.append("disarm")


async def test_ready_descriptor_calls_its_callback(eventfd: int) -> None:
    async with running() as loop:
        events: list[int] = []

        def ready(which: int) -> None:
            events.append(which)
            os.eventfd_read(eventfd)

        loop.add(eventfd, ready)
        os.eventfd_write(eventfd, 1)
        await settled()
        assert events == [EPOLLIN]


async def test_edge_triggered_descriptor_is_called_for_every_write(eventfd: int) -> None:
    """A kick's counter is never read."""
    async with running() as loop:
        calls: list[int] = []
        loop.add(eventfd, calls.append, EPOLLIN | EPOLLET)
        for number in range(1, 4):
            os.eventfd_write(eventfd, 1)
            await settled()
            assert len(calls) == number


async def test_descriptor_that_was_ready_before_it_was_added_is_called(eventfd: int) -> None:
    os.eventfd_write(eventfd, 1)
    async with running() as loop:
        calls: list[int] = []
        loop.add(eventfd, calls.append, EPOLLIN | EPOLLET)
        await settled()
        assert calls


async def test_removed_descriptor_is_not_called(eventfd: int) -> None:
    async with running() as loop:
        calls: list[int] = []
        loop.add(eventfd, calls.append, EPOLLIN | EPOLLET)
        loop.remove(eventfd)
        os.eventfd_write(eventfd, 1)
        await settled()
        assert calls == []


async def test_callback_may_remove_another_ready_descriptor() -> None:
    async with running() as loop:
        fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        called: list[int] = []

        def make(mine: int, other: int) -> None:
            def ready(events: int) -> None:
                called.append(mine)
                loop.remove(other)

            loop.add(fds[mine], ready, EPOLLIN | EPOLLET)
            assert other != fds[mine]

        make(0, fds[1])
        make(1, fds[0])
        for fd in fds:
            os.eventfd_write(fd, 1)
        await settled()
        assert len(called) == 1
        for fd in fds:
            os.close(fd)


async def test_modified_descriptor_waits_for_something_else(eventfd: int) -> None:
    async with running() as loop:
        events: list[int] = []
        loop.add(eventfd, events.append, EPOLLIN | EPOLLET)
        await settled()
        loop.modify(eventfd, EPOLLOUT | EPOLLET)
        await settled()
        assert events == [EPOLLOUT]


async def test_file_that_cannot_be_waited_for_is_refused(tmp_path: object) -> None:
    async with running() as loop:
        fd = os.open(f"{tmp_path}/file", os.O_CREAT)
        with pytest.raises(OSError, match="not permitted"):
            loop.add(fd, lambda events: None)
        os.close(fd)


async def test_turn_end_runs_once_after_everything_of_the_turn() -> None:
    async with running() as loop:
        order: list[str] = []
        box = Box(loop)
        loop.add_poller(box)

        class Worker(Box):
            def poll(self) -> bool:
                worked = super().poll()
                if worked:
                    order.append("poll")
                    loop.turn.at_end(lambda: order.append("end"))
                return worked

        worker = Worker(loop)
        loop.add_poller(worker)
        await settled()
        worker.put(1)
        await settled()
        assert order == ["poll", "end"]


async def test_turn_end_asked_for_while_asleep_runs() -> None:
    async with running() as loop:
        order: list[int] = []
        loop.turn.at_end(lambda: order.append(1))
        await settled()
        assert order == [1]


async def test_turn_end_asked_for_at_the_turns_end_runs_too() -> None:
    async with running() as loop:
        order: list[int] = []

        def first() -> None:
            order.append(1)
            loop.turn.at_end(lambda: order.append(2))

        loop.turn.at_end(first)
        await settled()
        assert order == [1, 2]


async def test_what_a_task_finishes_while_the_loop_sleeps_is_told() -> None:
    async with running() as loop:
        told: list[Request] = []
        loop.turn.finish(Request(READ, 0, 0, [], told.append))
        assert told == []
        await settled()
        assert len(told) == 1


@pytest.mark.parametrize("poll_us", [0, 32, 1000])
async def test_what_a_task_queues_moves_if_it_wants_a_turn(poll_us: float) -> None:
    """Whether the loop sleeps, or lets the tasks run for a moment."""

    class Queue:
        def __init__(self) -> None:
            self.queued: list[int] = []
            self.moved: list[int] = []

        def advance(self) -> bool:
            if not self.queued:
                return False
            self.moved.append(self.queued.pop(0))
            return True

    async with running(poll_us=poll_us) as loop:
        queue = Queue()
        loop.turn.add_stage(queue)
        for number in range(200):
            queue.queued.append(number)
            loop.turn.want()
            for _ in range(number % 5):
                await trio.lowlevel.checkpoint()
        await settled()
        assert queue.moved == list(range(200))


@pytest.mark.parametrize("poll_us", [0, 32, 1000])
async def test_no_work_is_lost_around_falling_asleep(poll_us: float) -> None:
    """The producer kicks only when the poller has asked for it."""
    async with running(poll_us=poll_us) as loop:
        box = Box(loop)
        loop.add_poller(box)
        for number in range(500):
            box.put(number)
            for _ in range(number % 5):
                await trio.lowlevel.checkpoint()
        await settled()
        assert box.done == list(range(500))


async def test_work_that_comes_while_arming_is_done_without_a_kick() -> None:
    async with running() as loop:
        box = Box(loop)
        box.before_arm = [7]
        loop.add_poller(box)
        await settled()
        assert box.done == [7]
        assert box.armed


async def test_pollers_are_disarmed_while_awake() -> None:
    async with running() as loop:
        box = Box(loop)
        loop.add_poller(box)
        await settled()
        box.put(1)
        await settled()
        assert box.log[-2:] == ["disarm", "arm"]


async def test_removed_poller_is_left_alone() -> None:
    async with running() as loop:
        box = Box(loop)
        loop.add_poller(box)
        await settled()
        loop.remove_poller(box)
        box.work.append(1)
        loop.wake()
        await settled()
        assert box.done == []


async def test_wake_while_asleep_is_one_turn() -> None:
    async with running() as loop:
        box = Box(loop)
        loop.add_poller(box)
        await settled()
        turns = len(box.log)
        for _ in range(3):
            loop.wake()
        await settled()
        assert box.log[turns:] == ["disarm", "arm"]


async def test_idle_loop_has_no_turns() -> None:
    """An idle disk uses no CPU."""
    async with running(poll_us=100) as loop:
        box = Box(loop)
        loop.add_poller(box)
        await settled()
        turns = len(box.log)
        await trio.sleep(0.05)
        assert len(box.log) == turns


async def test_busy_loop_lets_other_tasks_run() -> None:
    async with running(poll_us=32) as loop:

        class Busy(Box):
            def poll(self) -> bool:
                return True

        busy = Busy(loop)
        loop.add_poller(busy)
        for _ in range(5):
            await trio.lowlevel.checkpoint()
        loop.remove_poller(busy)


async def test_close_gives_its_descriptors_back() -> None:
    before = len(os.listdir("/proc/self/fd"))
    async with running():
        pass
    assert len(os.listdir("/proc/self/fd")) == before


async def test_soon_is_the_next_turn_and_others_come_between() -> None:
    async with running() as loop:
        order: list[str] = []

        def work(left: int) -> None:
            order.append(f"work {left}")
            loop.turn.at_end(lambda: order.append(f"end {left}"))
            if left:
                loop.turn.next_turn(lambda: work(left - 1))

        loop.turn.next_turn(lambda: work(2))
        await settled()
        assert order == ["work 2", "end 2", "work 1", "end 1", "work 0", "end 0"]


async def test_long_work_lets_other_tasks_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A vhost-user message is answered while a guest keeps the loop busy."""
    seconds = itertools.count()
    monkeypatch.setattr("bridge.datapath.loop.perf_counter", lambda: float(next(seconds)))
    async with running() as loop:
        slices = 0

        def work() -> None:
            nonlocal slices
            slices += 1
            if slices < 50:
                loop.turn.next_turn(work)

        loop.turn.next_turn(work)
        for _ in range(10):
            await trio.lowlevel.checkpoint()
        assert slices < 20
        await settled()
        assert slices == 50


async def test_turn_that_takes_long_goes_on_with_the_next_poller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = itertools.count()
    monkeypatch.setattr("bridge.datapath.loop.perf_counter", lambda: float(next(seconds)))
    polled: list[int] = []

    class Busy(Box):
        def __init__(self, loop: Loop, number: int) -> None:
            super().__init__(loop)
            self.number = number

        def poll(self) -> bool:
            if len(polled) >= 18:
                return False
            polled.append(self.number)
            self.loop.turn.at_end(lambda: polled.append(-1))
            return True

    async with running() as loop:
        for number in range(3):
            loop.add_poller(Busy(loop, number))
        await settled()
    assert polled[6:18] == [0, -1, 1, -1, 2, -1] * 2


async def test_rings_count_as_looked_at_when_no_turn_was_cut_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seconds = itertools.count()
    monkeypatch.setattr("bridge.datapath.loop.perf_counter", lambda: float(next(seconds)))
    polled, looked = list[int](), list[int]()

    class Busy(Box):
        def poll(self) -> bool:
            if len(polled) >= 6:
                return False
            polled.append(1)
            return True

    async with running() as loop:
        loop.turn.after_look(lambda: looked.append(len(polled)))
        await settled()
        for _ in range(3):
            loop.add_poller(Busy(loop))
        await settled()
        loop.turn.after_look(lambda: looked.append(len(polled)))
        loop.wake()
        await settled()
    assert looked == [6, 6]


async def test_descriptor_closed_too_early_can_still_be_removed() -> None:
    async with running() as loop:
        fd = os.eventfd(0, os.EFD_NONBLOCK)
        loop.add(fd, lambda events: None)
        os.close(fd)
        loop.remove(fd)
        loop.remove(fd)


class _CompiledTurns:
    """Stands for `compiled.CompiledTurns`: at the end of its first turn a poller comes."""

    def __init__(self, loop: Loop, comes: Box) -> None:
        self._loop = loop
        self._comes: Box | None = comes

    def run(self, epoll_fd: int, pollers: Sequence[object], until_s: float, *, worked: bool) -> Any:
        if self._comes is None:
            return None
        comes, self._comes = self._comes, None
        self._loop.add_poller(comes)
        return SimpleNamespace(
            went_to_sleep=False, worked=False, was_usual=True, used_up=True, naps=0, ready=[]
        )


async def test_poller_that_comes_with_the_end_of_a_compiled_turn_is_polled_from_then_on() -> None:
    async with running() as loop:
        box = Box(loop)
        box.work.append(1)
        loop._compiled = _CompiledTurns(loop, box)  # type: ignore[assignment]
        loop.turn.want()
        await settled()
        assert box.done == [1]


async def test_loop_does_without_compiled_turns_for_a_while_that_find_nothing_usual() -> None:
    """Large requests, or a flush after each write: the way through them would cost, each time."""

    class Ring(Box):
        def usual_ring(self) -> None:
            return None

    class Useless:
        calls = 0

        def run(self, *args: object, **options: object) -> Any:
            self.calls += 1
            return SimpleNamespace(
                went_to_sleep=False, worked=True, used_up=False, was_usual=False, naps=0, ready=[]
            )

    async with running() as loop:
        loop._compiled = useless = Useless()  # type: ignore[assignment]
        box = Ring(loop)
        loop.add_poller(box)
        for number in range(100):
            box.put(number)
            loop.wake()
            await settled()
        assert box.done == list(range(100))
        assert 1 <= useless.calls <= 10


class FakeEpoll:
    """Every wait takes as long as its answer does."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.answer_s = 0.0

    def perf_counter(self) -> float:
        return self.now_s

    def poll(self, timeout_s: float, most: int) -> list[tuple[int, int]]:
        self.now_s += min(timeout_s, self.answer_s)
        return []

    def close(self) -> None: ...


def test_polling_for_a_long_payload_stops_while_it_comes_later_and_goes_on_when_it_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A server that is far away would otherwise cost the whole window for each of its pieces."""
    loop, fake = Loop(poll_us=32), FakeEpoll()
    loop._epoll.close()
    monkeypatch.setattr("bridge.datapath.loop.perf_counter", fake.perf_counter)
    vars(loop)["_epoll"] = fake
    assert loop._long_poll_s == loop.poll_max_s
    other_s, loop._lingered, fake.answer_s = loop._poll_s, True, 0.001
    for _ in range(8):
        loop._nap()
    assert (loop._long_poll_s, loop._poll_s) == (0.0, other_s)
    fake.answer_s = loop.poll_max_s / 2
    for _ in range(8):
        loop._nap()
    assert (loop._long_poll_s, loop._poll_s) == (loop.poll_max_s, other_s)
    loop.close()
