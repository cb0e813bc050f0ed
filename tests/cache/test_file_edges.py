"""A cache file that is removed, full of holes, or cannot be kept, just when it matters."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from bridge.cache.file.cache_file import CacheFile
from bridge.cache.file.layout import Identity, geometry_for
from bridge.cache.file.opening import open_file, open_or_create
from bridge.errors import ConfigError
from tests.tools import told

DISK_BYTES = 64 << 20
IDENTITY = Identity("nbd://server", "disk")


def opened(path: Path) -> CacheFile:
    geometry = geometry_for(disk_bytes=DISK_BYTES, cache_bytes=8 << 20)
    return open_or_create(str(path), geometry=geometry, identity=IDENTITY)


def test_file_removed_between_open_and_lock_is_not_the_one_that_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes would each have a cache, one of them without a name."""
    path = tmp_path / "cache"
    opened(path).close(clean=True)
    real, removed = fcntl.flock, []

    def flock(fd: int, how: int) -> None:
        if not removed:
            removed.append(path.unlink())
        real(fd, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    file = opened(path)

    assert removed
    assert os.path.samestat(os.fstat(file.fd), path.stat())
    file.close(clean=True)


def test_file_removed_between_open_and_lock_and_not_to_be_made_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    opened(path).close(clean=True)
    monkeypatch.setattr(fcntl, "flock", lambda fd, how: path.unlink())

    with pytest.raises(ConfigError, check=told("No such file")):
        open_file(str(path))


def make_holes(path: Path) -> None:
    """What `cp --sparse=always` does."""
    content = path.read_bytes()
    path.write_bytes(content.rstrip(b"\0"))
    os.truncate(path, len(content))


def test_holes_of_a_copied_file_are_filled_before_it_is_mapped(tmp_path: Path) -> None:
    """A store into a hole is a SIGBUS when the disk is full."""
    path = tmp_path / "cache"
    opened(path).close(clean=True)
    make_holes(path)
    assert path.stat().st_blocks * 512 < path.stat().st_size

    opened(path).close(clean=True)

    assert path.stat().st_blocks * 512 >= path.stat().st_size


def test_file_with_holes_on_a_full_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    opened(path).close(clean=True)
    make_holes(path)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ConfigError, check=told("no room")):
        opened(path)
    assert path.exists()


@pytest.mark.parametrize("dirty", [False, True])
def test_file_that_cannot_be_synced_is_let_go_and_kept_only_for_its_dirty_data(
    dirty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache"
    file = opened(path)
    if dirty:
        file.granule_of[1] = 5
        file.state[1] = 1 | 1 << 16

    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="Input/output error"):
        file.close(clean=True)
    monkeypatch.undo()

    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file.fd)
    assert path.exists() == dirty
    if dirty:
        again = open_file(str(path))  # and it is no longer locked
        assert not again.header.clean
        again.close(clean=False)
