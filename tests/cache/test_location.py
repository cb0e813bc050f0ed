"""Which cache file belongs to an export, however the operator spells it."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from bridge.cache.file.cache_file import CacheFile
from bridge.cache.file.layout import FileHeader, Geometry, Identity, new_header
from bridge.cache.file.location import Found, Wanted, find, forget, note, noted
from bridge.cache.file.opening import open_file, open_or_create
from bridge.cache.index import Index

GRANULE = 65536
GEOMETRY = Geometry(64 * GRANULE, 4096, GRANULE, 64)
VOLUME = b"v" * 16
ADDRESSES = {"localhost": {"127.0.0.1"}, "nas": {"10.0.0.5"}, "10.0.0.5": {"10.0.0.5"}}


def resolve(host: str) -> frozenset[str] | None:
    """The tests' name service."""
    found = ADDRESSES.get(host)
    return None if found is None else frozenset(found)


def header(server: str, export: str = "vm0", volume: bytes = b"") -> FileHeader:
    made = new_header(GEOMETRY, Identity(server, export), bytes(16), 0)
    return replace(made, export_identity=volume)


def wanted(server: str, *names: str, volume: bytes = b"", size: int = 64 * GRANULE) -> Wanted:
    names = names or ("vm0",)
    return Wanted(Identity(server, names[0]), frozenset(names), volume, size)


@pytest.mark.parametrize("spelling", ["127.0.0.1:10809", "[::1]:10809", "localhost:10809"])
def test_file_of_another_spelling_belongs_to_the_export(spelling: str) -> None:
    assert wanted("localhost:10809").owns(header(spelling))


def test_file_of_the_default_export_belongs_to_the_name_that_the_server_gives_it() -> None:
    assert wanted("nas:1", "", "vm0").owns(header("nas:1", "vm0"))
    assert wanted("nas:1", "vm0", "").owns(header("nas:1", ""))


@pytest.mark.parametrize("export", ["vm0", ""])
def test_volume_decides_whatever_the_server_is_called(export: str) -> None:
    assert wanted("nas:1", volume=VOLUME).owns(header("10.0.0.9:1", export, VOLUME))


def test_another_volume_of_the_same_name_owns_nothing_and_is_not_in_doubt() -> None:
    other = wanted("nas:1", volume=b"w" * 16)
    assert not other.owns(header("nas:1", volume=VOLUME))
    assert not other.may_own(header("nas:1", volume=VOLUME), resolve)


def test_clone_that_kept_the_identity_does_not_take_the_originals_cache() -> None:
    """But if it is the volume under a new name, what only the cache has must not be forgotten."""
    clone = wanted("nas:1", "vm1", volume=VOLUME)
    assert not clone.owns(header("nas:1", "vm0", VOLUME))
    assert clone.may_own(header("nas:1", "vm0", VOLUME), resolve)


@pytest.mark.parametrize(
    ("server", "export", "may"),
    [
        ("nas:1", "", True),  # its default export may be vm0
        ("10.0.0.5:1", "vm0", True),  # the same address
        ("gone.example:1", "vm0", True),  # its address is unknown
        ("localhost:1", "vm0", False),
        ("nas:1", "vm1", False),
        ("nas:2", "vm0", False),
        ("/run/nbd", "vm0", False),
    ],
)
def test_file_that_could_be_the_exports_is_in_doubt(server: str, export: str, may: bool) -> None:
    assert wanted("nas:1").may_own(header(server, export), resolve) is may


def test_file_of_a_larger_disk_is_another_disks() -> None:
    assert not wanted("nas:1", size=63 * GRANULE).may_own(header("nas:1", ""), resolve)


def test_names_longer_than_the_header_belong_together_by_their_digest() -> None:
    long = "n" * 4000
    cut = replace(header("nas:1", long), export=long[:1500])
    assert wanted("nas:1", long).owns(cut)
    assert not wanted("nas:1", long[:1500]).owns(cut)
    assert not wanted("nas:1", long + "x").owns(cut)


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    """A directory of the operator's choice, and the default one."""
    for name in ("chosen", "default"):
        (tmp_path / name).mkdir()
    return tmp_path / "chosen", tmp_path / "default"


