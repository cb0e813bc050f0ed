"""The disk on a file descriptor, against a bytearray and against a medium that fails."""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nbd_plugin import fallocate
from nbd_plugin.errors import NotSupported, PluginError, nbd_errno, one_line
from nbd_plugin.file_store import FileStore
from nbd_plugin.memory_store import MemoryStore
from nbd_plugin.volume_file import VolumeFile

SIZE = 1 << 20

ranges = st.tuples(st.integers(0, SIZE - 1), st.integers(1, SIZE)).map(
    lambda pair: (pair[0], min(pair[1], SIZE - pair[0]))
)
steps = st.lists(
    st.tuples(st.sampled_from(["write", "trim", "zero", "zero_allocated", "extents"]), ranges),
    max_size=20,
)


@pytest.fixture
def disk(tmp_path: Path) -> VolumeFile:
    store = FileStore(tmp_path)
    store.create("v", SIZE)
    return store.open("v", read_only=False, timeout_s=0)


@given(steps=steps)
@settings(max_examples=60, deadline=None)
def test_disk_any_requests_equals_a_bytearray(steps: list[tuple[str, tuple[int, int]]]) -> None:
    store = MemoryStore()
    store.create("v", SIZE)
    disk = store.open("v", read_only=False, timeout_s=0)
    model = bytearray(SIZE)
    for number, (kind, (offset, length)) in enumerate(steps, 1):
        if kind == "write":
            data = bytes([number]) * length
            disk.pwrite(memoryview(data), offset, fua=number % 2 == 0)
            model[offset : offset + length] = data
        elif kind == "trim":
            disk.trim(offset, length, fua=False)
            model[offset : offset + length] = bytes(length)
        elif kind == "extents":
            check_extents(disk.extents(offset, length, False), model, offset, length)
        else:
            disk.zero(offset, length, may_trim=kind == "zero", fua=False, fast=True)
            model[offset : offset + length] = bytes(length)
    seen = bytearray(SIZE)
    disk.pread(memoryview(seen), 0)
    assert seen == model
    disk.close()
    store.remove("v")


def check_extents(
    extents: list[tuple[int, int, int]], model: bytearray, offset: int, length: int
) -> None:
    position = offset
    for begin, count, kind in extents:
        assert begin == position
        assert count > 0
        if kind:
            assert not any(model[begin : begin + count])
        position += count
    assert offset < position <= offset + length


def test_extents_req_one_gives_one(disk: VolumeFile) -> None:
    disk.pwrite(memoryview(b"x" * 4096), 8192, False)
    assert disk.extents(0, SIZE, True) == [(0, 8192, 3)]
    assert disk.extents(8192, SIZE - 8192, True) == [(8192, 4096, 0)]
    assert disk.extents(100, 50, True) == [(100, 50, 3)]


def test_failed_flush_no_later_flush_succeeds_and_instance_changes(
    disk: VolumeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = disk.instance()

    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "medium error")

    monkeypatch.setattr(os, "fdatasync", fail)
    with pytest.raises(OSError, match="medium error"):
        disk.flush()
    monkeypatch.undo()
    with pytest.raises(PluginError) as caught:
        disk.flush()
    assert nbd_errno(caught.value) == errno.ESHUTDOWN
    assert disk.instance() != before


