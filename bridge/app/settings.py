"""Every option of `serve`, declared once: its name, type, unit, default, bounds and help.

`command_settings` has those of the other commands, some of which share groups with `serve`.

A command's settings are a dataclass of groups (`ServeSettings.cache` is a `CacheSettings`), and a
group is a dataclass whose fields are made by `setting`. Everything else is derived from these:

- the option of the command line, `--cache-size` (`bridge.cli.options` makes it, with click);
- its environment variable, NBD_BRIDGE_SERVE_CACHE_SIZE: the command's words and the option's;
- its place in `--help`, under the title of its group;
- its name in a mapping of defaults, such as a file has: `cache_size`.

A field's name ends with its unit; an option's name has none. Where the object that a setting is for
has a default, the setting has the same. This module does not know click, and imports nothing slow:
`--version` and `--help` import it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar

from bridge.app.settings_model import (
    Choice,
    CommandSettings,
    FeatureBits,
    Flag,
    Mode,
    Number,
    Path,
    Size,
    Text,
    Whole,
    setting,
)
from bridge.cache.cache_options import OFF, WRITEBACK, WRITETHROUGH
from bridge.datapath.engine_names import AUTO as AUTO_ENGINE
from bridge.datapath.engine_names import ENGINES
from bridge.server.client_options import ClientOptions
from bridge.spec.virtio_blk import ID_BYTES

MIN_CACHE_SIZE = "4M"
"""The smallest cache that `cache.file.layout` can make with 4 KiB blocks, as nearly all servers
have them."""

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")

AUTO = "auto"
"""The control socket is where the commands look for it."""

_MAX_FD = (1 << 31) - 1
"""An `int` of the system's."""
_CLIENT = ClientOptions()


# The groups. Their fields are in the order of `--help`.


@dataclass(frozen=True, kw_only=True)
class DiskSettings:
    """The disk that the guest sees, and the socket on which its front-end connects."""

    title: ClassVar[str] = "Disk"

    socket_path: str | None = setting("--socket-path", Path(), None, "Listen on this unix socket.")
    fd: int | None = setting(
        "--fd", Whole(0, _MAX_FD), None, "Listen on this inherited socket instead."
    )
    socket_group: str | None = setting(
        "--socket-group",
        Text(max_bytes=256),
        None,
        "Give the socket, and the control socket, to this group: that of QEMU's user.",
    )
    socket_mode: int | None = setting(
        "--socket-mode",
        Mode(),
        None,
        "Permissions of the socket, in octal. Default: 0600, or 0660 with --socket-group.",
    )
    read_only: bool = setting("--read-only", Flag(), False, "The guest may not write.")
    serial: str = setting(
        "--serial",
        Text(max_bytes=ID_BYTES),
        "",
        f"Serial number of the disk, at most {ID_BYTES} bytes.",
    )
    num_queues: int = setting("--num-queues", Whole(1, 64), 1, "Virtqueues offered to the guest.")
    queue_size: int = setting(
        "--queue-size",
        Whole(2, 1024, power_of_two=True),
        1024,
        "Largest virtqueue accepted, in descriptors.",
    )
    block_size_bytes: int = setting(
        "--block-size",
        Whole(512, 4096, power_of_two=True),
        512,
        "Logical block size that the guest sees, in bytes.",
    )
    withheld_features: int = setting(
        "--features",
        FeatureBits(),
        0,
        "Features to withhold from the guest, such as -mq,-discard.",
        written_default="",
    )


@dataclass(frozen=True, kw_only=True)
class CacheSettings:
    """The local cache, and the flush timer."""

    title: ClassVar[str] = "Cache"

    mode: str = setting(
        "--cache-mode",
        Choice((OFF, WRITETHROUGH, WRITEBACK)),
        WRITEBACK,
        "Keep a local cache; writeback also completes writes in it.",
    )
    size_bytes: int = setting(
        "--cache-size",
        Size(minimum=MIN_CACHE_SIZE),
        1 << 30,
        f"Size of the cache file, such as 512M or 20G; at least {MIN_CACHE_SIZE}.",
        written_default="1G",
    )
    directory: str | None = setting(
        "--cache-dir",
        Path(),
        None,
        "Where the cache file is. Default: /var/cache/nbd-bridge, or ~/.cache/nbd-bridge.",
    )
    flush_interval_s: float = setting(
        "--flush-interval",
        Number(0),
        60.0,
        "Flush this many seconds after a write at the latest; 0: never.",
    )


