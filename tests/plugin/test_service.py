"""The service without nbdkit: who is let in, what is kept of whom, who learns what."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bridge.server.export import Export
from nbd_plugin.errors import PluginError
from nbd_plugin.file_store import FileStore
from nbd_plugin.service import MAX_DESCRIPTION_CHARS, Service
from nbd_plugin.session import Handle
from nbd_plugin.settings import Settings
from nbd_plugin.volume_file import VolumeFile

MIB = 1 << 20


@pytest.fixture
def service(tmp_path: Path) -> Service:
    FileStore(tmp_path).create("v", MIB)
    return Service(Settings(store="file", dir=str(tmp_path), fence_timeout="0"))


def refused(service: Service, name: str) -> PluginError:
    with pytest.raises(PluginError) as caught:
        service.open(name, read_only=False)
    return caught.value


def test_names_that_there_are_not_leave_nothing_behind(service: Service) -> None:
    for number in range(100):
        assert refused(service, f"absent{number}").errno == errno.ENOENT
        assert refused(service, f"absent{number}@session=t").errno == errno.ENOENT
    handle = service.open("v", read_only=False)
    service.close(handle)
    assert not service._fences
    assert not service._refusals


def test_fence_holds_until_the_last_connection_of_a_session_is_closed(service: Service) -> None:
    first = service.open("v@session=s", read_only=False)
    second = service.open("v@session=s", read_only=False)
    service.close(first)
    assert refused(service, "v").errno == errno.EBUSY
    service.close(second)
    service.close(service.open("v", read_only=False))


def test_connection_that_outlives_two_sessions_can_close(service: Service) -> None:
    """Its session was replaced by the same client's next one, which has ended, too: the fence that
    admitted it is forgotten."""
    old = service.open("v@session=one,client=me", read_only=False)
    service.close(service.open("v@session=two,client=me", read_only=False))
    assert not service._fences
    service.close(old)
    service.close(service.open("v", read_only=False))
    assert not service._fences


def test_session_whose_flush_failed_is_ended_by_the_next_connection_with_its_token(
    service: Service,
) -> None:
    """It admits none any more, and a bridge that stood by for a migration, with nothing to ask,
    never left it: the guest's own bridge waited for ever."""
    standing_by, writer = (
        service.open(f"v@session=s,client={name}.1", read_only=False) for name in ("other", "us")
    )
    assert writer.session is not None
    writer.disk.failed = True
    service.close(writer)
    assert refused(service, "v@session=another").errno == errno.EBUSY
    again = service.open("v@session=s,client=us.2", read_only=False)
    assert again.session is not None
    assert again.session.generation == writer.session.generation + 1
    with pytest.raises(PluginError) as caught:
        standing_by.check_alive()
    assert caught.value.errno == errno.ESHUTDOWN
    service.close(standing_by)
    service.close(again)


def enter(service: Service, *names: str) -> list[Handle]:
    """Let clients into one session."""
    return [service.open(f"v@session=s,client={name}", read_only=False) for name in names]


def write(handle: Handle) -> None:
    assert handle.session is not None
    handle.session.note_write(handle)


def test_client_that_writes_ends_all_connections_of_one_that_came_before(service: Service) -> None:
    """Also those that it opened later: both went on to write."""
    source, target, late = enter(service, "source.1", "target.1", "source.1")
    write(source)
    write(target)
    for handle in (source, late, *enter(service, "source.1")):
        with pytest.raises(PluginError) as caught:
            write(handle)
        assert caught.value.errno == errno.ESHUTDOWN
    write(target)


def test_client_whose_first_connection_has_left_came_when_that_one_did(service: Service) -> None:
    """Its next write ended the rights of those that had come since, and stood by."""
    source, target, late = enter(service, "source.1", "target.1", "source.1")
    service.close(source)
    write(late)
    target.check_alive()
    write(target)
    with pytest.raises(PluginError):
        late.check_alive()


def test_busy_text_does_not_name_the_token(service: Service) -> None:
    handle = service.open("v@session=SECRET", read_only=False)
    for name in ("v", "v@session=other"):
        text = str(refused(service, name))
        assert "open for writing by another session" in text
        assert "SECRET" not in text
    assert all("SECRET" not in line for _, line in service.list_exports())
    service.close(handle)


def test_open_that_fails_and_cannot_close_leaves_the_volume_free(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    really_close = VolumeFile.close

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "the cluster is gone")

    def close_and_fail(disk: VolumeFile) -> None:
        really_close(disk)
        fail()

    monkeypatch.setattr(VolumeFile, "update_state", fail)
    monkeypatch.setattr(VolumeFile, "close", close_and_fail)
    with pytest.raises(OSError, match="gone"):
        service.open("v", read_only=False)
    monkeypatch.undo()
    service.close(service.open("v", read_only=False))


