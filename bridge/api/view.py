"""What a running disk looks like, as plain values: the answer to `GET /status`.

Everything is read when it is asked for. Names end with their unit; None: the figure is not known.
"""

from __future__ import annotations

import errno
import os
import time
from dataclasses import asdict, dataclass
from typing import Any

from bridge import __version__
from bridge.api import traffic
from bridge.api.live import Live
from bridge.api.sampler import Sampler
from bridge.api.traffic import Count
from bridge.api.watch import Watch
from bridge.cache.upstream import Stats
from bridge.datapath.histogram import BOUNDS_S, Histogram
from bridge.datapath.request import OP_NAMES
from bridge.server.link import Phase
from bridge.units import size_text


@dataclass(frozen=True)
class Bridge:
    """The process."""

    name: str
    version: str
    pid: int
    started_s: float
    """Unix time."""
    uptime_s: float
    state: str
    """serving, or stopping."""
    engine: str
    """pure or compiled."""
    took_over_after_s: float | None
    """How long the guest has waited for this program, which took over from another one; None: it
    did not."""


@dataclass(frozen=True)
class Guest:
    """The guest's side."""

    state: str
    """none; attached: a front-end has shared a guest's memory; running: it uses the disk."""
    socket: str
    """Where a front-end connects; "": an inherited descriptor."""
    serial: str
    size_bytes: int
    read_only: bool
    queues: int
    """That run."""
    in_flight: int
    """Requests that are not answered."""
    requests_total: int
    general_total: dict[str, int]
    """Those of them that the engine left to the general path, by reason."""
    faults: dict[str, int]
    """What the guest did wrong, by kind."""
    loss_unreported: bool
    """The server may have lost acknowledged writes, and no flush of the guest's has failed yet."""


@dataclass(frozen=True)
class Cache:
    """The local cache."""

    mode: str
    path: str
    size_bytes: int
    used_bytes: int
    dirty_bytes: int
    oldest_dirty_s: float | None
    """How long the oldest dirty block has waited to be sent."""
    dirty_for_s: float
    """How long ago nothing was dirty."""
    write_out_bytes_per_s: float | None
    clean_in_s: float | None
    """When nothing is dirty any more, at that rate and if nothing else is written."""
    hit_ratio: float | None
    """Of all reads and writes since the start, those that were served on the spot."""
    hits_total: int
    lookups_total: int
    """Those reads and writes: as the cache counts them, a large request in pieces."""
    waiting: dict[str, int]


@dataclass(frozen=True)
class Server:
    """The server's side."""

    uri: str
    state: str
    """connected; leaving; down: reconnecting; failing: down for so long that requests fail."""
    connections: int
    in_flight: int
    """NBD commands without an answer, and those that wait for a connection. Each request that was
    merged with others counts."""
    merged_total: int
    """Requests of the guest's that needed no command of their own: they went with the one before,
    whose bytes theirs follow."""
    reconnects_total: int
    down_s: float
    """How long the present outage has lasted."""
    down_total_s: float
    outages_total: int
    reason: str
    """Why there is no connection, or why nothing is sent."""
    size_bytes: int


@dataclass(frozen=True)
class Latency:
    """Of one kind of request: sampled, and upper bounds of a histogram's buckets."""

    samples: int
    p50_s: float | None
    p99_s: float | None
    counts: tuple[int, ...]
    """Samples in each bucket: up to each of `latency_bounds_s`, and one for those above."""


@dataclass(frozen=True)
class Safety:
    """May this host be rebooted, or the bridge be stopped, without leaving anything behind?"""

    safe: bool
    reasons: tuple[str, ...]
    """Why not."""
    answer: str
    """The same in one line."""


@dataclass(frozen=True)
class Warming:
    """What is being read into the cache on request."""

    done_bytes: int
    total_bytes: int
    failed_bytes: int


@dataclass(frozen=True)
class Settings:
    """What can be changed while the bridge runs."""

    cache_mode: str
    flush_interval_s: float
    drain_timeout_s: float
    slow_ms: float
    log_level: str
    connections: int
    """Wanted: the server may allow one only."""
    request_timeout_s: float
    reconnect_timeout_s: float


@dataclass(frozen=True)
class Status:
    """All of it."""

    bridge: Bridge
    guest: Guest
    cache: Cache | None
    server: Server
    traffic: dict[str, Count]
    """By operation."""
    errors: dict[str, int]
    """By operation and error, as "read EIO": requests of the guest's that failed."""
    latency: dict[str, Latency]
    """By operation and what served it, as "read cache" or "flush server"."""
    latency_bounds_s: tuple[float, ...]
    safe_to_reboot: Safety
    settings: Settings
    warming: Warming | None
    slow_requests_total: int

    def as_json(self) -> dict[str, Any]:
        """For `json.dumps`."""
        return asdict(self)


