"""The command line: `nbd-bridge serve`, `info` and their options."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, fields
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec

import click
import trio

from bridge import __version__
from bridge.app import logs
from bridge.app.signals import run_until_signal
from bridge.cli import api_options, bridges, flush, resize, settings, status, stop
from bridge.cli.output import complain, one_line_errors, print_line
from bridge.cli.parameters import FilePath, Finite, Range, Size, Utf8, option
from bridge.errors import ConfigError

if TYPE_CHECKING:
    from bridge.server.client_options import ClientOptions

P = ParamSpec("P")

_CAPABILITIES = {"type": "block", "features": ["read-only"]}
"""What `--print-capabilities` says (vhost-user "Backend program conventions")."""


MIN_CACHE_SIZE = "4M"
"""What `cache.layout` needs at least, with the blocks that nearly all servers have."""


_MAX_FD = (1 << 31) - 1
"""An `int` of the system's."""


def main(arguments: list[str] | None = None) -> NoReturn:
    """The `nbd-bridge` command; `arguments` None: those of the process."""
    _open_standard_descriptors()
    try:
        status = nbd_bridge.main(
            arguments,
            prog_name="nbd-bridge",
            auto_envvar_prefix="NBD_BRIDGE",
            standalone_mode=False,  # It would say an error in four lines.
        )
    except click.ClickException as error:
        complain(_one_line(error))
        status = error.exit_code
    except click.Abort:
        complain("interrupted")
        status = 1
    sys.exit(status)


def _open_standard_descriptors() -> None:
    """What was closed is /dev/null: a socket must not become the place for errors."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest there is: this one


def _one_line(error: click.ClickException) -> str:
    """What click has to say, without its line breaks, and where to read more."""
    text = " ".join(error.format_message().split("\n")).rstrip(".")
    context = getattr(error, "ctx", None)
    more = f" (see '{context.command_path} --help')" if context is not None else ""
    return text[:1].lower() + text[1:] + more


def _print_capabilities(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        click.echo(json.dumps(_CAPABILITIES))
        context.exit()


_capabilities_option = option(
    "--print-capabilities",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_capabilities,
    help="Print what this vhost-user program can do, as JSON, and exit.",
)


class _Group(click.Group):
    """Commands; without one, its help is printed, and nothing was done."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:  # A shell that completes parses too.
            click.echo(self.get_help(ctx), err=True)
            ctx.exit(2)
        return super().parse_args(ctx, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="nbd-bridge")
@_capabilities_option
def nbd_bridge() -> None:
    """Give a virtual machine a disk that lives on a network block device.

    Every option can also be set by an environment variable: NBD_BRIDGE_SERVE_CACHE_SIZE for
    `serve --cache-size`, and so on.
    """


def _block_size(_: click.Context, __: click.Parameter, value: int) -> int:
    if value & (value - 1):
        raise click.BadParameter("must be a power of two")
    return value


def _withheld(context: click.Context, _: click.Parameter, value: str) -> int:
    """The bits of `-name,-name`."""
    from bridge.guest.virtio.blk_config import FEATURE_BITS

    bits = 0
    for word in filter(None, value.split(",")):
        name = word.strip().removeprefix("-").lower()
        if not word.strip().startswith("-") or name not in FEATURE_BITS:
            raise click.BadParameter(
                f"{word!r}: write -NAME with NAME of {', '.join(sorted(FEATURE_BITS))}"
            )
        bits |= FEATURE_BITS[name]
    return bits


_CONNECTION_OPTIONS = [
    option(
        "--connect-timeout",
        "connect_timeout_s",
        type=Finite(0.1),
        default=10.0,
        show_default=True,
        help="Seconds for one attempt to connect.",
    ),
    option("--tls-ca", "tls_ca_file", type=FilePath(), help="CA certificates (PEM)."),
    option("--tls-cert", "tls_certificate_file", type=FilePath(), help="Our certificate."),
    option("--tls-key", "tls_key_file", type=FilePath(), help="The key to --tls-cert."),
]


def _connection_options(command: Callable[P, None]) -> Callable[P, None]:
    """What every command has that connects to a server."""
    for each in reversed(_CONNECTION_OPTIONS):
        command = each(command)
    return command


def _client_options(options: dict[str, Any]) -> ClientOptions:
    """Those of the client, which are taken out of `options`."""
    from bridge.server.client_options import ClientOptions

    names = {each.name for each in fields(ClientOptions)} - {"read_only"}
    return ClientOptions(**{name: options.pop(name) for name in names & options.keys()})


