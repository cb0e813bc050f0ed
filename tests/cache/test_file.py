"""Cache files: bad ones, foreign ones, full disks, two processes, restarts."""

from __future__ import annotations

import errno
import json
import mmap
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from bridge.cache.cache import Cache
from bridge.cache.cache_options import Options
from bridge.cache.cold import ThreadedCold
from bridge.cache.file import cache_file, locking, opening
from bridge.cache.file.cache_file import CacheFile
from bridge.cache.file.inspect import Fault, drop, open_to_flush, show
from bridge.cache.file.layout import (
    HEADER_AREA_BYTES,
    MIN_SLOTS,
    FileHeader,
    Geometry,
    Identity,
    geometry_for,
    new_header,
    parse_header_untrusted,
    state_word,
)
from bridge.cache.file.opening import open_or_create
from bridge.cli.cache_show import json_of, text_of
from bridge.cli.wording import explain
from bridge.datapath.request import FLUSH, READ, WRITE, Request
from bridge.datapath.turn import Outcome
from bridge.errors import ConfigError
from tests.tools import HUNG_S, told
from tests.turns import deliver, submit, turn

from .fakes import BLOCK, GRANULE, FakeServer

GEOMETRY = Geometry(64 * GRANULE, BLOCK, GRANULE, 64)
IDENTITY = Identity("nbd://server", "disk")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "disk.cache")


def _open(path: str, geometry: Geometry = GEOMETRY, identity: Identity = IDENTITY) -> CacheFile:
    return open_or_create(path, geometry=geometry, identity=identity)


def _cache(file: CacheFile, server: FakeServer) -> Cache:
    cache = Cache(file, server, Options(), clock=lambda: 0.0, turn=turn())
    turn().add_stage(cache)
    return cache


def _write_one(path: str, content: bytes = b"a", *, clean: bool = True) -> None:
    """A file with one dirty block at the start of the disk."""
    file = _open(path)
    cache = _cache(file, FakeServer(64 * GRANULE))
    data = [memoryview(content * BLOCK)]
    submit(cache, Request(WRITE, 0, BLOCK, data, lambda _: None))
    file.close(clean=clean)


def _damage(path: str, offset: int) -> None:
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes((byte ^ 0x10,)))


def _read_first(file: CacheFile) -> bytes:
    cache = _cache(file, FakeServer(64 * GRANULE))
    buffer = bytearray(BLOCK)
    submit(cache, Request(READ, 0, BLOCK, [memoryview(buffer)], lambda _: None))
    return bytes(buffer)


def test_clean_shutdown_keeps_dirty_data_for_the_next_start(path: str) -> None:
    _write_one(path)

    file = _open(path)
    server = FakeServer(64 * GRANULE)
    cache = _cache(file, server)
    submit(cache, Request(FLUSH, 0, 0, [], lambda _: None))
    while server.pending:
        server.answer()
    file.close(clean=True)

    assert server.image[:BLOCK] == b"a" * BLOCK
    assert show(path).dirty_bytes == 0


def test_unclean_end_under_the_same_boot_keeps_everything(path: str) -> None:
    _write_one(path, clean=False)

    file = _open(path)

    assert file.notes == []
    assert _read_first(file) == b"a" * BLOCK
    file.close(clean=False)


def test_unclean_end_under_another_boot_is_discarded(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_one(path, clean=False)
    monkeypatch.setattr(opening, "boot_id", lambda: bytes(range(16)))

    file = _open(path)

    assert "without a clean shutdown; 4 KiB of what it held had not reached" in file.notes[0]
    assert not any(file.state)
    file.close(clean=False)


def test_clean_end_under_another_boot_is_kept(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_one(path)
    monkeypatch.setattr(opening, "boot_id", lambda: bytes(range(16)))

    file = _open(path)

    assert _read_first(file) == b"a" * BLOCK
    file.close(clean=False)


def test_clean_mark_is_gone_as_soon_as_the_file_is_in_use(path: str) -> None:
    _write_one(path)

    file = _open(path)

    assert not file.header.clean
    with open(path, "rb") as raw:
        header = parse_header_untrusted(raw.read(HEADER_AREA_BYTES))
    assert header is not None
    assert not header.clean
    file.close(clean=False)


def test_second_process_is_refused(path: str) -> None:
    file = _open(path)

    with pytest.raises(ConfigError, check=told("in use by another process")):
        _open(path)
    file.close(clean=False)


def test_lock_is_held_while_a_file_is_made_anew(path: str) -> None:
    _open(path).close(clean=True)

    file = _open(path, Geometry(64 * GRANULE, BLOCK, GRANULE, 65))

    with pytest.raises(ConfigError, check=told("in use")):
        _open(path)
    file.close(clean=False)


def test_file_of_another_export_is_refused_with_the_remedy(path: str) -> None:
    _write_one(path)

    with pytest.raises(ConfigError, check=told(f"belongs to .*cache drop {path}")):
        _open(path, identity=Identity("nbd://server", "other"))


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(64 * GRANULE, 2 * BLOCK, GRANULE, 64),
        Geometry(64 * GRANULE, BLOCK, 2 * GRANULE, 64),
    ],
    ids=["other blocks", "other granules"],
)
def test_file_with_dirty_data_that_does_not_fit_is_refused(path: str, geometry: Geometry) -> None:
    _write_one(path)

    with pytest.raises(ConfigError, check=told("cache flush")):
        _open(path, geometry)


