"""The options of every command beside `serve`, declared as those of `serve` are in `settings`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from bridge.app.settings import LOG_LEVELS, MIN_CACHE_SIZE, ConnectSettings, TlsSettings
from bridge.app.settings_model import (
    Choice,
    CommandSettings,
    Flag,
    Number,
    Path,
    Ranges,
    Size,
    Text,
    Whole,
    setting,
)
from bridge.cache.cache_options import WRITEBACK, WRITETHROUGH

# The groups. Their fields are in the order of `--help`.


@dataclass(frozen=True, kw_only=True)
class InfoOutput:
    """What `info` prints."""

    title: ClassVar[str] = "Output"

    as_json: bool = setting("--json", Flag(), False, "Print JSON.")
    as_list: bool = setting("--list", Flag(), False, "Print which exports there are.")


@dataclass(frozen=True, kw_only=True)
class ActionChoices:
    """How long a running bridge may take for what is asked of it."""

    title: ClassVar[str] = "Limits"

    timeout_s: float = setting("--timeout", Number(0, 3600), 60.0, "Seconds that this may take.")


@dataclass(frozen=True, kw_only=True)
class StopChoices(ActionChoices):
    """When `stop` ends a bridge."""

    when_clean: bool = setting(
        "--when-clean", Flag(), False, "Only once everything is on the server."
    )
    even_with_guest: bool = setting(
        "--even-with-guest", Flag(), False, "Also while a guest uses the disk: it will hang."
    )


@dataclass(frozen=True, kw_only=True)
class Changes:
    """What `set` changes; None: nothing. Fields are those of `POST /settings`."""

    title: ClassVar[str] = "Settings, as those of serve"

    cache_mode: str | None = setting(
        "--cache-mode", Choice((WRITETHROUGH, WRITEBACK)), None, "When a write is complete."
    )
    flush_interval_s: float | None = setting(
        "--flush-interval", Number(0), None, "Seconds, from the next write after a flush on."
    )
    drain_timeout_s: float | None = setting(
        "--drain-timeout", Number(0), None, "Seconds, from the next stop of the guest on."
    )
    slow_ms: float | None = setting("--slow-ms", Number(0), None, "Milliseconds.")
    connections: int | None = setting(
        "--connections", Whole(1, 16), None, "To the server, where it allows several."
    )
    request_timeout_s: float | None = setting(
        "--request-timeout", Number(0), None, "Seconds of silence of the server; 0: any."
    )
    reconnect_timeout_s: float | None = setting(
        "--reconnect-timeout", Number(0), None, "Seconds without a server; 0: any."
    )
    log_level: str | None = setting(
        "--log-level", Choice(LOG_LEVELS), None, "Log this and what is worse."
    )


@dataclass(frozen=True, kw_only=True)
class ShowOutput:
    """What a command prints that has nothing else to choose."""

    title: ClassVar[str] = "Output"

    as_json: bool = setting("--json", Flag(), False, "Print JSON.")


@dataclass(frozen=True, kw_only=True)
class ExporterChoices:
    """Where `exporter` can be asked."""

    title: ClassVar[str] = "Exporter"

    listen: str = setting(
        "--listen",
        Text(max_bytes=300),
        "127.0.0.1:9809",
        "HOST:PORT; without HOST, every address of this machine.",
    )


@dataclass(frozen=True, kw_only=True)
class TopChoices:
    """How `top` looks."""

    title: ClassVar[str] = "View"

    interval_s: float = setting("--interval", Number(0.2, 60), 1.0, "Seconds between two looks.")
    once: bool = setting("--once", Flag(), False, "Print one table and end.")
    as_json: bool = setting("--json", Flag(), False, "Print that as JSON.")


@dataclass(frozen=True, kw_only=True)
class DropChoices:
    """What `cache drop` removes."""

    title: ClassVar[str] = "Cache"

    discard_dirty: bool = setting(
        "--discard-dirty", Flag(), False, "Even if it holds data that the server lacks."
    )


@dataclass(frozen=True, kw_only=True)
class ListChoices(ShowOutput):
    """What `cache list` finds out."""

    check_servers: bool = setting(
        "--check-servers", Flag(), False, "Ask the servers whether the disks still exist."
    )


@dataclass(frozen=True, kw_only=True)
class PruneChoices:
    """Which files `cache prune` removes."""

    title: ClassVar[str] = "Cache"

    gone: bool = setting(
        "--gone", Flag(), False, "Those of disks that their server does not have any more."
    )
    older_than_days: float | None = setting(
        "--older-than", Number(0), None, "Those that were not used for so many days."
    )
    discard_dirty: bool = setting(
        "--discard-dirty", Flag(), False, "Also those that hold data that the server lacks."
    )
    dry_run: bool = setting("--dry-run", Flag(), False, "Only print what would be removed.")


@dataclass(frozen=True, kw_only=True)
class FlushChoices:
    """Which data `cache flush` writes, and to which export."""

    title: ClassVar[str] = "Cache"

    moved: bool = setting("--moved", Flag(), False, "URI is where the export is now.")
    force: bool = setting("--force", Flag(), False, "Also over what another host wrote meanwhile.")
    skip_damaged: bool = setting(
        "--skip-damaged",
        Flag(),
        False,
        "Give up damaged parts of the file, and write all the rest.",
    )
    timeout_s: float = setting(
        "--timeout",
        Number(1),
        60.0,
        "Seconds for all of it; what is not on the server then stays in the file.",
    )


@dataclass(frozen=True, kw_only=True)
class WarmChoices:
    """Which ranges `cache warm` reads, into which cache."""

    title: ClassVar[str] = "Cache"

    cache_bytes: int | None = setting(
        "--cache-size",
        Size(minimum=MIN_CACHE_SIZE),
        None,
        f"Size of the cache file, at least {MIN_CACHE_SIZE}. Default: that of an existing file, "
        "or 1G. Give the same to `serve`, which makes a file of another size anew.",
    )
    directory: str | None = setting("--cache-dir", Path(), None, "Where the cache file is.")
    ranges: tuple[tuple[int, int], ...] = setting(
        "--range", Ranges(), (), "Only this part of the disk; may be given several times."
    )
    timeout_s: float = setting(
        "--timeout", Number(1), 60.0, "Give up after this many seconds without a server."
    )


@dataclass(frozen=True, kw_only=True)
class DemoChoices:
    """What `demo` runs."""

    title: ClassVar[str] = "Demo"

    no_guest: bool = setting(
        "--no-guest", Flag(), False, "Let the built-in front-end play the guest."
    )


@dataclass(frozen=True, kw_only=True)
class UnitChoices:
    """Which files `install-units` writes, and where."""

    title: ClassVar[str] = "Units"

    root: str = setting("--root", Path(), "/", "Below this directory.")
    vendor: bool = setting(
        "--vendor", Flag(), False, "Where a distribution's package has them, in /usr."
    )
    program: str | None = setting(
        "--program", Path(), None, "The nbd-bridge command. Default: that of this installation."
    )
    plugin: str | None = setting(
        "--plugin", Path(), None, "The nbdkit plugin. Default: that of this installation."
    )


@dataclass(frozen=True, kw_only=True)
class BenchChoices:
    """The load that `bench` puts on a device."""

    title: ClassVar[str] = "Load"

    pattern: str = setting(
        "--rw",
        Choice(("read", "write", "randread", "randwrite", "mixed")),
        "randread",
        "Sequential, or blocks at random; mixed reads 70 % of them and writes the rest.",
    )
    block_bytes: int = setting(
        "--block-size", Size(minimum="512"), 4096, "Of each request.", written_default="4K"
    )
    depth: int = setting("--depth", Whole(1, 256), 32, "Requests in flight on each queue.")
    queues: int = setting("--queues", Whole(1, 64), 1, "Virtqueues.")
    runtime_s: float = setting("--runtime", Number(0.1, 86400), 10.0, "Seconds.")
    flush_every: int = setting(
        "--flush-every", Whole(0, 1 << 30), 0, "A flush after so many writes of a queue; 0: none."
    )


@dataclass(frozen=True, kw_only=True)
class ProbeChoices(ShowOutput):
    """What `bench` may do to the disk, and how it prints."""

    title: ClassVar[str] = "Device and output"

    destructive: bool = setting(
        "--destructive", Flag(), False, "Overwrite the disk: what it holds is lost."
    )


@dataclass(frozen=True, kw_only=True)
class CheckChoices(ProbeChoices):
    """Which rules `check` tries, and how it prints."""

    only: str = setting("--only", Text(max_bytes=40), "", "Rules whose name has this in it.")
    timeout_s: float = setting("--timeout", Number(1, 3600), 60.0, "Seconds for each rule.")


# The commands.


@dataclass(frozen=True, kw_only=True)
class InfoSettings(CommandSettings):
    """`info`."""

    output: InfoOutput = InfoOutput()
    server: ConnectSettings = ConnectSettings()
    tls: TlsSettings = TlsSettings()


@dataclass(frozen=True, kw_only=True)
class CacheShowSettings(CommandSettings):
    """`cache show`."""

    output: ShowOutput = ShowOutput()


@dataclass(frozen=True, kw_only=True)
class CacheDropSettings(CommandSettings):
    """`cache drop`."""

    cache: DropChoices = DropChoices()


@dataclass(frozen=True, kw_only=True)
class CacheListSettings(CommandSettings):
    """`cache list`."""

    output: ListChoices = ListChoices()
    server: ConnectSettings = ConnectSettings()
    tls: TlsSettings = TlsSettings()


@dataclass(frozen=True, kw_only=True)
class CachePruneSettings(CommandSettings):
    """`cache prune`."""

    cache: PruneChoices = PruneChoices()
    server: ConnectSettings = ConnectSettings()
    tls: TlsSettings = TlsSettings()
    output: ShowOutput = ShowOutput()


@dataclass(frozen=True, kw_only=True)
class CacheFlushSettings(CommandSettings):
    """`cache flush`."""

    cache: FlushChoices = FlushChoices()
    server: ConnectSettings = ConnectSettings()
    tls: TlsSettings = TlsSettings()
    output: ShowOutput = ShowOutput()


@dataclass(frozen=True, kw_only=True)
class CacheWarmSettings(CommandSettings):
    """`cache warm`."""

    cache: WarmChoices = WarmChoices()
    server: ConnectSettings = ConnectSettings()
    tls: TlsSettings = TlsSettings()
    output: ShowOutput = ShowOutput()


@dataclass(frozen=True, kw_only=True)
class StatusSettings(CommandSettings):
    """`status` and `list`."""

    output: ShowOutput = ShowOutput()


@dataclass(frozen=True, kw_only=True)
class ActionSettings(CommandSettings):
    """`flush` and `resize`."""

    action: ActionChoices = ActionChoices()
    output: ShowOutput = ShowOutput()


@dataclass(frozen=True, kw_only=True)
class StopSettings(CommandSettings):
    """`stop`."""

    action: StopChoices = StopChoices()
    output: ShowOutput = ShowOutput()


@dataclass(frozen=True, kw_only=True)
class SetSettings(CommandSettings):
    """`set`."""

    changes: Changes = Changes()
    output: ShowOutput = ShowOutput()


@dataclass(frozen=True, kw_only=True)
class ExporterSettings(CommandSettings):
    """`exporter`."""

    exporter: ExporterChoices = ExporterChoices()


@dataclass(frozen=True, kw_only=True)
class TopSettings(CommandSettings):
    """`top`."""

    view: TopChoices = TopChoices()


@dataclass(frozen=True, kw_only=True)
class BenchSettings(CommandSettings):
    """`bench`."""

    load: BenchChoices = BenchChoices()
    device: ProbeChoices = ProbeChoices()


@dataclass(frozen=True, kw_only=True)
class CheckSettings(CommandSettings):
    """`check`."""

    device: CheckChoices = CheckChoices()


@dataclass(frozen=True, kw_only=True)
class DemoSettings(CommandSettings):
    """`demo`."""

    demo: DemoChoices = DemoChoices()


@dataclass(frozen=True, kw_only=True)
class UpgradeSettings(CommandSettings):
    """`upgrade`."""

    action: ActionChoices = ActionChoices()
    output: ShowOutput = ShowOutput()


@dataclass(frozen=True, kw_only=True)
class ConfigCheckSettings(CommandSettings):
    """`config check`."""


@dataclass(frozen=True, kw_only=True)
class ConfigShowSettings(CommandSettings):
    """`config show`."""

    output: ShowOutput = ShowOutput()


@dataclass(frozen=True, kw_only=True)
class InstallUnitsSettings(CommandSettings):
    """`install-units`."""

    units: UnitChoices = UnitChoices()


@dataclass(frozen=True, kw_only=True)
class PluginPathSettings(CommandSettings):
    """`plugin-path`."""


@dataclass(frozen=True, kw_only=True)
class ManPagesSettings(CommandSettings):
    """`man-pages`."""


@dataclass(frozen=True, kw_only=True)
class CompletionSettings(CommandSettings):
    """`completion`."""