@nbd_bridge.command()
@click.argument("uri")
@option("--socket-path", type=FilePath(), help="Listen on this unix socket.")
@option("--fd", type=click.IntRange(0, _MAX_FD), help="Listen on this inherited socket instead.")
@_capabilities_option
@option("--read-only", is_flag=True, help="The guest may not write.")
@option("--serial", type=Utf8(), default="", help="Serial number of the disk, at most 20 bytes.")
@option(
    "--num-queues",
    type=click.IntRange(1, 64),
    default=1,
    show_default=True,
    help="Virtqueues offered to the guest.",
)
@option(
    "--queue-size",
    type=click.IntRange(2, 1024),
    default=1024,
    show_default=True,
    callback=_block_size,
    help="Largest virtqueue accepted, in descriptors.",
)
@option(
    "--block-size",
    type=click.IntRange(512, 4096),
    default=512,
    show_default=True,
    callback=_block_size,
    help="Logical block size that the guest sees, in bytes.",
)
@option(
    "--flush-interval",
    "flush_interval_s",
    type=Finite(0),
    default=60.0,
    show_default=True,
    help="Flush this many seconds after a write at the latest; 0: never.",
)
@option(
    "--poll-us",
    type=Finite(0, 10_000),
    default=32.0,
    show_default=True,
    help="Look for work this many microseconds before sleeping; 0: sleep at once.",
)
@option(
    "--features",
    default="",
    help="Features to withhold from the guest, such as -mq,-discard.",
    callback=_withheld,
    metavar="-NAME,…",
)
@option(
    "--cache-mode",
    type=click.Choice(["off", "writethrough", "writeback"]),
    default="writeback",
    show_default=True,
    help="Keep a local cache; writeback also completes writes in it.",
)
@option(
    "--cache-size",
    type=Size(minimum=MIN_CACHE_SIZE),
    default="1G",
    show_default=True,
    help=f"Size of the cache file, such as 512M or 20G; at least {MIN_CACHE_SIZE}.",
)
@option(
    "--cache-dir",
    type=FilePath(),
    help="Where the cache file is. Default: /var/cache/nbd-bridge, or ~/.cache/nbd-bridge.",
)
@option(
    "--connections",
    type=click.IntRange(1, 16),
    default=1,
    show_default=True,
    help="Connections to the server, where it allows several.",
)
@_connection_options
@option(
    "--request-timeout",
    "request_timeout_s",
    type=Finite(0),
    default=60.0,
    show_default=True,
    help="Reconnect when the server is silent for this many seconds (ten times as many during a "
    "flush, if it answers nothing beside it); 0: never.",
)
@option(
    "--reconnect-timeout",
    "reconnect_timeout_s",
    type=Finite(0),
    default=0.0,
    show_default=True,
    help="Fail the guest's requests after this many seconds without a server; 0: they wait.",
)
@option(
    "--stale-write-grace",
    "stale_write_grace_s",
    type=Finite(0),
    default=5.0,
    show_default=True,
    help="Seconds that a write of a lost connection may still reach a server without a fence.",
)
@option(
    "--stop-timeout",
    "stop_timeout_s",
    type=Finite(0),
    default=30.0,
    show_default=True,
    help="Seconds that a stop may take to bring everything to the server.",
)
@option(
    "--drain-timeout",
    "drain_timeout_s",
    type=Finite(0),
    default=30.0,
    show_default=True,
    help="Seconds that the guest's stop (pause, migration) may take to be answered.",
)
@api_options.add
@option("--log-level", type=click.Choice(logs.LEVELS), default="info", show_default=True)
@option("--log-format", type=click.Choice(logs.FORMATS), default="text", show_default=True)
@one_line_errors
def serve(uri: str, log_level: str, log_format: str, **options: Any) -> None:
    """Serve the export at URI as a vhost-user-blk disk.

    URI is nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; nbds:// and nbds+unix://
    with TLS.
    """
    from bridge.app.serve import ServeOptions, serve_disk
    from bridge.app.storage import CacheSettings

    logs.configure(level=log_level, format_=log_format)
    if (options["socket_path"] is None) == (options["fd"] is None):
        raise ConfigError("give either --socket-path or --fd")
    if len(options["serial"].encode()) > 20:
        raise ConfigError(f"--serial {options['serial']!r} is longer than the 20 bytes there are")
    cache = CacheSettings(
        mode=options.pop("cache_mode"),
        size_bytes=options.pop("cache_size"),
        directory=options.pop("cache_dir"),
    )
    api = api_options.take(options)
    client = _client_options(options)
    options["withheld_features"] = options.pop("features")
    trio.run(serve_disk, ServeOptions(uri=uri, client=client, cache=cache, api=api, **options))


