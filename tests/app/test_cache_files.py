"""`cache list` and `cache prune`: what is found, and that nothing is removed that must stay."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from bridge.app import cache_files as module
from bridge.app.cache_files import CacheEntry, DiskState, State, ask_servers, cache_files, owner_of
from bridge.app.cache_prune import PruneRules, prune
from bridge.cache.file import inspect
from bridge.cache.file.layout import HEADER_BYTES, MAGIC
from bridge.cache.file.location import note, noted
from bridge.cache.file.opening import open_file
from bridge.cli.wording import explain
from bridge.errors import InUse
from bridge.peers.nbd_server import Server
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.peers.nbd_server_settings import ServerSettings
from bridge.server.client_options import ClientOptions
from bridge.server.tls import server_context
from tests.cache.test_location import make, mark_dirty, open_file_of
from tests.processes import bridge_argv
from tests.server import certificates

DAY_S = 86400
OLD = PruneRules(unused_s=30 * DAY_S)


@pytest.fixture(autouse=True)
def _own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No file of this machine's user is looked at, let alone removed."""
    (tmp_path / "default").mkdir()
    for where in ("bridge.app.cache_files", "bridge.app.cache_names"):
        monkeypatch.setattr(f"{where}.default_directory", lambda: tmp_path / "default")
    monkeypatch.setattr(module, "control_sockets", list)


@pytest.fixture
def caches(tmp_path: Path) -> Iterator[Path]:
    """A directory with a clean, a dirty, a used and a damaged cache file, all of them old."""
    where = tmp_path / "caches"
    where.mkdir()
    make(where / "clean.cache", export="clean", dirty=False)
    make(where / "dirty.cache", export="dirty")
    damaged = make(where / "damaged.cache", export="damaged")
    with damaged.open("r+b") as file:
        for copy_at in (0, HEADER_BYTES):
            file.seek(copy_at + len(MAGIC))
            file.write(b"\xff" * 64)
    used = open_file_of(where / "used.cache", "nas:1", "used")
    for path in where.iterdir():
        age(path, days=60)
    yield where
    used.close(clean=True)


def age(path: Path, *, days: float) -> None:
    then = time.time() - days * DAY_S
    os.utime(path, (then, then))


def by_name(entries: list[CacheEntry]) -> dict[str, CacheEntry]:
    return {Path(each.path).stem: each for each in entries}


def left(where: Path) -> set[str]:
    return {each.stem for each in where.iterdir()}


def test_list_tells_the_state_of_every_file(caches: Path) -> None:
    found = by_name(cache_files([str(caches)]))

    assert {name: each.state for name, each in found.items()} == {
        "clean": State.CLEAN,
        "dirty": State.DIRTY,
        "damaged": State.DAMAGED,
        "used": State.IN_USE,
    }
    assert (found["dirty"].server, found["dirty"].export) == ("nas:1", "dirty")
    assert found["dirty"].dirty_bytes == 4096
    assert found["clean"].dirty_bytes == 0
    assert found["used"].dirty_bytes is None
    assert found["used"].export == "used"
    assert found["damaged"].problem
    assert 59.9 < found["clean"].age_s() / DAY_S < 60.1


def test_file_in_use_names_its_process(caches: Path) -> None:
    assert by_name(cache_files([str(caches)]))["used"].owner_pid == os.getpid()
    assert owner_of(str(caches / "clean.cache")) is None


def test_what_is_no_cache_file_is_neither_listed_nor_removed(caches: Path) -> None:
    (caches / "mine.cache").write_text("not a cache, only called so")
    (caches / "clean.txt").write_bytes((caches / "clean.cache").read_bytes())
    (caches / "link.cache").symlink_to(caches / "clean.cache")
    for name in ("mine.cache", "clean.txt"):
        age(caches / name, days=60)

    assert by_name(cache_files([str(caches)])).keys() == {"clean", "dirty", "damaged", "used"}
    prune(cache_files([str(caches)]), OLD, now_s=time.time())
    assert {"mine", "link"} <= left(caches)
    assert (caches / "clean.txt").exists()


