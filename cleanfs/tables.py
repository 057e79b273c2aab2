"""Statistics as tables for people."""

from collections.abc import Callable
from typing import Any

from rich.table import Table

from cleanfs.sizes import format_size

Stats = dict[str, Any]
"""The parsed ``stats.json``: the values are what their names say (stats.MountStats.values)."""


def stats_table(now: Stats, before: Stats | None) -> Table:
    """What matters at a glance; per second in a second column if there is an earlier snapshot."""
    table = Table(title=f"{now['source']} on {now['mountpoint']}", title_justify="left")
    table.add_column("")
    table.add_column("total", justify="right")
    elapsed = now["uptime_seconds"] - before["uptime_seconds"] if before else 0
    if before:
        table.add_column("per second", justify="right")

    def row(label: str, name: str, show: Callable[[float], str] = lambda n: f"{n:,.0f}") -> None:
        cells = [label, show(now[name])]
        if before and elapsed > 0:
            cells.append(show((now[name] - before[name]) / elapsed))
        table.add_row(*cells)

    row("pages hit in the page cache", "pagecache_hits")
    row("pages got from cleancache (succ_gets)", "succ_gets")
    row("pages not there (failed_gets)", "failed_gets")
    row("pages put (puts)", "puts")
    row("flushes", "flushes")
    row("reads of the source", "source_reads")
    row("read from the source", "source_read_bytes", format_size)
    row("written to the source", "source_write_bytes", format_size)
    row("changes found in the source", "changes_found")
    table.add_section()
    ratio = _interval_hit_ratio(now, before) if before else now["hit_ratio"]
    facts = {
        "hit ratio" + (" in the interval" if before else ""): f"{ratio:.1%}",
        "compression ratio": f"{now['compression_ratio']:.2f}",
        "backend": now["backend"],
        "pool": _of(
            now["backend_counters"].get("pool_used"), now["backend_counters"].get("pool_limit")
        ),
        "page cache": _of(now["pagecache_used"], now["pagecache_limit"]),
        "daemon's memory": format_size(now["rss_bytes"]),
    }
    for label, fact in facts.items():
        table.add_row(label, fact)
    return table


def _of(used: float | None, limit: float | None) -> str:
    return "-" if used is None or limit is None else f"{format_size(used)} of {format_size(limit)}"


def _interval_hit_ratio(now: Stats, before: Stats) -> float:
    hits = sum(now[name] - before[name] for name in ("pagecache_hits", "succ_gets"))
    asked = sum(now[name] - before[name] for name in ("pagecache_hits", "pagecache_misses"))
    return hits / asked if asked else 0.0
