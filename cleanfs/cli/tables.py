"""Show statistics as a table."""

from rich.table import Table
from rich.text import Text

from cleanfs.cli.watch import Stats, format_ns
from cleanfs.latency import KINDS
from cleanfs.printable import printable
from cleanfs.sizes import format_size
from cleanfs.source.identity import Rule


def stats_table(stats: Stats) -> Table:
    """Make a table of the most important statistics."""
    table = Table(title=plain(f"{stats['source']} on {stats['mountpoint']}"), title_justify="left")
    table.add_column("")
    table.add_column("total", justify="right")
    for label, name in (
        ("pages hit in the page cache", "pagecache_hits"),
        ("pages got from cleancache (succ_gets)", "succ_gets"),
        ("pages not there (failed_gets)", "failed_gets"),
        ("pages put (puts)", "puts"),
        ("flushes", "flushes"),
        ("reads of the source", "source_reads"),
    ):
        table.add_row(label, f"{stats[name]:,}")
    table.add_row("read from the source", format_size(stats["source_read_bytes"]))
    table.add_row("written to the source", format_size(stats["source_write_bytes"]))
    table.add_row("changes found in the source", f"{stats['changes_found']:,}")
    table.add_row("files flushed in doubt", f"{stats['doubtful_flushes']:,}")
    if stats["identity"] != Rule.INODE:
        table.add_row("files are known by their", plain(stats["identity"]))
    if stats["pagecache_lost_files"]:
        table.add_row("pages lost, as no name led to them", f"{stats['pagecache_lost_pages']:,}")
    if stats["watcher"] != "none":
        table.add_row("invalidated upon events", f"{stats['watch_invalidations']:,}")
        table.add_row("inodes not watched", f"{stats['watch_unwatched']:,}")
        table.add_row("times that events were lost", f"{stats['watch_overflows']:,}")
    if stats["evictions_ring_bytes"]:
        for label, name in (
            ("pages that the kernel evicted or dropped", "evictions_seen"),
            ("evicted pages put", "evictions_put"),
            ("pages lost, as the ring was full", "evictions_lost"),
        ):
            table.add_row(label, f"{stats[name]:,}")
    table.add_section()
    for kind in KINDS:
        table.add_row(f"{kind} p50 / p99", _percentiles(stats, kind))
    table.add_section()
    counters = stats["backend_counters"]
    for label, fact in (
        ("hit ratio", f"{stats['hit_ratio']:.1%}"),
        ("compression ratio", f"{stats['compression_ratio']:.2f}"),
        ("backend", plain(stats["backend"])),
        ("evictions", plain(stats["evictions"])),
        ("pool", _of(counters.get("pool_used"), counters.get("pool_limit"))),
        ("page cache", _of(stats["pagecache_used"], stats["pagecache_limit"])),
        ("daemon's memory", format_size(stats["rss_bytes"])),
    ):
        table.add_row(label, fact)
    if stats.get("transport") == "uring":
        table.add_row("requests come by", "io_uring")
    if stats["memory_withheld_bytes"]:
        table.add_row("withheld, memory is short", format_size(stats["memory_withheld_bytes"]))
    return table


def plain(text: str) -> Text:
    """Return untrusted text without markup or terminal control characters."""
    return Text(printable(text))


def _percentiles(stats: Stats, kind: str) -> str:
    if not stats[f"latency_{kind}_count"]:
        return "-"
    return " / ".join(format_ns(1000 * stats[f"latency_{kind}_{p}_us"]) for p in ("p50", "p99"))


def _of(used: float | None, limit: float | None) -> str:
    return "-" if used is None or limit is None else f"{format_size(used)} of {format_size(limit)}"
