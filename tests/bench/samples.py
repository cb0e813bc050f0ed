"""One measurement of a side, and what came of many."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from tests.bench.peer import Usual, Workload, measure
from tests.bench.rows import MIXED, QEMU_IMG, WRITE, Row
from tests.bench.sides import Disk
from tests.bench.versions import cpu_s

_TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")
_CORES: Final = os.cpu_count() or 1
_FRONT_END_RATE: Final = 20_000
"""Requests per second that turn a row's count into the seconds that `nbd-bridge bench` takes."""


class Failed(Exception):
    """A run with an error, which has no figures."""


@dataclass(frozen=True)
class Sample:
    """One run."""

    rate: float
    """Requests per second, of all disks together."""
    cpu_us: float
    """Processor time of the side (without the server) per request."""
    others: float
    """The part of all processors' time that was used by processes that have nothing to do with
    the measurement."""
    general: float = 0.0
    """Of the bridges' requests those that their engine left to the general path, in percent."""


@dataclass
class Side:
    """All runs of one side of a row."""

    samples: list[Sample] = field(default_factory=list)

    @property
    def rate(self) -> float:
        """The median."""
        return statistics.median(each.rate for each in self.samples)

    @property
    def cpu_us(self) -> float:
        """The median."""
        return statistics.median(each.cpu_us for each in self.samples)

    @property
    def spread(self) -> float:
        """How far the lowest and the highest rate are apart, as a part of the median."""
        rates = [each.rate for each in self.samples]
        return (max(rates) - min(rates)) / self.rate

    @property
    def others(self) -> float:
        """The median."""
        return statistics.median(each.others for each in self.samples)

    @property
    def general(self) -> float:
        """The median."""
        return statistics.median(each.general for each in self.samples)


@dataclass
class Result:
    """A row of the finished table; without figures where a run failed."""

    group: str
    name: str
    required: float
    ours: float = 0.0
    theirs: float = 0.0
    ours_spread: float = 0.0
    theirs_spread: float = 0.0
    ours_cpu_us: float = 0.0
    theirs_cpu_us: float = 0.0
    others: float = 0.0
    general: float = 0.0
    failure: str = ""

    @property
    def ratio(self) -> float:
        """Of the rates; 0 where a run failed."""
        return self.ours / self.theirs if self.theirs else 0.0

    @property
    def cpu_ratio(self) -> float:
        """Of the processor time per request: the lower, the better."""
        return self.ours_cpu_us / self.theirs_cpu_us if self.theirs_cpu_us else 0.0

    def as_json(self) -> dict[str, Any]:
        """The fields."""
        return asdict(self)


def result_of(row: Row, ours: Side, theirs: Side) -> Result:
    """The medians of both."""
    return Result(
        *(row.group, row.name, row.required, ours.rate, theirs.rate, ours.spread, theirs.spread),
        *(ours.cpu_us, theirs.cpu_us, max(ours.others, theirs.others), ours.general),
    )


def sample_of_bridges(row: Row, disks: list[Disk], count: int) -> Sample:
    """`sample`, and how much of it went the general way."""
    counts = [Usual(disk.socket) for disk in disks]
    for each in counts:
        each.share()
    found = sample(row, disks, count)
    return replace(found, general=statistics.fmean(each.share() for each in counts))


def sample(row: Row, disks: list[Disk], count: int) -> Sample:
    """Let a guest for each of `disks` ask for `count` requests at once. Raises Failed."""
    before = _Times(disks)
    with ThreadPoolExecutor(len(disks)) as pool:
        runs = list(pool.map(lambda disk: _run(row, disk.socket, count), disks))
    complaints = "".join(disk.log.read_text(errors="replace") for disk in disks)
    if complaints:
        raise Failed(complaints.strip().splitlines()[0])
    side_s, others = _Times(disks).since(before)
    rates, requests = zip(*runs, strict=True)
    return Sample(sum(rates), side_s / sum(requests) * 1e6, others)


def _run(row: Row, socket: Path, count: int) -> tuple[float, int]:
    """Requests per second, and how many requests there were."""
    try:
        if row.generator == QEMU_IMG:
            workload = Workload(
                *("", row.block_bytes, row.depth, count, row.kind == WRITE, 0.0),
                *(row.step_blocks, row.flush_every),
            )
            return measure(socket, workload), count
        argv = [sys.executable, "-m", "bridge", "bench", "--json", "--destructive"]
        argv += ["--rw", row.kind if row.kind == MIXED else f"rand{row.kind}"]
        argv += ["--block-size", str(row.block_bytes), "--depth", str(row.depth)]
        argv += ["--queues", str(row.queues), "--runtime", str(count / _FRONT_END_RATE)]
        done = subprocess.run([*argv, str(socket)], check=True, capture_output=True, text=True)
        kinds = json.loads(done.stdout)["requests"].values()
        return sum(each["per_s"] for each in kinds), sum(each["count"] for each in kinds)
    except subprocess.CalledProcessError as error:
        raise Failed((error.stderr or "").strip() or f"exit status {error.returncode}") from error


class _Times:
    """Processor time used so far: by the side, by all that is measured, by everything."""

    def __init__(self, disks: list[Disk]) -> None:
        self._at_s = time.monotonic()
        self._side_s = sum(cpu_s(disk.pid) for disk in disks)
        times = os.times()
        own_s = times.user + times.system + times.children_user + times.children_system
        self._known_s = self._side_s + own_s + sum(cpu_s(disk.server_pid) for disk in disks)
        fields = list(map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]))
        # Everything but idle and waiting for disks.
        self._all_s = (sum(fields[:8]) - fields[3] - fields[4]) / _TICKS_PER_S

    def since(self, before: _Times) -> tuple[float, float]:
        """Seconds of the side, and the part that others had."""
        length_s = (self._at_s - before._at_s) * _CORES
        others_s = self._all_s - before._all_s - (self._known_s - before._known_s)
        return self._side_s - before._side_s, max(0.0, others_s / length_s)
