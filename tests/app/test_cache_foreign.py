"""A cache file and an export that do not belong together any more, or not as they were left.

Nothing that only the cache has is passed over, written over another host's data or dropped without
being told to; nothing old is served.
"""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import trio

from bridge.app.cache_flush import flush_file
from bridge.cache.file.inspect import show
from bridge.errors import ConfigError, RequestError
from bridge.peers.blk_driver import BlkDriver
from tests.app.test_cache import (
    SIZE_BYTES,
    cache_file,
    cached,
    command,
    directory,
    nbdkit,
    shown,
    write_and_leave_dirty,
)
from tests.ports import free_port
from tests.processes import bridge_argv, process, serving, unix_uri, wait_for
from tests.tools import HUNG_S, need, told

__all__ = ["directory"]

MIB = 1 << 20


def nbdkit_file(directory: Path) -> list[str]:
    """A server that knows nothing of sessions."""
    path = directory / "disk.img"
    return [need("nbdkit"), "-f", "-U", str(directory / "nbd"), "file", str(path)]


def write_as_another_host(directory: Path, offset: int) -> None:
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
    """The next run with the cache would not know of it, and would serve old bytes."""
    (directory / "disk.img").write_bytes(b"a" * SIZE_BYTES)
    vhost, nbd = directory / "vhost", directory / "nbd"
    async with process(nbdkit_file(directory), ready=nbd):
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                assert await guest.read(0, MIB) == b"a" * MIB
        async with serving(unix_uri(nbd), vhost, *cached(directory), "--cache-mode", "off"):
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(4096, b"n" * 4096)
                await guest.flush()
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                assert await guest.read(4096, 4096) == b"n" * 4096


async def test_dirty_data_is_not_written_over_another_hosts_unless_forced(directory):
    data = await write_and_leave_dirty(directory)
    dirty = shown(directory)["dirty_bytes"]
    image = directory / "disk.img"
    flush = ("cache", "flush", str(cache_file(directory)))
    async with process(nbdkit(directory), ready=directory / "nbd"):
        await trio.to_thread.run_sync(write_as_another_host, directory, 8 << 20)
        refused = await refusal(directory)
        not_flushed = await trio.to_thread.run_sync(lambda: command(*flush, status=2))
        kept = image.read_bytes()[8 << 20 :][:4096]
        await trio.to_thread.run_sync(lambda: command(*flush, "--force"))

    assert "another host wrote" in refused
    assert f"{dirty} bytes" in refused
    assert "cache flush --force" in refused
    assert "another host wrote" in not_flushed
    assert kept == b"3" * 4096
    assert image.read_bytes()[8 << 20 :][:MIB] == data


async def test_flushed_cache_stays_warm_and_counts_as_unchanged(directory):
    """The session of `cache flush` does not count as another host's."""
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
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(0, b"o" * MIB)
    remove_volume(directory)
    async with process(nbdkit(directory), ready=nbd):
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
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
            async with await BlkDriver.connect(vhost) as guest:
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
            async with await BlkDriver.connect(vhost) as guest:
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
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(0, b"a" * MIB)
        with image.open("r+b") as file:
            file.write(b"b" * MIB)
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                assert await guest.read(0, MIB) == b"b" * MIB


