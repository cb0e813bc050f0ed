"""What a running disk looks like to Prometheus: counters are read only when they are scraped.

The names are a promise to dashboards and alert rules: one that means something else gets another
name. `docs/operating.md` has a table of them.

The client library is imported with the first scrape: it takes 2 MB and 30 ms, which a bridge that
is never scraped need not have.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bridge import __version__
from bridge.api import traffic
from bridge.api.sampler import PAUSE_S
from bridge.api.view import View, errors, guest_state, safety, server_state
from bridge.app import logs
from bridge.datapath.histogram import BOUNDS_S, Histogram
from bridge.datapath.request import OP_NAMES
from bridge.guest.general import WHY

if TYPE_CHECKING:
    from prometheus_client import Metric

_PREFIX: Final = "nbd_bridge_"
_GUEST_STATES: Final = ("none", "attached", "running")
_SERVER_STATES: Final = ("connected", "leaving", "down", "failing", "closed")
_USUAL_ERRORS: Final = tuple((op, "EIO") for op in OP_NAMES[:5])
"""There from the start: a counter that begins with 1 has not increased, for Prometheus."""
_CACHE_COUNTERS: Final = {
    "cache_fetches": ("fetches", "Reads of the server for misses and read-ahead."),
    "cache_fetched_bytes": ("fetched_bytes", "Bytes of those reads."),
    "cache_readahead_bytes": ("readahead_bytes", "Bytes of those reads, before the guest asks."),
    "cache_writeouts": ("writebacks", "Writes of dirty blocks to the server."),
    "cache_writeout_bytes": ("writeback_bytes", "Bytes of those writes."),
    "cache_writeout_errors": ("writeback_errors", "Those that failed; they are tried again."),
    "cache_flushes": ("flushes", "Flushes sent to the server."),
    "cache_flush_errors": ("flush_errors", "Those that failed."),
    "cache_timed_flushes": ("timed_flushes", "Flushes that the flush interval asked for."),
    "cache_fua_flushes": ("fua_flushes", "Flushes done by writes with FUA instead."),
    "cache_resent_blocks": ("resent_blocks", "Blocks sent again since the server may lose them."),
    "cache_writes_waited": ("writes_waited", "Writes that waited since too much was dirty."),
    "cache_file_errors": ("file_errors", "Errors of the disk that the cache file is on."),
}
_CACHE_LOOKUPS: Final = {
    ("read", "hit"): "read_hits",
    ("read", "miss"): "read_misses",
    ("read", "cold"): "read_cold",
    ("read", "bypassed"): "read_bypassed",
    ("write", "hit"): "write_hits",
    ("write", "slow"): "writes",
}


def exposition(view: View) -> bytes:
    """Prometheus' text format, version 0.0.4."""
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(view))
    return generate_latest(registry)


CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"


