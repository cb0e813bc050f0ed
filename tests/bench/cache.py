"""The cache beside qemu-storage-daemon, which has none: same server, same client, alternating.

`qemu-img bench` with libblkio plays the guest of both. "null-co" is qemu-storage-daemon without any
storage behind it, the limit of its engine. The far server takes a millisecond more for every
command.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from tests.bench.peer import Workload, bridge, measure, running, storage_daemon

_DISK_BYTES = 256 << 20
_KIB = 1024
_FAR_PLUGIN = Path(__file__).with_name("far_plugin.py")


@dataclass(frozen=True)
class Row:
    """One line of the table: a workload, the server, and what it is compared with."""

    workload: Workload
    server: str
    peer: str = "nbd"
    warm: bool = True
    """All of the disk is in the cache before; otherwise nothing is."""
    aim: float = 0.0


def _row(
    name: str,
    server: str,
    block: int,
    depth: int,
    count: int,
    required: float,
    aim: float,
    *,
    write: bool = False,
    peer: str = "nbd",
    warm: bool = True,
    step: int = 5,
    flush_every: int = 0,
) -> Row:
    workload = Workload(name, block, depth, count, write, required, step, flush_every)
    return Row(workload, server, peer, warm, aim)


ROWS = [
    _row("warm 4 KiB read, depth 32", "near", 4096, 32, 200_000, 3, 4),
    _row("  beside null-co", "near", 4096, 32, 200_000, 0.25, 0.5, peer="null-co"),
    _row("warm 4 KiB read, depth 1", "near", 4096, 1, 40_000, 3, 4),
    _row("  beside null-co", "near", 4096, 1, 40_000, 1.5, 2, peer="null-co"),
    _row("4 KiB write, depth 1", "near", 4096, 1, 40_000, 3, 4, write=True),
    _row("4 KiB write, depth 32", "near", 4096, 32, 150_000, 2.5, 4, write=True),
    _row("1 ms away: warm 4 KiB read, depth 1", "far", 4096, 1, 1_500, 20, 20),
    _row("1 ms away: 4 KiB write, depth 1", "far", 4096, 1, 1_500, 20, 20, write=True),
    _row(
        "1 ms away: cold 128 KiB sequential read",
        *("far", 128 * _KIB, 1, 1_000, 4, 8),
        warm=False,
        step=1,
    ),
    _row(
        "1 ms away: 4 KiB write and flush",
        *("far", 4096, 1, 1_000, 1.5, 1.9),
        write=True,
        flush_every=1,
    ),
]


def server(kind: str, socket: Path) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    """nbdkit's memory plugin, near or a millisecond away."""
    argv = ["nbdkit", "-f", "-U", str(socket)]
    if kind == "far":
        argv += ["python", str(_FAR_PLUGIN), f"size={_DISK_BYTES}"]
    else:
        argv += ["memory", str(_DISK_BYTES)]
    return running(*argv, ready=socket)


def run_row(row: Row, rounds: int, scale: float) -> tuple[float, float]:
    """Median requests per second of the bridge and of its peer."""
    workload = replace(row.workload, count=max(200, int(row.workload.count * scale)))
    ours_rates, theirs_rates = [], []
    with contextlib.ExitStack() as up:
        directory = Path(up.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp")))
        nbd, theirs = directory / "nbd", directory / "qsd"
        up.enter_context(server(row.server, nbd))
        up.enter_context(storage_daemon(None if row.peer == "null-co" else nbd, theirs))
        with contextlib.ExitStack() as warm_bridge:
            if row.warm:
                ours = _bridge(warm_bridge, nbd, directory, "warm")
                # Smaller than what goes past the cache (Options.bypass_bytes).
                fill = Workload("", 128 * _KIB, 8, _DISK_BYTES // (128 * _KIB), False, 0, 1)
                measure(ours, fill)
            for number in range(rounds):
                if row.warm:
                    ours_rates.append(measure(ours, workload))
                else:
                    with contextlib.ExitStack() as cold_bridge:
                        cold = _bridge(cold_bridge, nbd, directory, f"cold{number}")
                        ours_rates.append(measure(cold, workload))
                theirs_rates.append(measure(theirs, workload))
    return statistics.median(ours_rates), statistics.median(theirs_rates)


def _bridge(up: contextlib.ExitStack, nbd: Path, directory: Path, name: str) -> Path:
    socket, cache = directory / name, directory / f"{name}-cache"
    cache.mkdir()
    up.enter_context(
        bridge(
            nbd,
            socket,
            *("--cache-mode", "writeback", "--cache-dir", str(cache)),
            *("--cache-size", str(_DISK_BYTES)),
        )
    )
    return socket


def main() -> None:
    """Run the table and print it."""
    parser = argparse.ArgumentParser(prog="./run bench cache", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="alternating runs of each row")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the request counts")
    arguments = parser.parse_args()
    print(f"{'':42}{'nbd-bridge':>12}{'qemu-s-d':>12}{'ratio':>8}{'required':>10}{'aim':>6}")
    for row in ROWS:
        if arguments.only not in row.workload.name:
            continue
        ours, theirs = run_row(row, arguments.rounds, arguments.scale)
        ratio = ours / theirs
        mark = "" if ratio >= row.workload.required else "  below"
        print(
            f"{row.workload.name:42}{ours:12,.0f}{theirs:12,.0f}{ratio:8.2f}"
            f"{row.workload.required:10.2f}{row.aim:6.1f}{mark}",
            flush=True,
        )


if __name__ == "__main__":
    main()
