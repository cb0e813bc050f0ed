"""Large requests: what one turn begins, what is in flight, and what happens to the rest."""

from __future__ import annotations

import inspect
from errno import EIO
from typing import Any

import pytest

from bridge.datapath.lanes import (
    IN_FLIGHT_BYTES,
    PIECE_BYTES,
    RANGE_COST_BYTES,
    SMALL_BYTES,
    TURN_BYTES,
    WHOLE_BYTES,
)
from bridge.datapath.request import DISCARD, READ, Request
from bridge.datapath.turn import Turn
from bridge.guest.virtio.blk import MAX_REQUEST_BYTES, BlkEngine
from bridge.guest.virtio.chain import Chain
from bridge.spec.virtio_blk import S_IOERR, S_OK, T_DISCARD, T_IN, T_OUT
from tests import turns
from tests.guest.virtio.mock import BlkGuest, FakeHits
from tests.guest.virtio.test_blk import segments

MIB = 1 << 20
DISK_BYTES = 8 << 30


class Target:
    """Takes requests without doing anything."""

    def __init__(self, turn: Turn) -> None:
        self.turn = turn
        self.pending: list[Request] = []
        self.begun_bytes = 0
        self.at_once = False

    def submit(self, request: Request) -> None:
        self.begun_bytes += request.length
        if self.at_once:
            self.turn.finish(request)
        else:
            self.pending.append(request)

    def answer(self, count: int | None = None, error: int = 0) -> None:
        for request in self.pending[:count]:
            self.pending.remove(request)
            self.turn.finish(request, error)
        self.turn.settle()

    @property
    def pending_bytes(self) -> int:
        return sum(request.length for request in self.pending)


class Ring:
    """Collects what is complete: (number of the chain, status, used length)."""

    def __init__(self) -> None:
        self.done: list[tuple[int, int, int]] = []

    def complete(self, chain: Chain, status: int, length: int) -> None:
        self.done.append((chain[0], status, length))


class Rig:
    """An engine over a disk of 8 GiB, whose guest has one buffer for everything."""

    def __init__(self, hits: Any = None) -> None:
        config = BlkGuest().config
        config.resize(DISK_BYTES)
        self.turn, self.ring = turns.turn(), Ring()
        self.target = Target(self.turn)
        self.faults: list[str] = []
        self.engine = BlkEngine(
            config,
            self.target,
            hits=hits,
            serial="",
            fault=self.faults.append,
            turn=self.turn,
        )
        self.engine.negotiated(config.features())
        self.buffer = memoryview(bytearray(4 * MIB))

    def chain(self, number: int, type_: int, lengths: list[int], *, sector: int = 0) -> Chain:
        views = [self.buffer[:length] for length in lengths]
        readable, writable = (views, []) if type_ == T_OUT else ([], views)
        return number, type_, sector, readable, writable, self.buffer, 0, None

    def start(self, *chains: Chain, ring: Ring | None = None) -> None:
        self.engine.start(ring or self.ring, chains)

    def finish_all(self) -> int:
        """Turn after turn, with every answer; how many turns that took."""
        n_turns = 0
        while self.target.pending or self.turn.pending:
            self.target.answer()
            self.turn.end()
            n_turns += 1
            assert n_turns < 100_000
        return n_turns


@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_turn_begins_no_more_than_its_bytes_and_the_rest_follows(type_: int) -> None:
    rig = Rig()

    rig.start(*[rig.chain(number, type_, [MIB]) for number in range(100)])

    assert rig.target.begun_bytes == TURN_BYTES
    rig.turn.end()
    assert rig.target.begun_bytes == 2 * TURN_BYTES
    rig.finish_all()
    assert [number for number, _, _ in rig.ring.done] == list(range(100))
    assert {status for _, status, _ in rig.ring.done} == {S_OK}


@pytest.mark.parametrize("type_", [T_IN, T_OUT])
def test_bytes_in_flight_are_bounded_and_the_rest_follows_without_a_kick(type_: int) -> None:
    rig = Rig()
    rig.start(*[rig.chain(number, type_, [2 * MIB]) for number in range(1024)])

    for _ in range(1000):
        rig.turn.end()

    assert rig.target.pending_bytes == IN_FLIGHT_BYTES
    assert not rig.turn.pending  # nothing to be awake for
    rig.finish_all()
    assert len(rig.ring.done) == 1024


def test_long_request_is_cut_into_pieces_that_cover_it() -> None:
    rig = Rig()
    lengths = [4096, 3 * MIB, 512, 512, MIB - 1024, 5 * 512]
    total = sum(lengths)

    rig.start(rig.chain(1, T_IN, lengths, sector=8))
    pieces = list(rig.target.pending)
    rig.finish_all()

    at = 8 * 512
    for piece in pieces:
        assert (piece.op, piece.offset) == (READ, at)
        assert piece.length == sum(map(len, piece.buffers)) <= PIECE_BYTES
        at += piece.length
    assert at == 8 * 512 + total
    assert rig.ring.done == [(1, S_OK, total + 1)]