@nbd_bridge.command()
@click.argument("uri")
@option("--json", "as_json", is_flag=True, help="Print JSON.")
@option("--list", "as_list", is_flag=True, help="Print which exports there are.")
@_connection_options
@one_line_errors
def info(uri: str, as_json: bool, as_list: bool, **options: Any) -> None:
    """Print what the server at URI offers."""
    from bridge.app.info import describe, describe_list, inspect_uri, list_uri

    logs.configure(level="warning", format_="text")
    client = _client_options(options)
    if as_list:
        exports = run_until_signal(partial(list_uri, uri, client))
        print_line(json.dumps(exports, indent=2) if as_json else describe_list(exports))
        return
    export = run_until_signal(partial(inspect_uri, uri, client))
    print_line(json.dumps(export, indent=2) if as_json else describe(export))


for _command in (
    bridges.list_,
    status.status,
    flush.flush,
    resize.resize,
    settings.set_,
    stop.stop,
):
    nbd_bridge.add_command(_command)


@nbd_bridge.group(cls=_Group)
def cache() -> None:
    """Look after a cache that is not in use.

    `show`, `flush` and `drop` take its FILE, `warm` the URI of the export.
    """


@cache.command("show")
@click.argument("file")
@option("--json", "as_json", is_flag=True, help="Print JSON.")
@one_line_errors
def cache_show(file: str, as_json: bool) -> None:
    """Print what cache FILE holds."""
    from bridge.cache.file.inspect import describe, show

    summary = show(file)
    print_line(json.dumps(asdict(summary), indent=2) if as_json else describe(summary))


@cache.command("drop")
@click.argument("file")
@option("--discard-dirty", is_flag=True, help="Even if it holds what the server has not.")
@one_line_errors
def cache_drop(file: str, discard_dirty: bool) -> None:
    """Remove cache FILE."""
    from bridge.cache.file.inspect import drop

    drop(file, discard_dirty=discard_dirty)


@cache.command("flush")
@click.argument("file")
@click.argument("uri", required=False)
@option("--moved", is_flag=True, help="URI is where the export is now.")
@option("--force", is_flag=True, help="Also over what somebody else wrote meanwhile.")
@option(
    "--skip-damaged",
    is_flag=True,
    help="Give up what is in damaged parts of the file, and bring all the rest.",
)
@option(
    "--timeout",
    "timeout_s",
    type=Finite(1),
    default=60.0,
    show_default=True,
    help="Seconds for all of it; what is missing then stays in the file.",
)
@_connection_options
@one_line_errors
def cache_flush(file: str, uri: str | None, **options: Any) -> None:
    """Bring what only FILE holds to the server.

    URI is needed where the server wants TLS, or has moved.
    """
    from bridge.app.cache_tools import flush_file

    logs.configure(level="warning", format_="text")
    client = _client_options(options)
    flushed = run_until_signal(partial(flush_file, file, uri, client=client, **options))
    print_line(f"{flushed} bytes written to the server and flushed")


@cache.command("warm")
@click.argument("uri")
@option(
    "--cache-size",
    "cache_bytes",
    type=Size(MIN_CACHE_SIZE),
    help=f"Size of the cache file, at least {MIN_CACHE_SIZE}. Default: that of the file there is, "
    "or 1G. Give the same to `serve`, which makes a file of another size anew.",
)
@option("--cache-dir", "directory", type=FilePath(), help="Where the cache file is.")
@option(
    "--range",
    "ranges",
    type=Range(),
    multiple=True,
    metavar="OFFSET:LENGTH",
    help="Only this part of the disk; may be given several times.",
)
@option(
    "--timeout",
    "timeout_s",
    type=Finite(1),
    default=60.0,
    show_default=True,
    help="Give up after this many seconds without a server.",
)
@_connection_options
@one_line_errors
def cache_warm(uri: str, **options: Any) -> None:
    """Fill the cache of the export at URI.

    All of it is read that the cache has room for; holes are left out. `serve` needs the same
    --cache-size and --cache-dir to use the cache.
    """
    from bridge.app.cache_tools import warm

    logs.configure(level="warning", format_="text")
    client = _client_options(options)
    with ExitStack() as at_last:
        bar: Any = None

        def progress(done_bytes: int, total_bytes: int) -> None:
            # Not before there is progress: it would be a second line of a refusal.
            nonlocal bar
            if bar is None:
                new = click.progressbar(length=total_bytes, label="warming", file=sys.stderr)
                bar = at_last.enter_context(new)
            bar.update(done_bytes - bar.pos)

        warmed = run_until_signal(partial(warm, uri, client=client, progress=progress, **options))
    print_line(f"{warmed} bytes are in the cache")


@nbd_bridge.command()
@option("--no-guest", is_flag=True, help="Let the built-in front-end play the guest.")
@one_line_errors
def demo(no_guest: bool) -> None:
    """Boot a small Linux guest on a disk of the bridge, check the image."""
    from bridge.demo.demo import DemoConfig, run_demo

    logs.configure(level="warning", format_="text")
    result = run_until_signal(partial(run_demo, DemoConfig(guest=not no_guest), say=print_line))
    if not result.passed:
        sys.exit(1)