@dataclass
class View:
    """Reads the state of `live`."""

    live: Live
    sampler: Sampler
    watch: Watch
    stopping: bool = False
    took_over_after_s: float | None = None
    warming: Warming | None = None

    def status(self, settings: Settings) -> Status:
        """All of it, now."""
        live = self.live
        return Status(
            bridge=self._bridge(),
            guest=self._guest(),
            cache=self._cache(),
            server=self._server(),
            traffic=traffic.counts(live),
            errors={" ".join(key): count for key, count in errors(live).items()},
            latency={
                f"{op} {served_by}": _latency(each)
                for (op, served_by), each in sorted(self.sampler.histograms.items())
            },
            latency_bounds_s=BOUNDS_S,
            safe_to_reboot=safety(live),
            settings=settings,
            warming=self.warming,
            slow_requests_total=self.watch.slow_total,
        )

    def _bridge(self) -> Bridge:
        facts = self.live.facts
        return Bridge(
            name=facts.name,
            version=__version__,
            pid=os.getpid(),
            started_s=facts.started_s,
            uptime_s=time.time() - facts.started_s,
            state="stopping" if self.stopping else "serving",
            engine=self.live.loop.engine.name,
            took_over_after_s=self.took_over_after_s,
        )

    def _guest(self) -> Guest:
        live = self.live
        return Guest(
            state=guest_state(live),
            socket=live.facts.socket_path or "",
            serial=live.facts.serial,
            size_bytes=live.capacity_bytes,
            read_only=live.read_only,
            queues=len(live.rings),
            in_flight=live.in_flight,
            requests_total=live.requests_total,
            general_total=live.general_total,
            faults=dict(live.device.guest_faults),
            loss_unreported=live.loss_unreported,
        )

    def _cache(self) -> Cache | None:
        live = self.live
        cache = live.cache
        if cache is None:
            return None
        dirty = live.dirty_bytes
        rate = self.watch.write_out_rate
        hits, lookups = _lookups(cache.stats)
        return Cache(
            mode=live.mode,
            path=live.cache_path,
            size_bytes=live.cache_bytes,
            used_bytes=live.valid_bytes,
            dirty_bytes=dirty,
            oldest_dirty_s=live.oldest_dirty_s,
            dirty_for_s=live.now() - self.watch.last_clean_s if dirty else 0.0,
            write_out_bytes_per_s=rate,
            clean_in_s=(dirty / rate if rate else None) if dirty else 0.0,
            hit_ratio=hits / lookups if lookups else None,
            hits_total=hits,
            lookups_total=lookups,
            waiting=cache.waiting,
        )

    def _server(self) -> Server:
        live = self.live
        client = live.storage.client
        now = live.now()
        return Server(
            uri=live.facts.uri,
            state=server_state(live),
            connections=live.connections,
            in_flight=live.commands_in_flight,
            merged_total=client.rows.merged_total,
            reconnects_total=client.reconnects_total,
            down_s=client.outages.seconds(now),
            down_total_s=client.outages.seconds_total(now),
            outages_total=client.outages.total,
            reason=client.outages.reason or live.left_reason,
            size_bytes=client.export.size_bytes,
        )


def guest_state(live: Live) -> str:
    """See `Guest.state`."""
    if live.rings:
        return "running"
    return "attached" if live.has_front_end else "none"


def server_state(live: Live) -> str:
    """See `Server.state`."""
    if live.phase is Phase.UP:
        return "connected"
    if live.storage.client.link.given_up:
        return "failing"
    return {Phase.LEAVING: "leaving", Phase.CLOSED: "closed"}.get(live.phase, "down")


def one_line(live: Live) -> str:
    """What a service manager shows of the disk."""
    text = f"guest {guest_state(live)}, server {server_state(live)}"
    dirty = live.dirty_bytes
    return f"{text}, {size_text(dirty)} not on the server" if dirty else text


def errors(live: Live) -> dict[tuple[str, ...], int]:
    """By operation and name of the errno."""
    return {
        (OP_NAMES[op], errno.errorcode.get(number, str(number))): count
        for (op, number), count in live.errors.items()
    }


def _latency(times: Histogram) -> Latency:
    return Latency(times.count, times.quantile(0.5), times.quantile(0.99), tuple(times.counts))


def _lookups(stats: Stats) -> tuple[int, int]:
    """Hits, and all reads and writes that the cache was asked for."""
    hits = stats.read_hits + stats.write_hits
    return hits, (hits + stats.read_misses + stats.read_bypassed + stats.read_cold + stats.writes)


def safety(live: Live) -> Safety:
    """Is everything that the guest was told is on the disk, on the server?"""
    reasons = []
    if dirty := live.dirty_bytes:
        reasons.append(f"{size_text(dirty)} are not on the server")
    if not (live.disk.is_durable or live.cache is not None):
        reasons.append("the server has not flushed everything that was written")
    if pending := live.in_flight:
        plural = "s are" if pending > 1 else " is"
        reasons.append(f"{pending} request{plural} not answered")
    if live.storage.has_left and live.left_reason and dirty:
        reasons.append(f"nothing is sent: {live.left_reason}")
    elif reasons and live.phase is not Phase.UP:
        reasons.append("the server is not connected")
    if live.loss_unreported:
        reasons.append(
            "the server may have lost writes, which the guest learns from its next flush"
        )
    if reasons:
        return Safety(False, tuple(reasons), f"no, because {', and '.join(reasons)}")
    if guest_state(live) == "none":
        return Safety(True, (), "yes")
    return Safety(True, (), "yes, once the guest is shut down: until then it may write more")
