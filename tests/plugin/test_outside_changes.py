"""Changes by another program to a volume that the plugin does not have open: another generation, so
that clients drop their caches. Changes by the plugin itself do not look like that."""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from nbd_plugin import last_seen
from nbd_plugin.file_store import FileStore
from nbd_plugin.last_seen import Mark, read_mark
from nbd_plugin.session import begin_generation
from nbd_plugin.volume_file import VolumeFile
from nbd_plugin.volume_state import parse_state
from tests.plugin.client import WRITE, RawClient
from tests.plugin.server import Nbdkit
from tests.tools import HUNG_S

MIB = 1 << 20


def visit(server: Nbdkit, *, write: bool = False) -> dict[str, str]:
    with RawClient(str(server.socket), "disk") as client:
        if write:
            client.write(0, b"x" * 512)
        return client.properties


def believes(cached: dict[str, str], now: dict[str, str]) -> bool:
    """The rule of README.md for a client that cached the volume in an earlier session."""
    return cached["identity"] == now["identity"] and (
        int(now["written"]) <= int(cached["generation"]) <= int(now["generation"])
    )


def edit(path: Path) -> None:
    with open(path, "r+b") as file:
        file.write(b"edited")


def replace_file(path: Path) -> None:
    new = path.with_name("new")
    new.write_bytes(bytes(MIB))
    shutil.copystat(path, new)
    os.rename(new, path)


def shrink_and_grow(path: Path) -> None:
    os.truncate(path, 4096)
    os.truncate(path, MIB)


def restore_with_its_time(path: Path) -> None:
    edit(path)
    os.utime(path, (1_500_000_000, 1_500_000_000))


CHANGES = [edit, replace_file, shrink_and_grow, restore_with_its_time]


@pytest.mark.nbdkit
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("write", [True, False])
def test_file_changed_while_nbdkit_was_stopped_is_another_generation(
    volumes: Path, change: Callable[[Path], None], write: bool
) -> None:
    with Nbdkit(f"file={volumes}/disk", f"size={MIB}") as server:
        before = visit(server, write=write)
    change(volumes / "disk")
    with Nbdkit(f"file={volumes}/disk") as server:
        after = visit(server)
        assert not believes(before, after)
        assert believes(after, visit(server)), "one change, one new generation"


@pytest.mark.nbdkit
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("flush", [True, False])
def test_file_changed_after_nbdkit_was_killed_is_another_generation(
    volumes: Path, change: Callable[[Path], None], flush: bool
) -> None:
    with Nbdkit(f"file={volumes}/disk", f"size={MIB}") as server:
        client = RawClient(str(server.socket), "disk")
        client.write(0, b"x" * 512)
        if flush:
            client.flush()
        server.kill()
        client.cut()
    wait_for_another_tick()
    change(volumes / "disk")
    with Nbdkit(f"file={volumes}/disk") as server:
        assert not believes(client.properties, visit(server))


def wait_for_another_tick() -> None:
    """The kernel's clock for files has moved on: a change after this has another time."""
    now = time.time_ns()
    while time.clock_gettime_ns(5) <= now:  # CLOCK_REALTIME_COARSE
        pass


def wait_for_end_of_session(volumes: Path) -> None:
    """The client sees the end of its connection a little earlier than the plugin does."""
    deadline = time.monotonic() + HUNG_S
    while '"closed ' not in (volumes / ".nbd_plugin" / "disk.json").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.nbdkit
def test_file_changed_beside_a_running_nbdkit_between_sessions_is_another_generation(
    volumes: Path,
) -> None:
    with Nbdkit(f"file={volumes}/disk", f"size={MIB}") as server:
        before = visit(server, write=True)
        wait_for_end_of_session(volumes)
        edit(volumes / "disk")
        assert not believes(before, visit(server))


