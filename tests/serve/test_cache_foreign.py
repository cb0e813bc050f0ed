"""A cache file and an export that do not belong together any more, or not as they were left.

Nothing that only the cache has is passed over, written over somebody else's data or dropped without
being told to; nothing old is served.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from bridge.errors import RequestError
from bridge.guest import Guest
from tests.serve.processes import process, serving, unix_uri, wait_for
from tests.serve.test_cache import (
    SIZE_BYTES,
    cache_file,
    cached,
    command,
    directory,
    nbdkit,
    shown,
    write_and_leave_dirty,
)
from tests.tools import HUNG_S, need

__all__ = ["directory"]

MIB = 1 << 20


def nbdkit_file(directory: Path) -> list[str]:
    """A server that knows nothing of sessions."""
    path = directory / "disk.img"
    return [need("nbdkit"), "-f", "-U", str(directory / "nbd"), "file", str(path)]


def write_as_somebody_else(directory: Path, offset: int) -> None:
    """4 KiB of "3" through the server, in a session of its own."""
    write = f"write -P 0x33 {offset} 4096"
    argv = [need("qemu-io"), "-f", "raw", "-c", write, unix_uri(directory / "nbd")]
    subprocess.run(argv, check=True, timeout=30, stdout=subprocess.DEVNULL)


async def refusal(directory: Path, *options: str) -> str:
    """What `serve` says when it does not start because of what was asked."""
    arguments = ("serve", unix_uri(directory / "nbd"), *cached(directory), *options)
    arguments += ("--socket-path", str(directory / "vhost"))
    return await trio.to_thread.run_sync(lambda: command(*arguments, status=2))


@pytest.mark.parametrize(
    "options", [("--cache-mode", "off"), ("--read-only",)], ids=["off", "read-only"]
)
async def test_serving_without_the_cache_that_has_unwritten_data_is_refused(options, directory):
    """The guest would see an old image, and what it wrote would be overwritten later."""
    await write_and_leave_dirty(directory)
    dirty = shown(directory)["dirty_bytes"]
    async with process(nbdkit(directory), ready=directory / "nbd"):
        text = await refusal(directory, *options)
    assert f"{dirty} bytes" in text
    assert "cache flush" in text
    assert shown(directory)["dirty_bytes"] == dirty


async def test_serving_a_read_only_export_whose_cache_has_unwritten_data_is_refused(directory):
    await write_and_leave_dirty(directory)
    read_only = [*nbdkit(directory)]
    read_only.insert(1, "-r")
    async with process(read_only, ready=directory / "nbd"):
        assert "cache flush" in await refusal(directory)


async def test_writing_past_a_clean_cache_of_a_foreign_server_removes_it(directory):
    """Nobody would tell the next run with the cache, and it would serve old bytes."""
    (directory / "disk.img").write_bytes(b"a" * SIZE_BYTES)
    vhost, nbd = directory / "vhost", directory / "nbd"
    async with process(nbdkit_file(directory), ready=nbd):
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await Guest.connect(vhost) as guest:
                assert await guest.read(0, MIB) == b"a" * MIB
        async with serving(unix_uri(nbd), vhost, *cached(directory), "--cache-mode", "off"):
            async with await Guest.connect(vhost) as guest:
                await guest.write(4096, b"n" * 4096)
                await guest.flush()
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await Guest.connect(vhost) as guest:
                assert await guest.read(4096, 4096) == b"n" * 4096


async def test_dirty_data_is_not_written_over_somebody_elses_without_being_told_to(directory):
    data = await write_and_leave_dirty(directory)
    dirty = shown(directory)["dirty_bytes"]
    image = directory / "disk.img"
    flush = ("cache", "flush", str(cache_file(directory)))
    async with process(nbdkit(directory), ready=directory / "nbd"):
        await trio.to_thread.run_sync(write_as_somebody_else, directory, 8 << 20)
        refused = await refusal(directory)
        not_flushed = await trio.to_thread.run_sync(lambda: command(*flush, status=2))
        kept = image.read_bytes()[8 << 20 :][:4096]
        await trio.to_thread.run_sync(lambda: command(*flush, "--force"))

    assert "somebody else wrote" in refused
    assert f"{dirty} bytes" in refused
    assert "cache flush --force" in refused
    assert "somebody else wrote" in not_flushed
    assert kept == b"3" * 4096
    assert image.read_bytes()[8 << 20 :][:MIB] == data


async def test_flushed_cache_stays_warm_and_blames_nobody(directory):
    """The session of `cache flush` is no somebody else."""
    await write_and_leave_dirty(directory)
    vhost = directory / "vhost"
    async with process(nbdkit(directory), ready=directory / "nbd"):
        flush = ("cache", "flush", str(cache_file(directory)))
        await trio.to_thread.run_sync(lambda: command(*flush))
        valid = shown(directory)["valid_bytes"]
        async with serving(unix_uri(directory / "nbd"), vhost, *cached(directory)):
            pass
    assert valid >= MIB
    assert shown(directory)["valid_bytes"] == valid


async def test_volume_made_anew_is_not_served_from_the_old_ones_cache(directory):
    """The image and the plugin's counters are gone; a volume of that name has others."""
    vhost, nbd = directory / "vhost", directory / "nbd"
    async with process(nbdkit(directory), ready=nbd):
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await Guest.connect(vhost) as guest:
                await guest.write(0, b"o" * MIB)
    remove_volume(directory)
    async with process(nbdkit(directory), ready=nbd):
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await Guest.connect(vhost) as guest:
                assert await guest.read(0, MIB) == bytes(MIB)


