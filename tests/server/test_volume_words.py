"""Both sides of our own vocabulary: what the client writes the nbdkit plugin understands, and what
the plugin writes the client does."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from bridge.peers.nbd_server_settings import DEFAULT_FLAGS
from bridge.server.export import Export
from bridge.server.volume_words import VolumeDescription, VolumeName
from nbd_plugin.errors import PluginError
from nbd_plugin.file_store import FileStore
from nbd_plugin.names import ExportName, parse_export_name_untrusted
from nbd_plugin.service import Service
from nbd_plugin.settings import Settings


@pytest.mark.parametrize(
    ("name", "understood"),
    [
        ("", ExportName("", session="t", client="c", connection=2)),
        ("vm1", ExportName("vm1", session="t", client="c", connection=2)),
        ("vm1@session=move", ExportName("vm1", session="move", client="c")),
    ],
)
def test_name_of_a_connection_is_what_the_plugin_takes_apart(
    name: str, understood: ExportName
) -> None:
    sent = VolumeName(name).for_connection("t", client="c", number=2)

    assert parse_export_name_untrusted(sent) == understood
    assert VolumeName(sent).client == understood.client == "c"
    assert VolumeName(sent).is_shared
    assert VolumeName(sent).without_session == understood.volume


@pytest.mark.parametrize(
    ("name", "is_fenced"),
    [("v", True), ("v@session=s", True), ("v@session=s,client=mine", False)],
)
def test_session_in_which_our_attempts_have_one_name_is_not_relied_on(
    name: str, is_fenced: bool
) -> None:
    """The plugin lets the next attempt in beside what the last one has in flight."""
    words = "nbd-bridge volume=v instance=i session=yes"
    assert Export(name, 4096, DEFAULT_FLAGS, description=words).is_fenced == is_fenced


@pytest.mark.parametrize(
    ("writer", "is_ours"),
    [("c", True), ("c.1", True), ("c.12", True), ("c.x", False), ("d.1", False), ("cc.1", False)],
)
def test_client_knows_its_own_writes_by_whichever_attempt(writer: str, is_ours: bool) -> None:
    seen = VolumeDescription(f"nbd-bridge volume=v writer={writer}")
    assert seen.was_written_by("c") == is_ours
    assert not VolumeDescription("nbd-bridge volume=v").was_written_by("c")


@pytest.mark.parametrize("name", ["", "vm1", "vm1@session=move"])
def test_name_of_a_reader_is_what_the_plugin_takes_apart(name: str) -> None:
    sent = VolumeName(name).for_reader()

    volume = VolumeName(name).without_session
    assert parse_export_name_untrusted(sent) == ExportName(volume, read_only=True)


@pytest.mark.parametrize(
    ("name", "plain", "names_reader", "names_client"),
    [
        ("", True, True, True),
        ("vm1", True, True, True),
        ("vm1@monday", False, False, False),
        ("vm1@readonly", False, False, False),
        ("vm1@session=t", False, True, True),
        ("vm1@session=t,client=c", False, True, False),
    ],
)
def test_name_is_completed_only_where_it_does_not_say_that_yet(
    name: str, plain: bool, names_reader: bool, names_client: bool
) -> None:
    found = VolumeName(name)

    assert found.is_plain == plain
    assert found.may_name_reader == names_reader
    assert found.may_name_client == names_client


@pytest.fixture
def service(tmp_path: Path) -> Service:
    FileStore(tmp_path).create("v", 1 << 20)
    return Service(Settings(store="file", dir=str(tmp_path), fence_timeout="0"))


def test_description_of_a_writer_says_all_that_a_cache_has_to_know(service: Service) -> None:
    first = service.open("v@session=t,client=c", read_only=False)
    assert first.session is not None
    first.session.note_write(first)
    seen = VolumeDescription(service.describe(first))
    service.close(first)

    assert seen.is_ours
    assert seen.is_fenced
    assert seen.instance
    assert len(seen.identity) == 16
    assert seen.sessions is not None
    assert seen.content_sessions == seen.sessions
    second = service.open("v", read_only=False)
    again = VolumeDescription(service.describe(second))
    service.close(second)
    assert again.sessions == (seen.sessions[0] + 1, seen.sessions[0])
    assert again.writer == "c"
    assert again.identity == seen.identity


def test_volume_that_only_grew_past_the_plugin_is_told_apart(
    service: Service, tmp_path: Path
) -> None:
    handle = service.open("v", read_only=False)
    assert handle.session is not None
    handle.session.note_write(handle)
    wrote = VolumeDescription(service.describe(handle)).sessions
    service.close(handle)
    assert wrote is not None
    os.truncate(tmp_path / "v", 2 << 20)

    handle = service.open("v", read_only=False)
    seen = VolumeDescription(service.describe(handle))
    service.close(handle)

    assert seen.sessions != seen.content_sessions == (seen.sessions or (0, 0))[:1] + wrote[:1]


def test_refusal_is_told_in_the_list(service: Service) -> None:
    writer = service.open("v", read_only=False)
    with pytest.raises(PluginError) as refused:
        service.open("v", read_only=False)
    lines = dict(service.list_exports())
    service.close(writer)

    assert refused.value.errno == errno.EBUSY
    assert VolumeDescription(lines["v"]).is_ours
    assert VolumeDescription(lines["v"]).why_refused == str(refused.value)


@pytest.mark.parametrize(
    "text", ["", "a disk", "volume=v refused: no", "x identity=12 generation=1 session=perhaps"]
)
def test_description_of_another_server_says_nothing(text: str) -> None:
    seen = VolumeDescription(text)

    assert not seen.is_ours
    assert not seen.is_fenced
    assert seen.sessions is None
    assert (seen.identity, seen.instance, seen.writer) == (b"", "", None)
    assert (seen.why_read_only, seen.why_refused) == ("", "")
