"""What the export's description says: generation, last writer, instance."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugin.client import RawClient, Refused
from tests.plugin.server import Nbdkit


def visit(server: Nbdkit, export: str = "disk", *, write: bool = False) -> dict[str, str]:
    with RawClient(str(server.socket), export) as client:
        if write:
            client.write(0, b"x" * 512)
        return client.properties


def test_description_of_a_session_has_its_own_generation(volumes: Path, where: str) -> None:
    with Nbdkit(f"file={volumes}/disk", "size=1M", where=where) as server:
        with RawClient(str(server.socket), "disk") as client:
            words = client.description.split()
            assert words[0] == "nbd-bridge"
            assert client.properties["volume"] == "disk"
            assert client.properties["session"] == "yes"
            shown = int(client.properties["generation"])
        assert int(visit(server)["generation"]) == shown + 1


def test_generation_and_last_writer_survive_a_restart(volumes: Path) -> None:
    with Nbdkit(f"file={volumes}/disk", "size=1M") as server:
        before = visit(server, write=True)
    with Nbdkit(f"file={volumes}/disk") as server:
        after = visit(server)
    assert int(after["generation"]) == int(before["generation"]) + 1
    assert after["written"] == before["generation"]


def test_session_that_writes_nothing_leaves_last_writer(volumes: Path) -> None:
    with Nbdkit(f"file={volumes}/disk", "size=1M") as server:
        writer = visit(server, write=True)
        visit(server)
        visit(server, "disk@readonly")
        assert visit(server)["written"] == writer["generation"]


def test_last_writer_is_stored_before_the_write_is_answered(volumes: Path) -> None:
    with Nbdkit(f"file={volumes}/disk", "size=1M") as server:
        client = RawClient(str(server.socket), "disk")
        client.write(0, b"x" * 512)
        server.kill()
    with Nbdkit(f"file={volumes}/disk") as server:
        assert visit(server)["written"] == client.properties["generation"]
    client.cut()


def test_last_writer_of_a_shared_session_is_the_client_that_wrote_last(volumes: Path) -> None:
    """One number for all of it: only this tells whether another host wrote since."""
    names = [f"disk@session=s{name}" for name in (",client=source.1", ",client=target.1", "")] + [
        "disk@session=s,client=source.2"
    ]
    with Nbdkit(f"file={volumes}/disk", "size=1M") as server:
        source, target, nameless, again = (RawClient(str(server.socket), name) for name in names)
        seen = []
        for client in (source, target, target, nameless, target, again):
            client.write(0, b"x" * 512)
            seen.append(visit(server, names[0]).get("writer"))
        assert seen == ["source.1", "target.1", "target.1", None, "target.1", "source.2"]
        server.kill()
    with Nbdkit(f"file={volumes}/disk") as server:
        assert visit(server)["writer"] == "source.2"
    for client in (source, target, nameless, again):
        client.cut()


def test_read_only_connection_raises_nothing(volumes: Path) -> None:
    with Nbdkit(f"file={volumes}/disk", "size=1M") as server:
        visit(server)
    with Nbdkit(f"file={volumes}/disk", options=("-r",)) as server:
        first, second = visit(server), visit(server)
    assert first == second


def test_instance_of_file_store_survives_kill_of_nbdkit(volumes: Path) -> None:
    with Nbdkit(f"file={volumes}/disk", "size=1M") as server:
        before = visit(server)
        server.kill()
    with Nbdkit(f"file={volumes}/disk") as server:
        assert visit(server)["instance"] == before["instance"]


def test_instance_of_memory_store_changes_with_the_process() -> None:
    found = set()
    for _ in range(2):
        with Nbdkit("store=memory", "size=1M") as server:
            found.add(visit(server, "memory")["instance"])
    assert len(found) == 2


def test_volume_made_again_under_an_old_name_goes_on_counting(volumes: Path) -> None:
    with Nbdkit(f"dir={volumes}", "create=on", "size=1M") as server:
        old = visit(server, write=True)
        (volumes / "disk").unlink()
        new = visit(server)
    assert int(new["written"]) > int(old["generation"])


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"generation": -1}', b"x" * 5000])
def test_damaged_state_refuses_the_volume(volumes: Path, damage: bytes) -> None:
    with Nbdkit(f"dir={volumes}", "create=on", "size=1M") as server:
        visit(server)
        (volumes / ".nbd_plugin" / "disk.json").write_bytes(damage)
        with pytest.raises(Refused):
            visit(server)
        assert "disk.json is damaged" in server.log
