"""Parameters that cannot be: nbdkit refuses to start with one line that names the mistake."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbd_plugin.errors import PluginError
from nbd_plugin.settings import Settings
from nbd_plugin.sizes import format_size, parse_size
from tests.plugin.server import Nbdkit, refusal


@pytest.mark.nbdkit
@pytest.mark.parametrize(
    ("parameters", "text"),
    [
        ([], "no store"),
        (["store=tape"], "unknown store 'tape'"),
        (["dir=/", "colour=red"], "unknown parameter 'colour'"),
        (["dir=/nowhere/at/all"], "/nowhere/at/all"),
        (["file=/nowhere/at/all/disk", "size=1M"], "/nowhere/at/all"),
        (["file={dir}/absent"], "absent does not exist"),
        (["file={dir}"], "is a directory: dir= serves the files in it"),
        (["file=/dev/null"], "file=/dev/null is neither a file nor a block device"),
        (["dir={dir}", "connections=many"], "connections='many' is not a number"),
        (["dir={dir}", "connections=-1"], "connections='-1' is not a number"),
        (["store=memory", "size=1M", "state={dir}"], "do not go with store=memory"),
        (["file={dir}/x", "dir={dir}"], "either dir= or file="),
        (["file={dir}/x", "size=0"], "size '0'"),
        (["file={dir}/x", "size=many"], "size 'many'"),
        (["file={dir}/x", "size=-5"], "size '-5'"),
        (["file={dir}/x", "size=16E"], "8 EiB"),
        (["file={dir}/full", "size=2M"], "full has 3 bytes"),
        (["dir={dir}", "create=on"], "create=on needs size="),
        (["dir={dir}", "create=maybe"], "create='maybe'"),
        (["dir={dir}", "fence=high"], "fence='high'"),
        (["dir={dir}", "fence_timeout=soon"], "fence_timeout='soon'"),
        (["dir={dir}", "fence_timeout=-1"], "fence_timeout='-1'"),
        (["dir={dir}", "parallel=yes"], "parallel='yes'"),
        (["dir={dir}", "volume=../x"], "'../x'"),
        (["dir={dir}", "pool=p"], "pool= goes with store=rbd"),
        (["store=memory"], "store=memory needs size="),
        (["store=memory", "dir={dir}"], "do not go with store=memory"),
        (["store=rbd"], "store=rbd needs pool="),
    ],
)
def test_parameter_that_cannot_be_refused_in_one_line(
    volumes: Path, parameters: list[str], text: str
) -> None:
    (volumes / "full").write_bytes(b"abc")
    said = refusal(*(parameter.format(dir=volumes) for parameter in parameters))
    assert text in said
    assert "Traceback" not in said
    assert len(said.splitlines()) == 1


@pytest.mark.nbdkit
def test_lone_file_with_a_strange_name_is_volume_disk(volumes: Path) -> None:
    with Nbdkit(f"file={volumes}/my disk!", "size=1M") as server:
        assert server.process.poll() is None
    assert (volumes / "my disk!").stat().st_size == 1 << 20


def test_directory_whose_name_is_too_long_is_none() -> None:
    settings = Settings()
    settings.set("dir", "/" + "x" * 300)

    with pytest.raises(PluginError, match="no such directory"):
        settings.check()


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1", 1), ("512", 512), ("10G", 10 << 30), ("4k", 4096), ("3MiB", 3 << 20), ("1tb", 10**12)],
)
def test_size_as_people_write_it_in_bytes(text: str, size_bytes: int) -> None:
    assert parse_size(text) == size_bytes


@given(st.integers(min_value=1, max_value=(1 << 63) - 512))
def test_size_written_and_read_back_the_same(size_bytes: int) -> None:
    assert parse_size(format_size(size_bytes)) == size_bytes


@given(st.text(max_size=30))
def test_size_any_text_is_positive_or_refused(text: str) -> None:
    with contextlib.suppress(PluginError):
        assert parse_size(text) > 0