async def test_next_session_of_a_volume_finds_its_cache(directory):
    vhost, nbd = directory / "vhost", directory / "nbd"
    data = os.urandom(MIB)

    def uri(session: str) -> str:
        return f"nbd+unix:///@session={session}?socket={nbd}"

    async with process(nbdkit(directory), ready=nbd):
        async with serving(uri("one"), vhost, *cached(directory)) as child:
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(0, data)
                child.send_signal(signal.SIGKILL)
            await wait_for(child, limit_s=HUNG_S)
        vhost.unlink(missing_ok=True)
        async with serving(uri("two"), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
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
            async with await BlkDriver.connect(directory / f"{place}.vhost") as guest:
                before = bytes([content[0] - 1]) if content != b"1" else b"\0"
                assert await guest.read(0, MIB) == before * MIB
                await guest.write(0, content * MIB)
                await guest.stop()  # answered when everything is at the server


CLEAN, DIRTY = b"c", b"d"


async def leave_clean_and_dirty(directory: Path, dirty_mib: int = 1) -> None:
    """1 MiB that was flushed, and from 8 MiB on what only the cache has; on a server without
    sessions."""
    (directory / "disk.img").write_bytes(bytes(SIZE_BYTES))
    nbd, vhost = directory / "nbd", directory / "vhost"
    argv = bridge_argv("serve", unix_uri(nbd), "--socket-path", str(vhost), *cached(directory))
    async with process(nbdkit_file(directory), ready=nbd):
        async with process([*argv, "--flush-interval", "0"], ready=vhost) as child:
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(0, CLEAN * MIB)
                await guest.flush()
                for number in range(dirty_mib):
                    await guest.write((8 + number) << 20, DIRTY * MIB)
                child.send_signal(signal.SIGKILL)
            await wait_for(child, limit_s=HUNG_S)


async def test_dirty_data_is_not_written_over_a_foreign_servers_changed_image(directory):
    """The server does not count who wrote: blocks that were flushed or read before are compared."""
    await leave_clean_and_dirty(directory)
    image = directory / "disk.img"
    image.write_bytes(b"z" * SIZE_BYTES)
    dirty = shown(directory)["dirty_bytes"]
    path = str(cache_file(directory))
    async with process(nbdkit_file(directory), ready=directory / "nbd"):
        for _ in range(2):
            refused = await refusal(directory)
            assert "another host wrote" in refused
            assert f"{dirty} bytes" in refused
            assert f"cache flush --force {path}" in refused
            assert f"cache drop --discard-dirty {path}" in refused
            text = await trio.to_thread.run_sync(lambda: command("cache", "flush", path, status=2))
            assert "another host wrote" in text
        assert image.read_bytes() == b"z" * SIZE_BYTES
        await trio.to_thread.run_sync(lambda: command("cache", "flush", "--force", path))
    assert image.read_bytes()[8 << 20 :][:MIB] == DIRTY * MIB
    assert image.read_bytes()[:MIB] == b"z" * MIB
    assert shown(directory)["dirty_bytes"] == shown(directory)["valid_bytes"] - MIB == 0


@pytest.mark.parametrize("grown_bytes", [0, 1 << 20], ids=["lost", "lost and grown"])
async def test_foreign_server_that_lost_unflushed_writes_gets_them_again(directory, grown_bytes):
    await leave_clean_and_dirty(directory)
    nbd, vhost, image = directory / "nbd", directory / "vhost", directory / "disk.img"
    content = image.read_bytes()
    image.write_bytes(content[: 8 << 20] + bytes(SIZE_BYTES + grown_bytes - (8 << 20)))
    async with process(nbdkit_file(directory), ready=nbd):
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                assert await guest.read(8 << 20, MIB) == DIRTY * MIB
                await guest.flush()
    assert image.read_bytes()[8 << 20 :][:MIB] == DIRTY * MIB


def nbdkit_tcp(directory: Path, port: int, *what: str) -> list[str]:
    pid = str(directory / "pid")
    return [need("nbdkit"), "-f", "-p", str(port), "-P", pid, *what]


def plugin(directory: Path) -> list[str]:
    return nbdkit(directory)[4:]


def foreign(directory: Path) -> list[str]:
    image = directory / "disk.img"
    if not image.exists():
        image.write_bytes(bytes(SIZE_BYTES))
    return ["file", str(image)]


async def write_and_kill(directory: Path, uri: str, *options: str) -> None:
    vhost = directory / "vhost"
    argv = bridge_argv("serve", uri, "--socket-path", str(vhost), *cached(directory), *options)
    async with process(argv, ready=vhost) as child:
        async with await BlkDriver.connect(vhost) as guest:
            await guest.write(8 << 20, DIRTY * MIB)
            child.send_signal(signal.SIGKILL)
        await wait_for(child, limit_s=HUNG_S)


@pytest.mark.parametrize("server", [plugin, foreign])
@pytest.mark.parametrize(
    ("first", "then"),
    [("localhost", "127.0.0.1"), ("127.0.0.1", "[::1]"), ("LOCALHOST", "127.0.0.1")],
)
async def test_dirty_data_is_found_under_another_spelling_of_the_server(
    server, first, then, directory
):
    port, vhost = free_port(), directory / "vhost"
    argv = nbdkit_tcp(directory, port, *server(directory))
    async with process(argv, ready=directory / "pid"):
        await write_and_kill(directory, f"nbd://{first}:{port}/")
        async with serving(f"nbd://{then}:{port}/", vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                assert await guest.read(8 << 20, MIB) == DIRTY * MIB
    cache_file(directory)  # there is just one


async def test_default_export_by_its_name_finds_the_volumes_dirty_data(directory):
    """The plugin tells which volume it is."""
    nbd, vhost = directory / "nbd", directory / "vhost"
    volumes = directory / "volumes"
    volumes.mkdir()
    argv = [*nbdkit(directory)[:6], f"dir={volumes}", "volume=vm0"]
    (volumes / "vm0").write_bytes(bytes(SIZE_BYTES))
    async with process(argv, ready=nbd):
        await write_and_kill(directory, unix_uri(nbd))
        async with serving(unix_uri(nbd, "vm0"), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                assert await guest.read(8 << 20, MIB) == DIRTY * MIB
    cache_file(directory)


async def test_dirty_data_of_a_possible_default_export_is_not_passed_over(directory):
    nbd = directory / "nbd"
    (directory / "disk.img").write_bytes(bytes(SIZE_BYTES))
    async with process(nbdkit_file(directory), ready=nbd):
        await write_and_kill(directory, unix_uri(nbd))
        path = str(cache_file(directory))
        arguments = ("serve", unix_uri(nbd, "vm0"), *cached(directory))
        arguments += ("--socket-path", str(directory / "vhost"))
        text = await trio.to_thread.run_sync(lambda: command(*arguments, status=2))
    assert f"{path} may belong to" in text
    assert f"cache flush {path}" in text


@pytest.mark.parametrize("options", [(), ("--cache-mode", "off")], ids=["cached", "off"])
@pytest.mark.parametrize("server", [nbdkit, nbdkit_file])
async def test_dirty_data_in_another_cache_directory_is_not_passed_over(server, options, directory):
    nbd = directory / "nbd"
    (directory / "disk.img").write_bytes(bytes(SIZE_BYTES))
    (directory / "other").mkdir()
    other = ("--cache-dir", str(directory / "other"))
    async with process(server(directory), ready=nbd):
        await write_and_kill(directory, unix_uri(nbd), *other)
        (path,) = (directory / "other").iterdir()
        text = await refusal(directory, *options)
        assert f"{path} belongs to" in text
        await trio.to_thread.run_sync(lambda: command("cache", "flush", str(path)))
        async with serving(unix_uri(nbd), directory / "vhost", *cached(directory), *options):
            pass
    assert (directory / "disk.img").read_bytes()[8 << 20 :][:MIB] == DIRTY * MIB


async def test_clean_cache_of_another_spelling_of_a_foreign_server_is_not_left_to_grow_old(
    directory,
):
    """The cache's next user would not know that the export was written meanwhile."""
    nbd, vhost = directory / "nbd", directory / "vhost"
    (directory / "disk.img").write_bytes(bytes(SIZE_BYTES))
    async with process(nbdkit_file(directory), ready=nbd):
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(0, b"o" * MIB)
                await guest.flush()
        async with serving(unix_uri(nbd, "vm0"), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(0, b"n" * MIB)
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                assert await guest.read(0, MIB) == b"n" * MIB


async def test_cache_flush_of_an_export_with_a_long_name_needs_its_uri_and_takes_it(directory):
    """The header has only the beginning of the name."""
    nbd = directory / "nbd"
    (directory / "disk.img").write_bytes(bytes(SIZE_BYTES))
    name = "n" * 2000
    async with process(nbdkit_file(directory), ready=nbd):
        await write_and_kill(directory, unix_uri(nbd, name))
        path = str(cache_file(directory))
        for uri in ((), (unix_uri(nbd, name[:1500]),), (unix_uri(nbd, name + "n"),)):
            arguments = ("cache", "flush", path, *uri)
            text = await trio.to_thread.run_sync(partial(command, *arguments, status=2))
            assert "give the URI after the file" in text or "--moved" in text
        arguments = ("cache", "flush", path, unix_uri(nbd, name))
        await trio.to_thread.run_sync(lambda: command(*arguments))
    assert (directory / "disk.img").read_bytes()[8 << 20 :][:MIB] == DIRTY * MIB


async def test_cache_flush_of_a_file_that_was_exchanged_meanwhile_is_refused(
    directory, monkeypatch
):
    """What is looked at and what is flushed must be one file."""
    nbd = directory / "nbd"
    (directory / "disk.img").write_bytes(bytes(SIZE_BYTES))
    async with process(nbdkit_file(directory), ready=nbd):
        await write_and_kill(directory, unix_uri(nbd, "vm0"))
        path = str(cache_file(directory))
        summary = show(path)
        monkeypatch.setattr(
            "bridge.app.cache_flush.show", lambda path: replace(summary, digest="00", export="vm0")
        )
        refusal = pytest.RaisesExc(ConfigError, check=told("is another one than a moment ago"))
        with pytest.RaisesGroup(refusal, flatten_subgroups=True):
            await flush_file(path, unix_uri(nbd, "vm0"), moved=True, timeout_s=10)
    assert show(path).dirty_bytes == MIB
    assert not any((directory / "disk.img").read_bytes())


async def test_cache_flush_sends_no_more_when_the_image_was_exchanged_under_it(directory):
    """Not even without sessions: what comes back is compared first, as at the start."""
    nbd, image = directory / "nbd", directory / "disk.img"
    await leave_clean_and_dirty(directory, dirty_mib=16)
    log = directory / "log"
    slow = [*nbdkit_file(directory)[:4], "--filter=log", "--filter=delay", "file", str(image)]
    slow += ["wdelay=600", f"logfile={log}"]
    flush = bridge_argv("cache", "flush", str(cache_file(directory)))
    async with process(slow, ready=nbd) as server:
        child = subprocess.Popen(flush, stderr=subprocess.PIPE)
        with trio.fail_after(HUNG_S):
            while "Write" not in (log.read_text() if log.exists() else ""):
                await trio.sleep(0.02)
        server.kill()
        server.wait()
    image.write_bytes(b"z" * SIZE_BYTES)
    async with process(nbdkit_file(directory), ready=nbd):
        assert await wait_for(child, limit_s=HUNG_S) == 1
    assert child.stderr is not None
    text = child.stderr.read().decode()
    child.stderr.close()
    assert "the export was changed meanwhile" in text
    assert "Traceback" not in text
    assert image.read_bytes().count(b"z") >= SIZE_BYTES - (8 << 20)
    assert shown(directory)["dirty_bytes"] == 16 << 20


async def test_dirty_data_does_not_go_to_a_volume_that_grew_and_was_changed(directory):
    """The plugin can only say that it is longer: the content has to confirm that this is all."""
    nbd, vhost, image = directory / "nbd", directory / "vhost", directory / "disk.img"
    argv = bridge_argv("serve", unix_uri(nbd), "--socket-path", str(vhost), *cached(directory))
    async with process(nbdkit(directory), ready=nbd):
        async with process(argv, ready=vhost) as child:
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(0, CLEAN * MIB)
                await guest.flush()
                await guest.write(8 << 20, DIRTY * MIB)
                child.send_signal(signal.SIGKILL)
            await wait_for(child, limit_s=HUNG_S)
    os.truncate(image, SIZE_BYTES + MIB)
    with image.open("r+b") as file:
        file.write(b"superblock")
    async with process(nbdkit(directory)[:-1], ready=nbd):
        assert "cache flush --force" in await refusal(directory)
    assert image.read_bytes()[8 << 20 :][:MIB] != DIRTY * MIB
