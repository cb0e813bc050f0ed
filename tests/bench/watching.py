"""What it costs to watch bridges: `./run bench watching`.

- Requests per second, and processor time of the bridge per request, of a bridge that keeps no
  latencies and watches nothing (which only this benchmark has), of the usual one, and of the usual
  one while it is scraped once a second: alternating runs, medians. Required: less than 2 % for the
  metrics, less than 1 % for the scraping.
- How long `GET /status` takes while the disk is under full load. Required: 100 ms.
- Processor time and memory (PSS) of ten idle bridges, which were asked for their status once.
  Required: 0.2 % of a core, 255.6 MB.

On an idle machine it takes less than four minutes.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bridge.api.client import ask, read
from tests.bench import cache
from tests.bench.peer import Workload, measure, running
from tests.bench.versions import cpu_s

_ANSWER_S = 10.0
_IDLE_S = 20.0
_BRIDGES = 10
_WORKLOADS = (
    (Workload("warm 4 KiB read, depth 32", 4096, 32, 3_000_000, False, 0, 5), True),
    (Workload("warm 4 KiB read, depth 1", 4096, 1, 500_000, False, 0, 5), True),
    (Workload("4 KiB write, depth 32", 4096, 32, 2_000_000, True, 0, 5), True),
    (Workload("without a cache: 4 KiB read, depth 32", 4096, 32, 600_000, False, 0, 5), False),
)
"""Seconds each, so that some scrapes come in between."""

_BARE = """\
import sys, trio
from bridge.api import sampler, watch
async def nothing(self): await trio.sleep_forever()
sampler.Sampler.run = watch.Watch.run = nothing
from bridge.cli.main import main
main(sys.argv[1:])
"""
"""The bridge without what keeps latencies and looks for slow requests."""


@contextlib.contextmanager
def served(
    checkout: Path, *, cached: bool, filled: bool = True, bare: bool = False
) -> Iterator[tuple[int, Path, Path]]:
    """Process number, vhost-user socket and control socket of a bridge. `filled`: so is its cache,
    which counts as its memory."""
    with contextlib.ExitStack() as up:
        directory = Path(up.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp")))
        nbd, socket, control = directory / "nbd", directory / "vhost", directory / "vm0.api"
        up.enter_context(cache.server("near", nbd))
        options = ["--cache-mode", "off"]
        if cached:
            options = ["--cache-mode", "writeback", "--cache-size", "256M"]
            options += ["--cache-dir", str(directory)]
        argv = [
            *("sh", "-c", 'cd "$0" && exec "$@"', str(checkout)),
            str(checkout / ".venv/bin/python"),
            *(("-c", _BARE) if bare else ("-m", "bridge")),
            *("serve", f"nbd+unix:///?socket={nbd}", "--socket-path", str(socket)),
            *("--log-level", "warning", "--api", str(control), *options),
        ]
        pid = up.enter_context(running(*argv, ready=socket)).pid
        if cached and filled:
            measure(socket, Workload("", 128 << 10, 8, 2048, False, 0, 1))
        yield pid, socket, control


@contextlib.contextmanager
def scraped(control: Path) -> Iterator[None]:
    """Its metrics are read once a second meanwhile."""
    ended = threading.Event()

    def scrape() -> None:
        while not ended.wait(1.0):
            read(control, "/metrics", timeout_s=_ANSWER_S)

    thread = threading.Thread(target=scrape)
    read(control, "/metrics", timeout_s=_ANSWER_S)  # The first one imports the library.
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def cost_of_watching(checkout: Path, workload: Workload, rounds: int, *, cached: bool) -> str:
    """One row: without metrics, with them, and scraped."""
    rates: tuple[list[float], ...] = [], [], []
    costs: tuple[list[float], ...] = [], [], []
    with (
        served(checkout, cached=cached, bare=True) as bare,
        served(checkout, cached=cached) as usual,
    ):
        for _ in range(rounds):
            for number, (pid, socket, control) in enumerate((bare, usual, usual)):
                with scraped(control) if number == 2 else contextlib.nullcontext():
                    before_s = cpu_s(pid)
                    rates[number].append(measure(socket, workload))
                    costs[number].append((cpu_s(pid) - before_s) / workload.count * 1e6)
    rate, cost = (list(map(statistics.median, each)) for each in (rates, costs))
    text = f"{workload.name:38} | bare {rate[0]:9,.0f}/s {cost[0]:6.2f} us"
    for name, at in (("metrics", 1), ("scraped", 2)):
        slower, dearer = 1 - rate[at] / rate[at - 1], cost[at] / cost[at - 1] - 1
        text += (
            f" | {name} {rate[at]:9,.0f}/s {cost[at]:6.2f} us: {-slower:+.1%}, time {dearer:+.1%}"
        )
    return text


def status_under_load(checkout: Path, asked: int) -> str:
    """Of a cached disk at depth 32, and of one without a cache."""
    found = []
    for workload, cached in (_WORKLOADS[0], _WORKLOADS[3]):
        took_s: list[float] = []
        with served(checkout, cached=cached) as (_, socket, control):
            ended = threading.Event()

            def load(socket: Path, workload: Workload, ended: threading.Event) -> None:
                while not ended.is_set():
                    measure(socket, workload)

            thread = threading.Thread(target=load, args=(socket, workload, ended))
            thread.start()
            time.sleep(1)
            for _ in range(asked):
                began_s = time.perf_counter()
                ask(control, "GET", "/status", timeout_s=_ANSWER_S)
                took_s.append(time.perf_counter() - began_s)
                time.sleep(0.05)
            ended.set()
            thread.join()
        took_s.sort()
        found.append(
            f"{'cached' if cached else 'no cache'}: median {took_s[asked // 2] * 1000:.1f} ms, "
            f"longest {took_s[-1] * 1000:.1f} ms"
        )
    return "; ".join(found)


def ten_idle(checkout: Path) -> str:
    with contextlib.ExitStack() as up:
        pids = []
        for _ in range(_BRIDGES):
            pid, _, control = up.enter_context(served(checkout, cached=True, filled=False))
            ask(control, "GET", "/status", timeout_s=_ANSWER_S)
            pids.append(pid)
        time.sleep(2)
        before_s = sum(map(cpu_s, pids))
        time.sleep(_IDLE_S)
        used_s = sum(map(cpu_s, pids)) - before_s
        pss = sum(map(pss_bytes, pids))
    return f"{used_s / _IDLE_S:.3%} of a core, {pss / 1e6:.0f} MB (PSS)"


def pss_bytes(pid: int) -> int:
    """Memory of a process; what it shares is divided among those that share it."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="./run bench watching", description=(__doc__ or "").replace("%", "%%")
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each row")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument(
        "--checkout", type=Path, default=Path.cwd(), help="of the bridge; with .venv"
    )
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    for workload, cached in _WORKLOADS:
        if arguments.only in workload.name:
            print(cost_of_watching(checkout, workload, arguments.rounds, cached=cached), flush=True)
    if arguments.only in "status":
        print(f"{'status under load':40} | {status_under_load(checkout, 100)}", flush=True)
    if arguments.only in "idle":
        print(f"{'ten idle bridges':40} | {ten_idle(checkout)}", flush=True)
