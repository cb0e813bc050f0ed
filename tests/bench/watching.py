"""What it costs to watch bridges: `./run bench watching`.

- Requests per second, and processor time of the bridge per request, of a bridge that nobody asks,
  and of one that is scraped once a second: alternating runs, medians.
- How long `GET /status` takes while the disk is under full load.
- Processor time and memory (PSS) of ten idle bridges, which were asked for their status once.
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
from tests.bench.peer import Workload, measure
from tests.bench.versions import cpu_s, serve

_ANSWER_S = 10.0
_IDLE_S = 20.0
_BRIDGES = 10
_WORKLOADS = (
    (Workload("warm 4 KiB read, depth 32", 4096, 32, 400_000, False, 0, 5), True),
    (Workload("warm 4 KiB read, depth 1", 4096, 1, 100_000, False, 0, 5), True),
    (Workload("4 KiB write, depth 32", 4096, 32, 300_000, True, 0, 5), True),
    (Workload("without a cache: 4 KiB read, depth 32", 4096, 32, 150_000, False, 0, 5), False),
)


@contextlib.contextmanager
def served(checkout: Path, *, cached: bool) -> Iterator[tuple[int, Path, Path]]:
    """Process number, vhost-user socket and control socket of a bridge."""
    with contextlib.ExitStack() as up:
        directory = Path(up.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp")))
        nbd, socket, control = directory / "nbd", directory / "vhost", directory / "vm0.api"
        up.enter_context(cache.server("near", nbd))
        options = ["--cache-mode", "off"]
        if cached:
            options = ["--cache-mode", "writeback", "--cache-size", "256M"]
            options += ["--cache-dir", str(directory)]
        options += ["--api", str(control)]
        yield serve(up, checkout, nbd, socket, *options), socket, control


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


def cost_of_scraping(checkout: Path, workload: Workload, rounds: int, *, cached: bool) -> str:
    rates: tuple[list[float], list[float]] = [], []
    costs: tuple[list[float], list[float]] = [], []
    with served(checkout, cached=cached) as (pid, socket, control):
        if cached:
            measure(socket, Workload("", 128 << 10, 8, 2048, False, 0, 1))
        for number in range(2 * rounds):
            watched = number % 2
            with scraped(control) if watched else contextlib.nullcontext():
                before_s = cpu_s(pid)
                rates[watched].append(measure(socket, workload))
                costs[watched].append((cpu_s(pid) - before_s) / workload.count * 1e6)
    (alone, asked), (alone_us, asked_us) = (map(statistics.median, each) for each in (rates, costs))
    return (
        f"{workload.name:40} | {alone:9,.0f}/s {alone_us:6.2f} us"
        f" | scraped {asked:9,.0f}/s {asked_us:6.2f} us"
        f" | time {asked_us / alone_us - 1:+.1%}"
    )


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
            pid, _, control = up.enter_context(served(checkout, cached=True))
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
    parser = argparse.ArgumentParser(prog="./run bench watching", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="runs with and without, of each row")
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument(
        "--checkout", type=Path, default=Path.cwd(), help="of the bridge; with .venv"
    )
    arguments = parser.parse_args()
    checkout = arguments.checkout.resolve()
    for workload, cached in _WORKLOADS:
        if arguments.only in workload.name:
            print(cost_of_scraping(checkout, workload, arguments.rounds, cached=cached), flush=True)
    if arguments.only in "status":
        print(f"{'status under load':40} | {status_under_load(checkout, 100)}", flush=True)
    if arguments.only in "idle":
        print(f"{'ten idle bridges':40} | {ten_idle(checkout)}", flush=True)