@dataclass(frozen=True, kw_only=True)
class ConnectSettings:
    """For every command that connects to a server. Fields are those of ClientOptions."""

    title: ClassVar[str] = "Server"

    connect_timeout_s: float = setting(
        "--connect-timeout",
        Number(0.1),
        _CLIENT.connect_timeout_s,
        "Seconds for one attempt to connect.",
    )


@dataclass(frozen=True, kw_only=True)
class ServerSettings(ConnectSettings):
    """For a command that stays connected."""

    connections: int = setting(
        "--connections",
        Whole(1, 16),
        _CLIENT.connections,
        "Connections to the server, where it allows several.",
    )
    request_timeout_s: float = setting(
        "--request-timeout",
        Number(0),
        _CLIENT.request_timeout_s,
        "Reconnect when the server is silent for this many seconds (ten times as many during a "
        "flush, if it answers nothing beside it); 0: never.",
    )
    reconnect_timeout_s: float = setting(
        "--reconnect-timeout",
        Number(0),
        _CLIENT.reconnect_timeout_s,
        "Fail the guest's requests after this many seconds without a server; 0: they wait.",
    )
    stale_write_grace_s: float = setting(
        "--stale-write-grace",
        Number(0),
        _CLIENT.stale_write_grace_s,
        "Seconds that a write of a lost connection may still reach a server without a fence.",
    )


@dataclass(frozen=True, kw_only=True)
class TlsSettings:
    """Files for TLS. Fields are those of ClientOptions."""

    title: ClassVar[str] = "TLS"

    tls_ca_file: str | None = setting("--tls-ca", Path(), None, "CA certificates (PEM).")
    tls_certificate_file: str | None = setting("--tls-cert", Path(), None, "Our certificate.")
    tls_key_file: str | None = setting("--tls-key", Path(), None, "The key to --tls-cert.")


@dataclass(frozen=True, kw_only=True)
class LimitSettings:
    """Time limits of a stop, and how long the loop polls before it sleeps."""

    title: ClassVar[str] = "Limits"

    poll_us: float = setting(
        "--poll-us",
        Number(0, 10_000),
        32.0,
        "Look for work this many microseconds before sleeping; 0: sleep at once.",
    )
    engine: str = setting(
        "--engine",
        Choice(ENGINES),
        AUTO_ENGINE,
        "What serves the usual requests: compiled code, where that was installed, or Python.",
    )
    wait_for_server: bool = setting(
        "--wait-for-server",
        Flag(),
        False,
        "Wait for a server that cannot be reached at the start, instead of ending.",
    )
    stop_timeout_s: float = setting(
        "--stop-timeout",
        Number(0),
        30.0,
        "Seconds that a stop may take to bring everything to the server.",
    )
    drain_timeout_s: float = setting(
        "--drain-timeout",
        Number(0),
        30.0,
        "Seconds that the guest's stop (pause, migration) may take to be answered.",
    )


@dataclass(frozen=True, kw_only=True)
class ControlSettings:
    """How a running bridge is found, seen and steered."""

    title: ClassVar[str] = "Control"

    name: str = setting(
        "--name",
        Text(max_bytes=64),
        "",
        "What the bridge is called: for `nbd-bridge status NAME`, in metrics and in the log. "
        "Default: like its socket.",
    )
    socket: str = setting(
        "--api",
        Path(),
        AUTO,
        "Control socket: auto, off, or a path. auto: NAME.api in /run/nbd-bridge, or in "
        "$XDG_RUNTIME_DIR/nbd-bridge.",
    )
    pid_file: str | None = setting(
        "--pidfile", Path(), None, "Write the process's number there once the disk is served."
    )
    slow_ms: float = setting(
        "--slow-ms",
        Number(0),
        1000.0,
        "Log requests that take longer than so many milliseconds; 0: none.",
    )


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """The log on standard error."""

    title: ClassVar[str] = "Logging"

    level: str = setting("--log-level", Choice(LOG_LEVELS), "info", "Log this level and above.")
    format: str = setting("--log-format", Choice(LOG_FORMATS), "text", "How a line looks.")


@dataclass(frozen=True, kw_only=True)
class ServeSettings(CommandSettings):
    """`serve`."""

    disk: DiskSettings = DiskSettings()
    cache: CacheSettings = CacheSettings()
    server: ServerSettings = ServerSettings()
    tls: TlsSettings = TlsSettings()
    limits: LimitSettings = LimitSettings()
    control: ControlSettings = ControlSettings()
    logging: LogSettings = LogSettings()


def client_options(server: ConnectSettings, tls: TlsSettings) -> ClientOptions:
    """The options of a client, which have the same names as the settings."""
    given = {
        each.name: getattr(group, each.name) for group in (server, tls) for each in fields(group)
    }
    return ClientOptions(**given)
