"""`python3 -m nbd_plugin`, with the system's own interpreter, as an operator runs it."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.plugin.client import RawClient
from tests.plugin.server import PACKAGE, Nbdkit


def command(*arguments: str) -> tuple[int, str]:
    done = subprocess.run(
        ["/usr/bin/python3", "-m", "nbd_plugin", *arguments],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


def works(*arguments: str) -> str:
    status, said = command(*arguments)
    assert status == 0, said
    return said


def test_create_list_resize_remove(volumes: Path) -> None:
    at = f"dir={volumes}"
    works("create", at, "vm1", "10G")
    works("create", at, "iso", "1M", "--read-only")
    listed = json.loads(works("list", at, "--json"))
    assert [(each["name"], each["size_bytes"], each["read_only"]) for each in listed] == [
        ("iso", 1 << 20, True),
        ("vm1", 10 << 30, False),
    ]
    assert listed[1]["allocated_bytes"] == 0
    works("resize", at, "vm1", "20G")
    assert "20G" in works("list", at)
    works("remove", at, "vm1")
    assert "vm1" not in works("list", at)


def test_create_twice_refused(volumes: Path) -> None:
    works("create", f"dir={volumes}", "vm1", "1M")
    assert command("create", f"dir={volumes}", "vm1", "1M") == (
        1,
        "nbd_plugin: volume vm1 exists already\n",
    )


def test_resize_smaller_only_when_told(volumes: Path) -> None:
    works("create", f"dir={volumes}", "vm1", "2M")
    status, said = command("resize", f"dir={volumes}", "vm1", "1M")
    assert status == 1
    assert "loses data" in said
    works("resize", f"dir={volumes}", "vm1", "1M", "--shrink")
    assert (volumes / "vm1").stat().st_size == 1 << 20


@pytest.mark.nbdkit
def test_volume_being_written_is_busy(volumes: Path) -> None:
    works("create", f"dir={volumes}", "vm1", "1M")
    with Nbdkit(f"dir={volumes}") as server, RawClient(str(server.socket), "vm1"):
        for words in (["resize", "vm1", "2M"], ["remove", "vm1"], ["snapshot", "vm1", "s"]):
            status, said = command(words[0], f"dir={volumes}", *words[1:])
            assert (status, "open for writing" in said) == (1, True), said


@pytest.mark.nbdkit
def test_snapshot_keeps_the_contents_and_is_read_only(volumes: Path) -> None:
    works("create", f"dir={volumes}", "vm1", "1M")
    with Nbdkit(f"dir={volumes}") as server:
        with RawClient(str(server.socket), "vm1") as client:
            client.write(0, b"before")
        works("snapshot", f"dir={volumes}", "vm1", "s1")
        with RawClient(str(server.socket), "vm1") as client:
            client.write(0, b"after!")
        with RawClient(str(server.socket), "vm1@s1") as client:
            assert client.read(0, 6) == b"before"
            assert client.size_bytes == 1 << 20
    works("remove", f"dir={volumes}", "vm1@s1")


def test_names_that_leave_the_directory_refused(volumes: Path) -> None:
    inside = volumes / "inside"
    inside.mkdir()
    (volumes / "outside").write_bytes(b"x")
    for name in ("../outside", "/etc/hostname", "a/b", ".."):
        assert command("remove", f"dir={inside}", name)[0] == 1
        assert command("create", f"dir={inside}", name, "1M")[0] == 1
    assert sorted(path.name for path in volumes.iterdir()) == ["inside", "outside"]
    assert list(inside.iterdir()) == []


def test_wrong_number_of_words_is_usage_error(volumes: Path) -> None:
    assert command("create", f"dir={volumes}", "vm1")[0] == 2