def test_file_with_dirty_data_for_a_disk_that_shrank_is_refused_with_what_helps(path: str) -> None:
    _write_one(path)

    with pytest.raises(ConfigError, check=told(f"grow the export back.*--discard-dirty {path}")):
        _open(path, Geometry(63 * GRANULE, BLOCK, GRANULE, 64))


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(65 * GRANULE, BLOCK, GRANULE, 64),
        Geometry(65 * GRANULE, BLOCK, GRANULE, 65),
        Geometry(64 * GRANULE, BLOCK, GRANULE, 32),
    ],
    ids=["larger disk", "larger disk and cache", "smaller cache"],
)
def test_file_with_dirty_data_keeps_its_sizes_until_that_is_written(
    path: str, geometry: Geometry
) -> None:
    _write_one(path)

    file = _open(path, geometry)

    assert file.geometry == GEOMETRY
    assert _read_first(file) == b"a" * BLOCK
    file.close(clean=False)


def test_file_of_a_disk_that_grew_in_use_is_taken_over_with_the_new_size(path: str) -> None:
    larger = Geometry(65 * GRANULE, BLOCK, GRANULE, 64)
    file = _open(path)
    cache = _cache(file, FakeServer(65 * GRANULE))
    cache.resize(65 * GRANULE, Outcome(lambda outcome: None))
    data = [memoryview(b"z" * BLOCK)]
    submit(cache, Request(WRITE, 64 * GRANULE, BLOCK, data, lambda _: None))
    file.close(clean=False)

    file = _open(path, larger)

    cache = _cache(file, FakeServer(65 * GRANULE))
    buffer = bytearray(BLOCK)
    submit(cache, Request(READ, 64 * GRANULE, BLOCK, [memoryview(buffer)], lambda _: None))
    assert (file.geometry, file.notes) == (larger, [])
    assert buffer == b"z" * BLOCK
    file.close(clean=False)


def test_clean_file_of_an_export_that_changed_size_is_made_anew(path: str) -> None:
    _open(path).close(clean=True)

    file = _open(path, Geometry(65 * GRANULE, BLOCK, GRANULE, 64))

    assert "it had" in file.notes[0]
    file.close(clean=False)


@pytest.mark.parametrize("offset", [9, 20, 60, 100, 4092])
def test_flipped_bit_in_both_headers_is_refused(path: str, offset: int) -> None:
    _write_one(path)
    _damage(path, offset)
    _damage(path, 4096 + offset)

    with pytest.raises(ConfigError, check=told("cache drop")):
        _open(path)


def test_flipped_bit_in_one_header_is_survived_by_the_other(path: str) -> None:
    """A process can be killed in the middle of writing one."""
    _write_one(path, clean=False)
    newest = 4096 * (show(path).clean_shutdown or _sequence(path) & 1)
    _damage(path, newest + 100)

    file = _open(path)

    assert _read_first(file) == b"a" * BLOCK
    file.close(clean=False)


def _sequence(path: str) -> int:
    with open(path, "rb") as raw:
        header = parse_header_untrusted(raw.read(HEADER_AREA_BYTES))
    assert header is not None
    return header.sequence


