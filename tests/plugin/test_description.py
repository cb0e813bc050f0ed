"""What the description may vouch for: with filters above the plugin, and of block devices."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from nbd_plugin import file_store, filters
from nbd_plugin.file_store import FileStore
from nbd_plugin.service import Service
from nbd_plugin.settings import Settings
from tests.plugin.client import RawClient
from tests.plugin.server import Nbdkit

MIB = 1 << 20


def properties(server: Nbdkit) -> dict[str, str]:
    with RawClient(str(server.socket), "disk") as client:
        return client.properties


@pytest.mark.nbdkit
@pytest.mark.parametrize("names", [("cache",), ("cow",), ("ip", "fua"), ("readahead",)])
def test_filter_that_may_hold_data_nothing_is_vouched_for(
    volumes: Path, names: tuple[str, ...]
) -> None:
    found = set()
    for _ in range(2):
        with Nbdkit(f"file={volumes}/disk", f"size={MIB}", filters=names) as server:
            seen = properties(server)
            found.add(seen["instance"])
            assert set(seen) == {"volume", "instance"}
            assert properties(server) == seen, "as long as the process lives"
            server.kill()
    assert len(found) == 2


@pytest.mark.nbdkit
def test_filters_that_pass_everything_on_change_nothing(volumes: Path) -> None:
    found = set()
    for _ in range(2):
        parameters = (f"file={volumes}/disk", f"size={MIB}", "limit=9", "rate=1G")
        with Nbdkit(*parameters, filters=("limit", "rate")) as server:
            seen = properties(server)
            assert seen["session"] == "yes"
            found.add(seen["instance"])
            server.kill()
    assert len(found) == 1


@pytest.mark.parametrize(
    ("words", "holds"),
    [
        ("nbdkit -f python x.py file=a", False),
        ("nbdkit --foreground python x.py file=a", False),
        ("nbdkit --filter=cache python x.py", True),
        ("nbdkit --filter cache python x.py", True),
        ("nbdkit --fil=cow python x.py", True),
        ("nbdkit --filter=limit --filter=cache python x.py", True),
        ("nbdkit --filter=limit --filter=ip python x.py", False),
        ("nbdkit --filter=./limit python x.py", True),
        ("nbdkit python x.py file=a --filter=cache", True),
        ("nbdkit python x.py --filter", True),
        ("nbdkit", True),
        ("", True),
    ],
)
def test_filters_are_read_from_the_command_line(tmp_path: Path, words: str, holds: bool) -> None:
    line = tmp_path / "cmdline"
    line.write_bytes(words.replace(" ", "\0").encode() + b"\0")
    assert filters.may_hold_data(line) == holds


def test_command_line_that_cannot_be_read_counts_as_a_filter(tmp_path: Path) -> None:
    assert filters.may_hold_data(tmp_path / "absent")
    (tmp_path / "cmdline").write_bytes(b"nbdkit\0\xff\xfe\0")
    assert not filters.may_hold_data(tmp_path / "cmdline")


# --- block devices: a file that says it is one


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "dev"
    folder.mkdir()
    path = folder / "disk"
    path.write_bytes(bytes(MIB))
    monkeypatch.setattr(stat, "S_ISBLK", stat.S_ISREG)
    monkeypatch.setattr("nbd_plugin.last_seen.device_name", lambda number: "wwid 1")
    monkeypatch.setattr(file_store, "_DEVICE_STATE_DIR", tmp_path / "lib" / "state")
    return path


def describe(path: Path, **settings: str) -> dict[str, str]:
    service = Service(Settings(store="file", file=str(path), **settings))
    handle = service.open("", read_only=False)
    try:
        assert handle.session is not None
        words = service.describe(handle).split()
        handle.session.note_write(handle)
    finally:
        service.close(handle)
    return dict(word.split("=", 1) for word in words if "=" in word)


def test_state_of_a_device_outlives_a_reboot(device: Path, tmp_path: Path) -> None:
    before = describe(device)
    assert os.listdir(device.parent) == ["disk"], "nothing in /dev, which is made anew at a boot"
    after = describe(device)
    assert after["identity"] == before["identity"]
    assert after["written"] == before["generation"]
    assert (tmp_path / "lib" / "state").stat().st_mode & 0o777 == 0o700


def test_devices_of_the_same_name_in_two_directories_are_two_volumes(
    device: Path, tmp_path: Path
) -> None:
    other = tmp_path / "mapper" / "disk"
    other.parent.mkdir()
    other.write_bytes(bytes(MIB))
    assert describe(device)["identity"] != describe(other)["identity"]
    state = str(tmp_path / "s")
    assert describe(device, state=state)["identity"] != describe(other, state=state)["identity"]


def test_state_directory_that_the_operator_chose_is_used(device: Path, tmp_path: Path) -> None:
    describe(device, state=str(tmp_path / "chosen"))
    assert len(list((tmp_path / "chosen").iterdir())) == 1
    assert not (tmp_path / "lib").exists()


def test_device_whose_state_cannot_be_stored_is_not_told_of(device: Path, tmp_path: Path) -> None:
    (tmp_path / "lib").write_bytes(b"in the way of the directory")
    first, second = describe(device), describe(device)
    assert set(first) == {"volume", "instance", "session"}
    assert first["instance"] != second["instance"], "failed flushes are forgotten with the process"


def test_file_with_a_state_directory_elsewhere(volumes: Path, tmp_path: Path) -> None:
    store = FileStore(volumes, state_directory=tmp_path / "s")
    store.create("v", MIB)
    assert not (volumes / ".nbd_plugin").exists()
    assert store.load_state("v").generation == 1