@pytest.mark.nbdkit
@pytest.mark.parametrize("flush", [True, False])
def test_kill_of_nbdkit_is_no_outside_change(volumes: Path, flush: bool) -> None:
    with Nbdkit(f"file={volumes}/disk", f"size={MIB}") as server:
        client = RawClient(str(server.socket), "disk")
        client.write(0, b"x" * 512)
        client.trim(4096, 4096)
        if flush:
            client.flush()
            client.write(512, b"y" * 512)
            client.flush()
        server.kill()
        client.cut()
    with Nbdkit(f"file={volumes}/disk") as server:
        assert believes(client.properties, visit(server))


@pytest.mark.nbdkit
def test_kill_of_nbdkit_under_writes_is_no_outside_change(volumes: Path) -> None:
    for _ in range(5):
        with Nbdkit(f"file={volumes}/disk", f"size={MIB}") as server:
            client = RawClient(str(server.socket), "disk")
            client.write(0, b"x" * 512)
            for number in range(64):
                client.send(WRITE, number * 4096, 4096, b"z" * 4096)
            server.kill()
            client.cut()
        with Nbdkit(f"file={volumes}/disk") as server:
            assert believes(client.properties, visit(server))


@pytest.mark.nbdkit
def test_chmod_and_reading_are_no_outside_changes(volumes: Path) -> None:
    with Nbdkit(f"file={volumes}/disk", f"size={MIB}") as server:
        before = visit(server, write=True)
    os.chmod(volumes / "disk", 0o640)
    (volumes / "disk").read_bytes()
    with Nbdkit(f"file={volumes}/disk") as server:
        assert believes(before, visit(server))


@pytest.mark.nbdkit
def test_reader_is_not_told_counters_after_an_outside_change(volumes: Path) -> None:
    with Nbdkit(f"file={volumes}/disk", f"size={MIB}") as server:
        visit(server, write=True)
        wait_for_end_of_session(volumes)
        with RawClient(str(server.socket), "disk@readonly") as client:
            assert "generation" in client.properties
        edit(volumes / "disk")
        with RawClient(str(server.socket), "disk@readonly") as client:
            assert "generation" not in client.properties


@pytest.mark.parametrize("in_place", [True, False])
def test_mark_is_on_disk_however_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_place: bool
) -> None:
    """On a file system that overwrites in place it is mapped, elsewhere (btrfs) written."""
    monkeypatch.setattr(last_seen, "_file_system", lambda fd: 0xEF53 if in_place else 0x9123683E)
    path = tmp_path / "mark"
    mark = Mark(path)
    mark.began()
    began, _, running, _, _ = read_mark(path)
    assert (running, began > 0) == (1, True)
    mark.ended()
    _, ended, running, exact, _ = read_mark(path)
    assert (running, exact, ended >= began) == (0, 0, True)
    with open(path, "rb") as file:
        mark.note_time(file.fileno())
    assert read_mark(path)[3] > 0
    mark.began()
    assert read_mark(path)[3] > 0
    mark.ended()
    assert read_mark(path)[3] == 0
    mark.close()


def test_mark_that_cannot_be_written_does_no_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_seen, "_file_system", lambda fd: 0)
    mark = Mark(tmp_path / "mark")

    def full(fd: int, data: object, offset: int) -> int:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "pwrite", full)
    mark.began()
    mark.ended()
    mark.close()


class Marked:
    """A file whose changes are marked, and what a kill of the process leaves to the next one."""

    def __init__(self, folder: Path) -> None:
        self._mark_path = folder / "mark"
        self._fd = os.open(folder / "v", os.O_CREAT | os.O_RDWR)
        self.mark = Mark(self._mark_path)
        self._seen = last_seen.describe(self._fd, is_open=True).split(" ")
        wait_for_another_tick()
        self.change()

    def change(self) -> None:
        """One change from beginning to end."""
        self.mark.began()
        os.pwrite(self._fd, b"x", 0)
        self.mark.ended()

    def flush(self) -> None:
        self.mark.note_time(self._fd)

    def looks_changed(self) -> bool:
        self._seen[3] = str(os.fstat(self._fd).st_size)
        return last_seen.has_changed(
            " ".join(self._seen), self._fd, lambda: read_mark(self._mark_path)
        )


