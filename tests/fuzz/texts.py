"""What operators and clients write: URIs, sizes, configuration files, names, the plugin's words."""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

import click

from bridge.app.settings_model import Size
from bridge.cli import config_file
from bridge.cli.options import type_of
from bridge.cli.wording import explain
from bridge.errors import ConfigError, ProtocolError
from bridge.server.uri import NbdUri, canonical_server, parse_uri
from bridge.server.volume_words import VolumeDescription, VolumeName
from bridge.units import parse_size, size_text
from nbd_plugin import names, sizes
from nbd_plugin.errors import PluginError
from nbd_plugin.settings import Settings
from tests.fuzz.target import check_line

_PLUGIN_MOST_DIGITS = 19
_SIZE_TYPE = type_of(Size(minimum="4M"))


def _text(data: bytes) -> str:
    """As Python has an argument of a command line."""
    return data.decode("utf-8", "surrogateescape")


def uri(data: bytes) -> str:
    """A URI is refused in one line, or means one server and one export, also when it is written
    anew."""
    try:
        found = parse_uri(_text(data))
    except ConfigError as error:
        check_line(explain(error))
        return "refused"
    # Python leaves some of them out without a word: it would be another name.
    assert not any(each < " " for each in found.text)
    assert (found.host is None) != (found.socket_path is None)
    assert 0 < found.port < 1 << 16
    again = parse_uri(_written(found))
    assert _meaning(again) == _meaning(found), again
    server = canonical_server(found.server)
    assert canonical_server(server) == server
    return "taken"


def _written(found: NbdUri) -> str:
    """The URI of these parts."""
    query = {
        "socket": found.socket_path,
        "tls-certificates": found.tls_certificates,
        "tls-hostname": found.tls_hostname,
        "tls-psk-file": found.tls_psk_file,
        "tls-verify-peer": None if found.tls_verify_peer else "false",
    }
    given = "&".join(f"{name}={quote(text)}" for name, text in query.items() if text is not None)
    scheme = ("nbds" if found.tls else "nbd") + ("+unix" if found.socket_path else "")
    server = found.server.replace("%", "%25") if found.socket_path is None else ""
    return f"{scheme}://{server}/{quote(found.export_name)}" + (f"?{given}" if given else "")


def _meaning(found: NbdUri) -> tuple[object, ...]:
    host = found.host and found.host.lower()  # Only one written with %XX keeps its case.
    return (
        *(found.export_name, found.tls, host, found.port, found.socket_path),
        *(found.tls_certificates, found.tls_hostname, found.tls_psk_file, found.tls_verify_peer),
    )


def size(data: bytes) -> str:
    """Both readers of sizes agree, and what one writes it reads."""
    text = _text(data)
    problem = "not a size"
    try:
        found: int | None = parse_size(text)
    except ValueError as error:
        problem = str(error)
        found = None
    check_line(problem)
    assert "not a size" in problem
    try:
        plugin: int | None = sizes.parse_size(text)
    except PluginError:
        plugin = None
    if found is not None and plugin is not None:
        assert found == plugin
        assert sizes.parse_size(sizes.format_size(plugin)) == plugin
    elif found is not None:
        assert not 0 < found <= sizes.MAX_SIZE_BYTES
    elif plugin is not None:
        long = any(len(each) >= _PLUGIN_MOST_DIGITS for each in text.strip().split("."))
        assert long or {"p", "e"} & set(text.lower())
    if found is not None:
        size_text(found)
    try:
        assert _SIZE_TYPE is not None
        _SIZE_TYPE.convert(text, None, None)
    except click.BadParameter:
        pass
    return "refused" if found is None else "taken"


def config(data: bytes) -> str:
    """A configuration file is refused with lines that name it, or gives text and yes or no for
    options that there are."""
    fd = os.memfd_create("config", os.MFD_CLOEXEC)
    try:
        os.write(fd, data)
        found = config_file.read(Path(f"/proc/self/fd/{fd}"))
    except config_file.ConfigFileError as error:
        for fault in error.faults:
            check_line(fault)
        return "refused"
    finally:
        os.close(fd)
    assert all(isinstance(value, str | bool) for value in found.values())
    return "taken"


def export_name(data: bytes) -> str:
    """The plugin refuses the name of an export, or takes it for what the client's side of the same
    vocabulary does."""
    text = _text(data)
    words = VolumeName(text)
    made = words.for_connection("token", client="us", number=1)
    try:
        found = names.parse_export_name_untrusted(text)
    except PluginError as error:
        check_line(str(error), most_chars=4000)
        return "refused"
    assert not found.volume or names.is_volume_name(found.volume)
    assert not {"/", "\0", "\n"} & set(found.volume)
    assert not found.volume.startswith((".", "-"))
    assert (found.session is None) or not found.read_only
    if words.may_name_client:
        ours = names.parse_export_name_untrusted(made)
        assert ours.volume == found.volume
        assert ours.client == "us"
        assert ours.session == ("token" if words.is_plain else found.session)
    if words.may_name_reader:
        assert names.parse_export_name_untrusted(words.for_reader()).read_only
    return "taken"


def description(data: bytes) -> str:
    """The description of an export says nothing, or numbers in their bounds."""
    found = VolumeDescription(data.decode("utf-8", "replace"))
    assert len(found.identity) in (0, 16)
    assert found.is_fenced in (True, False)
    assert not found.why_read_only or found.is_ours
    assert not found.why_refused or found.is_ours
    assert len(found.instance) <= 128
    try:
        sessions, content = found.sessions, found.content_sessions
    except ProtocolError:
        return "refused"
    assert (sessions is None) == (content is None)
    if sessions is None or content is None:
        return "taken"
    assert all(0 <= number < 1 << 63 for number in (*sessions, *content))
    assert content[0] == sessions[0]
    assert content[1] <= sessions[1]
    return "numbers"


def plugin_settings(data: bytes) -> str:
    """Parameters of the plugin, `key=value` in lines, are refused or go together."""
    settings = Settings()
    try:
        for line in _text(data).split("\n"):
            key, _, value = line.partition("=")
            settings.set(key, value)
        settings.check()
    except PluginError:
        return "refused"
    assert settings.size_bytes is None or settings.size_bytes > 0
    assert 0 <= settings.fence_timeout_s <= 3600
    assert 0 <= settings.timeout_s <= 3600
    assert settings.max_connections >= 0
    return "taken"
