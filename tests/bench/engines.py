"""Both engines beside qemu-storage-daemon: requests per second, and processor time per request.

One server, one client, alternating runs, medians. The processor time is that of the serving process
alone (user and system, from /proc): unlike the rate it hardly depends on what else the machine
does. `required` is the least ratio of the compiled engine's rate to the peer's.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path

from tests.bench.cache import server
from tests.bench.peer import Workload, measure, memory_server, running, storage_daemon

_KIB = 1024
_CACHE_BYTES = 256 << 20
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PEER = "qemu-s-d"
SIDES = ("pure", "compiled", PEER)

UNCACHED = [
    Workload("4 KiB read, depth 32", 4096, 32, 150_000, False, 1.8),
    Workload("4 KiB write, depth 32", 4096, 32, 150_000, True, 2.0),
    Workload("4 KiB read, depth 1", 4096, 1, 30_000, False, 1.3),
    Workload("4 KiB write, depth 1", 4096, 1, 30_000, True, 1.4),
    Workload("1 MiB read, depth 8", 1 << 20, 8, 4_000, False, 1.0),
    Workload("1 MiB write, depth 8", 1 << 20, 8, 4_000, True, 1.0),
]
CACHED = [
    Workload("cached 4 KiB read, depth 32", 4096, 32, 200_000, False, 9.0),
    Workload("cached 4 KiB read, depth 1", 4096, 1, 40_000, False, 6.0),
    Workload("cached 4 KiB write, depth 32", 4096, 32, 100_000, True, 6.0),
    Workload("cached 4 KiB write, depth 1", 4096, 1, 40_000, True, 5.0),
]


@dataclass
class Side:
    """Something that serves the disk."""

    socket: Path
    process: subprocess.Popen[bytes]
    rates: list[float] = field(default_factory=list)
    costs_us: list[float] = field(default_factory=list)

    def run(self, workload: Workload) -> None:
        before_s = self._processor_s()
        self.rates.append(measure(self.socket, workload))
        self.costs_us.append((self._processor_s() - before_s) / workload.count * 1e6)

    def _processor_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def _bridge(
    up: contextlib.ExitStack, nbd: Path, directory: Path, engine: str, *, cached: bool
) -> Side:
    socket = directory / f"{engine}-{cached}"
    options = ["--cache-mode", "off"]
    if cached:
        cache = directory / f"{engine}-cache"
        cache.mkdir()
        options = ["--cache-mode", "writeback", "--cache-dir", str(cache)]
        options += ["--cache-size", str(_CACHE_BYTES)]
    argv = ["env", f"NBD_BRIDGE_SERVE_ENGINE={engine}", sys.executable, "-m", "bridge", "serve"]
    argv += [f"nbd+unix:///?socket={nbd}", "--socket-path", str(socket)]
    argv += ["--log-level", "warning", *options]
    side = Side(socket, up.enter_context(running(*argv, ready=socket)))
    if cached:
        # Pieces smaller than what goes past the cache.
        measure(socket, Workload("", 128 * _KIB, 8, _CACHE_BYTES // (128 * _KIB), False, 0, 1))
    return side


def _row(workload: Workload, sides: dict[str, Side], rounds: int) -> None:
    for side in sides.values():
        side.rates, side.costs_us = [], []
    for _ in range(rounds):
        for side in sides.values():
            side.run(workload)
    peer = statistics.median(sides[PEER].rates)
    line = f"{workload.name:30}"
    for name, side in sides.items():
        rate, cost_us = statistics.median(side.rates), statistics.median(side.costs_us)
        line += f"{rate:10,.0f} {cost_us:7.1f}"
        if name != PEER:
            line += f" {rate / peer:5.2f}"
    print(f"{line}{workload.required:9.1f}", flush=True)


def main() -> None:
    """Run the tables and print them."""
    parser = argparse.ArgumentParser(prog="./run bench engines", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="alternating runs of each workload")
    parser.add_argument("--only", default="", help="workloads whose name has this in it")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the request counts")
    arguments = parser.parse_args()
    print(
        f"{'':30}{'pure':>10} {'us':>7} {'ratio':>5}{'compiled':>10} {'us':>7} {'ratio':>5}", end=""
    )
    print(f"{PEER:>10} {'us':>7}{'required':>9}")
    for cached, workloads in ((False, UNCACHED), (True, CACHED)):
        wanted = [each for each in workloads if arguments.only in each.name]
        if not wanted:
            continue
        with contextlib.ExitStack() as up:
            name = up.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp"))
            directory = Path(name)
            nbd, theirs = directory / "nbd", directory / "qsd"
            up.enter_context(server("near", nbd) if cached else memory_server(nbd))
            sides = {
                engine: _bridge(up, nbd, directory, engine, cached=cached)
                for engine in SIDES
                if engine != PEER
            }
            sides[PEER] = Side(theirs, up.enter_context(storage_daemon(nbd, theirs)))
            for workload in wanted:
                count = max(200, int(workload.count * arguments.scale))
                _row(replace(workload, count=count), sides, arguments.rounds)


if __name__ == "__main__":
    main()
