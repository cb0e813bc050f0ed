"""The promises of a `ServerDisk`, kept by the disk in memory, by a file and by a sparse file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bridge.demo.small_server import SparseFileDisk
from bridge.peers.nbd_server_disk import FileDisk, MemoryDisk, ServerDisk
from bridge.spec.nbd import STATE_HOLE, STATE_ZERO

SIZE = 1 << 20


@pytest.fixture(params=["memory", "volatile memory", "file", "sparse file"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerDisk]:
    if request.param.endswith("memory"):
        yield MemoryDisk(SIZE, volatile=request.param.startswith("volatile"))
        return
    path = tmp_path / "image"
    path.write_bytes(bytes(SIZE))
    made = (FileDisk if request.param == "file" else SparseFileDisk)(str(path))
    yield made
    made.close()


def test_disk_is_zeroes_at_first(disk: ServerDisk) -> None:
    assert disk.size_bytes == SIZE
    assert bytes(disk.read(0, SIZE)) == bytes(SIZE)


def test_write_reads_back_also_at_the_very_end(disk: ServerDisk) -> None:
    disk.write(1000, b"inside")
    disk.write(SIZE - 3, memoryview(b"end"))
    assert bytes(disk.read(999, 8)) == b"\0inside\0"
    assert bytes(disk.read(SIZE - 4, 4)) == b"\0end"


@pytest.mark.parametrize("may_unmap", [False, True])
def test_zeroed_range_reads_as_zeroes_and_its_neighbours_stay(
    disk: ServerDisk, may_unmap: bool
) -> None:
    disk.write(0, b"w" * SIZE)
    disk.zero(5000, 300_000, may_unmap=may_unmap)
    assert bytes(disk.read(0, SIZE)) == b"w" * 5000 + bytes(300_000) + b"w" * (SIZE - 305_000)


def test_flushed_bytes_survive_a_loss_of_power(disk: ServerDisk) -> None:
    disk.write(100, b"kept")
    disk.flush()
    disk.crash()
    assert bytes(disk.read(100, 4)) == b"kept"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(offset=st.integers(0, SIZE - 1), length=st.integers(1, SIZE), written=st.integers(0, SIZE))
def test_extents_cover_the_range_and_zero_means_zeroes(
    disk: ServerDisk, offset: int, length: int, written: int
) -> None:
    length = min(length, SIZE - offset)
    disk.write(min(written, SIZE - 1), b"w")
    extents = disk.extents(offset, length)
    assert sum(size for size, _ in extents) == length
    for size, flags in extents:
        assert size > 0
        if flags & STATE_ZERO:
            assert not any(bytes(disk.read(offset, size)))
        assert bool(flags & STATE_HOLE) <= bool(flags & STATE_ZERO)
        offset += size
