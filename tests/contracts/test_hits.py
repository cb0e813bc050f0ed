"""The promises of `Hits`, kept by the fake of the tests and by the cache alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from bridge.datapath.request import Hits
from tests.cache.fakes import Rig
from tests.guest.virtio.mock import FakeDisk, FakeHits
from tests.server.helpers import cut, pattern
from tests.turns import deliver, forget

HELD = 65536
"""Bytes that are at hand, from 0 on; those after them are not."""
DATA = pattern(0, HELD)


@dataclass
class Subject:
    """`hits` has the first `HELD` bytes of the disk at hand; `read` goes the long way."""

    hits: Hits
    read: Callable[[int, int], bytes]

    def read_hit(self, offset: int, length: int, pieces: int = 1) -> bytes | None:
        """The bytes; None if they were not at hand."""
        data = bytearray(b"\xee" * length)
        if self.hits.read_hit(offset, length, cut(data, pieces)):
            return bytes(data)
        assert data == b"\xee" * length, "a miss that touched the buffers"
        return None

    def write_hit(self, offset: int, data: bytes, pieces: int = 1) -> bool:
        return self.hits.write_hit(offset, len(data), cut(bytearray(data), pieces))


def _fake() -> Subject:
    forget()
    disk = FakeDisk(4 * HELD)
    disk.data[:] = DATA + bytes(3 * HELD)

    def read(offset: int, length: int) -> bytes:
        return bytes(disk.data[offset : offset + length])

    return Subject(FakeHits(disk, HELD), read)


def _cache() -> Subject:
    rig = Rig(granules=8)
    rig.write(0, DATA)
    return Subject(rig.cache, rig.read)


@pytest.fixture(params=[_fake, _cache], ids=["fake hits", "cache"])
def subject(request: pytest.FixtureRequest) -> Subject:
    made: Subject = request.param()
    return made


@pytest.mark.parametrize("pieces", [1, 3])
def test_read_hit_fills_the_buffers(subject: Subject, pieces: int) -> None:
    assert subject.read_hit(8192, 8192, pieces) == DATA[8192:16384]


@pytest.mark.parametrize("pieces", [1, 3])
def test_write_hit_is_read_afterwards_either_way(subject: Subject, pieces: int) -> None:
    data = pattern(0, 8192, seed=1)
    assert subject.write_hit(8192, data, pieces)
    deliver()
    assert subject.read_hit(4096, 16384) == DATA[4096:8192] + data + DATA[16384:20480]
    assert subject.read(8192, 8192) == data


def test_read_of_an_absent_range_misses_and_touches_nothing(subject: Subject) -> None:
    assert subject.read_hit(2 * HELD, 4096) is None


def test_write_of_an_absent_range_misses_and_changes_nothing(subject: Subject) -> None:
    assert not subject.write_hit(2 * HELD, pattern(0, 4096, seed=2))
    assert subject.read(2 * HELD, 4096) == bytes(4096)


def test_range_that_is_at_hand_in_part_only_misses(subject: Subject) -> None:
    assert subject.read_hit(HELD - 4096, 8192) is None
    assert not subject.write_hit(HELD - 4096, pattern(0, 8192, seed=3))
    assert subject.read(HELD - 4096, 4096) == DATA[-4096:]