async def test_dirty_data_does_not_go_to_a_volume_made_anew(directory):
    await write_and_leave_dirty(directory)
    remove_volume(directory)
    async with process(nbdkit(directory), ready=directory / "nbd"):
        assert "another volume" in await refusal(directory)
    assert not any((directory / "disk.img").read_bytes()[8 << 20 :][:MIB])


def remove_volume(directory: Path) -> None:
    """The image with everything that the plugin keeps beside it."""
    kept = {directory / "cache", directory / "vhost"}
    for path in directory.iterdir():
        if path not in kept:
            subprocess.run(["rm", "-rf", str(path)], check=True)


async def test_volume_replaced_under_a_running_bridge_is_refused(directory):
    vhost, nbd = directory / "vhost", directory / "nbd"
    options = [*cached(directory), "--reconnect-timeout", "1"]
    async with process(nbdkit(directory), ready=nbd) as server, AsyncExitStack() as later:
        async with serving(unix_uri(nbd), vhost, *options):
            async with await Guest.connect(vhost) as guest:
                await guest.write(0, b"o" * MIB)
                await guest.flush()
                server.kill()
                server.wait()
                remove_volume(directory)
                await later.enter_async_context(process(nbdkit(directory), ready=nbd))
                with trio.fail_after(HUNG_S), pytest.raises(RequestError):
                    await guest.read(32 << 20, MIB)  # never of the other volume
                assert await guest.read(0, MIB) == b"o" * MIB
    assert not any((directory / "disk.img").read_bytes())


async def test_image_changed_while_a_foreign_server_was_away_is_read_anew(directory):
    image, vhost, nbd = directory / "disk.img", directory / "vhost", directory / "nbd"
    image.write_bytes(b"a" * SIZE_BYTES)
    async with process(nbdkit_file(directory), ready=nbd) as server, AsyncExitStack() as later:
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await Guest.connect(vhost) as guest:
                assert await guest.read(0, MIB) == b"a" * MIB
                server.kill()
                server.wait()
                image.write_bytes(b"b" * SIZE_BYTES)
                await later.enter_async_context(process(nbdkit_file(directory), ready=nbd))
                with trio.fail_after(HUNG_S):
                    while await guest.read(0, 4096) != b"b" * 4096:
                        await trio.sleep(0.05)
                assert await guest.read(0, MIB) == b"b" * MIB


async def test_image_changed_behind_the_plugins_back_is_read_anew(directory):
    """The counters do not move; the sample sees it."""
    image, vhost, nbd = directory / "disk.img", directory / "vhost", directory / "nbd"
    async with process(nbdkit(directory), ready=nbd):
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await Guest.connect(vhost) as guest:
                await guest.write(0, b"a" * MIB)
        with image.open("r+b") as file:
            file.write(b"b" * MIB)
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await Guest.connect(vhost) as guest:
                assert await guest.read(0, MIB) == b"b" * MIB


async def test_next_session_of_a_volume_finds_its_cache(directory):
    vhost, nbd = directory / "vhost", directory / "nbd"
    data = os.urandom(MIB)

    def uri(session: str) -> str:
        return f"nbd+unix:///@session={session}?socket={nbd}"

    async with process(nbdkit(directory), ready=nbd):
        async with serving(uri("one"), vhost, *cached(directory)) as child:
            async with await Guest.connect(vhost) as guest:
                await guest.write(0, data)
                child.send_signal(signal.SIGKILL)
            await wait_for(child, limit_s=HUNG_S)
        vhost.unlink(missing_ok=True)
        async with serving(uri("two"), vhost, *cached(directory)):
            async with await Guest.connect(vhost) as guest:
                assert await guest.read(0, MIB) == data
    cache_file(directory)  # there is just one


async def test_guest_that_moved_away_and_came_back_reads_what_it_wrote_there(directory):
    """Two bridges in one session, both stay: the counters say nothing of who wrote what."""
    nbd = directory / "nbd"
    uri = f"nbd+unix:///@session=move?socket={nbd}"
    (directory / "there").mkdir()
    there = [*cached(directory), "--cache-dir", str(directory / "there")]
    async with (
        process(nbdkit(directory), ready=nbd),
        serving(uri, directory / "here.vhost", *cached(directory)),
        serving(uri, directory / "there.vhost", *there),
    ):
        for place, content in (("here", b"1"), ("there", b"2"), ("here", b"3"), ("there", b"4")):
            async with await Guest.connect(directory / f"{place}.vhost") as guest:
                before = bytes([content[0] - 1]) if content != b"1" else b"\0"
                assert await guest.read(0, MIB) == before * MIB
                await guest.write(0, content * MIB)
                await guest.stop()  # answered when everything is at the server
