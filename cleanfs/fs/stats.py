"""Everything that can be counted, as one frozen snapshot, and three ways to write it down.

Latencies are counted in histograms. The text has the count and two percentiles of each, and JSON also
has the buckets. Prometheus gets histograms, and can compute the percentiles of any interval.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from cleanfs.cache.cleancache import CleancacheStats
from cleanfs.cache.pagecache import PageCacheStats
from cleanfs.fuse.channel import ChannelStats
from cleanfs.fuse.request_limits import RequestLimits
from cleanfs.latency import HistogramSnapshot, LatencyStats
from cleanfs.memory.cache_limits import CacheLimitsStats
from cleanfs.source.io import BackingStats
from cleanfs.vfs.evictions import EvictionStats
from cleanfs.vfs.inodes import InodeStats
from cleanfs.vfs.source_watch import WatchStats

GAUGES = frozenset({
    "uptime_seconds", "rss_bytes", "pool_id", "page_size", "hit_ratio", "compression_ratio",
    "pagecache_limit", "pagecache_used", "pagecache_resident", "pagecache_files", "inodes",
    "inodes_held", "open_files", "read_ahead_kb", "max_background",
    "evictions_ring_bytes", "evictions_ring_high_water", "evictions_held_nodes",
    "pool_limit", "pool_used", "obj_count", "obj_count_max",
    "eph_zpages", "eph_zpages_max", "eph_zbytes", "eph_pagebytes", "raw_pages", "same_filled_pages",
    "zero_filled_pages", "loaned_zpages", "staged_pages", "metadata_bytes", "dictionary_bytes",
    "watch_file_systems", "watch_inodes", "watch_unwatched", "ghosts", "busy_poll_limit_us",
    "memory_spare_bytes", "memory_withheld_bytes", "pool_limit_now",
    "log_segments", "log_bytes", "log_hole_bytes", "zbud_eph_pageframes", "zbud_eph_zpages",
    "zbud_eph_zbytes", "zbud_eph_unbuddied_count", "zbud_eph_buddied_count",
})  # fmt: skip
"""Values that go up and down; all others only grow."""

PERCENTILES = (50, 99)
"""The percentiles of latencies in text and JSON."""

METRICS_LE_NS = tuple(1 << exponent for exponent in range(10, 37))
"""Upper bounds of the buckets that Prometheus gets: powers of two, from 1 us to 69 s."""

CONTROLS = re.compile("[\0-\x1f\x7f-\x9f\u2028\u2029]")
"""Characters that end a line or move a terminal. The text form escapes values that contain any."""

Value = int | float | str


@dataclass(frozen=True, slots=True)
class MountStats:
    """One mount at one moment."""

    version: str
    source: str
    mountpoint: str
    pid: int
    uptime_seconds: float
    rss_bytes: int
    """Resident memory of the daemon."""
    page_size: int
    backend: str
    engine: str
    """The engine of the backend: native, python."""
    pool_id: int
    """Negative: the mount has no pool."""
    coherency: str
    source_cache: str
    identity: str
    """What identifies files of the source (``identity.Rule``)."""
    requests: RequestLimits
    changes_found: int
    """Files flushed because others had changed them in the source."""
    doubtful_flushes: int
    """Files flushed because others could have changed them unseen."""
    watch: WatchStats
    evictions: EvictionStats
    open_files: int
    cleancache: CleancacheStats
    pagecache: PageCacheStats
    backing: BackingStats
    inodes: InodeStats
    limits: CacheLimitsStats
    channel: ChannelStats
    latencies: LatencyStats
    counters: Mapping[str, int]
    """The backend's own counters."""

    @property
    def hit_ratio(self) -> float:
        """Return the share of requested pages that a cache had; 0 if none was requested."""
        requested = self.pagecache.hits + self.pagecache.misses
        found = self.pagecache.hits + self.cleancache.succ_gets
        return found / requested if requested else 0.0

    @property
    def compression_ratio(self) -> float:
        """Return the bytes of kept pages over the bytes that they are kept in; 0 if there are none."""
        kept = self.counters.get("eph_zbytes", 0)
        return self.counters.get("eph_pagebytes", 0) / kept if kept else 0.0

    def values(self) -> dict[str, Value]:
        """Return all values by their flat names, in a stable order; the backend's come last."""
        return {
            "version": self.version,
            "source": self.source,
            "mountpoint": self.mountpoint,
            "pid": self.pid,
            "uptime_seconds": round(self.uptime_seconds, 3),
            "rss_bytes": self.rss_bytes,
            "page_size": self.page_size,
            "backend": self.backend,
            "engine": self.engine,
            "pool_id": self.pool_id,
            "coherency": self.coherency,
            "source_cache": self.source_cache,
            "identity": self.identity,
            **asdict(self.requests),
            **asdict(self.limits),
            "hit_ratio": round(self.hit_ratio, 4),
            "compression_ratio": round(self.compression_ratio, 3),
            **asdict(self.cleancache),
            **{f"pagecache_{name}": value for name, value in asdict(self.pagecache).items()},
            **asdict(self.backing),
            "inodes": self.inodes.inodes,
            "inodes_held": self.inodes.held,
            "inodes_parked_total": self.inodes.parked_total,
            "busy_poll_limit_us": self.channel.busy_poll_limit_us,
            "busy_poll_polled": self.channel.busy_poll_polled,
            "busy_poll_slept": self.channel.busy_poll_slept,
            "served_natively": self.channel.served_natively,
            "transport": self.channel.transport,
            "transport_reason": self.channel.transport_reason,
            "open_files": self.open_files,
            "changes_found": self.changes_found,
            "doubtful_flushes": self.doubtful_flushes,
            **asdict(self.watch),
            **asdict(self.evictions),
            "reads": self.latencies.reads,
            "read_bytes": self.latencies.read_bytes,
            "writes": self.latencies.write.total,
            "write_bytes": self.latencies.write_bytes,
        }

    def latency_values(self) -> dict[str, Value]:
        """Return the number of requests of each kind, and percentiles of latencies in microseconds.

        They cover the mount's whole life. Prometheus gets none of them: it has the histograms.
        """
        values: dict[str, Value] = {}
        for kind, histogram in self.latencies.by_kind().items():
            values[f"latency_{kind}_count"] = histogram.total
            for percent in PERCENTILES:
                us = round(histogram.percentile(percent) / 1000, 1)
                values[f"latency_{kind}_p{percent}_us"] = us
        return values

    def as_text(self) -> str:
        """Write ``name value`` lines. The backend's counters carry its name as a prefix."""
        values = {**self.values(), **self.latency_values()}
        lines = [f"{name} {_one_line(value)}" for name, value in values.items()]
        lines += [f"requests_{name} {count}" for name, count in self.channel.requests.items()]
        lines += [f"{self.backend}_{name} {value}" for name, value in self.counters.items()]
        return "\n".join(lines) + "\n"

    def as_json(self) -> str:
        """Write one object; the backend's counters are the member ``backend_counters``.

        The member ``latencies`` has an object for each kind of request: ``count``, ``sum_ns`` and
        ``buckets_ns``, in which the count of a bucket stands by the nanoseconds below which it ends.
        """
        nested = {
            "latencies": {kind: h.as_json() for kind, h in self.latencies.by_kind().items()},
            "requests": dict(self.channel.requests),
            "backend_counters": dict(self.counters),
        }
        return json.dumps({**self.values(), **self.latency_values(), **nested}, indent=2) + "\n"

    def as_prometheus(self) -> str:
        """Write Prometheus text exposition format 0.0.4."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Metrics(self))
        return generate_latest(registry).decode()


class _Metrics(Collector):
    """A snapshot as Prometheus metrics."""

    def __init__(self, stats: MountStats) -> None:
        self._stats = stats

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily]:
        stats = self._stats
        labels = {
            "mountpoint": stats.mountpoint,
            "source": stats.source,
            "backend": stats.backend,
            "engine": stats.engine,
            "version": stats.version,
        }
        info = GaugeMetricFamily("cleanfs_info", "What is mounted where.", labels=list(labels))
        info.add_metric([_printable(value) for value in labels.values()], 1)
        yield info
        for name, value in stats.values().items():
            if not isinstance(value, str) and name != "pid":
                yield _metric(f"cleanfs_{name}", name, value, stats.mountpoint)
        for name, value in stats.counters.items():
            yield _metric(f"cleanfs_{stats.backend}_{name}", name, value, stats.mountpoint)
        yield _requests_metric(stats.channel.requests, stats.mountpoint)
        yield _latency_metric(stats.latencies, stats.mountpoint)


def _metric(
    full_name: str, name: str, value: float, mountpoint: str
) -> GaugeMetricFamily | CounterMetricFamily:
    kind = GaugeMetricFamily if name in GAUGES else CounterMetricFamily
    metric = kind(full_name, f"cleanfs {name.replace('_', ' ')}", labels=["mountpoint"])
    metric.add_metric([_printable(mountpoint)], value)
    return metric


def _requests_metric(requests: Mapping[str, int], mountpoint: str) -> CounterMetricFamily:
    metric = CounterMetricFamily(
        "cleanfs_requests", "Requests of the kernel, by opcode.", labels=["mountpoint", "opcode"]
    )
    for name, count in requests.items():
        metric.add_metric([_printable(mountpoint), name], count)
    return metric


def _latency_metric(latencies: LatencyStats, mountpoint: str) -> HistogramMetricFamily:
    metric = HistogramMetricFamily(
        "cleanfs_request_latency_seconds",
        "Time in the daemon of programs' reads, by where they found their pages, and writes.",
        labels=["mountpoint", "kind"],
    )
    for kind, histogram in latencies.by_kind().items():
        labels = [_printable(mountpoint), kind]
        metric.add_metric(labels, _le_buckets(histogram), histogram.sum_ns / 1e9)
    return metric


def _le_buckets(histogram: HistogramSnapshot) -> list[tuple[str, int]]:
    """Return cumulative counts. Our buckets exclude their bound: that duration counts above it."""
    below = [(repr(ns / 1e9), histogram.below(ns)) for ns in METRICS_LE_NS]
    return [*below, ("+Inf", histogram.total)]


def _printable(text: str) -> str:
    """Make a path, which may hold any bytes, a metrics label, which is UTF-8."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _one_line(value: Value) -> str:
    text = str(value)
    return text.encode("unicode_escape").decode() if CONTROLS.search(text) else text