def test_pieces_of_a_long_request_are_views_of_the_right_bytes() -> None:
    rig = Rig()
    rig.buffer[:] = bytes(range(256)) * (len(rig.buffer) // 256)
    lengths = [512 * (number % 7 + 1) for number in range(900)] + [3 * MIB]
    chain = rig.chain(1, T_OUT, lengths)
    wanted = b"".join(chain[3])

    rig.start(chain)

    assert b"".join(view for piece in rig.target.pending for view in piece.buffers) == wanted


def test_request_of_the_largest_size_is_executed_and_a_larger_one_refused() -> None:
    rig = Rig()
    rig.target.at_once = True
    most = [4 * MIB] * (MAX_REQUEST_BYTES // (4 * MIB))

    rig.start(rig.chain(1, T_IN, most), rig.chain(2, T_IN, [*most, 512]))
    n_turns = rig.finish_all()

    assert sorted(rig.ring.done) == [(1, S_OK, MAX_REQUEST_BYTES + 1), (2, S_IOERR, 0)]
    assert n_turns >= MAX_REQUEST_BYTES // TURN_BYTES - 1
    assert len(rig.faults) == 1


def test_long_request_stops_at_its_first_error_and_is_answered_once() -> None:
    rig = Rig()
    rig.start(rig.chain(1, T_IN, [4 * MIB] * 16))
    rig.target.answer(1, error=EIO)
    assert rig.ring.done == []  # the other pieces still write to the guest's memory

    rig.finish_all()

    assert rig.ring.done == [(1, S_IOERR, 0)]
    assert rig.target.begun_bytes == TURN_BYTES


def test_small_requests_do_not_wait_behind_large_ones() -> None:
    rig = Rig()
    rig.start(*[rig.chain(number, T_IN, [2 * MIB]) for number in range(200)])

    rig.start(rig.chain(1000, T_IN, [SMALL_BYTES]))

    assert rig.target.pending[-1].length == SMALL_BYTES


def test_reads_do_not_wait_behind_writes_or_discards_that_are_stuck() -> None:
    """Writes may wait for room in the cache for as long as the server is away."""
    rig = Rig()
    rig.start(*[rig.chain(number, T_OUT, [2 * MIB]) for number in range(300)])
    data = segments(*[(0, 8, 0)] * 32)
    for number in range(300):
        rig.start((number, T_DISCARD, 0, [memoryview(data)], [], rig.buffer, 0, None))
    for _ in range(2000):
        rig.turn.end()
    before = len(rig.target.pending)

    rig.start(rig.chain(1000, T_IN, [MIB]))

    assert [request.op for request in rig.target.pending[before:]] == [READ]


def test_discards_in_flight_are_bounded() -> None:
    """32 segments in each of 1024 chains; a cache may look at all its slots for each."""
    rig = Rig()
    data = segments(*[(number * 8, 8, 0) for number in range(32)])
    for number in range(1024):
        rig.start((number, T_DISCARD, 0, [memoryview(data)], [], rig.buffer, 0, None))
    assert len(rig.target.pending) == TURN_BYTES // RANGE_COST_BYTES
    for _ in range(1000):
        rig.turn.end()

    assert len(rig.target.pending) == IN_FLIGHT_BYTES // RANGE_COST_BYTES
    assert {request.op for request in rig.target.pending} == {DISCARD}
    rig.finish_all()
    assert len(rig.ring.done) == 1024


def test_hits_count_as_the_turns_work() -> None:
    hits = FakeHits(BlkGuest().disk, 0)
    hits._hit = lambda request: True  # type: ignore[method-assign]
    rig = Rig(hits)

    rig.start(*[rig.chain(number, T_IN, [WHOLE_BYTES]) for number in range(100)])

    assert len(rig.ring.done) == TURN_BYTES // WHOLE_BYTES


def test_ring_that_closes_begins_nothing_more_and_others_go_on() -> None:
    rig = Rig()
    other = Ring()
    rig.start(*[rig.chain(number, T_IN, [4 * MIB]) for number in range(4)])
    rig.start(rig.chain(7, T_IN, [4 * MIB]), ring=other)
    begun_bytes = rig.target.begun_bytes

    rig.engine.abandon(rig.engine.unanswered(rig.ring))

    assert rig.ring.done == []
    pieces = [request for request in rig.target.pending if request.is_abandoned]
    assert len(pieces) == begun_bytes // MIB
    assert len({id(request.buffers[0].obj) for request in pieces}) == 1  # one scratch for all
    rig.finish_all()
    assert rig.ring.done == []
    assert rig.target.begun_bytes == begun_bytes + 4 * MIB
    assert other.done == [(7, S_OK, 4 * MIB + 1)]


@pytest.mark.parametrize("length", [WHOLE_BYTES, 4 * MIB])
def test_ring_that_closes_before_it_is_told_of_an_answer_stays_untold(length: int) -> None:
    rig = Rig()
    rig.start(rig.chain(1, T_IN, [length]))
    answered, rig.target.pending = rig.target.pending, []
    for request in answered:
        rig.turn.finish(request)

    rig.engine.abandon(rig.engine.unanswered(rig.ring))
    rig.finish_all()

    assert rig.ring.done == []
    assert rig.engine._reads.in_flight_bytes == 0
    rig.start(rig.chain(2, T_IN, [length]))
    rig.finish_all()
    assert rig.ring.done == [(2, S_OK, length + 1)]


def test_thousand_long_requests_that_end_at_once_do_not_grow_the_stack() -> None:
    depths: set[int] = set()

    class Measuring(Ring):
        def complete(self, chain: Chain, status: int, length: int) -> None:
            depths.add(len(inspect.stack(0)))
            super().complete(chain, status, length)

    rig = Rig()
    rig.ring = Measuring()
    rig.target.at_once = True
    rig.start(*[rig.chain(number, T_IN, [4 * MIB] * 4) for number in range(1000)])

    rig.finish_all()

    assert len(rig.ring.done) == 1000
    assert len(depths) == 1
