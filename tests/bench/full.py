"""All workloads beside qemu-storage-daemon, with the processor time of both: `./run bench full`.

Both sides have an nbdkit each; guests ask one and the other in turn, and the medians are compared.
A run in which a request failed or a bridge complained gives no figures, and the exit status says
so. `--loaded` keeps all cores busy with something else meanwhile. `--quick` is a smoke test of
speed: a few rows, once, which fails only where one has collapsed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bridge.datapath.engine_names import AUTO, ENGINES
from tests.bench import report, sides
from tests.bench.peer import running
from tests.bench.rows import COLD, ROWS, WARM, Row
from tests.bench.samples import Failed, Result, Side, result_of, sample, sample_of_bridges
from tests.server import certificates

_COLLAPSED: Final = 0.1
"""A ratio below which `--quick` fails. (Its single short runs scatter widely.)"""
_QUICK: Final = ("4 KiB read, depth 1", "4 KiB write, depth 32", "1 MiB read, depth 8")
_FILL: Final = Row("", "", "write", 128 << 10, 8, sides.DISK_BYTES >> 17, 0.0, step_blocks=1)


@contextlib.contextmanager
def busy_cores() -> Iterator[None]:
    """Every core has something else to do."""
    with contextlib.ExitStack() as up:
        for _ in range(os.cpu_count() or 1):
            up.enter_context(running("sh", "-c", "while :; do :; done"))
        yield


class Bench:
    """How rows are run."""

    def __init__(self, *, rounds: int, scale: float, engine: str, made: dict[str, Path]) -> None:
        self._rounds = rounds
        self._scale = scale
        self._engine = engine
        self._certificates = made

    def run(self, row: Row) -> Result:
        """Both sides in turn."""
        try:
            with tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp") as name:
                return self._run(row, Path(name))
        except Failed as failure:
            return Result(row.group, row.name, row.required, failure=str(failure))

    def _run(self, row: Row, directory: Path) -> Result:
        count = max(50, int(row.count * self._scale))
        ours, theirs = Side(), Side()
        with contextlib.ExitStack() as up:
            peers = [
                up.enter_context(
                    sides.storage_daemon(row, directory, f"peer{n}", self._certificates)
                )
                for n in range(row.disks)
            ]
            bridges = [] if row.cache == COLD else self._bridges(up, row, directory, 0)
            for number in range(self._rounds):
                with contextlib.ExitStack() as cold:
                    disks = bridges or self._bridges(cold, row, directory, number)
                    ours.samples.append(sample_of_bridges(row, disks, count))
                theirs.samples.append(sample(row, peers, count))
        return result_of(row, ours, theirs)

    def _bridges(
        self, up: contextlib.ExitStack, row: Row, directory: Path, number: int
    ) -> list[sides.Disk]:
        disks = [
            up.enter_context(
                sides.bridge(row, directory, f"ours{number}-{n}", self._certificates, self._engine)
            )
            for n in range(row.disks)
        ]
        if row.cache == WARM:
            sample(_FILL, disks, _FILL.count)
        return disks


def chosen(only: str, *, quick: bool) -> list[Row]:
    """The rows to run."""
    if quick:
        return [row for row in ROWS if row.group == "engine" and row.name in _QUICK]
    return [row for row in ROWS if only in f"{row.group}: {row.name}"]


def main() -> None:
    """Run the table and print it."""
    parser = argparse.ArgumentParser(prog="./run bench full", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="alternating runs of each row")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the request counts")
    parser.add_argument("--only", default="", help='rows with this in "group: name"')
    parser.add_argument("--engine", choices=ENGINES, default=AUTO)
    parser.add_argument("--loaded", action="store_true", help="with all cores busy otherwise")
    parser.add_argument("--quick", action="store_true", help="three rows, once: has one collapsed?")
    parser.add_argument("--json", type=Path, help="write the figures there, for `bench report`")
    parser.add_argument("--svg", type=Path, help="draw the ratios there")
    arguments = parser.parse_args()
    rounds, scale = (1, 0.2) if arguments.quick else (arguments.rounds, arguments.scale)
    results = []
    with contextlib.ExitStack() as up:
        folder = Path(up.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp")))
        bench = Bench(
            rounds=rounds, scale=scale, engine=arguments.engine, made=certificates.make(folder)
        )
        if arguments.loaded:
            up.enter_context(busy_cores())
        for row in chosen(arguments.only, quick=arguments.quick):
            results.append(bench.run(row))
            print(f"{row.group}: {row.name}: {_short(results[-1])}", file=sys.stderr, flush=True)
    print(report.markdown(results))
    print(_circumstances(results, loaded=arguments.loaded, rounds=rounds))
    if arguments.json:
        arguments.json.write_text(json.dumps([each.as_json() for each in results], indent=2))
    if arguments.svg:
        report.picture(results, arguments.svg)
    lowest = _COLLAPSED if arguments.quick else 0.0
    if any(each.failure or each.ratio < lowest for each in results):
        raise SystemExit("a run failed, or a ratio has collapsed")


def _short(each: Result) -> str:
    return each.failure or f"{each.ratio:.2f}, CPU {each.cpu_ratio:.2f}"


def _circumstances(results: list[Result], *, loaded: bool, rounds: int) -> str:
    others = [each.others for each in results if not each.failure]
    load = "all cores busy otherwise" if loaded else "nothing else was started"
    share = f"; other processes had up to {max(others):.0%} of the processors" if others else ""
    return (
        f"{os.cpu_count()} cores ({platform.machine()}), CPython {platform.python_version()}, "
        f"medians of {rounds}, {load}{share}."
    )


if __name__ == "__main__":
    main()