@pytest.mark.parametrize("flush", [True, False])
def test_killed_between_mark_and_change_is_no_outside_change(tmp_path: Path, flush: bool) -> None:
    """The mark says that a change began, and the file has the time of the one before. The bridge
    would have kept its dirty data back until an operator came."""
    file = Marked(tmp_path)
    if flush:
        file.flush()
    wait_for_another_tick()
    file.mark.began()
    assert not file.looks_changed()
    edit(tmp_path / "v")
    os.utime(tmp_path / "v", ns=(1, 1))
    assert file.looks_changed()


def test_killed_with_two_changes_under_way_is_no_outside_change(tmp_path: Path) -> None:
    """The older one has come to the file, the newer one has not."""
    file = Marked(tmp_path)
    wait_for_another_tick()
    file.mark.began()
    edit(tmp_path / "v")
    wait_for_another_tick()
    file.mark.began()
    assert not file.looks_changed()


def test_killed_in_the_middle_of_a_change_edit_of_later_is_seen(tmp_path: Path) -> None:
    file = Marked(tmp_path)
    file.flush()
    wait_for_another_tick()
    file.mark.began()
    later = time.time_ns() + 2 * last_seen._UNFINISHED_NS
    os.utime(tmp_path / "v", ns=(later, later))
    assert file.looks_changed()


