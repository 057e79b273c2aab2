"""Show what a soak did, as a table, and whether it did what it should have."""

from typing import Any

from rich.table import Table

from .plan import Plan
from .soak import Outcome

FROM_STATS = (
    "pagecache_hits", "pagecache_misses", "succ_gets", "failed_gets", "puts", "flushes",
    "pagecache_evictions", "pagecache_stale_reads", "pagecache_shared_reads", "source_reads",
    "source_writes", "changes_found", "doubtful_flushes", "rss_bytes", "evictions_seen",
    "evictions_put", "evictions_kept", "evictions_removed", "evictions_unclean", "evictions_stale",
    "evictions_unknown", "evictions_past_end", "evictions_refused", "evictions_lost",
)  # fmt: skip

LONG = 20.0
"""Seconds from which on a soak must have been everywhere."""

ALWAYS = ("reads checked", "read: pread", "read: O_DIRECT", "read: mapping", "read: whole file",
          "write: pwrite", "write: append", "write: mapping", "truncate down", "truncate up",
          "replace", "rename over", "exchange", "unlink", "link", "sizes checked")  # fmt: skip


WATCHED = ("quiet: write", "source: store", "read: quiet, mapping", "read: quiet, pread",
           "read: quiet, O_DIRECT")  # fmt: skip


def missing(plan: Plan, outcome: Outcome) -> list[str]:
    """Return what a long soak should have done and did not."""
    if plan.seconds < LONG:
        return []
    always = ALWAYS + (WATCHED if plan.quiet_files else ())
    lacking = [name for name in always if not outcome.counts[name]]
    if not plan.plain:
        wanted = ["succ_gets", "puts", "flushes"]
        wanted += ["evictions_put"] if plan.kernel_evicts else ["pagecache_hits", "pagecache_evictions"]
        wanted += ["changes_found"] if plan.source_changes else []
        lacking += [name for name in wanted if not outcome.stats.get(name)]
    return [f"{plan.seconds:.0f} s, and never: {', '.join(lacking)}"] if lacking else []


def table(plan: Plan, outcome: Outcome, title: str) -> Table:
    """Make a table of all counts."""
    shown = Table(title=title, title_justify="left", show_header=False)
    shown.add_column()
    shown.add_column(justify="right")
    for name, count in sorted(outcome.counts.items()):
        shown.add_row(name, f"{count:,}")
    if plan.quiet_files:
        shown.add_row("stalest bytes of a quiet file", f"{outcome.staleness / 1000:.3f} s")
    shown.add_section()
    for name in FROM_STATS:
        if name in outcome.stats:
            shown.add_row(name, f"{outcome.stats[name]:,}")
    return shown


def as_json(plan: Plan, outcome: Outcome, command: list[str]) -> dict[str, Any]:
    """Return everything, for a file."""
    return {
        "command": command,
        "seed": plan.seed,
        "coherency": plan.coherency,
        "page_size": plan.page_size,
        "seconds": round(outcome.seconds, 1),
        "found": outcome.found,
        "evidence": str(plan.evidence) if outcome.found else None,
        "counts": dict(sorted(outcome.counts.items())),
        "staleness_ms": outcome.staleness if plan.quiet_files else None,
        "stats": {name: outcome.stats[name] for name in FROM_STATS if name in outcome.stats},
    }
