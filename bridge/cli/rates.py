"""From two looks at a bridge to what happens per second in between.

A look is what `GET /status` answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rates:
    """Of one disk. What is not known is None."""

    reads_per_s: float
    writes_per_s: float
    others_per_s: float
    read_bytes_per_s: float
    written_bytes_per_s: float
    p50_s: float | None
    """Like the next: of the requests that were timed, whatever they were."""
    p99_s: float | None
    hit_ratio: float | None
    dirty_bytes: int | None
    """None: there is no cache."""
    in_flight: int

    @property
    def requests_per_s(self) -> float:
        """All of them."""
        return self.reads_per_s + self.writes_per_s + self.others_per_s


Status = dict[str, Any]


def rates(now: Status, before: Status, seconds: float, *, timed_since: Status) -> Rates:
    """`before` is `seconds` older than `now`, and of the same process; latencies are those since
    `timed_since`, which may be older: few requests are timed."""

    def per_s(op: str, what: str) -> float:
        return float(now["traffic"][op][what] - before["traffic"][op][what]) / seconds

    requests = {op: per_s(op, "requests_total") for op in now["traffic"]}
    reads, writes = requests.pop("read"), requests.pop("write")
    cache, cache_before = now["cache"], before["cache"]
    hit_ratio = None
    if cache is not None and cache_before is not None:
        lookups = cache["lookups_total"] - cache_before["lookups_total"]
        if lookups:
            hit_ratio = (cache["hits_total"] - cache_before["hits_total"]) / lookups
    return Rates(
        reads_per_s=reads,
        writes_per_s=writes,
        others_per_s=sum(requests.values()),
        read_bytes_per_s=per_s("read", "bytes_total"),
        written_bytes_per_s=per_s("write", "bytes_total"),
        p50_s=_quantile(now, timed_since, 0.5),
        p99_s=_quantile(now, timed_since, 0.99),
        hit_ratio=hit_ratio,
        dirty_bytes=None if cache is None else cache["dirty_bytes"],
        in_flight=now["guest"]["in_flight"],
    )


def _quantile(now: Status, before: Status, share: float) -> float | None:
    """As Prometheus has it: in proportion within its bucket."""
    bounds = now["latency_bounds_s"]
    counts = [0] * (len(bounds) + 1)
    for kind, latency in now["latency"].items():
        old = before["latency"].get(kind, {"counts": [0] * len(counts)})["counts"]
        counts = [
            count + new - was
            for count, new, was in zip(counts, latency["counts"], old, strict=True)
        ]
    wanted = share * sum(counts)
    if wanted <= 0:
        return None
    below, low = 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= wanted:
            found: float = low + (bound - low) * (wanted - below) / count
            return found
        below += count
        low = bound
    return low
