"""Two or more checkouts of the bridge beside one another: did a change cost speed?

`./run bench versions DIRECTORY…`: the first is what the others are compared with, this checkout is
the last. Each needs its own `.venv` (`./run setup` there). All serve the same server to the same
client, `qemu-img bench`; they are measured in turn, and the medians are printed: requests per
second, processor time of the bridge per request, and both relative to the first checkout.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
from dataclasses import replace
from pathlib import Path

from tests.bench import cache, peer
from tests.bench.peer import Workload, measure, running


def cpu_s(pid: int) -> float:
    """Processor time that the threads of a process have used so far."""
    used_ns = 0
    for each in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError):  # A thread that has just ended.
            used_ns += int(each.read_text().split()[0])
    return used_ns / 1e9


def serve(up: contextlib.ExitStack, checkout: Path, nbd: Path, socket: Path, *options: str) -> int:
    """Start the bridge of `checkout` for as long as `up` lasts; its process number."""
    argv = [
        *("sh", "-c", 'cd "$0" && exec "$@"', str(checkout)),
        *(str(checkout / ".venv/bin/python"), "-m", "bridge", "serve"),
        *(f"nbd+unix:///?socket={nbd}", "--socket-path", str(socket)),
        *("--log-level", "warning", *options),
    ]
    return up.enter_context(running(*argv, ready=socket)).pid


def compare(
    checkouts: list[Path], row: cache.Row, rounds: int, scale: float, *, cached: bool
) -> list[tuple[float, float]]:
    """Median requests per second, and median microseconds of processor time per request."""
    workload = replace(row.workload, count=max(200, int(row.workload.count * scale)))
    rates: list[list[float]] = [[] for _ in checkouts]
    costs: list[list[float]] = [[] for _ in checkouts]
    with contextlib.ExitStack() as up:
        directory = Path(up.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp")))
        served = []
        for number, checkout in enumerate(checkouts):
            # A server each: a cached disk has one writer.
            nbd, socket = directory / f"nbd{number}", directory / f"bridge{number}"
            up.enter_context(cache.server(row.server, nbd))
            options = ["--cache-mode", "off"]
            if cached:
                folder = directory / f"cache{number}"
                folder.mkdir()
                options = ["--cache-mode", "writeback", "--cache-dir", str(folder)]
                options += ["--cache-size", "256M"]
            served.append((serve(up, checkout, nbd, socket, *options), socket))
            if cached:
                measure(socket, Workload("", 128 << 10, 8, 2048, False, 0, 1))
        for _ in range(rounds):
            for number, (pid, socket) in enumerate(served):
                before_s = cpu_s(pid)
                rates[number].append(measure(socket, workload))
                costs[number].append((cpu_s(pid) - before_s) / workload.count * 1e6)
    return [
        (statistics.median(rate), statistics.median(cost))
        for rate, cost in zip(rates, costs, strict=True)
    ]


def main() -> None:
    """Run the table and print it."""
    parser = argparse.ArgumentParser(prog="./run bench versions", description=__doc__)
    parser.add_argument("checkouts", type=Path, nargs="+", help="other checkouts, with .venv")
    parser.add_argument("--rounds", type=int, default=5, help="alternating runs of each row")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--scale", type=float, default=0.4, help="factor on the request counts")
    arguments = parser.parse_args()
    checkouts = [*map(Path.resolve, arguments.checkouts), Path.cwd()]
    rows = [(cache.Row(each, "near"), False) for each in peer.WORKLOADS]
    rows += [(row, True) for row in cache.ROWS if row.peer == "nbd" and row.warm]
    for row, cached in rows:
        name = f"{'cache: ' if cached else ''}{row.workload.name}"
        if arguments.only not in name:
            continue
        results = compare(checkouts, row, arguments.rounds, arguments.scale, cached=cached)
        first_rate, first_cost = results[0]
        text = "".join(
            f" | {rate:9,.0f} {rate / first_rate:5.2f} {cost:7.1f} us {cost / first_cost:5.2f}"
            for rate, cost in results
        )
        print(f"{name:44}{text}", flush=True)
