"""The cache end to end: kills, clean stops without a server, and the commands on its file."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio

from bridge.app import cache_warm
from bridge.cache.file.locking import has_content
from bridge.cache.file.opening import open_file
from bridge.errors import ConnectionLost, RequestError
from bridge.peers.blk_driver import BlkDriver
from bridge.peers.nbd_server import Faults, Server
from bridge.peers.nbd_server_disk import MemoryDisk
from tests.processes import (
    bridge_argv,
    pause,
    process,
    serving,
    unix_uri,
    wait_for,
)
from tests.tools import HUNG_S, need

PLUGIN = Path(__file__).parents[2] / "nbd_plugin" / "plugin.py"
SIZE_BYTES = 64 << 20


@pytest.fixture
def directory(directory: Path) -> Path:
    (directory / "cache").mkdir()
    return directory


def nbdkit(directory: Path) -> list[str]:
    return [
        *(need("nbdkit"), "-f", "-U", str(directory / "nbd")),
        *("python", str(PLUGIN), f"file={directory / 'disk.img'}", f"size={SIZE_BYTES}"),
    ]


def cached(directory: Path, mode: str = "writeback") -> list[str]:
    return [
        *("--cache-mode", mode, "--cache-dir", str(directory / "cache")),
        *("--cache-size", "32M", "--log-level", "warning"),
    ]


def cache_file(directory: Path) -> Path:
    (path,) = (directory / "cache").iterdir()
    return path


def command(*arguments: str, status: int = 0) -> str:
    """The output of `nbd-bridge ARGUMENTS`."""
    done = subprocess.run(bridge_argv(*arguments), capture_output=True, timeout=60, check=False)
    text = (done.stdout + done.stderr).decode()
    assert "Traceback" not in text
    assert done.returncode == status, text
    return text


def shown(directory: Path) -> dict[str, int]:
    told: dict[str, int] = json.loads(
        command("cache", "show", "--json", str(cache_file(directory)))
    )
    return told


async def write_and_leave_dirty(directory: Path) -> bytes:
    """Write through a bridge that is killed before it could write anything out."""
    data = os.urandom(1 << 20)
    vhost = directory / "vhost"
    async with process(nbdkit(directory), ready=directory / "nbd"):
        argv = bridge_argv(
            "serve", unix_uri(directory / "nbd"), "--socket-path", str(vhost), *cached(directory)
        )
        async with process(argv, ready=vhost) as child:
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(8 << 20, data)
                child.send_signal(signal.SIGKILL)
            await wait_for(child, limit_s=HUNG_S)
    return data


async def test_killed_bridge_next_start_brings_completed_writes_to_the_server(directory):
    data = await write_and_leave_dirty(directory)
    assert shown(directory)["dirty_bytes"] > 0
    vhost = directory / "vhost"
    async with process(nbdkit(directory), ready=directory / "nbd"):
        async with serving(unix_uri(directory / "nbd"), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                assert await guest.read(8 << 20, 1 << 20) == data
                await guest.flush()
    assert (directory / "disk.img").read_bytes()[8 << 20 : 9 << 20] == data
    assert shown(directory)["dirty_bytes"] == 0


async def test_flush_in_writeback_is_on_the_server(directory):
    data = os.urandom(3 << 20)
    vhost = directory / "vhost"
    async with process(nbdkit(directory), ready=directory / "nbd"):
        async with serving(unix_uri(directory / "nbd"), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(4096, data)
                await guest.flush()
                image = (directory / "disk.img").read_bytes()
    assert image[4096 : 4096 + len(data)] == data


async def test_writethrough_completed_write_is_on_the_server(directory):
    vhost = directory / "vhost"
    async with process(nbdkit(directory), ready=directory / "nbd"):
        async with serving(unix_uri(directory / "nbd"), vhost, *cached(directory, "writethrough")):
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(4096, b"a" * 4096)
                image = (directory / "disk.img").read_bytes()
    assert image[4096:8192] == b"a" * 4096


async def test_server_killed_and_started_again_guest_sees_no_error(directory):
    data = [os.urandom(256 << 10) for _ in range(8)]
    vhost = directory / "vhost"
    nbd = directory / "nbd"
    server = subprocess.Popen(nbdkit(directory))
    try:
        with trio.fail_after(HUNG_S):
            while not nbd.exists():
                await trio.sleep(0.02)
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                for number, each in enumerate(data):
                    await guest.write(number << 20, each)
                    if number % 3 == 1:
                        server.kill()
                        server.wait()
                        nbd.unlink(missing_ok=True)
                        server = subprocess.Popen(nbdkit(directory))
                await guest.flush()
                for number, each in enumerate(data):
                    assert await guest.read(number << 20, len(each)) == each
    finally:
        server.terminate()
        server.wait()
    image = (directory / "disk.img").read_bytes()
    for number, each in enumerate(data):
        assert image[number << 20 : (number << 20) + len(each)] == each


async def test_server_given_up_flush_fails_until_it_is_back_and_loses_nothing(directory):
    data = os.urandom(1 << 20)
    vhost, nbd = directory / "vhost", directory / "nbd"
    options = [*cached(directory), "--reconnect-timeout", "0.3"]
    async with process(nbdkit(directory), ready=nbd) as server, AsyncExitStack() as later:
        async with serving(unix_uri(nbd), vhost, *options):
            async with await BlkDriver.connect(vhost) as guest:
                server.kill()
                server.wait()
                await guest.write(8 << 20, data)
                with trio.fail_after(HUNG_S):
                    for _ in range(2):  # The second one finds that there is no connection.
                        with pytest.raises(RequestError):
                            await guest.flush()
                assert await guest.read(8 << 20, len(data)) == data
                await later.enter_async_context(process(nbdkit(directory), ready=nbd))
                with trio.fail_after(HUNG_S):
                    while not await flushes(guest):
                        await trio.sleep(0.1)
                image = (directory / "disk.img").read_bytes()
    assert image[8 << 20 :][: len(data)] == data


async def flushes(guest: BlkDriver) -> bool:
    try:
        await guest.flush()
    except RequestError:
        return False
    return True


def nbdkit_on_image(directory: Path) -> list[str]:
    return [
        *(need("nbdkit"), "-f", "-U", str(directory / "nbd")),
        *("python", str(PLUGIN), f"file={directory / 'disk.img'}"),
    ]


def grow_image(directory: Path, content: bytes) -> None:
    with open(directory / "disk.img", "ab") as image:
        image.write(content)


@pytest.mark.parametrize("size_bytes", [SIZE_BYTES, SIZE_BYTES + 1536], ids=["whole", "in a block"])
@pytest.mark.parametrize("killed", [True, False], ids=["killed", "stopped"])
async def test_disk_that_grows_is_used_to_its_new_end_and_after_a_restart(
    size_bytes, killed, directory
):
    image, vhost, nbd = directory / "disk.img", directory / "vhost", directory / "nbd"
    image.write_bytes(bytes(size_bytes))
    last, beyond = os.urandom(1024), os.urandom(1 << 20)
    new_end = size_bytes + (4 << 20)
    argv = bridge_argv("serve", unix_uri(nbd), "--socket-path", str(vhost), *cached(directory))
    server_argv = nbdkit_on_image(directory)
    async with process(server_argv, ready=nbd) as server:
        async with process(argv, ready=vhost) as child:
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(size_bytes - 1024, last)
                server.kill()
                server.wait()
                grow_image(directory, b"s" * (4 << 20))
                async with process(server_argv, ready=nbd):
                    with trio.fail_after(HUNG_S):
                        assert (await guest.config_changed()).capacity_sectors == new_end // 512
                    assert await guest.read(size_bytes - 1024, 2048) == last + b"s" * 1024
                    await guest.write(new_end - (1 << 20), beyond)
                    child.send_signal(signal.SIGKILL if killed else signal.SIGTERM)
                    status = await wait_for(child, limit_s=HUNG_S)
                    assert status == (-signal.SIGKILL if killed else 0)
    nbd.unlink(missing_ok=True)
    async with process(server_argv, ready=nbd):
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                assert guest.size_bytes == new_end
                assert await guest.read(size_bytes - 1024, 2048) == last + b"s" * 1024
                assert await guest.read(new_end - (1 << 20), 1 << 20) == beyond
    found = image.read_bytes()
    assert found[size_bytes - 1024 :] == last + b"s" * (3 << 20) + beyond


@pytest.mark.parametrize("size_bytes", [SIZE_BYTES, SIZE_BYTES + 1536], ids=["whole", "in a block"])
async def test_disk_that_grew_while_the_bridge_was_dead_takes_the_dirty_data(size_bytes, directory):
    image, vhost, nbd = directory / "disk.img", directory / "vhost", directory / "nbd"
    image.write_bytes(bytes(size_bytes))
    last = os.urandom(1024)
    argv = bridge_argv("serve", unix_uri(nbd), "--socket-path", str(vhost), *cached(directory))
    async with process(nbdkit_on_image(directory), ready=nbd):
        async with process(argv, ready=vhost) as child:
            async with await BlkDriver.connect(vhost) as guest:
                await guest.write(size_bytes - 1024, last)
                child.kill()
            await wait_for(child, limit_s=HUNG_S)
    grow_image(directory, b"s" * (4 << 20))
    nbd.unlink(missing_ok=True)
    async with process(nbdkit_on_image(directory), ready=nbd):
        async with serving(unix_uri(nbd), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                assert guest.size_bytes == size_bytes + (4 << 20)
                await guest.write(size_bytes + (1 << 20), b"n" * 4096)
    found = image.read_bytes()
    assert found[size_bytes - 1024 : size_bytes + 4096] == last + b"s" * 4096
    assert found[size_bytes + (1 << 20) :][:4096] == b"n" * 4096


async def test_cache_flush_brings_what_a_killed_bridge_left(directory):
    data = await write_and_leave_dirty(directory)
    async with process(nbdkit(directory), ready=directory / "nbd"):
        arguments = ("cache", "flush", "--json", str(cache_file(directory)))
        text = await trio.to_thread.run_sync(command, *arguments)
    assert json.loads(text) == {"flushed_bytes": len(data)}
    assert (directory / "disk.img").read_bytes()[8 << 20 : 9 << 20] == data
    assert shown(directory)["dirty_bytes"] == 0


async def test_cache_flush_to_a_server_that_is_too_slow_says_so_and_keeps_the_data(directory):
    await write_and_leave_dirty(directory)
    dirty = shown(directory)["dirty_bytes"]
    slow = [need("nbdkit"), "-f", "-U", str(directory / "nbd"), "--filter=delay", "file"]
    slow += [str(directory / "disk.img"), "wdelay=3"]
    async with process(slow, ready=directory / "nbd"):
        arguments = ("cache", "flush", "--timeout", "1", str(cache_file(directory)))
        text = await trio.to_thread.run_sync(lambda: command(*arguments, status=1))
    assert "did not take everything" in text
    assert shown(directory)["dirty_bytes"] == dirty


async def test_cache_flush_to_another_export_is_refused(directory):
    await write_and_leave_dirty(directory)
    dirty = shown(directory)["dirty_bytes"]
    text = command(
        "cache", "flush", str(cache_file(directory)), unix_uri(directory / "other"), status=2
    )
    assert "--moved" in text
    assert shown(directory)["dirty_bytes"] == dirty


async def test_cache_flush_skip_damaged_brings_every_intact_slot_to_the_server(directory):
    data = await write_and_leave_dirty(directory)
    path = cache_file(directory)
    file = open_file(str(path))
    slot = next(slot for slot, granule in enumerate(file.granule_of) if granule == 8 << 20 >> 16)
    file.state[slot] ^= 1
    file.close(clean=False)
    dirty = shown(directory)["dirty_bytes"]
    async with process(nbdkit(directory), ready=directory / "nbd"):
        refused = await trio.to_thread.run_sync(
            lambda: command("cache", "flush", str(path), status=2)
        )
        text = await trio.to_thread.run_sync(command, "cache", "flush", "--skip-damaged", str(path))
    assert f"cache flush --skip-damaged {path}" in refused
    assert "slots=1" in text
    assert f"{dirty} bytes written" in text
    assert dirty == len(data) - (64 << 10)
    image = (directory / "disk.img").read_bytes()
    assert image[8 << 20 : 9 << 20] == bytes(64 << 10) + data[64 << 10 :]
    assert shown(directory)["usable"]


async def test_cache_drop_dirty_needs_to_be_told_twice(directory):
    await write_and_leave_dirty(directory)
    path = str(cache_file(directory))
    assert "--discard-dirty" in command("cache", "drop", path, status=2)
    command("cache", "drop", "--discard-dirty", path)
    assert not list((directory / "cache").iterdir())


async def test_cache_file_in_use_is_left_alone(directory):
    vhost = directory / "vhost"
    async with process(nbdkit(directory), ready=directory / "nbd"):
        async with serving(unix_uri(directory / "nbd"), vhost, *cached(directory)):
            path = str(cache_file(directory))
            assert "in use" in await trio.to_thread.run_sync(
                lambda: command("cache", "drop", path, status=2)
            )


async def test_cache_warm_reads_only_allocated_ranges(directory):
    data = os.urandom(2 << 20)
    async with process(nbdkit(directory), ready=directory / "nbd"):
        with open(directory / "disk.img", "r+b") as image:
            image.seek(16 << 20)
            image.write(data)
        arguments = ("cache", "warm", unix_uri(directory / "nbd"), "--cache-size", "32M")
        arguments += ("--cache-dir", str(directory / "cache"))
        await trio.to_thread.run_sync(command, *arguments)
        assert 2 << 20 <= shown(directory)["valid_bytes"] < 4 << 20


def warm(directory: Path, *options: str) -> list[str]:
    """The arguments that warm the export at `directory`."""
    where = ("--cache-dir", str(directory / "cache"))
    return ["cache", "warm", unix_uri(directory / "nbd"), *where, *options]


async def test_cache_warm_keeps_the_size_of_the_file_there_is(directory):
    async with process(nbdkit(directory), ready=directory / "nbd"):
        for options in (("--cache-size", "8M"), ()):
            await trio.to_thread.run_sync(command, *warm(directory, *options))
        assert shown(directory)["cache_bytes"] == 8 << 20


async def test_cache_warm_of_a_cache_of_all_of_a_small_disk_keeps_it(directory):
    argv = [need("nbdkit"), "-f", "-U", str(directory / "nbd"), "memory", "2M"]
    async with process(argv, ready=directory / "nbd"):
        for _ in range(2):
            text = await trio.to_thread.run_sync(command, *warm(directory, "--json"))
            assert json.loads(text) == {"warmed_bytes": 0}  # All of it is a hole.
        assert shown(directory)["cache_bytes"] == 2 << 20


async def test_cache_warm_of_a_read_only_export_is_refused(directory):
    argv = [*nbdkit(directory)[:4], "-r", "memory", "8M"]
    async with process(argv, ready=directory / "nbd"):
        text = await trio.to_thread.run_sync(lambda: command(*warm(directory), status=2))
    assert "read-only" in text
    assert len(text.splitlines()) == 1
    assert not list((directory / "cache").iterdir())


async def test_cache_warm_range_behind_the_end_is_named(directory):
    async with process(nbdkit(directory), ready=directory / "nbd"):
        arguments = warm(directory, "--range", "1G:1M")
        text = await trio.to_thread.run_sync(lambda: command(*arguments, status=2))
    assert f"--range {1 << 30}:{1 << 20}: the disk has only {SIZE_BYTES} bytes" in text


async def test_cache_warm_counts_the_bytes_that_could_not_be_read(directory):
    argv = [*nbdkit(directory)[:4], "eval", "get_size=echo 3M", "can_write=exit 0"]
    argv += ["pread=echo EIO none >&2; exit 1", "pwrite=exit 1"]
    async with process(argv, ready=directory / "nbd"):
        text = await trio.to_thread.run_sync(lambda: command(*warm(directory), status=1))
    assert f"{3 << 20} bytes could not be read" in text


def slow_nbdkit(directory: Path) -> list[str]:
    """A server of an image without holes, whose reads take longer than any test."""
    image = directory / "disk.img"
    image.write_bytes(b"x" * (32 << 20))
    return [*nbdkit(directory)[:4], "--filter=delay", "file", str(image), "rdelay=600"]


async def warming(directory: Path, *options: str) -> subprocess.Popen[bytes]:
    """A `cache warm` that has begun."""
    child = subprocess.Popen(bridge_argv(*warm(directory, *options)), stderr=subprocess.PIPE)
    with trio.fail_after(HUNG_S):
        while not any(has_content(str(path)) for path in (directory / "cache").iterdir()):
            await trio.sleep(0.02)
    return child


async def test_cache_warm_gives_a_lost_server_up_after_its_timeout(directory):
    async with process(slow_nbdkit(directory), ready=directory / "nbd") as server:
        child = await warming(directory, "--timeout", "1")
        server.kill()
        assert await wait_for(child, limit_s=HUNG_S) == 1
    assert child.stderr is not None
    text = child.stderr.read().decode()
    child.stderr.close()
    assert (
        "the server was lost and could not be reached again within 1 s; 0 bytes are in the cache"
        in text
    )
    assert "Traceback" not in text
    assert shown(directory)["clean_shutdown"]


async def test_cache_warm_leaves_a_server_that_answers_nothing(directory):
    """It takes every connection, and negotiates: nothing is ever lost for long enough."""
    server = Server({"": MemoryDisk(1 << 20)}, faults=Faults(stall=True))
    (directory / "cache").mkdir(exist_ok=True)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve_unix, directory / "s")
        with trio.fail_after(HUNG_S), pytest.raises(ExceptionGroup) as caught:
            await cache_warm.warm(
                unix_uri(directory / "s"),
                cache_bytes=4 << 20,
                directory=str(directory / "cache"),
                ranges=(),
                timeout_s=0.5,
                progress=lambda done, total: None,
            )
        nursery.cancel_scope.cancel()
    assert caught.group_contains(ConnectionLost, match=f"{directory}/s: the server ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT])
async def test_cache_warm_interrupted_with_a_hung_server_is_one_line_and_leaves_a_usable_file(
    number, directory
):
    async with process(slow_nbdkit(directory), ready=directory / "nbd") as server:
        child = await warming(directory)
        pause(server)
        child.send_signal(number)
        assert await wait_for(child, limit_s=HUNG_S) == 1
        server.kill()
    assert child.stderr is not None
    text = child.stderr.read().decode()
    child.stderr.close()
    assert "nbd-bridge: interrupted" in text
    assert "Traceback" not in text
    assert shown(directory)["usable"]


async def test_image_changed_meanwhile_is_read_anew(directory):
    vhost = directory / "vhost"
    argv = [need("nbdkit"), "-f", "-U", str(directory / "nbd"), "file", str(directory / "disk.img")]
    (directory / "disk.img").write_bytes(b"a" * SIZE_BYTES)
    for expected in (b"a", b"b"):
        (directory / "disk.img").write_bytes(expected * SIZE_BYTES)
        async with process(argv, ready=directory / "nbd"):
            async with serving(unix_uri(directory / "nbd"), vhost, *cached(directory)):
                async with await BlkDriver.connect(vhost) as guest:
                    assert await guest.read(0, 4 << 20) == expected * (4 << 20)
        (directory / "nbd").unlink(missing_ok=True)


async def test_stop_without_a_server_keeps_dirty_data_for_the_next_start(directory):
    data = os.urandom(1 << 20)
    vhost = directory / "vhost"
    argv = bridge_argv(
        "serve", unix_uri(directory / "nbd"), "--socket-path", str(vhost), *cached(directory)
    )
    async with process(nbdkit(directory), ready=directory / "nbd") as server:
        async with process([*argv, "--stop-timeout", "1"], ready=vhost) as child:
            async with await BlkDriver.connect(vhost) as guest:
                server.kill()
                server.wait()
                await guest.write(8 << 20, data)
            child.terminate()
            assert await wait_for(child, limit_s=HUNG_S) == 1  # something was left behind
    assert shown(directory)["dirty_bytes"] >= 1 << 20
    (directory / "nbd").unlink(missing_ok=True)
    async with process(nbdkit(directory), ready=directory / "nbd"):
        async with serving(unix_uri(directory / "nbd"), vhost, *cached(directory)):
            async with await BlkDriver.connect(vhost) as guest:
                assert await guest.read(8 << 20, 1 << 20) == data


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda file: file.write_bytes(b"x" * (1 << 20)), "not a cache file; remove it with rm"),
        (lambda file: os.truncate(file, 1 << 20), "cut short.*cache drop --discard-dirty"),
        (lambda file: _flip(file, 24), "damaged header.*cache drop --discard-dirty"),
    ],
    ids=["foreign", "truncated", "flipped header"],
)
async def test_damaged_cache_file_is_refused_with_its_name(change, says, directory):
    await write_and_leave_dirty(directory)
    path = cache_file(directory)
    change(path)
    async with process(nbdkit(directory), ready=directory / "nbd"):
        arguments = ("serve", unix_uri(directory / "nbd"), *cached(directory))
        arguments += ("--socket-path", str(directory / "vhost"))
        text = await trio.to_thread.run_sync(lambda: command(*arguments, status=2))
    assert str(path) in text
    assert re.search(says, text)


def _flip(path: Path, position: int) -> None:
    """Flip a bit in both copies of the header."""
    with open(path, "r+b") as file:
        for start in (0, 4096):
            file.seek(start + position)
            byte = file.read(1)[0]
            file.seek(start + position)
            file.write(bytes([byte ^ 1]))


def test_cache_directory_missing_is_named(directory):
    argv = [need("nbdkit"), "-U", str(directory / "nbd"), "memory", "64M", "--run"]
    words = bridge_argv("serve", unix_uri(directory / "nbd"), "--socket-path", "/tmp/x")
    words += ["--cache-mode", "writeback", "--cache-dir", str(directory / "none")]
    done = subprocess.run(
        [*argv, " ".join(f"'{word}'" for word in words)], capture_output=True, check=False
    )
    assert done.returncode == 2
    assert str(directory / "none") in done.stderr.decode()
