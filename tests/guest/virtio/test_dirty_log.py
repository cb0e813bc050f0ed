"""The dirty log (`dirty_log`)."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import ProtocolError
from bridge.guest.virtio.chain import Chain
from bridge.guest.virtio.dirty_log import DirtyBitmap, DirtyLog, _fetch_or, address_of
from bridge.guest.virtio.memory import GuestMemory, Region
from bridge.spec.virtio_blk import T_IN, T_OUT
from tests.tiers import in_ci

PAGES = 512
FETCH_OR = [_fetch_or, None]
FetchOr = Callable[[int, int, int], int] | None


def dirty_pages(log: memoryview) -> set[int]:
    return {page for page in range(len(log) * 8) if log[page >> 3] >> (page & 7) & 1}


def bitmap(fetch_or: FetchOr = _fetch_or) -> tuple[DirtyBitmap, memoryview]:
    log = memoryview(bytearray(PAGES // 8))
    return DirtyBitmap(log, fetch_or), log


def test_libatomic_is_there_in_ci() -> None:
    """The other way is tested, too, but marks eight times as much."""
    if _fetch_or is None:
        if in_ci():
            pytest.fail("libatomic.so.1 is not installed")
        pytest.skip("libatomic.so.1 is not installed")


@given(address=st.integers(0, PAGES * 4096 - 1), length=st.integers(1, 600_000))
def test_dirty_log_every_page_of_a_range_and_no_other_is_marked(address: int, length: int) -> None:
    marks, log = bitmap()
    marks.mark(address, length)
    touched = range(address >> 12, (address + length - 1 >> 12) + 1)
    wanted = {page for page in touched if page < PAGES}
    if _fetch_or is not None:
        assert dirty_pages(log) == wanted
    else:
        assert dirty_pages(log) >= wanted


@given(address=st.integers(0, PAGES * 4096 - 1), length=st.integers(1, 600_000))
def test_dirty_log_without_atomics_whole_bytes_are_marked(address: int, length: int) -> None:
    marks, log = bitmap(None)
    marks.mark(address, length)
    touched = range(address >> 12, (address + length - 1 >> 12) + 1)
    wanted = {(page & ~7) + bit for page in touched for bit in range(8)}
    assert dirty_pages(log) == {page for page in wanted if page < PAGES}


@pytest.mark.parametrize("fetch_or", FETCH_OR)
def test_dirty_log_bits_of_others_stay(fetch_or: FetchOr) -> None:
    marks, log = bitmap(fetch_or)
    log[0] = 0b1000_0000
    marks.mark(0, 1)
    assert log[0] & 0b1000_0001 == 0b1000_0001


@pytest.mark.parametrize("address", [PAGES * 4096, 1 << 40, (1 << 64) - 4096])
@pytest.mark.parametrize("fetch_or", FETCH_OR)
def test_dirty_log_pages_beyond_the_bitmap_are_ignored(fetch_or: FetchOr, address: int) -> None:
    """CVE-2020-10722, CVE-2019-14835."""
    marks, log = bitmap(fetch_or)
    marks.mark(address, 4096)
    assert dirty_pages(log) == set()


@pytest.mark.parametrize("address", [0, 4096, 32768, (1 << 64) - 1])
@pytest.mark.parametrize("fetch_or", FETCH_OR)
def test_dirty_log_no_bytes_mark_nothing(fetch_or: FetchOr, address: int) -> None:
    """CVE-2019-14835: a zero-length descriptor during a migration."""
    marks, log = bitmap(fetch_or)
    marks.mark(address, 0)
    assert dirty_pages(log) == set()


def test_dirty_log_concurrent_marks_lose_no_bit() -> None:
    """Two back-ends of one VM share the bitmap: each clears and sets bits of the same byte."""
    if _fetch_or is None:
        pytest.skip("libatomic.so.1 is not installed")
    log = memoryview(mmap.mmap(-1, 4096))
    marks = DirtyBitmap(log)
    rounds = 3000
    child = os.fork()
    if not child:
        status = 1
        try:
            for page in range(rounds):
                marks.mark((page * 2 + 1) % 8192 << 12, 1)
            status = 0
        finally:
            os._exit(status)
    for page in range(rounds):
        marks.mark(page * 2 % 8192 << 12, 1)
    assert os.waitpid(child, 0)[1] == 0
    assert dirty_pages(log) == set(range(rounds * 2))


# What a ring marks


def chain(type_: int, data: list[memoryview], status: memoryview | None, at: int) -> Chain:
    readable, writable = ([], data) if type_ == T_IN else (data, [])
    return 0, type_, 0, readable, writable, status, at, None


def memory() -> GuestMemory:
    """Two regions, mapped the other way round."""
    shared = memoryview(bytearray(1 << 20))
    return GuestMemory(
        [Region(0, 0, shared[1 << 19 :]), Region(1 << 20, 1 << 19, shared[: 1 << 19])]
    )


def test_dirty_log_read_marks_data_and_status() -> None:
    guest = memory()
    marks, log = bitmap()
    views = [guest.views(0x3000, 10)[0], guest.views((1 << 20) + 0x5FFF, 4096)[0]]
    status = guest.views(0x9000, 4096)[0]
    DirtyLog(marks, guest, []).mark_chain(chain(T_IN, views, status, 4095))
    assert dirty_pages(log) >= {3, 256 + 5, 256 + 6, 9}
    if _fetch_or is not None:
        assert dirty_pages(log) == {3, 256 + 5, 256 + 6, 9}


def test_dirty_log_write_marks_its_status_only() -> None:
    guest = memory()
    marks, log = bitmap()
    data = guest.views(0x100000, 4096)
    DirtyLog(marks, guest, []).mark_chain(chain(T_OUT, data, guest.views(0, 1)[0], 0))
    assert 0 in dirty_pages(log)
    assert 256 not in dirty_pages(log)


def test_dirty_log_ring_area_is_marked_where_the_front_end_says() -> None:
    marks, log = bitmap()
    DirtyLog(marks, memory(), [(0x40FFF, 2)]).mark_ring()
    assert dirty_pages(log) >= {0x40, 0x41}


def test_dirty_log_memory_that_is_no_longer_known_marks_everything() -> None:
    marks, log = bitmap()
    elsewhere = memoryview(bytearray(16))
    DirtyLog(marks, memory(), []).mark_chain(chain(T_IN, [elsewhere], None, 0))
    assert dirty_pages(log) == set(range(PAGES))


def test_address_of_a_slice_is_where_it_lies() -> None:
    view = memoryview(bytearray(100))
    assert address_of(view[40:]) == address_of(view) + 40


# Mapping


@pytest.fixture
def log_fd() -> Iterator[int]:
    fd = os.memfd_create("log-under-test")
    os.ftruncate(fd, 8192)
    yield fd
    os.close(fd)


def test_dirty_log_bitmap_at_an_offset_is_mapped(log_fd: int) -> None:
    DirtyBitmap.map(log_fd, 4100, 64).mark(0, 1)
    assert os.pread(log_fd, 1, 4100) in (b"\1", b"\xff")


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 8193), (8192, 1), (1 << 63, 1), ((1 << 64) - 1, 64), (0, 0)]
)
def test_dirty_log_bitmap_beyond_its_file_is_refused(log_fd: int, offset: int, size: int) -> None:
    """CVE-2020-10722: offset + size."""
    with pytest.raises(ProtocolError):
        DirtyBitmap.map(log_fd, offset, size)
