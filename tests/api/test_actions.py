"""What can be asked of a running bridge, over its control socket."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
import trio

from bridge.cache.cache_options import WRITEBACK
from bridge.errors import BridgeError, ConfigError, RequestError
from bridge.peers.blk_driver import BlkDriver
from bridge.peers.nbd_server import Faults, Server
from bridge.peers.nbd_server_disk import MemoryDisk
from bridge.spec import nbd as p
from tests.api.bridges import SIZE_BYTES, served
from tests.tools import HUNG_S


def changes(server: Server) -> list[int]:
    assert server.commands is not None
    return [each.kind for each in server.commands if each.kind in (p.CMD_WRITE, p.CMD_FLUSH)]


async def test_dirty_data_makes_a_reboot_unsafe_until_it_is_flushed(directory: Path) -> None:
    async with served(directory, cache=WRITEBACK) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 65536)
            found = await bridge.status()
            assert found["cache"]["dirty_bytes"] == 65536
            assert not found["safe_to_reboot"]["safe"]
            assert "no, because 64 KiB are not on the server" in found["safe_to_reboot"]["answer"]
            flushed = await bridge.ask("POST", "/flush")
            assert flushed["dirty_bytes"] == 0
            assert (await bridge.status())["safe_to_reboot"]["safe"]
            # What is cached is still there.
            assert (await bridge.status())["cache"]["used_bytes"] >= 65536
        disk = bridge.server.exports[""]
        assert isinstance(disk, MemoryDisk)
        assert disk.read(0, 65536) == b"a" * 65536


async def test_unflushed_write_without_a_cache_makes_a_reboot_unsafe(directory: Path) -> None:
    async with served(directory) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 512)
            assert not (await bridge.status())["safe_to_reboot"]["safe"]
            await bridge.ask("POST", "/flush")
            assert (await bridge.status())["safe_to_reboot"]["safe"]


async def test_flush_that_the_server_refuses_is_an_error_and_the_data_stays(
    directory: Path,
) -> None:
    server = Server({"": MemoryDisk(SIZE_BYTES)})
    async with served(directory, cache=WRITEBACK, server=server) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 65536)
            server.faults.errors = {p.CMD_WRITE: errno.EIO}
            with pytest.raises(BridgeError, match="could not flush"):
                await bridge.ask("POST", "/flush")
            assert (await bridge.status())["cache"]["dirty_bytes"] == 65536
            server.faults.errors = {}
            await bridge.ask("POST", "/flush")


async def test_flush_is_no_success_while_the_guest_has_not_heard_of_a_loss(
    directory: Path,
) -> None:
    """The server has dropped the write with the first one, and has nothing to do in the second."""
    async with served(directory) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 512)
            bridge.server.faults.errors = {p.CMD_FLUSH: errno.EIO}
            with pytest.raises(BridgeError, match="could not flush"):
                await bridge.ask("POST", "/flush")
            bridge.server.faults.errors = {}
            with pytest.raises(BridgeError, match="may have lost writes"):
                await bridge.ask("POST", "/flush")
            with pytest.raises(RequestError):
                await guest.flush()
            await bridge.ask("POST", "/flush")


async def test_flush_that_takes_too_long_says_so_and_goes_on(directory: Path) -> None:
    server = Server({"": MemoryDisk(SIZE_BYTES)}, faults=Faults())
    async with served(directory, cache=WRITEBACK, server=server) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 65536)
            server.faults.delay_s = 0.3
            with pytest.raises(BridgeError, match=r"not done after 0\.05 s, it goes on"):
                await bridge.ask("POST", "/flush", {"timeout_s": 0.05})
            server.faults.delay_s = 0
            await bridge.until("cache", dirty_bytes=0)


async def test_write_through_set_at_run_time_has_a_write_wait_for_the_server(
    directory: Path,
) -> None:
    async with served(directory, cache=WRITEBACK, flush_interval_s=0) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            # An open block: writes to it are copies.
            await guest.write(0, b"a" * 4096)
            await guest.write(0, b"b" * 4096)
            bridge.server.commands = []
            answer = await bridge.ask("POST", "/settings", {"cache_mode": "writethrough"})
            assert answer["cache_mode"] == "writethrough"
            await guest.write(0, b"c" * 4096)
            assert changes(bridge.server) == [p.CMD_WRITE]
            await bridge.ask("POST", "/settings", {"cache_mode": "writeback"})
            bridge.server.commands = []
            await guest.write(0, b"d" * 4096)
            assert changes(bridge.server) == []
            assert await guest.read(0, 4096) == b"d" * 4096


async def test_settings_are_changed_all_or_not_at_all(directory: Path) -> None:
    async with served(directory) as bridge:
        before = await bridge.ask("GET", "/settings")
        with pytest.raises(BridgeError, match="there is no cache"):
            await bridge.ask("POST", "/settings", {"cache_mode": "writeback", "slow_ms": 5})
        assert await bridge.ask("GET", "/settings") == before
        after = await bridge.ask("POST", "/settings", {"slow_ms": 5, "flush_interval_s": 0.05})
        assert after == {**before, "slow_ms": 5, "flush_interval_s": 0.05}
        # The new interval is the one that counts.
        bridge.server.commands = []
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 512)
            with trio.fail_after(HUNG_S):
                while p.CMD_FLUSH not in changes(bridge.server):
                    await trio.sleep(0.01)


async def test_number_of_connections_is_changed_at_once_under_a_running_guest(
    directory: Path,
) -> None:
    async with served(directory, cache=WRITEBACK) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 65536)
            answer = await bridge.ask("POST", "/settings", {"connections": 3})
            assert answer["connections"] == 3
            found = await bridge.until("server", connections=3, state="connected")
            assert found["server"]["outages_total"] == 0
            assert await guest.read(0, 65536) == b"a" * 65536
            await guest.flush()
            await bridge.ask("POST", "/settings", {"connections": 1})
            await bridge.until("server", connections=1, state="connected")
            await guest.flush()


async def test_limits_of_waiting_for_the_server_are_changed_at_run_time(directory: Path) -> None:
    server = Server({"": MemoryDisk(SIZE_BYTES)})
    async with served(directory, server=server) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            # A server that is silent is given up, and one that is away for too long, too.
            wanted = {"request_timeout_s": 0.3, "reconnect_timeout_s": 0.3}
            answer = await bridge.ask("POST", "/settings", wanted)
            assert {name: answer[name] for name in wanted} == wanted
            server.faults.delay_s = HUNG_S
            server.faults.refuse_connections = True
            with pytest.raises(RequestError):
                await guest.read(0, 512)
            found = await bridge.until("server", state="failing")
            assert found["server"]["outages_total"] == 1
            server.faults.delay_s = 0
            server.faults.refuse_connections = False
            await bridge.until("server", state="connected")
            await guest.read(0, 512)


async def test_warm_fills_the_cache_and_drop_clean_empties_it(directory: Path) -> None:
    async with served(directory, cache=WRITEBACK) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 4096)
            answer = await bridge.ask("POST", "/cache/warm", {"offset": 1 << 20, "length": 2 << 20})
            assert answer["total_bytes"] == 2 << 20
            await bridge.until("warming", done_bytes=2 << 20)
            assert (await bridge.status())["cache"]["used_bytes"] == (2 << 20) + 4096
            bridge.server.commands = []
            await guest.read(1 << 20, 65536)
            assert bridge.server.commands == []
            dropped = await bridge.ask("POST", "/cache/drop-clean")
            assert dropped["dropped_bytes"] == 2 << 20
            # What is dirty is kept.
            found = await bridge.status()
            assert found["cache"]["used_bytes"] == found["cache"]["dirty_bytes"] == 4096
            assert await guest.read(0, 4096) == b"a" * 4096


async def test_warming_can_be_cancelled_and_is_one_at_a_time(directory: Path) -> None:
    async with served(directory, cache=WRITEBACK) as bridge:
        with pytest.raises(BridgeError, match="not being warmed"):
            await bridge.ask("DELETE", "/cache/warm")
        bridge.server.faults.delay_s = 0.2
        await bridge.ask("POST", "/cache/warm")
        with pytest.raises(BridgeError, match="warmed already"):
            await bridge.ask("POST", "/cache/warm")
        await bridge.ask("DELETE", "/cache/warm")
        bridge.server.faults.delay_s = 0


async def test_cache_is_not_warmed_before_the_guest_runs_where_its_session_is_shared(
    directory: Path,
) -> None:
    """What another host's guest writes after that would be read from here once it has migrated."""
    name = "vm@session=s"
    server = Server({name: MemoryDisk(SIZE_BYTES)})
    async with served(directory, cache=WRITEBACK, server=server, export=name) as bridge:
        with pytest.raises(BridgeError, match="once it runs here"):
            await bridge.ask("POST", "/cache/warm")
        async with await BlkDriver.connect(bridge.vhost):
            await bridge.ask("POST", "/cache/warm")


