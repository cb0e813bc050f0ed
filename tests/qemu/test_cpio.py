"""The initrd's archive, read back by the system's cpio and by a reader of our own."""

import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bridge.demo.cpio import CpioArchive
from tests.tools import need


def read_newc(data: bytes) -> dict[str, tuple[int, bytes]]:
    """name -> (mode, content), as the kernel's unpacker would see it."""
    found, at = {}, 0
    while True:
        assert at % 4 == 0
        assert data[at : at + 6] == b"070701"
        fields = [int(data[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        name_at = at + 110
        name = data[name_at : name_at + fields[11] - 1].decode()
        content_at = (name_at + fields[11] + 3) // 4 * 4
        content = data[content_at : content_at + fields[6]]
        at = (content_at + fields[6] + 3) // 4 * 4
        if name == "TRAILER!!!":
            assert at == len(data)
            return found
        assert name not in found
        found[name] = (fields[1], content)


@pytest.mark.qemu
def test_archive_with_parents_is_unpacked_by_busybox_cpio(tmp_path: Path) -> None:
    archive = CpioArchive()
    archive.add_file("/a/b/program", b"#!/bin/sh\n", executable=True)
    archive.add_symlink("/a/link", "b/program")
    archive.add_folder("/empty")

    subprocess.run(
        [need("busybox"), "cpio", "-i"], input=archive.finish(), cwd=tmp_path, check=True,
        capture_output=True,
    )  # fmt: skip

    assert (tmp_path / "a/b/program").read_bytes() == b"#!/bin/sh\n"
    assert (tmp_path / "a/b/program").stat().st_mode & 0o777 == 0o755
    assert (tmp_path / "a/link").readlink() == Path("b/program")
    assert (tmp_path / "empty").is_dir()


@given(
    st.dictionaries(
        st.text("abc", min_size=1, max_size=3).map(lambda name: f"/{name}"), st.binary(max_size=9)
    )
)
def test_archive_with_any_files_reads_back_whole(files: dict[str, bytes]) -> None:
    archive = CpioArchive()
    for name, content in files.items():
        archive.add_file(name, content)

    found = read_newc(archive.finish())

    assert {f"/{name}": content for name, (_, content) in found.items()} == files


def test_same_path_twice_keeps_the_first() -> None:
    archive = CpioArchive()
    archive.add_file("/scripts/a.sh", b"first")
    archive.add_file("/scripts/a.sh", b"second")

    assert read_newc(archive.finish())["scripts/a.sh"][1] == b"first"