def make(path: Path, server: str = "nas:1", export: str = "vm0", *, dirty: bool = True) -> Path:
    file = open_file_of(path, server, export)
    if dirty:
        mark_dirty(file)
    file.close(clean=True)
    return path


def open_file_of(path: Path, server: str, export: str) -> CacheFile:
    return open_or_create(str(path), geometry=GEOMETRY, identity=Identity(server, export))


def mark_dirty(file: CacheFile) -> None:
    index = Index(file)
    index.load()
    slot = index.take_free()
    index.bind(slot, 1)
    index.fill(slot, 1)
    index.write(slot, 1)


def looked(places: tuple[Path, Path], each: Wanted) -> tuple[list[Found], list[Found]]:
    return find(each, *places, resolve)


def test_dirty_file_under_another_spelling_is_found(places: tuple[Path, Path]) -> None:
    path = make(places[0] / "a.cache", "10.0.0.5:1", "vm0")
    mine = make(places[0] / "b.cache", "NAS.:1", "vm0", dirty=False)
    make(places[0] / "c.cache", "nas:1", "vm1")

    here, elsewhere = looked(places, wanted("nas:1"))

    assert [(each.path, each.dirty_bytes, each.owned) for each in here] == [
        (str(path), 4096, False),
        (str(mine), 0, True),
    ]
    assert elsewhere == []


def test_dirty_file_in_the_default_directory_is_found_from_another(
    places: tuple[Path, Path],
) -> None:
    path = make(places[1] / "a.cache")

    assert [each.path for each in looked(places, wanted("nas:1"))[1]] == [str(path)]


def test_dirty_file_in_a_third_directory_is_found_by_its_note(
    places: tuple[Path, Path], tmp_path: Path
) -> None:
    (tmp_path / "third").mkdir()
    path = make(tmp_path / "third" / "a.cache")
    note(str(path), places[1])

    found = looked(places, wanted("nas:1"))[1]
    forget(str(path), places[1])

    assert [(each.path, each.dirty_bytes) for each in found] == [(str(path), 4096)]
    assert looked(places, wanted("nas:1"))[1] == []


def test_note_of_a_file_that_is_gone_is_removed_by_the_next_one(
    places: tuple[Path, Path],
) -> None:
    gone = make(places[0] / "gone.cache")
    note(str(gone), places[1])
    gone.unlink()

    note(str(make(places[0] / "there.cache")), places[1])

    assert noted(places[1]) == [str(places[0] / "there.cache")]


def test_file_that_another_bridge_uses_is_left_to_it(places: tuple[Path, Path]) -> None:
    """It will bring what is dirty to the server; only the same server and name are a conflict."""
    same = open_file_of(places[0] / "a.cache", "nas:1", "vm0")
    perhaps = open_file_of(places[0] / "b.cache", "nas:1", "")
    for file in (same, perhaps):
        mark_dirty(file)

    here, _ = looked(places, wanted("nas:1"))

    assert [(each.path, each.dirty_bytes, each.in_use) for each in here] == [(same.path, 0, True)]
    for file in (same, perhaps):
        file.close(clean=False)


def test_files_that_are_not_caches_are_ignored(places: tuple[Path, Path]) -> None:
    (places[0] / "text.cache").write_text("root:x")
    (places[0] / "empty.cache").touch()
    (places[0] / "directory.cache").mkdir()
    os.mkfifo(places[0] / "fifo.cache")
    (places[0] / "link.cache").symlink_to(make(places[1] / "a.cache"))

    assert looked((places[0], places[0]), wanted("nas:1")) == ([], [])


def test_look_for_ones_own_file_does_not_keep_another_bridge_from_it(
    places: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both start at once: a lock that is held only for a look is waited for."""
    path = make(places[0] / "a.cache")
    looking = [open_file(str(path))]

    def pause(seconds: float) -> None:
        if looking:
            looking.pop().close(clean=False)

    monkeypatch.setattr("bridge.cache.file.locking.time.sleep", pause)
    open_file(str(path)).close(clean=False)