async def test_warming_past_the_end_of_the_disk_is_refused(directory: Path) -> None:
    async with served(directory, cache=WRITEBACK) as bridge:
        with pytest.raises(ConfigError, match=f"the disk has {SIZE_BYTES} bytes"):
            await bridge.ask("POST", "/cache/warm", {"offset": SIZE_BYTES})


@pytest.mark.parametrize("cache", ["off", WRITEBACK])
async def test_resize_takes_a_larger_size_over_and_nothing_else(
    directory: Path, cache: str
) -> None:
    async with served(directory, cache=cache) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 4096)
            answer = await bridge.ask("POST", "/resize")
            assert answer == {"changed": False, "size_bytes": SIZE_BYTES}
            disk = bridge.server.exports[""]
            assert isinstance(disk, MemoryDisk)
            disk.resize(2 * SIZE_BYTES)
            answer = await bridge.ask("POST", "/resize")
            assert answer == {"changed": True, "size_bytes": 2 * SIZE_BYTES}
            # A reconnect in between must not look like a loss.
            await guest.flush()
            await guest.write(SIZE_BYTES, b"b" * 4096)
            assert await guest.read(0, 4096) == b"a" * 4096
            await guest.flush()
            disk.resize(SIZE_BYTES)
            with pytest.raises(BridgeError, match="cannot shrink"):
                await bridge.ask("POST", "/resize")