@pytest.mark.parametrize("bit", range(0, 96, 5))
def test_flipped_bit_in_the_index_after_a_kill_is_refused(path: str, bit: int) -> None:
    _write_one(path, clean=False)
    at = HEADER_AREA_BYTES + 4 if bit < 32 else GEOMETRY.states_offset + 8
    within = bit if bit < 32 else bit - 32
    with open(path, "r+b") as raw:
        raw.seek(at + within // 8)
        byte = raw.read(1)[0]
        raw.seek(at + within // 8)
        raw.write(bytes((byte ^ 1 << within % 8,)))

    file = _open(path)
    with pytest.raises(ConfigError, check=told(f"{path} has a damaged index.*cache drop")):
        _cache(file, FakeServer(64 * GRANULE))
    file.close(clean=False)


def test_flipped_bit_in_the_index_after_a_clean_end_is_refused(path: str) -> None:
    _write_one(path)
    _damage(path, GEOMETRY.states_offset + 8 * 40)

    with pytest.raises(ConfigError, check=told("damaged index")):
        _open(path)


def test_granule_held_twice_is_refused(path: str) -> None:
    file = _open(path)
    for slot in (1, 2):
        file.granule_of[slot] = 7
        file.state[slot] = state_word(7, 1, 0)

    with pytest.raises(ConfigError, check=told("held twice")):
        _cache(file, FakeServer(64 * GRANULE))
    file.close(clean=False)


def test_file_cut_short_is_refused(path: str) -> None:
    _write_one(path)
    os.truncate(path, GEOMETRY.file_bytes - 1)

    with pytest.raises(ConfigError, check=told("cut short")):
        _open(path)


def test_file_of_another_version_is_refused(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bridge.cache.file.layout.VERSION", 2)
    _open(path).close(clean=True)
    monkeypatch.undo()

    with pytest.raises(ConfigError, check=told("version 2")):
        _open(path)


def test_something_else_is_not_overwritten(path: str) -> None:
    Path(path).write_bytes(b"precious" * 10000)

    with pytest.raises(ConfigError, check=told("is not a cache file")):
        _open(path)
    assert Path(path).read_bytes().startswith(b"precious")


def test_creation_that_was_cut_off_is_begun_again(path: str) -> None:
    Path(path).write_bytes(bytes(100_000))

    _open(path).close(clean=False)

    assert os.path.getsize(path) == GEOMETRY.file_bytes


def test_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, check=told(r"no does not exist; create it .*--cache-dir")):
        _open(str(tmp_path / "no" / "disk.cache"))


def test_directory_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "no").write_text("")

    with pytest.raises(ConfigError, check=told(r"no is not a directory; .*--cache-dir")):
        _open(str(tmp_path / "no" / "disk.cache"))


def test_directory_that_cannot_be_written_is_named(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)

    with pytest.raises(
        ConfigError, check=told(r"cannot be written \(Permission denied\).*--cache-dir")
    ):
        _open(path)


def test_full_disk_is_named_and_leaves_no_file(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)

    with pytest.raises(ConfigError, check=told("No space left")):
        _open(path)
    assert not os.path.exists(path)


def test_file_is_preallocated(path: str) -> None:
    """A store into a hole on a full disk is a SIGBUS."""
    _open(path).close(clean=False)

    assert os.stat(path).st_blocks * 512 >= GEOMETRY.file_bytes


def test_symbolic_link_is_not_followed(tmp_path: Path, path: str) -> None:
    target = tmp_path / "target"
    target.write_bytes(b"")
    os.symlink(target, path)

    for use in (_open, show, drop):
        with pytest.raises(
            ConfigError, check=told(f"is a symbolic link.*the file itself is {target}")
        ):
            use(path)


def test_cache_size_below_the_minimum_is_refused() -> None:
    with pytest.raises(ConfigError, check=told("below the minimum")):
        geometry_for(disk_bytes=1 << 30, cache_bytes=MIN_SLOTS * GRANULE - 1)


@pytest.mark.parametrize(
    ("disk_bytes", "cache_bytes", "says"),
    [
        (1 << 45, 20 << 40, "20 TiB is above the maximum of 16 TiB: .*smaller --cache-size, or"),
        (1 << 50, 1 << 30, "an export of 1 PiB, only for less than 256 TiB: use --cache-mode off"),
    ],
)
def test_cache_or_disk_that_is_too_large_is_refused_with_what_helps(
    disk_bytes: int, cache_bytes: int, says: str
) -> None:
    with pytest.raises(ConfigError, check=told(says)):
        geometry_for(disk_bytes=disk_bytes, cache_bytes=cache_bytes)


def test_cache_is_not_larger_than_the_disk() -> None:
    assert geometry_for(disk_bytes=10 * GRANULE + 1, cache_bytes=1 << 30).slots == 11


def test_servers_minimum_block_becomes_the_block() -> None:
    geometry = geometry_for(disk_bytes=1 << 30, cache_bytes=1 << 26, min_block_bytes=65536)

    assert (geometry.block_bytes, geometry.granule_bytes) == (65536, 65536)


def test_header_with_long_names_round_trips() -> None:
    identity = Identity("nbd://" + "ü" * 2000, "e" * 4000)
    header = new_header(GEOMETRY, identity, bytes(16), 1)

    parsed = parse_header_untrusted(header.pack() + bytes(4096))

    assert isinstance(parsed, FileHeader)
    assert parsed.digest == identity.digest


def test_show_says_how_much_is_dirty(path: str) -> None:
    _write_one(path)

    summary = show(path)

    assert (summary.dirty_bytes, summary.granules_used) == (BLOCK, 1)
    assert (summary.export, summary.clean_shutdown, summary.usable) == ("disk", True, True)


def test_show_leaves_the_file_as_it_is(path: str) -> None:
    _write_one(path)
    before = Path(path).read_bytes()

    show(path)

    assert Path(path).read_bytes() == before


def test_drop_of_a_dirty_file_needs_to_be_told(path: str) -> None:
    _write_one(path)

    with pytest.raises(ConfigError, check=told("does not have")):
        drop(path)
    drop(path, discard_dirty=True)

    assert not os.path.exists(path)


@pytest.mark.parametrize("content", ["damaged", "cut short", "empty", "zero"])
def test_drop_of_a_file_that_cannot_be_read_needs_to_be_told(path: str, content: str) -> None:
    _write_one(path)
    if content == "damaged":
        _damage(path, 100)
        _damage(path, 4096 + 100)
    elif content == "cut short":
        os.truncate(path, 1 << 16)
    else:
        Path(path).write_bytes(bytes(9000 if content == "zero" else 0))

    with pytest.raises(ConfigError) as refused:
        drop(path)
    drop(path, discard_dirty=True)

    assert explain(refused.value).count("--discard-dirty") == 1
    assert "cache drop" not in explain(refused.value)
    assert not os.path.exists(path)


@pytest.mark.parametrize("discard_dirty", [False, True])
def test_drop_of_something_else_is_refused(path: str, discard_dirty: bool) -> None:
    Path(path).write_text("root:x:0:0:root:/root:/bin/sh\n")

    with pytest.raises(ConfigError, check=told("is not a cache file; remove it with rm")):
        drop(path, discard_dirty=discard_dirty)

    assert os.path.exists(path)


def _make_fifo(path: str) -> None:
    os.mkfifo(path)


def _make_socket(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)


@pytest.mark.parametrize("make", [_make_fifo, _make_socket, os.mkdir])
@pytest.mark.parametrize(
    "use",
    [_open, show, drop, partial(drop, discard_dirty=True), partial(open_to_flush, export_bytes=0)],
)
def test_file_that_is_not_regular_is_refused(
    path: str, make: Callable[[str], None], use: Callable[[str], object]
) -> None:
    make(path)

    with pytest.raises(ConfigError) as refused:
        use(path)

    assert str(refused.value) == f"cache file {path} is not a regular file"
    assert os.path.exists(path)


def test_file_that_is_longer_than_its_header_says_is_used(path: str) -> None:
    _write_one(path)
    os.truncate(path, GEOMETRY.file_bytes + (1 << 20))

    dirty = show(path).dirty_bytes
    file = _open(path)

    assert dirty == BLOCK
    assert _read_first(file) == b"a" * BLOCK
    file.close(clean=True)


def _damage_a_slot(path: str, *, clean: bool) -> None:
    """A file with two dirty blocks; the slot of the second is damaged."""
    file = _open(path)
    cache = _cache(file, FakeServer(64 * GRANULE))
    for granule in (0, 7):
        data = [memoryview(b"a" * BLOCK)]
        submit(cache, Request(WRITE, granule * GRANULE, BLOCK, data, lambda _: None))
    at = GEOMETRY.states_offset + 8 * cache.index.find(7)
    file.close(clean=clean)
    _damage(path, at)


@pytest.mark.parametrize("clean", [False, True])
def test_show_of_a_damaged_slot_counts_it_and_says_why_the_file_is_not_usable(
    path: str, clean: bool
) -> None:
    _damage_a_slot(path, clean=clean)

    summary = show(path)

    assert (summary.damaged_slots, summary.granules_used, summary.dirty_bytes) == (1, 1, BLOCK)
    assert not summary.usable
    assert summary.fault is Fault.DAMAGED
    assert "the index is damaged" in json.loads(json_of(summary))["fault"]


@pytest.mark.parametrize("clean", [False, True])
def test_drop_of_a_damaged_index_says_how_to_save_the_rest(path: str, clean: bool) -> None:
    _damage_a_slot(path, clean=clean)

    with pytest.raises(
        ConfigError, check=told(f"cache flush --skip-damaged {path}' first, or add")
    ):
        drop(path)

    drop(path, discard_dirty=True)


@pytest.mark.parametrize("clean", [False, True])
def test_damaged_slot_is_skipped_only_when_asked_for_and_the_rest_is_there(
    path: str, clean: bool
) -> None:
    _damage_a_slot(path, clean=clean)
    with pytest.raises(ConfigError, check=told("--skip-damaged")):
        _open_and_load(path, skip_damaged=False)

    file, cache = _open_and_load(path, skip_damaged=True)

    assert (cache.index.damaged_slots, cache.index.dirty_blocks) == (1, 1)
    assert cache.index.find(7) == 0
    assert _read_first(file) == b"a" * BLOCK
    file.close(clean=True)
    assert show(path).usable


def _open_and_load(path: str, *, skip_damaged: bool) -> tuple[CacheFile, Cache]:
    file = open_to_flush(path, export_bytes=64 * GRANULE, skip_damaged=skip_damaged)
    try:
        cache = Cache(
            *(file, FakeServer(64 * GRANULE), Options()),
            clock=lambda: 0.0,
            turn=turn(),
            skip_damaged=skip_damaged,
        )
    except ConfigError:
        file.close(clean=False)
        raise
    return file, cache


def test_show_of_a_crashed_hosts_file_says_why_it_is_not_usable(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _write_one(path, clean=False)
    monkeypatch.setattr(opening, "boot_id", lambda: bytes(range(16)))

    summary = show(path)

    assert summary.fault is Fault.CRASHED
    assert "without a clean shutdown" in json.loads(json_of(summary))["fault"]
    assert "usable             no: the host" in text_of(summary)


def test_time_that_cannot_be_in_a_header_is_not_shown(path: str) -> None:
    _write_one(path)

    for created_s in (1 << 55, (1 << 64) - 1):
        assert "created            -" in text_of(replace(show(path), created_s=created_s))


def test_show_for_people_has_sizes_and_a_date(path: str) -> None:
    _write_one(path)

    text = text_of(replace(show(path), created_s=1_700_000_000))

    assert "cache              4 MiB, 4 KiB of it used" in text
    assert "not on the server  4 KiB" in text
    assert "2023-11-14 22:13:20 UTC" in text


def test_show_needs_no_write_permission(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root nothing is refused: so what is asked for is looked at."""
    _write_one(path)
    modes: list[int] = []
    real_open = os.open

    def spy(path: str, flags: int, mode: int = 0o777) -> int:
        modes.append(flags & os.O_ACCMODE)
        return real_open(path, flags, mode)

    monkeypatch.setattr(os, "open", spy)

    show(path)

    assert modes == [os.O_RDONLY]


def test_drop_of_a_file_in_use_is_refused(path: str) -> None:
    file = _open(path)

    for force in (False, True):
        with pytest.raises(ConfigError, check=told("in use")):
            drop(path, discard_dirty=force)
    file.close(clean=False)


def test_drop_of_a_clean_file_removes_it(path: str) -> None:
    _open(path).close(clean=True)

    drop(path)

    assert not os.path.exists(path)


def test_flush_of_a_file_to_a_smaller_export_is_refused(path: str) -> None:
    _write_one(path)

    with pytest.raises(ConfigError, check=told("nothing was written; grow the export back, or")):
        open_to_flush(path, export_bytes=GRANULE)


def test_open_to_flush_hands_the_dirty_data_over(path: str) -> None:
    _write_one(path)

    file = open_to_flush(path, export_bytes=64 * GRANULE)

    assert _read_first(file) == b"a" * BLOCK
    file.close(clean=True)


def test_block_that_left_the_page_cache_is_seen_and_read_back(tmp_path: Path) -> None:
    path = str(tmp_path / "disk.cache")
    file = _open(path)
    file.put(GRANULE, b"c" * GRANULE)
    resident_before = file.resident(GRANULE, GRANULE)
    file.sync()
    file._map.madvise(mmap.MADV_DONTNEED)  # The map's own hold on the pages goes.
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    if file.resident(GRANULE, BLOCK):
        file.close(clean=False)
        pytest.skip("the file system does not drop pages when told to")
    view = memoryview(bytearray(BLOCK))

    file.read_wait([view], GRANULE)

    assert resident_before
    assert bytes(view) == b"c" * BLOCK
    assert file.resident(GRANULE, BLOCK)
    file.close(clean=False)


def test_store_to_a_page_on_the_disk_only_is_seen_through_the_map(tmp_path: Path) -> None:
    file = _open(str(tmp_path / "disk.cache"))
    file.put(GRANULE, b"c" * GRANULE)
    file.sync()
    file._map.madvise(mmap.MADV_DONTNEED)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)

    file.put(GRANULE + BLOCK, b"d" * BLOCK)

    assert file.data[GRANULE + BLOCK : GRANULE + 2 * BLOCK] == b"d" * BLOCK
    assert file.data[GRANULE : GRANULE + BLOCK] == b"c" * BLOCK
    file.close(clean=False)


def _open_untouched(directory: Path) -> CacheFile:
    """A new file, nothing of whose data is in the page cache."""
    file = _open(str(directory / "x.cache"))
    file.sync()
    # The kernel has read around the header.
    file._map.madvise(mmap.MADV_DONTNEED)
    os.posix_fadvise(file.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return file


def _fill_granule(file: CacheFile, slot: int) -> None:
    for block in range(GRANULE // BLOCK):
        file.put(slot * GRANULE + block * BLOCK, bytes([block + 1]) * BLOCK)


def test_sequence_of_small_stores_finds_the_pages_of_its_next_slot_there(tmp_path: Path) -> None:
    file = _open_untouched(tmp_path)
    _fill_granule(file, 1)
    alone = file.resident(GRANULE, GRANULE), file.resident(2 * GRANULE, BLOCK)

    file.put(2 * GRANULE, b"c" * BLOCK)
    after = file.resident(2 * GRANULE, GRANULE), file.resident(3 * GRANULE, BLOCK)
    file.put(2 * GRANULE + BLOCK, b"d" * BLOCK)

    assert (alone, after) == ((True, False), (True, False))
    assert file.data[2 * GRANULE :][:GRANULE] == (
        b"c" * BLOCK + b"d" * BLOCK + bytes(GRANULE - 2 * BLOCK)
    )


@pytest.mark.parametrize("stored", [5 * BLOCK, GRANULE - BLOCK])
def test_store_that_begins_a_slot_leaves_what_is_in_it_already(tmp_path: Path, stored: int) -> None:
    file = _open(str(tmp_path / "x.cache"))
    _fill_granule(file, 1)
    file.put(2 * GRANULE + stored, b"e" * BLOCK)

    file.put(2 * GRANULE, b"c" * BLOCK)

    assert file.data[2 * GRANULE + stored :][:BLOCK] == b"e" * BLOCK


def test_store_that_begins_a_slot_after_one_with_gaps_touches_its_own_page(tmp_path: Path) -> None:
    file = _open_untouched(tmp_path)
    _fill_granule(file, 1)
    file.put(3 * GRANULE, b"c" * BLOCK)

    assert not file.resident(3 * GRANULE + BLOCK, BLOCK)


@pytest.mark.parametrize("taken", [0, 512, BLOCK, BLOCK + 512])
def test_store_that_begins_a_slot_and_is_written_in_part_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    def short(fd: int, buffers: list[bytes], offset: int) -> int:
        return os.pwrite(fd, b"".join(buffers)[:taken], offset)

    file = _open(str(tmp_path / "x.cache"))
    _fill_granule(file, 1)
    monkeypatch.setattr(os, "pwritev", short)

    _fill_granule(file, 2)

    assert file.data[2 * GRANULE :][:GRANULE] == file.data[GRANULE:][:GRANULE]


def test_write_fails_whose_slot_the_disk_refuses_to_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(fd: int, buffers: list[bytes], offset: int) -> int:
        raise OSError(errno.ENOSPC, "no space")

    file = _open(str(tmp_path / "x.cache"))
    _fill_granule(file, 1)
    monkeypatch.setattr(os, "pwritev", full)

    with pytest.raises(OSError, match="no space"):
        file.put(2 * GRANULE, b"c" * BLOCK)
    file.put(2 * GRANULE + BLOCK, b"d" * BLOCK)

    assert file.data[2 * GRANULE :][: 2 * BLOCK] == bytes(BLOCK) + b"d" * BLOCK


def test_threaded_cold_runs_jobs_and_reports_on_the_callers_side() -> None:
    cold = ThreadedCold(turn())
    results: list[int] = []

    def done(outcome: Outcome) -> None:
        results.append(outcome.error)

    def fail() -> None:
        raise OSError(errno.EIO, "no")

    cold.run(lambda: None, Outcome(done))
    cold.run(fail, Outcome(done))
    while len(results) < 2:
        select.select([cold.fd], [], [], 10)
        cold.collect()
        deliver()
    cold.close()

    assert sorted(results) == [0, errno.EIO]


_WRITER = """
import os, sys, struct
from bridge.cache.cache import Cache
from bridge.cache.file.opening import open_or_create
from bridge.cache.file.layout import Geometry, Identity
from bridge.cache.cache_options import Options
from bridge.datapath.request import WRITE, Request
from bridge.datapath.turn import Turn
class Server:
    size_bytes = 64 * 65536
    min_block_bytes = 1
    can_fua = can_flush = can_trim = can_write_zeroes = True
    gone = False
    generation = 1
    def submit(self, request):
        pass
file = open_or_create(sys.argv[1], geometry=Geometry(64 * 65536, 4096, 65536, 64),
                      identity=Identity("nbd://server", "disk"))
turn = Turn()
cache = Cache(file, Server(), Options(dirty_hard_ratio=1.0), clock=lambda: 0.0, turn=turn)
number = 0
while True:
    number += 1
    block = number * 7919 % 1024
    data = struct.pack("<I", number) * 1024
    request = Request(WRITE, block * 4096, 4096, [memoryview(data)], lambda _: None)
    cache.submit(request)
    turn.end()
    os.write(1, struct.pack("<II", number, block))
"""


@pytest.mark.parametrize("attempt", range(5))
def test_killed_process_leaves_every_completed_write(path: str, attempt: int) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", _WRITER, path],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    done = process.stdout.read(8 * (500 + 777 * attempt))
    process.send_signal(signal.SIGKILL)
    done += process.stdout.read()
    process.stdout.close()
    process.wait()

    last = {}
    for at in range(0, len(done) - 7, 8):
        number = int.from_bytes(done[at : at + 4], "little")
        last[int.from_bytes(done[at + 4 : at + 8], "little")] = number
    file = _open(path)
    cache = _cache(file, FakeServer(64 * GRANULE))
    for block, number in last.items():
        buffer = bytearray(BLOCK)
        submit(cache, Request(READ, block * BLOCK, BLOCK, [memoryview(buffer)], lambda _: None))
        found = int.from_bytes(buffer[:4], "little")
        # One more write may have been stored whose report did not come through.
        assert found >= number
    assert cache.index.dirty_blocks >= len(last)
    file.close(clean=False)


def test_header_of_an_older_version_has_seen_nothing(path: str) -> None:
    """Its last bytes were zeroes where the newer fields are."""
    file = _open(path)
    page = file.header.pack()
    file.close(clean=False)

    header = parse_header_untrusted(page + bytes(4096))

    assert header is not None
    assert (header.witness, header.discarded) == (0, (0, 0))
    assert page[-44:-20] == bytes(24)


def test_header_keeps_what_was_seen(path: str) -> None:
    file = _open(path)
    file.save_header(witness=1 << 40, discarded=(7, 9), export_identity=b"i" * 16)
    file.close(clean=False)

    header = opening.open_file(path).header

    assert (header.witness, header.discarded) == (1 << 40, (7, 9))
    assert header.export_identity == b"i" * 16


@pytest.mark.root
@pytest.mark.parametrize("content", [b"", b"0.1"], ids=["empty", "used"])
def test_cache_file_of_another_user_is_refused(path: str, content: bytes) -> None:
    """Put there in advance: who made it could read the guest's data, and change it."""
    if content:
        _write_one(path)
    else:
        Path(path).touch()
    os.chown(path, 23456, 23456)

    with pytest.raises(ConfigError, check=told("belongs to user 23456")):
        _open(path)
    with pytest.raises(ConfigError, check=told("belongs to user 23456")):
        open_to_flush(path, export_bytes=64 * GRANULE)

    assert os.stat(path).st_uid == 23456


@pytest.mark.parametrize("mode", [0o644, 0o666])
def test_cache_file_of_ours_that_others_may_read_is_closed_to_them(path: str, mode: int) -> None:
    """Restored from a backup, perhaps."""
    _write_one(path)
    os.chmod(path, mode)

    _open(path).close(clean=False)

    assert os.stat(path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    ("mode", "refused"), [(0o777, True), (0o1777, False), (0o755, False), (0o703, True)]
)
def test_directory_that_others_may_write_is_refused_unless_sticky(
    path: str, mode: int, refused: bool
) -> None:
    directory = Path(path).parent
    directory.chmod(mode)
    try:
        if refused:
            with pytest.raises(ConfigError, check=told(f"chmod go-w {directory}")):
                _open(path)
        else:
            _open(path).close(clean=False)
    finally:
        directory.chmod(0o700)


def _refuse(*_: object) -> NoReturn:
    raise OSError(errno.EIO, "Input/output error")


def test_file_whose_disk_cannot_be_read_is_an_error_with_its_name(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _open(path).close(clean=True)
    monkeypatch.setattr(os, "pread", _refuse)
    before = len(os.listdir("/proc/self/fd"))

    for use in (show, drop, opening.open_file, locking.has_content, _open):
        with pytest.raises(
            ConfigError, check=told(f"cache file {path}: cannot be read: Input/output")
        ):
            use(path)

    assert len(os.listdir("/proc/self/fd")) == before


def test_file_system_that_maps_no_files_is_an_error_with_the_remedy(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bridge.cache.file.cache_file.mmap.mmap", _refuse)

    with pytest.raises(
        ConfigError, check=told(r"cannot be mapped .*--cache-dir.*--cache-mode off")
    ):
        _open(path)


def test_show_of_something_else_does_not_recommend_to_remove_it() -> None:
    with pytest.raises(ConfigError) as refused:
        show("/etc/passwd")

    assert str(refused.value) == "/etc/passwd is not a cache file"


def test_show_escapes_what_would_control_the_terminal(path: str) -> None:
    _open(path, identity=Identity("h\x1b[2J:1", "x\ny\r\x9b\u202eü")).close(clean=True)

    text = text_of(show(path))

    assert r"h\x1b[2J:1" in text
    assert r"x\ny\r\x9b\u202eü" in text
    assert all(each.isprintable() for each in text.replace("\n", ""))


def test_threaded_cold_with_a_stuck_disk_is_not_waited_for() -> None:
    """And what had not begun never does."""
    cold = ThreadedCold(turn())
    stuck, began = threading.Event(), threading.Semaphore(0)
    later: list[int] = []

    def wait() -> None:
        began.release()
        stuck.wait()

    for _ in range(4):
        cold.run(wait, Outcome(lambda outcome: later.append(outcome.error)))
    for _ in range(4):
        assert began.acquire(timeout=10)
    cold.run(lambda: later.append(1), Outcome(lambda outcome: later.append(2)))
    cold.close(limit_s=0.01)
    os.fstat(cold.fd)  # The thread may still write to it.
    stuck.set()
    for thread in cold._threads:
        thread.join(HUNG_S)

    assert later == []
    os.close(cold.fd)


_STUCK_AT_THE_EXIT = """
import os
from bridge.cache.cold import ThreadedCold
from bridge.datapath.turn import Outcome, Turn
cold = ThreadedCold(Turn())
began, begin = os.pipe()
never, _ = os.pipe()
def wait():
    os.write(begin, b"x")
    os.read(never, 1)
cold.run(wait, Outcome(print))
os.read(began, 1)
cold.close(limit_s=0.0)
"""


def test_process_with_a_cold_read_on_a_stuck_disk_ends() -> None:
    """The threads of a `concurrent.futures` executor would be waited for at the exit."""
    done = subprocess.run([sys.executable, "-c", _STUCK_AT_THE_EXIT], timeout=HUNG_S, check=False)
    assert done.returncode == 0


def test_close_that_was_given_up_sets_no_clean_mark(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = _open(path)
    stuck, began = threading.Event(), threading.Event()

    def fsync(fd: int) -> None:
        began.set()
        assert stuck.wait(HUNG_S)

    monkeypatch.setattr(cache_file.os, "fsync", fsync)
    closing = threading.Thread(target=lambda: file.close(clean=True))
    closing.start()
    assert began.wait(HUNG_S)
    file.abandon()
    stuck.set()
    closing.join(HUNG_S)

    assert not show(path).clean_shutdown
    assert show(path).usable
