"""`nbd-bridge bench`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from functools import partial

import click

from bridge.app.command_settings import BenchSettings
from bridge.app.signals import run_until_signal
from bridge.cli import common
from bridge.cli.wording import time_text
from bridge.errors import ConfigError
from bridge.probe.bench import Load, Measured, Result, bench
from bridge.units import size_text

_MAX_BUFFER_BYTES = 1 << 30
"""Of all requests in flight together: they are in this process' memory."""
_SHARES = (("p50", 0.5), ("p95", 0.95), ("p99", 0.99), ("p99.9", 0.999))


@common.command(
    "bench", BenchSettings, example="nbd-bridge bench --rw randread --depth 32 /run/vm0.sock"
)
@click.argument("socket")
def command(settings: BenchSettings, socket: str) -> None:
    """Measure how fast the vhost-user-blk device at SOCKET is.

    This process plays the guest, so no other guest may be connected. It works with any back-end.
    Loads that write need --destructive.
    """
    load = Load(**asdict(settings.load))
    if load.writes and not settings.device.destructive:
        raise ConfigError(f"--rw {load.pattern} overwrites the disk: add --destructive to do it")
    if load.block_bytes * load.depth * load.queues > _MAX_BUFFER_BYTES:
        raise ConfigError(
            "--block-size times --depth times --queues is more than "
            f"{size_text(_MAX_BUFFER_BYTES)}: choose less of one of them"
        )
    result = run_until_signal(partial(bench, socket, load))
    as_json = settings.device.as_json
    common.print_result(json.dumps(json_of(result), indent=2) if as_json else text_of(result))
    if any(each.errors for each in result.kinds.values()):
        sys.exit(1)


def json_of(result: Result) -> dict[str, object]:
    """The result for a program; times in seconds."""
    return {
        "load": asdict(result.load),
        "disk_bytes": result.disk_bytes,
        "depth": result.depth,
        "elapsed_s": result.elapsed_s,
        "requests": {name: _figures(each, result) for name, each in result.kinds.items()},
    }


def _figures(measured: Measured, result: Result) -> dict[str, float]:
    latencies = measured.latencies
    return {
        "count": latencies.count,
        "errors": measured.errors,
        "per_s": latencies.count / result.elapsed_s,
        "bytes_per_s": measured.moved_bytes / result.elapsed_s,
        "mean_s": latencies.mean_ns / 1e9,
        **{f"{name}_s": latencies.quantile_ns(share) / 1e9 for name, share in _SHARES},
        "max_s": latencies.max_ns / 1e9,
    }


def text_of(result: Result) -> str:
    """The result as a table."""
    load = result.load
    head = ("", "IOPS", "MB/s", "mean", *(name for name, _ in _SHARES), "max", "errors")
    rows = [head]
    for name, each in result.kinds.items():
        figures = _figures(each, result)
        times = [figures[f"{column}_s"] for column in head[3:-1]]
        rows.append(
            (
                name,
                f"{figures['per_s']:.0f}",
                f"{figures['bytes_per_s'] / 1e6:.1f}",
                *map(time_text, times),
                str(each.errors),
            )
        )
    return (
        f"{load.pattern} of {size_text(load.block_bytes)} on {size_text(result.disk_bytes)}, "
        f"{load.queues} x {result.depth} requests in flight, {result.elapsed_s:.1f} s\n"
        + common.columns(rows)
    )
