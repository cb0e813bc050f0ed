"""`nbd-bridge serve`."""

from __future__ import annotations

from typing import Any

import click
import structlog
import trio

from bridge.api.places import may_be_called
from bridge.app import logs, upgrade
from bridge.app.listening import gid_of, passed_sockets
from bridge.app.serve import serve_disk
from bridge.app.settings import ServeSettings
from bridge.cli import common, config_file
from bridge.cli.options import GroupedOption
from bridge.cli.variables import misspelt
from bridge.cli.wording import explain
from bridge.errors import ConfigError
from bridge.server.uri import parse_uri

_log = structlog.get_logger(__name__)


def _read_config(context: click.Context, _: click.Parameter, value: str | None) -> None:
    """What the file sets stands behind the command line and the environment."""
    if value is None or context.resilient_parsing:
        return
    path = config_file.find(value)
    found: dict[str, Any] = config_file.read(path)
    if may_be_called(path.stem):
        found.setdefault("name", path.stem)
    context.default_map = found


@common.command(
    "serve",
    ServeSettings,
    example="nbd-bridge serve nbd://storage/vm0 --socket-path /run/vm0.sock --cache-size 20G",
    warns=False,
)
@click.argument("uri", envvar="NBD_BRIDGE_SERVE_URI")
@click.option(
    "--config",
    cls=GroupedOption,
    title="Configuration",
    metavar="NAME|FILE",
    is_eager=True,
    expose_value=False,
    callback=_read_config,
    help="Take uri and options that are not given otherwise from this file: a path, or NAME.toml "
    f"in {config_file.DIRECTORY}. The bridge is called NAME then.",
)
@common.capabilities_option
def command(settings: ServeSettings, uri: str) -> None:
    """Serve the export at URI as a vhost-user-blk disk.

    URI is nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH; nbds:// and nbds+unix://
    with TLS.
    """
    logging = settings.logging
    logs.configure(level=logging.level, format_=logging.format, explain=explain)
    for text in misspelt(click.get_current_context()):
        _log.warning(text)
    check_socket(settings, passed=bool(passed_sockets()) or upgrade.is_passed_a_socket())
    if upgrade.is_trial():
        gid_of(settings.disk.socket_group)
        upgrade.check_trial(parse_uri(uri))
        return
    leaving = trio.run(serve_disk, uri, settings, upgrade.received())
    if leaving is not None:
        leaving.go()


def check_socket(settings: ServeSettings, *, passed: bool = False) -> None:
    """Raises ConfigError if it is not clear where to listen. `passed`: a service manager has passed
    a socket."""
    disk = settings.disk
    if disk.socket_path is not None and disk.fd is not None:
        raise ConfigError("give either --socket-path or --fd")
    if disk.socket_path is None and disk.fd is None and not passed:
        raise ConfigError("give --socket-path, or --fd for an inherited socket")
    if disk.socket_path is None and disk.socket_mode is not None:
        raise ConfigError("--socket-mode is for --socket-path: an inherited socket has its own")