def test_failed_write_through_counts_as_a_failed_flush(
    disk: VolumeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = disk.instance()

    def fail_flush(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        count = os.pwritev(fd, buffers, offset)
        if flags & os.RWF_DSYNC:
            raise OSError(errno.EIO, "a page of another write was lost")
        return count

    monkeypatch.setattr("nbd_plugin.file_disk._pwritev", fail_flush)
    with pytest.raises(OSError, match="was lost"):
        disk.pwrite(memoryview(b"x" * 512), 0, True)
    monkeypatch.undo()
    for vouch in (disk.flush, lambda: disk.pwrite(memoryview(b"x" * 512), 0, True)):
        with pytest.raises(PluginError) as caught:
            vouch()
        assert nbd_errno(caught.value) == errno.ESHUTDOWN
    assert disk.instance() != before


def test_fua_write_without_space_is_not_a_failed_flush(
    disk: VolumeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = disk.instance()

    def full(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr("nbd_plugin.file_disk._pwritev", full)
    with pytest.raises(OSError, match="full"):
        disk.pwrite(memoryview(b"x" * 512), 0, True)
    monkeypatch.undo()
    disk.flush()
    assert disk.instance() == before


def test_state_is_written_by_one_at_a_time(tmp_path: Path) -> None:
    """A failed flush beside the first write of a session, in two processes: none is lost."""
    stores = [FileStore(tmp_path) for _ in range(4)]
    stores[0].create("v", SIZE)
    each = 25

    def count(store: FileStore) -> None:
        for _ in range(each):
            store.update_state("v", lambda state: replace(state, losses=state.losses + 1))

    threads = [threading.Thread(target=count, args=(store,)) for store in (*stores, *stores)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert stores[0].load_state("v").losses == each * len(threads)


def test_short_reads_and_writes_are_continued(
    disk: VolumeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short_write(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        return os.pwritev(fd, [buffers[0][:1000]], offset, flags)

    def short_read(fd: int, buffers: list[memoryview], offset: int) -> int:
        return os.preadv(fd, [buffers[0][:1000]], offset)

    monkeypatch.setattr("nbd_plugin.file_disk._pwritev", short_write)
    monkeypatch.setattr("nbd_plugin.file_disk._preadv", short_read)
    data = os.urandom(4096)
    disk.pwrite(memoryview(data), 512, False)
    seen = bytearray(4096)
    disk.pread(memoryview(seen), 512)
    assert seen == data


def test_file_cut_behind_our_back_read_is_eio(disk: VolumeFile, tmp_path: Path) -> None:
    os.truncate(tmp_path / "v", 4096)
    with pytest.raises(OSError, match="ends at 4096") as caught:
        disk.pread(memoryview(bytearray(8192)), 0)
    assert nbd_errno(caught.value) == errno.EIO


def test_file_system_without_holes_trim_is_ignored_zero_says_so(
    disk: VolumeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(fd: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    for name in ("punch_hole", "zero_range"):
        monkeypatch.setattr(fallocate, name, unsupported)
    disk.pwrite(memoryview(b"x" * 4096), 0, False)
    disk.trim(0, 4096, False)
    for may_trim in (True, False):
        with pytest.raises(NotSupported):
            disk.zero(0, 4096, may_trim=may_trim, fua=False, fast=False)
    seen = bytearray(4096)
    disk.pread(memoryview(seen), 0)
    assert seen == b"x" * 4096


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, ""), errno.ENOSPC),
        (OSError(errno.EDQUOT, ""), errno.ENOSPC),
        (OSError(errno.EFBIG, ""), errno.ENOSPC),
        (OSError(errno.EROFS, ""), errno.EPERM),
        (OSError(errno.EACCES, ""), errno.EPERM),
        (OSError(errno.ETIMEDOUT, ""), errno.EIO),
        (OSError(errno.EBADF, ""), errno.EIO),
        (OSError(-errno.ENOSPC, ""), errno.ENOSPC),
        (OSError("no number"), errno.EIO),
        (MemoryError(), errno.ENOMEM),
        (ZeroDivisionError("a bug"), errno.EIO),
        (NotSupported(), errno.EOPNOTSUPP),
    ],
)
def test_errno_that_the_client_is_told(error: BaseException, number: int) -> None:
    assert nbd_errno(error) == number


def test_error_with_many_lines_is_logged_as_one() -> None:
    assert one_line(PluginError("a\nb\x1b[31m\tc")) == "a b?[31m c"
    assert len(one_line(ValueError("x" * 10_000))) == 500