def test_files_elsewhere_are_found_by_their_notes(tmp_path: Path, caches: Path) -> None:
    default = tmp_path / "default"
    make(default / "own.cache", export="own", dirty=False)
    note(str(caches / "clean.cache"), default)
    age(caches / "clean.cache", days=60)

    entries = cache_files()

    assert by_name(entries).keys() == {"own", "clean"}
    assert [Path(each.entry.path).stem for each in prune(entries, OLD, now_s=time.time())] == [
        "clean"
    ]
    assert noted(default) == []


def test_prune_removes_old_clean_files_only(caches: Path) -> None:
    make(caches / "young.cache", export="young", dirty=False)

    results = prune(cache_files([str(caches)]), OLD, now_s=time.time())

    kept = {Path(each.entry.path).stem: each.kept for each in results}
    assert kept["clean"] == ""
    assert kept["used"] == f"in use by process {os.getpid()}"
    assert "4096 bytes that the server lacks" in kept["dirty"]
    assert "may hold data" in kept["damaged"]
    assert "young" not in kept
    assert left(caches) == {"young", "used", "dirty", "damaged"}


def test_dry_run_removes_nothing_and_says_what_it_would(caches: Path) -> None:
    before = left(caches)

    results = prune(cache_files([str(caches)]), OLD, now_s=time.time(), dry_run=True)

    assert [Path(each.entry.path).stem for each in results if not each.kept] == ["clean"]
    assert left(caches) == before


def test_dirty_file_goes_only_when_that_is_asked_for_and_one_in_use_never(caches: Path) -> None:
    rules = PruneRules(unused_s=30 * DAY_S, discard_dirty=True)

    prune(cache_files([str(caches)]), rules, now_s=time.time())

    assert left(caches) == {"used"}


@pytest.mark.parametrize("rules", [OLD, PruneRules(unused_s=0, discard_dirty=True)])
def test_file_that_a_bridge_used_after_the_look_stays(caches: Path, rules: PruneRules) -> None:
    """It came, wrote, and was killed, between the look and the removal."""
    entries = [each for each in cache_files([str(caches)]) if each.state is State.CLEAN]
    file = open_file(str(caches / "clean.cache"))
    file.begin()
    mark_dirty(file)
    file.close(clean=False)

    (result,) = prune(entries, rules, now_s=time.time())

    assert "was used meanwhile" in result.kept
    assert "clean" in left(caches)


def test_file_that_became_dirty_unseen_stays(caches: Path) -> None:
    """A coarse clock: its time is the one that was seen."""
    path = caches / "clean.cache"
    entries = [each for each in cache_files([str(caches)]) if each.state is State.CLEAN]
    file = open_file(str(path))
    mark_dirty(file)
    file.close(clean=True)
    os.utime(path, ns=(entries[0].used_ns, entries[0].used_ns))

    (result,) = prune(entries, OLD, now_s=time.time())

    assert "the server does not have" in result.kept
    assert path.exists()


