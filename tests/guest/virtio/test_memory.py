"""Guest memory: what may be mapped, how addresses are found, when mappings go away.

Rules `chain` and `session` of docs/rules/virtio.md.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.errors import ProtocolError
from bridge.guest.virtio.memory import BadAddress, GuestMemory, Region, map_region


@pytest.fixture
def memfd() -> Iterator[int]:
    fd = os.memfd_create("guest-memory-under-test")
    os.ftruncate(fd, 1 << 20)
    yield fd
    os.close(fd)


def mapped(
    fd: int, *, guest: int = 0, user: int = 0x10000, size: int = 1 << 20, offset: int = 0
) -> Region:
    return map_region(
        fd, guest_address=guest, user_address=user, size_bytes=size, mmap_offset_bytes=offset
    )


def test_map_region_shows_the_file(memfd: int) -> None:
    os.pwrite(memfd, b"here", 8192)
    region = mapped(memfd, offset=8192, size=4096)
    assert bytes(region.view[:4]) == b"here"
    region.view[0:4] = b"back"
    assert os.pread(memfd, 4, 8192) == b"back"
    assert region.size_bytes == len(region.view) == 4096


def test_map_region_at_an_unaligned_offset_starts_there(memfd: int) -> None:
    os.pwrite(memfd, b"here", 4100)
    assert bytes(mapped(memfd, offset=4100, size=100).view[:4]) == b"here"


def test_map_region_beyond_the_file_is_refused(memfd: int) -> None:
    """CVE lesson: touching a mapping past the end of its file is a SIGBUS; fstat comes first."""
    with pytest.raises(ProtocolError, match=r"1048577 of a file of 1048576"):
        mapped(memfd, offset=1, size=1 << 20)


@pytest.mark.parametrize(
    "where",
    [
        {"guest": (1 << 64) - 4096, "size": 8192},
        {"user": (1 << 64) - 4096, "size": 8192},
        {"offset": (1 << 64) - 4096, "size": 8192},
        {"size": 0},
        {"offset": (1 << 63), "size": 4096},
    ],
)
def test_map_region_with_impossible_numbers_is_refused(memfd: int, where: dict[str, int]) -> None:
    with pytest.raises(ProtocolError):
        mapped(memfd, **where)


def test_map_region_of_something_unmappable_is_refused() -> None:
    reading, writing = os.pipe()
    try:
        with pytest.raises(ProtocolError):
            mapped(reading, size=4096)
    finally:
        os.close(reading)
        os.close(writing)


def test_map_region_of_a_read_only_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4096))
    fd = os.open(path, os.O_RDONLY)
    try:
        with pytest.raises(ProtocolError, match="cannot be mapped"):
            mapped(fd, size=4096)
    finally:
        os.close(fd)


def test_regions_that_overlap_are_refused() -> None:
    view = memoryview(bytearray(8192))
    with pytest.raises(ProtocolError, match="overlap"):
        GuestMemory([Region(0, 0, view), Region(8191, 1 << 20, view)])


def test_regions_that_touch_are_fine() -> None:
    view = memoryview(bytearray(8192))
    assert len(GuestMemory([Region(8192, 0, view), Region(0, 1 << 20, view)]).regions) == 2


def two_regions_mapped_the_other_way_round() -> tuple[GuestMemory, memoryview]:
    """Guest 0 … 4095 lies behind guest 4096 … 8191 in our memory."""
    shared = memoryview(bytearray(8192))
    low = Region(0, 0x10000, shared[4096:])
    high = Region(4096, 0x20000, shared[:4096])
    return GuestMemory([high, low]), shared


def test_range_over_two_regions_comes_in_two_views() -> None:
    """`chain` straddling; CVE-2018-1059: contiguous for the guest is not contiguous here."""
    memory, shared = two_regions_mapped_the_other_way_round()
    shared[8190:8192] = b"ab"
    shared[0:2] = b"cd"
    views = memory.views(4094, 4)
    assert [bytes(view) for view in views] == [b"ab", b"cd"]


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (8190, 4),  # runs past the end
        (8192, 1),  # behind everything
        ((1 << 64) - 1, 2),  # wraps
        ((1 << 64) - 1, (1 << 32) - 1),
        (0, (1 << 32) - 1),
    ],
)
def test_range_outside_memory_is_a_bad_address(address: int, length: int) -> None:
    """`chain`: outside every region, past the end, address + length over 2^64 (T5, T7, T8, T73)."""
    memory, _ = two_regions_mapped_the_other_way_round()
    with pytest.raises(BadAddress):
        memory.views(address, length)


def test_range_into_a_hole_is_a_bad_address() -> None:
    view = memoryview(bytearray(4096))
    memory = GuestMemory([Region(0, 0, view), Region(8192, 8192, view)])
    with pytest.raises(BadAddress, match=r"0x1000 \(range up to 0x2001\)"):
        memory.views(4095, 4098)


@given(
    layout=st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), max_size=12),
    address=st.integers(0, 80),
    length=st.integers(1, 30),
)
def test_views_of_any_layout_are_the_bytes_or_a_bad_address(
    layout: list[tuple[int, int]], address: int, length: int
) -> None:
    """Against the plain definition: a byte per guest address."""
    regions, guest, at = [], dict[int, int](), 0
    for gap, size in layout:
        at += gap
        content = bytearray(at + position & 0xFF for position in range(size))
        regions.append(Region(at, 0, memoryview(content)))
        guest |= {at + position: content[position] for position in range(size)}
        at += size
    memory = GuestMemory(regions[::-1])
    wanted = range(address, address + length)
    if all(each in guest for each in wanted):
        assert b"".join(memory.views(address, length)) == bytes(guest[each] for each in wanted)
    else:
        with pytest.raises(BadAddress):
            memory.views(address, length)


def test_user_view_finds_a_ring_by_the_front_ends_address() -> None:
    memory, shared = two_regions_mapped_the_other_way_round()
    shared[100:104] = b"ring"
    assert bytes(memory.user_view(0x20000 + 100, 4)) == b"ring"
    assert memory.guest_address_of(0x20000 + 100) == 4096 + 100


@pytest.mark.parametrize(
    ("address", "length"), [(0x10000 + 4094, 4), (0, 1), (0x30000, 1), (0x10000 - 1, 2)]
)
def test_user_view_over_the_edge_is_refused(address: int, length: int) -> None:
    """`session`: a ring lies wholly in one region, even where two touch for the guest."""
    memory, _ = two_regions_mapped_the_other_way_round()
    with pytest.raises(ProtocolError):
        memory.user_view(address, length)


def test_without_region_wants_the_exact_region() -> None:
    memory, _ = two_regions_mapped_the_other_way_round()
    with pytest.raises(ProtocolError, match="no memory region"):
        memory.without_region(guest_address=0, user_address=0x10000, size_bytes=4095)
    left = memory.without_region(guest_address=0, user_address=0x10000, size_bytes=4096)
    assert [region.guest_address for region in left.regions] == [4096]


def test_memory_without_regions_has_no_addresses() -> None:
    memory = GuestMemory([])
    assert memory.largest_region().size_bytes == 0
    with pytest.raises(BadAddress):
        memory.views(0, 1)


def mappings_of_the_memfd() -> int:
    return Path("/proc/self/maps").read_text().count("guest-memory-under-test")


def test_mapping_goes_away_with_its_last_view(memfd: int) -> None:
    """A request in flight keeps its memory; nothing else does (mmap.close would raise)."""
    before = mappings_of_the_memfd()
    fds_before = len(os.listdir("/proc/self/fd"))
    memory = GuestMemory([mapped(memfd)])
    in_flight = memory.views(4096, 512)
    assert mappings_of_the_memfd() == before + 1
    memory = GuestMemory([])
    in_flight[0][:4] = b"late"
    assert mappings_of_the_memfd() == before + 1
    del in_flight
    assert mappings_of_the_memfd() == before
    assert len(os.listdir("/proc/self/fd")) == fds_before


def test_file_that_can_be_mapped_may_be_bigger_than_the_region(memfd: int) -> None:
    region = mapped(memfd, size=mmap.PAGESIZE + 1)
    assert region.size_bytes == mmap.PAGESIZE + 1
