"""The fence, end to end: what a write left behind on a dead connection may still do."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.plugin.client import WRITE, NbdError, RawClient, Refused
from tests.plugin.server import PACKAGE, Nbdkit
from tests.tools import HUNG_S

OLD = b"STALL" + b"A" * 4091
NEW = b"B" * 4096


class Stall:
    """The write that hangs in the server: `reached` when it does, `release` lets it go on."""

    def __init__(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._reached = directory / "reached"
        self._go = directory / "go"
        monkeypatch.setenv("STALL_REACHED", str(self._reached))
        monkeypatch.setenv("STALL_GO", str(self._go))
        monkeypatch.setenv("PLUGIN_DIRECTORY", str(PACKAGE))

    def wait_reached(self) -> None:
        deadline = time.monotonic() + HUNG_S
        while not self._reached.exists():
            assert time.monotonic() < deadline, "the write never arrived"
            time.sleep(0.005)

    def release(self) -> None:
        self._go.touch()


@pytest.fixture
def stall(volumes: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stall]:
    stall = Stall(volumes, monkeypatch)
    yield stall
    stall.release()


def serve(volumes: Path, *parameters: str) -> Nbdkit:
    plugin = Path(__file__).with_name("stalling_plugin.py")
    (volumes / "v").mkdir()
    return Nbdkit(
        f"dir={volumes}/v", "create=on", "size=1M", "volume=disk", *parameters, plugin=plugin
    )


def leave_write_behind(server: Nbdkit, stall: Stall, export: str = "disk") -> RawClient:
    """A client whose write of OLD at 0 hangs in the server; returns it, still connected."""
    client = RawClient(str(server.socket), export)
    client.send(WRITE, 0, len(OLD), OLD)
    stall.wait_reached()
    return client


def come_back(server: Nbdkit, export: str = "disk") -> RawClient:
    """What a client does after a reconnect: the unanswered write again, then a newer one."""
    client = RawClient(str(server.socket), export)
    client.write(0, OLD)
    client.write(0, NEW)
    client.flush()
    return client


@contextmanager
def coming_back_late(server: Nbdkit, stall: Stall, export: str) -> Iterator[RawClient]:
    """A client that comes back, and is let in only once the write that hangs has ended."""
    outcome: list[RawClient] = []
    back = threading.Thread(target=lambda: outcome.append(come_back(server, export)))
    back.start()
    back.join(0.3)
    assert not outcome
    stall.release()
    back.join(HUNG_S)
    with outcome[0] as client:
        yield client


def test_reconnect_with_a_write_left_behind_newer_data_stays(volumes: Path, stall: Stall) -> None:
    with serve(volumes) as server:
        leave_write_behind(server, stall).cut()
        outcome: list[RawClient] = []
        back = threading.Thread(target=lambda: outcome.append(come_back(server)))
        back.start()
        back.join(0.3)
        assert not outcome, "admitted while a write of the old connection is in flight"
        stall.release()
        back.join(HUNG_S)
        with outcome[0] as client:
            assert client.read(0, 4096) == NEW
            assert client.properties["generation"] == "3"


def test_reconnect_without_fence_stale_write_wins(volumes: Path, stall: Stall) -> None:
    """The hazard itself: this is what the test above would see if the fence were gone."""
    with serve(volumes, "fence=off") as server:
        leave_write_behind(server, stall).cut()
        with come_back(server) as client:
            assert client.read(0, 4096) == NEW
            stall.release()
            deadline = time.monotonic() + HUNG_S
            while client.read(0, 4096) == NEW:
                assert time.monotonic() < deadline, "the stale write never landed"
            assert client.read(0, 4096) == OLD


def test_second_writer_while_first_lives_refused_in_one_line(volumes: Path, stall: Stall) -> None:
    with (
        serve(volumes, "fence_timeout=0.2") as server,
        RawClient(str(server.socket), "disk") as first,
    ):
        with pytest.raises(Refused):
            RawClient(str(server.socket), "disk")
        first.write(0, NEW)
        errors = [line for line in server.log.splitlines() if "error" in line]
        assert len(errors) == 1
        assert "volume disk is open for writing by another connection" in errors[0]
        assert "Traceback" not in server.log


def test_takeover_of_a_live_writer_old_one_loses_its_rights(volumes: Path, stall: Stall) -> None:
    with serve(volumes, "fence=takeover", "fence_timeout=0.2") as server:
        first = RawClient(str(server.socket), "disk")
        first.write(0, OLD[::-1])
        with RawClient(str(server.socket), "disk") as second:
            second.write(0, NEW)
            with pytest.raises(NbdError) as caught:
                first.write(0, OLD[::-1])
            assert caught.value.errno == errno.ESHUTDOWN
            assert second.read(0, 4096) == NEW
        first.cut()


def test_connections_of_one_session_admitted_together(volumes: Path, stall: Stall) -> None:
    with serve(volumes) as server:
        clients = [RawClient(str(server.socket), "disk@session=s1") for _ in range(4)]
        assert {client.properties["generation"] for client in clients} == {"2"}
        clients[0].write(0, NEW)
        clients[1].flush()
        assert clients[3].read(0, 4096) == NEW
        for client in clients:
            client.close()


def test_next_session_waits_for_all_connections_of_the_previous(
    volumes: Path, stall: Stall
) -> None:
    with serve(volumes) as server:
        first, second = (RawClient(str(server.socket), "disk@session=s1") for _ in range(2))
        outcome: list[RawClient] = []
        after = threading.Thread(
            target=lambda: outcome.append(RawClient(str(server.socket), "disk@session=s2"))
        )
        after.start()
        first.close()
        after.join(0.3)
        assert not outcome
        second.close()
        after.join(HUNG_S)
        with outcome[0] as client:
            assert client.properties["generation"] == "3"


def test_replaced_connection_of_a_session_drains_first(volumes: Path, stall: Stall) -> None:
    export = "disk@session=s1,connection=1"
    with serve(volumes) as server:
        other = RawClient(str(server.socket), "disk@session=s1,connection=2")
        # Not cut: to the server the old connection looks alive.
        old = leave_write_behind(server, stall, export)
        with coming_back_late(server, stall, export) as client:
            assert client.read(0, 4096) == NEW
            assert client.properties["generation"] == "2", "the session goes on"
        other.close()
        old.cut()


def test_new_session_of_the_same_client_replaces_its_live_looking_one(
    volumes: Path, stall: Stall
) -> None:
    with serve(volumes) as server:
        old = leave_write_behind(server, stall, "disk@session=s1,client=c")
        with coming_back_late(server, stall, "disk@session=s2,client=c") as client:
            assert client.read(0, 4096) == NEW
            assert client.properties["generation"] == "3"
        old.cut()


def test_next_attempt_of_a_client_in_a_shared_session_writes_after_what_it_had_in_flight(
    volumes: Path, stall: Stall
) -> None:
    """It was let in beside its own old connection, whose write then went over a newer one: in a
    session for migrations others are let in at any time, and that it is no other was not asked."""
    with serve(volumes) as server:
        old = leave_write_behind(server, stall, "disk@session=s,client=c.1")
        with coming_back_late(server, stall, "disk@session=s,client=c.2") as client:
            assert client.read(0, 4096) == NEW
            assert client.properties["generation"] == "2", "the session goes on"
        old.cut()


def test_next_process_in_a_shared_session_writes_after_what_the_last_one_had_in_flight(
    volumes: Path, stall: Stall
) -> None:
    with serve(volumes) as server:
        other = RawClient(str(server.socket), "disk@session=s,client=stands-by.1")
        old = leave_write_behind(server, stall, "disk@session=s,client=killed.1")
        old.cut()
        with coming_back_late(server, stall, "disk@session=s,client=next.1") as client:
            assert client.read(0, 4096) == NEW
        other.close()


def test_client_that_was_let_in_later_keeps_its_rights_until_it_writes_itself(
    volumes: Path, stall: Stall
) -> None:
    """The target of a migration stands by while the source writes; then the guest is there."""
    with serve(volumes) as server:
        source, target = (
            RawClient(str(server.socket), f"disk@session=s,client={name}.1")
            for name in ("source", "target")
        )
        source.write(0, NEW)
        assert target.read(0, 4096) == NEW
        source.write(0, NEW)
        target.write(0, NEW)
        with pytest.raises(NbdError) as caught:
            source.write(0, NEW)
        assert caught.value.errno == errno.ESHUTDOWN
        # It comes again, for a guest that has come back.
        with RawClient(str(server.socket), "disk@session=s,client=source.2") as again:
            again.write(0, NEW)
            with pytest.raises(NbdError):
                target.read(0, 4096)
        source.close()
        target.close()


def test_read_only_export_opens_beside_a_writer(volumes: Path, stall: Stall) -> None:
    with (
        serve(volumes) as server,
        RawClient(str(server.socket), "disk") as writer,
        RawClient(str(server.socket), "disk@readonly") as reader,
    ):
        writer.write(0, NEW)
        assert reader.read(0, 4096) == NEW
        with pytest.raises(NbdError):
            reader.write(0, NEW)


def test_fence_token_connection_without_token_is_read_only(volumes: Path, stall: Stall) -> None:
    with serve(volumes, "fence=token") as server:
        with RawClient(str(server.socket), "disk@session=s") as client:
            client.write(0, NEW)
        with RawClient(str(server.socket), "disk") as client, pytest.raises(NbdError) as caught:
            client.write(0, NEW)
        assert caught.value.errno == errno.EPERM


def test_second_nbdkit_on_a_volume_being_written_refused(volumes: Path, stall: Stall) -> None:
    with (
        serve(volumes) as server,
        RawClient(str(server.socket), "disk"),
        Nbdkit(f"dir={volumes}/v", "fence_timeout=0.2") as second,
    ):
        with pytest.raises(Refused):
            RawClient(str(second.socket), "disk")
        assert "volume disk is open for writing in another process" in second.log