async def test_stop_is_refused_while_a_guest_runs_or_the_server_refuses(directory: Path) -> None:
    async with served(directory, cache=WRITEBACK) as bridge:
        async with await BlkDriver.connect(bridge.vhost) as guest:
            await guest.write(0, b"a" * 65536)
            with pytest.raises(BridgeError, match="a guest uses the disk"):
                await bridge.ask("POST", "/stop")
            bridge.server.faults.errors = {p.CMD_WRITE: errno.EIO}
            with pytest.raises(BridgeError, match="could not flush"):
                await bridge.ask("POST", "/stop", {"even_with_guest": True})
            bridge.server.faults.errors = {}
            answer = await bridge.ask("POST", "/detach")
            assert answer["safe"]
        await bridge.until("guest", state="none")
        await bridge.ask("POST", "/stop")
        with trio.fail_after(HUNG_S):
            while bridge.control.exists() or bridge.vhost.exists():
                await trio.sleep(0.02)


async def test_outage_is_seen_with_its_reason_and_its_time(directory: Path) -> None:
    server = Server({"": MemoryDisk(SIZE_BYTES)})
    async with served(directory, server=server) as bridge:
        assert (await bridge.ask("GET", "/ready"))["ready"]
        async with await BlkDriver.connect(bridge.vhost) as guest:
            server.faults.refuse_connections = True
            server.faults.cut_after_commands = 0
            async with trio.open_nursery() as nursery:
                nursery.start_soon(guest.write, 0, b"a" * 512)
                found = await bridge.until("server", state="down")
                assert found["server"]["reason"]
                assert found["server"]["outages_total"] == 1
                assert not found["safe_to_reboot"]["safe"]
                with pytest.raises(BridgeError, match="not connected"):
                    await bridge.ask("POST", "/resize")
                with pytest.raises(BridgeError, match="the server is not connected"):
                    await bridge.ask("GET", "/ready")
                server.faults.refuse_connections = False
                server.faults.cut_after_commands = None
            found = await bridge.until("server", state="connected")
            assert found["server"]["down_s"] == 0
            assert found["server"]["down_total_s"] > 0
