"""`nbd-bridge exporter`."""

from __future__ import annotations

import socket
from functools import partial

import click
import trio

from bridge.api.exporter import Exporter, serve
from bridge.app import service_manager
from bridge.app.command_settings import ExporterSettings
from bridge.app.signals import ending_signals
from bridge.cli import common
from bridge.errors import ConfigError


@common.command("exporter", ExporterSettings, example="nbd-bridge exporter --listen 10.0.0.5:9809")
def command(settings: ExporterSettings) -> None:
    """Show all bridges of this host over HTTP: pages to look at, and /metrics for Prometheus.

    It only reads. Whoever reaches the address may look: names, sizes, URIs and rates of the disks.
    It finds the bridges that this user may ask, as `list` does.
    """
    host, port = _address(settings.exporter.listen)
    trio.run(_serve, host, port)


def _address(text: str) -> tuple[str | None, int]:
    """Host (None: every address of this machine) and port. Raises ConfigError."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ConfigError(f"--listen {text}: write HOST:PORT, such as 127.0.0.1:9809 or [::1]:9809")
    return host.removeprefix("[").removesuffix("]") or None, int(port)


async def _serve(host: str | None, port: int) -> None:
    with ending_signals() as signals:
        try:
            listeners = await trio.open_tcp_listeners(port, host=host)
        except (OSError, socket.gaierror) as error:
            reason = error.strerror or error
            raise ConfigError(f"--listen {host or ''}:{port}: cannot listen: {reason}") from None
        at = ", ".join(_url(each) for each in listeners)
        click.echo(f"nbd-bridge: the bridges of this host are shown at {at}", err=True)
        await service_manager.ready(f"listening at {at}")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(serve, Exporter(), listeners))
            await signals.receive()
            nursery.cancel_scope.cancel()


def _url(listener: trio.SocketListener) -> str:
    host, port, *_ = listener.socket.getsockname()
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"