@dataclass(eq=False)
class _Collector:
    """The custom collector of one disk; every metric has the label `disk`."""

    view: View

    def describe(self) -> list[Metric]:
        """Nothing need be collected to register it."""
        return []

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client's "Custom Collectors"."""
        yield from self._bridge()
        yield from self._guest()
        yield from self._latency()
        yield from self._server()
        yield from self._cache()

    def _gauge(self, name: str, text: str, value: float | None) -> Iterator[Metric]:
        from prometheus_client.metrics_core import GaugeMetricFamily

        if value is not None:
            metric = GaugeMetricFamily(_PREFIX + name, text, labels=["disk"])
            metric.add_metric([self._disk], value)
            yield metric

    def _states(self, name: str, text: str, states: tuple[str, ...], now: str) -> Iterator[Metric]:
        from prometheus_client.metrics_core import GaugeMetricFamily

        metric = GaugeMetricFamily(_PREFIX + name, text, labels=["disk", "state"])
        for state in states:
            metric.add_metric([self._disk, state], state == now)
        yield metric

    def _counter(self, name: str, text: str, value: float) -> Iterator[Metric]:
        yield from self._counters(name, text, (), {(): value})

    def _counters(
        self, name: str, text: str, labels: tuple[str, ...], values: dict[tuple[str, ...], float]
    ) -> Iterator[Metric]:
        from prometheus_client.metrics_core import CounterMetricFamily

        metric = CounterMetricFamily(_PREFIX + name, text, labels=["disk", *labels])
        for key, value in values.items():
            metric.add_metric([self._disk, *key], value)
        yield metric

    def _histograms(
        self,
        name: str,
        text: str,
        labels: tuple[str, ...],
        values: dict[tuple[str, ...], Histogram],
    ) -> Iterator[Metric]:
        from prometheus_client.metrics_core import HistogramMetricFamily

        metric = HistogramMetricFamily(_PREFIX + name, text, labels=["disk", *labels])
        bounds = [*map(str, BOUNDS_S), "+Inf"]
        for key, each in sorted(values.items()):
            buckets = list(zip(bounds, each.cumulative(), strict=True))
            metric.add_metric([self._disk, *key], buckets, each.sum_s)
        yield metric

    @property
    def _disk(self) -> str:
        return self.view.live.facts.name

    def _bridge(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import GaugeMetricFamily

        facts = self.view.live.facts
        info = GaugeMetricFamily(
            _PREFIX + "info",
            "What is served; always 1.",
            labels=["disk", "version", "engine", "uri"],
        )
        engine = self.view.live.loop.engine.name
        info.add_metric([facts.name, __version__, engine, facts.uri], 1)
        yield info
        yield from self._gauge("start_time_seconds", "Start, as Unix time.", facts.started_s)
        loop = self.view.live.loop
        yield from self._counter(
            "loop_turns", "Turns of the data path that had work.", loop.turn.number
        )
        yield from self._counters(
            "loop_waits",
            "How often polling saw nothing and the data path slept: shortly, in a nap, or for "
            "long. Turns without a wait before them are the success of polling.",
            ("how",),
            {("nap",): loop.naps_total, ("sleep",): loop.sleeps_total},
        )
        yield from self._counter(
            "log_lines_dropped", "Log lines that could not be written.", logs.dropped_lines()
        )

    def _guest(self) -> Iterator[Metric]:
        live = self.view.live
        yield from self._states(
            "guest_state",
            "1 for the state that the guest is in.",
            _GUEST_STATES,
            guest_state(live),
        )
        yield from self._gauge("disk_size_bytes", "What the guest sees.", live.capacity_bytes)
        counts = traffic.counts(live)
        yield from self._counters(
            "requests",
            "Requests that the guest has sent, by operation.",
            ("op",),
            {(op,): each.requests_total for op, each in counts.items()},
        )
        yield from self._counters(
            "request_bytes",
            "Bytes that they are about.",
            ("op",),
            {(op,): each.bytes_total for op, each in counts.items() if op != "flush"},
        )
        failed: dict[tuple[str, ...], float] = dict.fromkeys(_USUAL_ERRORS, 0)
        failed.update(errors(live))
        yield from self._counters(
            "request_errors",
            "Requests that failed, by operation and error.",
            ("op", "error"),
            failed,
        )
        reasons = live.general_total
        general: dict[tuple[str, ...], float] = {(why,): reasons.get(why, 0) for why in WHY}
        yield from self._counters(
            "requests_general",
            "Those of them that the engine left to the general path, which costs several times as "
            "much, by reason.",
            ("why",),
            general,
        )
        yield from self._gauge(
            "requests_in_flight", "Requests that are not answered.", live.in_flight
        )
        yield from self._counter(
            "slow_requests",
            "Requests that took longer than the limit for slow ones.",
            self.view.watch.slow_total,
        )
        faults: dict[tuple[str, ...], float]
        faults = {(kind,): count for kind, count in live.device.guest_faults.items()}
        yield from self._counters(
            "guest_faults", "What the guest did wrong, by kind.", ("kind",), faults
        )
        yield from self._gauge(
            "loss_unreported",
            "1: the server may have lost writes, and the guest does not know yet.",
            live.loss_unreported,
        )
        yield from self._gauge(
            "safe_to_reboot", "1: all that the guest wrote is on the server.", safety(live).safe
        )

    def _latency(self) -> Iterator[Metric]:
        yield from self._histograms(
            "request_sampled_seconds",
            "Time from the turn that popped a request to its completion, by operation and by what "
            "served it: the cache on the spot, or all else. Sampled: of one batch of requests "
            f"every {PAUSE_S * 1000:.0f} ms one is timed, so _count is not the number of requests.",
            ("op", "served_by"),
            self.view.sampler.histograms,
        )
        yield from self._histograms(
            "request_stage_sampled_seconds",
            "Where the time of those went that the cache did not serve on the spot: take (pop, "
            "check, look in the cache, send), then server (its answer) or held (room, other "
            "requests, the cache's disk, a connection), then reply.",
            ("op", "stage"),
            self.view.sampler.stages,
        )

    def _server(self) -> Iterator[Metric]:
        live = self.view.live
        client, now = live.storage.client, live.now()
        yield from self._states(
            "server_state",
            "1 for the state of the connection.",
            _SERVER_STATES,
            server_state(live),
        )
        yield from self._gauge("server_connections", "Present ones.", live.connections)
        yield from self._gauge(
            "server_commands_in_flight",
            "NBD commands without an answer, and those that wait for a connection.",
            live.commands_in_flight,
        )
        yield from self._counter(
            "server_merged_requests",
            "Requests that needed no command of their own: they went with the one before.",
            client.rows.merged_total,
        )
        yield from self._counter("server_outages", "Lost connections.", client.outages.total)
        yield from self._counter(
            "server_reconnects", "Connections made after the first.", client.reconnects_total
        )
        yield from self._counter(
            "server_down_seconds", "Time without a server.", client.outages.seconds_total(now)
        )
        yield from self._counter(
            "server_resent_commands",
            "Commands sent again after a reconnect or a failed flush.",
            client.link.resent_total,
        )
        yield from self._counter(
            "flushes_refused",
            "Flushes that failed to tell the guest of a loss.",
            client.link.flushes_refused_total,
        )
        yield from self._counter(
            "timed_flushes",
            "Flushes that the flush interval asked for, without a cache.",
            live.disk.timed_flushes,
        )
        yield from self._counter(
            "timed_flush_failures", "Those that failed.", live.disk.timed_flush_failures
        )
        yield from self._histograms(
            "flush_seconds",
            "How long flushes took, all of them, by who asked: the guest, or the bridge itself.",
            ("by",),
            {("guest",): live.disk.flush_times, ("bridge",): live.disk.internal_flush_times},
        )

    def _cache(self) -> Iterator[Metric]:
        view, live = self.view, self.view.live
        cache = live.cache
        if cache is None:
            return
        yield from self._gauge("cache_size_bytes", "Room in the cache.", live.cache_bytes)
        yield from self._gauge("cache_used_bytes", "What it holds.", live.valid_bytes)
        dirty = live.dirty_bytes
        yield from self._gauge("cache_dirty_bytes", "What is not on the server.", dirty)
        yield from self._gauge(
            "cache_oldest_dirty_seconds",
            "How long the oldest dirty block has waited to be sent.",
            live.oldest_dirty_s or 0.0,
        )
        yield from self._gauge(
            "cache_dirty_for_seconds",
            "How long ago nothing was dirty.",
            live.now() - view.watch.last_clean_s if dirty else 0.0,
        )
        rate = view.watch.write_out_rate
        yield from self._gauge(
            "cache_clean_in_seconds",
            "When nothing is dirty any more, at the rate of the last seconds.",
            (dirty / rate if rate else None) if dirty else 0.0,
        )
        yield from self._counter(
            "cache_evicted_granules",
            "Parts of the disk of up to 16 blocks that were forgotten for room.",
            live.evicted_total,
        )
        yield from self._gauge(
            "cache_writeout_rate_bytes_per_second",
            "Written out lately, over the last seconds.",
            view.watch.write_out_rate or 0.0,
        )
        stats = cache.stats
        yield from self._counters(
            "cache_requests",
            "Reads and writes, by what became of them in the cache: a hit was served on the spot; "
            "a cold read was of a block that had left the page cache.",
            ("op", "result"),
            {key: getattr(stats, name) for key, name in _CACHE_LOOKUPS.items()},
        )
        for name, (attribute, text) in _CACHE_COUNTERS.items():
            yield from self._counter(name, text, getattr(stats, attribute))