def test_bridge_that_starts_while_a_file_is_removed_cannot_have_it(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before the last look on: what it wrote would be removed with the file."""
    path = str(caches / "clean.cache")
    tried: list[str] = []
    looks_again, unlink = inspect.copy_index, os.unlink

    def start_a_bridge(where: str) -> None:
        with pytest.raises(InUse):
            open_file(path)
        tried.append(where)

    def look(*arguments: object) -> object:
        start_a_bridge("look")
        return looks_again(*arguments)  # type: ignore[arg-type]

    def remove(*arguments: object) -> None:
        start_a_bridge("unlink")
        unlink(*arguments)  # type: ignore[arg-type]

    entries = [each for each in cache_files([str(caches)]) if each.state is State.CLEAN]
    monkeypatch.setattr(inspect, "copy_index", look)
    monkeypatch.setattr(inspect.os, "unlink", remove)
    inspect.drop(path, used_ns=entries[0].used_ns)
    monkeypatch.undo()

    assert tried == ["look", "unlink"]
    assert not Path(path).exists()


def test_use_of_a_cache_is_seen_in_its_age(tmp_path: Path) -> None:
    path = make(tmp_path / "x.cache", dirty=False)
    age(path, days=60)
    file = open_file(str(path))
    file.begin()
    assert time.time() - path.stat().st_mtime < DAY_S
    age(path, days=60)
    file.close(clean=True)
    assert time.time() - path.stat().st_mtime < DAY_S


async def test_only_a_server_that_answers_can_say_that_a_disk_is_gone(
    directory: Path, nursery: trio.Nursery
) -> None:
    up, down, caches = directory / "up", directory / "down", directory / "c"
    caches.mkdir()
    await nursery.start(Server({"there": MemoryDisk(1 << 20)}).serve_unix, up)
    make(caches / "there.cache", str(up), "there", dirty=False)
    make(caches / "gone.cache", str(up), "gone", dirty=False)
    make(caches / "dirty.cache", str(up), "also-gone")
    make(caches / "down.cache", str(down), "gone", dirty=False)

    entries = await ask_servers(cache_files([str(caches)]), ClientOptions(connect_timeout_s=60))

    assert {name: each.disk for name, each in by_name(entries).items()} == {
        "there": DiskState.THERE,
        "gone": DiskState.GONE,
        "dirty": DiskState.GONE,
        "down": DiskState.UNREACHABLE,
    }
    prune(entries, PruneRules(gone=True), now_s=time.time())
    assert left(caches) == {"there", "dirty", "down"}
    nursery.cancel_scope.cancel()


async def test_server_that_wants_tls_is_asked_over_it(
    directory: Path, nursery: trio.Nursery, tmp_path: Path
) -> None:
    folders = certificates.make(tmp_path)
    context = server_context(
        str(folders["good"] / "server-cert.pem"), str(folders["good"] / "server-key.pem")
    )
    disks = {"there": MemoryDisk(1 << 20)}
    server = Server(disks, ServerSettings(tls=True, tls_required=True), tls_context=context)
    safe = f"localhost:{await nursery.start(server.serve_tcp)}"
    clear = f"localhost:{await nursery.start(Server(disks).serve_tcp)}"
    caches = directory / "c"
    caches.mkdir()
    for name in ("there", "gone"):
        make(caches / f"{name}.cache", safe, name, dirty=False)
    make(caches / "clear.cache", clear, "clear", dirty=False)

    async def asked(**files: str) -> dict[str, CacheEntry]:
        options = ClientOptions(connect_timeout_s=60, **files)
        return by_name(await ask_servers(cache_files([str(caches)]), options, explain))

    found = await asked(tls_ca_file=str(folders["good"] / "ca-cert.pem"))
    # What is said in clear could be said by anybody.
    assert {name: each.disk for name, each in found.items()} == {
        "there": DiskState.THERE,
        "gone": DiskState.GONE,
        "clear": DiskState.REFUSED,
    }
    found = await asked()
    assert found["clear"].disk is DiskState.GONE
    assert {found[name].disk for name in ("there", "gone")} == {DiskState.REFUSED}
    assert "--tls-ca" in found["there"].disk_reason
    nursery.cancel_scope.cancel()


def run(*arguments: str, status: int = 0) -> str:
    done = subprocess.run(
        bridge_argv("cache", *arguments), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


def test_list_says_why_a_server_did_not_answer(directory: Path) -> None:
    caches = directory / "c"
    caches.mkdir()
    for name in ("one", "two"):
        make(caches / f"{name}.cache", str(directory / "down"), name, dirty=False)
    said = run("list", "--check-servers", str(caches)).splitlines()
    assert len(said) == 4  # Heading, two files, and one reason for both.
    assert said[3].startswith(f"{directory / 'down'}: unreachable: ")


def test_commands_print_lines_and_json(caches: Path) -> None:
    head, *lines = run("list", str(caches)).splitlines()
    assert head.split()[:3] == ["LAST", "USE", "SIZE"]
    assert any("60 days ago" in line and "4 KiB" in line and "dirty" in line for line in lines)
    found = json.loads(run("list", "--json", str(caches)))
    assert {each["state"] for each in found} == {"clean", "dirty", "damaged", "in use"}

    text = run("prune", "--older-than", "30", "--dry-run", str(caches))
    assert "clean.cache: would be removed, not used for 60.0 days" in text
    assert text.splitlines()[-1].startswith("files would be removed: 1, ")
    found = json.loads(run("prune", "--older-than", "30", "--json", str(caches)))
    assert [each["removed"] for each in found if each["export"] == "clean"] == [True]
    assert "clean" not in left(caches)


def test_prune_without_a_rule_is_refused(caches: Path) -> None:
    before = left(caches)

    assert "--older-than" in run("prune", str(caches), status=2)
    assert "No such file" in run("list", str(caches / "none"), status=2)
    assert left(caches) == before
