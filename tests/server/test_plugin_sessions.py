"""Our client and our nbdkit plugin: what they tell each other in names and descriptions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from errno import EIO
from pathlib import Path

import pytest

from bridge.datapath.request import FLUSH
from bridge.server.inspection import inspect, list_exports
from bridge.server.uri import parse_uri
from tests.processes import short_directory
from tests.server import servers
from tests.server.helpers import FAST, do, read, running_client, write
from tests.tools import until

PLUGIN = Path(__file__).parents[2] / "nbd_plugin" / "plugin.py"


@pytest.fixture
def uri() -> Iterator[str]:
    with short_directory() as folder, _plugin(folder) as found:
        yield found


@contextlib.contextmanager
def _plugin(folder: Path, *options: str) -> Iterator[str]:
    image = folder / "disk.img"
    with servers.nbdkit(
        folder, "python", str(PLUGIN), f"file={image}", "size=4M", *options
    ) as found:
        yield found


async def test_description_names_instance_and_session(uri: str) -> None:
    properties = (await inspect(parse_uri(uri))).volume.words
    assert properties["instance"]
    assert properties["session"] == "yes"
    assert int(properties["generation"]) >= 1


async def test_several_connections_form_one_session(uri: str) -> None:
    async with running_client(uri, replace(FAST, connections=4)) as client:
        assert len(client._connections) == 4
        for i in range(32):
            assert await write(client, i * 4096, bytes([i]) * 4096) == 0
        assert await do(client, FLUSH) == 0
        for i in range(32):
            assert await read(client, i * 4096, 4096) == bytes([i]) * 4096


@pytest.mark.parametrize("connections", [1, 3])
async def test_reconnect_waits_for_its_own_old_session_and_flush_goes_on(
    uri: str, connections: int
) -> None:
    async with running_client(uri, replace(FAST, connections=connections)) as client:
        assert await write(client, 0, b"a" * 4096) == 0
        for generation in range(2, 6):
            client._connections[0]._end_of_file()
            await until(lambda generation=generation: client.generation == generation)
            assert len(client._connections) == connections
            assert await do(client, FLUSH) == 0  # the same instance: nothing was lost
            assert await read(client, 0, 4096) == b"a" * 4096
        generations = client.export.volume.words
        assert int(generations["generation"]) >= 5


READER = replace(FAST, read_only=True)


async def test_readers_and_a_writer_share_a_volume() -> None:
    with short_directory() as folder, _plugin(folder, "fence_timeout=0.2") as uri:
        async with (
            running_client(uri, READER) as first,
            running_client(uri, READER) as second,
            running_client(uri) as writer,
        ):
            assert await write(writer, 0, b"a" * 512) == 0
            for reader in (first, second):
                assert reader.export.read_only
                assert await read(reader, 0, 512) == b"a" * 512
            # And a reader comes when there is a writer, again and again.
            first._connections[0]._end_of_file()
            await until(lambda: first.generation == 2)
            assert await read(first, 0, 512) == b"a" * 512


async def test_reader_of_a_named_volume_and_over_several_connections() -> None:
    with short_directory() as folder, _plugin(folder, "fence_timeout=0.2") as uri:
        named = uri.replace(":///", ":///disk.img")
        async with (
            running_client(named) as writer,
            running_client(named, replace(READER, connections=3)) as reader,
        ):
            assert await write(writer, 0, b"a" * 512) == 0
            assert len(reader._connections) == 3
            assert reader.export.name == "disk.img"
            assert await read(reader, 0, 512) == b"a" * 512


async def test_reader_that_names_a_session_takes_no_lock() -> None:
    """Of a pair of hosts that migrate a guest whose disk is read-only."""
    with short_directory() as folder, _plugin(folder, "fence_timeout=0.2") as uri:
        shared = uri.replace(":///", ":///disk.img@session=s")
        async with (
            running_client(shared, READER) as reader,
            running_client(uri) as writer,
            running_client(shared, READER) as late,
        ):
            assert await write(writer, 0, b"a" * 512) == 0
            for each in (reader, late):
                assert each.export.read_only
                assert await read(each, 0, 512) == b"a" * 512


async def test_reader_where_a_filter_hides_the_sessions_takes_no_lock() -> None:
    with (
        short_directory() as folder,
        _plugin(folder, "fence_timeout=0.2", "--filter=readahead") as uri,
    ):
        async with running_client(uri, READER) as reader, running_client(uri) as writer:
            assert "session" not in writer.export.volume.words
            assert await write(writer, 0, b"a" * 512) == 0
            assert reader.export.read_only


async def test_reader_of_another_server_asks_for_the_plain_name() -> None:
    with short_directory() as folder, servers.nbdkit(folder, "memory", "4M") as uri:
        async with running_client(uri, READER) as reader:
            assert await read(reader, 0, 512) == bytes(512)


async def test_clients_of_a_shared_session_are_told_who_wrote_last(uri: str) -> None:
    """Source and target of a migration: each finds out whether the other one wrote."""
    shared = uri.replace("///", "///@session=s")
    async with running_client(shared) as source, running_client(shared) as target:
        seen = []
        for writer in (source, target):
            assert await write(writer, 0, b"a" * 4096) == 0
            await source.leave(2, EIO)
            source.come_back()
            await until(lambda: source.connected)
            volume = source.export.volume
            seen.append([volume.was_written_by(each.client_id) for each in (source, target)])
        assert seen == [[True, False], [False, True]]
        assert source.export.volume.words["generation"] == target.export.volume.words["generation"]


async def test_client_of_a_shared_session_that_lost_its_connection_goes_on(uri: str) -> None:
    """With its old connection there still, which the server takes for another client's; and with
    one that stands by, and loses its rights to it."""
    shared = uri.replace("///", "///@session=s")
    options = replace(FAST, connections=2)
    async with running_client(shared, options) as source, running_client(shared) as target:
        for generation in range(1, 4):
            assert await write(source, 0, bytes([generation]) * 4096) == 0
            assert await read(target, 0, 4096) == bytes([generation]) * 4096
            source._connections[0]._end_of_file()
            await until(lambda generation=generation: source.generation == generation + 1)
        assert await write(source, 0, b"s" * 4096) == 0
        assert await write(target, 0, b"t" * 4096) == 0
        assert target.generation > 1
        assert await read(source, 0, 4096) == b"t" * 4096


async def test_volume_in_use_can_be_looked_at() -> None:
    with short_directory() as folder, _plugin(folder, "fence_timeout=0.2") as uri:
        async with running_client(uri) as client:
            assert await write(client, 0, b"a" * 512) == 0
            export = await inspect(parse_uri(uri))
            assert export.size_bytes == 4 << 20
            assert export.volume.words["session"] == "yes"
            assert await list_exports(parse_uri(uri))