def test_reason_of_a_refusal_is_in_the_list_until_the_volume_opens(service: Service) -> None:
    handle = service.open("v", read_only=False)
    text = str(refused(service, "v"))
    assert service.list_exports()[0][1].endswith(f" refused: {text}")
    reader = service.open("v@readonly", read_only=False)
    assert "refused: " in service.list_exports()[0][1], "a reader changes nothing about it"
    for each in (reader, handle):
        service.close(each)
    service.close(service.open("v", read_only=False))
    assert "refused" not in service.list_exports()[0][1]


def test_reason_of_a_refusal_is_old_after_a_minute(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = service.open("v", read_only=False)
    monkeypatch.setattr("nbd_plugin.service.time.monotonic", lambda: 1000.0)
    refused(service, "v")
    monkeypatch.setattr("nbd_plugin.service.time.monotonic", lambda: 1061.0)
    assert "refused" not in service.list_exports()[0][1]
    service.close(handle)


def test_line_of_a_list_has_a_bound(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> Handle:
        raise PluginError("x" * 100_000, errno.EIO)

    monkeypatch.setattr(service, "_admit", refuse)
    refused(service, "v")
    assert len(service.list_exports()[0][1]) <= MAX_DESCRIPTION_CHARS


def test_connections_have_a_bound_that_is_given_back(tmp_path: Path) -> None:
    FileStore(tmp_path).create("v", MIB)
    settings = Settings(store="file", dir=str(tmp_path), fence_timeout="0", connections="2")
    service = Service(settings)
    for _ in range(3):
        handles = [service.open("v", read_only=False), service.open("v@readonly", read_only=False)]
        error = refused(service, "v@readonly")
        assert (error.errno, str(error)) == (
            errno.EBUSY,
            "2 connections are open already (connections=2)",
        )
        service.close(handles.pop())
        assert refused(service, "v").errno == errno.EBUSY, "refused for another reason"
        handles.append(service.open("v@readonly", read_only=False))
        for handle in handles:
            service.close(handle)
    assert service._connections == 0


# --- what cannot be written is served read-only, as nbdkit's file plugin does


@contextmanager
def nobody() -> Iterator[None]:
    """Root may write everything: be the user nobody meanwhile."""
    saved = os.geteuid()
    if saved == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(saved)


def mode_for_nobody(path: Path, mode: int) -> None:
    """`mode` for all others where we are root, for ourselves where we are not."""
    path.chmod(mode | mode << 3 if os.geteuid() == 0 else mode << 6)


def served_read_only(service: Service) -> str:
    handle = service.open("v", read_only=False)
    try:
        assert handle.read_only
        seen = bytearray(4)
        handle.disk.pread(memoryview(seen), 0)
        assert seen == b"data"
        assert "instance=" in service.describe(handle)
        why = handle.disk.why_read_only
        export = Export("v", MIB, description=service.describe(handle))
        assert export.volume.why_read_only == why
        assert export.volume.words["session"] == "yes"
        return why
    finally:
        service.close(handle)


@pytest.fixture
def folder(volumes: Path) -> Iterator[Path]:
    volumes.chmod(0o755)
    (volumes / "v").write_bytes(b"data".ljust(MIB))
    yield volumes
    volumes.chmod(0o755)


@pytest.fixture
def service_of_folder(folder: Path) -> Service:
    return Service(Settings(store="file", file=str(folder / "v")))


def test_file_that_may_not_be_written_is_served_read_only(
    folder: Path, service_of_folder: Service
) -> None:
    mode_for_nobody(folder / "v", 4)
    with nobody():
        assert served_read_only(service_of_folder) == f"{folder}/v: Permission denied"
    assert "refused: read-only: " in service_of_folder.list_exports()[0][1]


def test_directory_that_may_not_be_written_file_is_served_read_only(
    folder: Path, service_of_folder: Service
) -> None:
    mode_for_nobody(folder / "v", 6)
    mode_for_nobody(folder, 5)
    with nobody():
        assert str(folder) in served_read_only(service_of_folder)


def test_state_that_may_not_be_read_file_is_served_read_only(
    folder: Path, service_of_folder: Service
) -> None:
    """Another user's nbdkit made it."""
    service_of_folder.close(service_of_folder.open("v", read_only=False))
    mode_for_nobody(folder / "v", 6)
    mode_for_nobody(folder / ".nbd_plugin", 0)
    with nobody():
        assert "state=" in served_read_only(service_of_folder)


def test_file_that_may_not_be_read_is_refused_with_the_reason(
    folder: Path, service_of_folder: Service
) -> None:
    mode_for_nobody(folder / "v", 0)
    with nobody():
        error = refused(service_of_folder, "v")
    assert error.errno == errno.EACCES
    assert "may not read it" in str(error)
    assert "may not read it" in service_of_folder.list_exports()[0][1]
