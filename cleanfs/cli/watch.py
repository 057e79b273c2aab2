"""Show a mount's activity, one line per interval (``cleanfs stats --watch``), like vmstat, arcstat."""

import time
from collections.abc import Iterator
from typing import Any

from cleanfs.latency import READ_KINDS, HistogramSnapshot
from cleanfs.sizes import format_size

Stats = dict[str, Any]
"""The parsed ``stats.json``; ``stats.MountStats`` describes the values."""

COLUMNS = (
    ("time", 8), ("reads/s", 8), ("MB/s", 7), ("pc%", 6), ("zc%", 6), ("srcMB/s", 7), ("evict/s", 7),
    ("lost", 4), ("pool", 15), ("ratio", 6), ("p50", 7), ("p99", 7),
)  # fmt: skip
"""Headings, each of one word, and widths."""

LINES_PER_HEADER = 20

HEADER = " ".join(heading.rjust(width) for heading, width in COLUMNS)


def watch_line(now: Stats, before: Stats) -> str:
    """Format the activity between two snapshots of one daemon, taken at different times."""
    seconds = now["uptime_seconds"] - before["uptime_seconds"]

    def grown(name: str) -> float:
        return now[name] - before[name]  # type: ignore[no-any-return]  # numbers, as JSON has them

    pages = grown("pagecache_hits") + grown("pagecache_misses")
    latency = sum((_since(now, before, kind) for kind in READ_KINDS), HistogramSnapshot())
    idle = not latency.total
    counters = now["backend_counters"]
    of_kernel = now["evictions_ring_bytes"] > 0
    cells = (
        time.strftime("%H:%M:%S"),
        f"{grown('reads') / seconds:.0f}",
        f"{grown('read_bytes') / seconds / 1e6:.1f}",
        f"{100 * grown('pagecache_hits') / pages:.1f}" if pages else "-",
        f"{100 * grown('succ_gets') / pages:.1f}" if pages else "-",
        f"{grown('source_read_bytes') / seconds / 1e6:.1f}",
        f"{grown('evictions_seen') / seconds:.0f}" if of_kernel else "-",
        f"{grown('evictions_lost')}" if of_kernel else "-",
        _of(counters.get("pool_used"), counters.get("pool_limit")),
        f"{now['compression_ratio']:.2f}" if counters else "-",
        "-" if idle else format_ns(latency.percentile(50)),
        "-" if idle else format_ns(latency.percentile(99)),
    )
    return " ".join(cell.rjust(width) for cell, (_, width) in zip(cells, COLUMNS, strict=True))


def watch_lines(snapshots: Iterator[Stats]) -> Iterator[str]:
    """Yield the header at once, a line for each snapshot but the first, and the header regularly."""
    before = next(snapshots)
    yield HEADER
    lines = 0
    for now in snapshots:
        same_daemon = now["pid"] == before["pid"]
        if same_daemon and now["uptime_seconds"] > before["uptime_seconds"]:
            if lines and lines % LINES_PER_HEADER == 0:
                yield HEADER
            yield watch_line(now, before)
            lines += 1
        before = now


def format_ns(ns: float) -> str:
    """Format a duration with two digits or more and a unit: ``9.2us``, ``31us``, ``1.2ms``."""
    value, unit = ns / 1e3, "us"
    if value >= 999.5:
        value, unit = ns / 1e6, "ms"
    if value >= 999.5:
        value, unit = ns / 1e9, "s"
    return f"{value:.1f}{unit}" if value < 9.95 else f"{value:.0f}{unit}"


def _since(now: Stats, before: Stats, kind: str) -> HistogramSnapshot:
    earlier = HistogramSnapshot.from_json(before["latencies"][kind])
    return HistogramSnapshot.from_json(now["latencies"][kind]) - earlier


def _of(used: float | None, limit: float | None) -> str:
    return "-" if used is None or limit is None else f"{_short(used)}/{_short(limit)}"


def _short(size: float) -> str:
    """Format a size without a space (``44.6M``), so that each line has the same number of words."""
    return format_size(size).replace(" ", "").removesuffix("iB")