def test_killed_after_a_change_that_left_the_file_as_it_was_is_no_outside_change(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system that cannot punch holes, or a disk without room."""

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "unsupported")

    disk = store.open("v", read_only=False, timeout_s=1)
    begin_generation(disk)
    disk.update_state(lambda state: replace(state, seen=disk.seen(writing=True)))
    disk.pwrite(memoryview(b"x" * 512), 0, False)
    monkeypatch.setattr("nbd_plugin.fallocate.punch_hole", refuse)
    for _ in range(3):
        wait_for_another_tick()
        disk.trim(0, 512, False)
    assert not disk.was_changed(disk.load_state())
    edit(tmp_path / "v")
    assert disk.was_changed(disk.load_state())


@pytest.mark.parametrize("rounded_to_ns", [100, 10_000_000, 1_000_000_000, 2_000_000_000])
def test_file_system_with_coarse_times_kill_is_no_outside_change(
    tmp_path: Path, rounded_to_ns: int
) -> None:
    path = tmp_path / "v"
    path.write_bytes(b"x")
    began = 1_700_000_001_234_567_891
    kept = began - began % rounded_to_ns
    os.utime(path, ns=(kept, kept))
    with open(path, "rb") as file:
        seen = last_seen.describe(file.fileno(), is_open=True).split(" ")
        seen[4] = "1"
        marked = (began, began + 5000, 0, 0, 0)
        assert not last_seen.has_changed(" ".join(seen), file.fileno(), lambda: marked)
        late = began + 5001
        os.utime(path, ns=(late, late))
        assert last_seen.has_changed(" ".join(seen), file.fileno(), lambda: marked)


# --- the host was started anew: told by the boot's number, which is made up here


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    store = FileStore(tmp_path)
    store.create("v", MIB)
    return store


def written(store: FileStore, *, close: bool) -> VolumeFile:
    """A volume that was written by a session; not closed: as if the host had lost power."""
    disk = store.open("v", read_only=False, timeout_s=0)
    begin_generation(disk)
    seen = disk.seen(writing=True)
    disk.update_state(lambda state: replace(state, seen=seen))
    disk.pwrite(memoryview(b"x" * 512), 0, False)
    if close:
        disk.update_state(lambda state: replace(state, seen=disk.seen(writing=False)))
        disk.close()
    return disk


def changed_at_next_boot(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(last_seen, "boot_id", lambda: "another")
    disk = store.open("v", read_only=True, timeout_s=0)
    try:
        return disk.was_changed(disk.load_state())
    finally:
        disk.close()


@pytest.mark.parametrize("close", [True, False])
def test_loss_of_power_is_no_outside_change(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, close: bool
) -> None:
    written(store, close=close)
    state = store.load_state("v")
    path = store.state_path("v").with_suffix(".mark")
    # The file's times are older than remembered: they did not reach the medium.
    later = str(int(state.seen.split(" ")[4]) + 5), str(int(state.seen.split(" ")[5]) + 5)
    store.update_state(
        "v", lambda state: replace(state, seen=" ".join([*state.seen.split(" ")[:4], *later]))
    )
    assert path.exists()
    assert not changed_at_next_boot(store, monkeypatch)


def test_change_after_an_orderly_end_and_a_boot_is_seen(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(store, close=True)
    wait_for_another_tick()
    edit(tmp_path / "v")
    assert changed_at_next_boot(store, monkeypatch)


def test_change_long_after_a_loss_of_power_is_seen(
    store: FileStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(store, close=False)
    mark = store.state_path("v").with_suffix(".mark")
    words = memoryview(bytearray(mark.read_bytes())).cast("q")
    words[0] = words[1] = words[1] - 61_000_000_000
    mark.write_bytes(words.tobytes())
    edit(tmp_path / "v")
    assert changed_at_next_boot(store, monkeypatch)


def test_lost_mark_counts_as_a_change(store: FileStore, monkeypatch: pytest.MonkeyPatch) -> None:
    written(store, close=False)
    store.state_path("v").with_suffix(".mark").unlink()
    assert changed_at_next_boot(store, monkeypatch)


def test_another_device_under_the_same_path_is_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(last_seen.stat, "S_ISBLK", lambda mode: True)
    fd = os.open(tmp_path / "d", os.O_CREAT | os.O_RDWR)
    monkeypatch.setattr(last_seen, "device_name", lambda number: "wwid one")
    seen = last_seen.describe(fd, is_open=False)
    assert not last_seen.has_changed(seen, fd, lambda: (0, 0, 0, 0, 0))
    monkeypatch.setattr(last_seen, "device_name", lambda number: "wwid two")
    assert last_seen.has_changed(seen, fd, lambda: (0, 0, 0, 0, 0))
    os.close(fd)


@pytest.mark.parametrize("seen", ["x" * 300, "a\nb", 5])
def test_remembered_description_that_cannot_be_is_damage(seen: object) -> None:
    with pytest.raises(ValueError, match="description"):
        parse_state(json.dumps({"seen": seen}).encode())


@pytest.mark.nbdkit
def test_file_that_only_grew_is_told_from_one_that_a_session_wrote(volumes: Path) -> None:
    """A client with unwritten data must not be refused because the disk was made longer; how often
    that was, and who looked in between, does not matter."""
    with Nbdkit(f"file={volumes}/disk", f"size={MIB}") as server:
        before = visit(server, write=True)
    for size in (2, 3):
        os.truncate(volumes / "disk", size * MIB)
        with Nbdkit(f"file={volumes}/disk") as server:
            visit(server)
            grown = visit(server)
            assert not believes(before, grown)
            assert grown["grown_from"] == before["generation"]
    with Nbdkit(f"file={volumes}/disk") as server:
        visit(server, write=True)
        assert "grown_from" not in visit(server)


@pytest.mark.nbdkit
@pytest.mark.parametrize("change", CHANGES)
def test_change_that_is_no_growth_is_not_called_one(
    volumes: Path, change: Callable[[Path], None]
) -> None:
    with Nbdkit(f"file={volumes}/disk", f"size={MIB}") as server:
        visit(server, write=True)
    os.truncate(volumes / "disk", 2 * MIB)
    with Nbdkit(f"file={volumes}/disk") as server:
        visit(server)
    change(volumes / "disk")
    with Nbdkit(f"file={volumes}/disk") as server:
        assert "grown_from" not in visit(server)
