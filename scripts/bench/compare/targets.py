"""State what is aimed at, as ratios within one run, and what was measured."""

from dataclasses import dataclass

from . import contestants as who
from . import daemon, equal_ram, overhead, tree
from .disks import CLOUD_DISK, HARD_DISK
from .reads import readers_text
from .results import Results, number
from .rows import CONTESTANTS


@dataclass(frozen=True)
class Target:
    """Compares cleanfs with another, or the inverse where less is better."""

    text: str
    goal: float
    section: str
    workload: str
    ours: str
    theirs: str
    times: bool = False
    """The figures are times: less is better."""


TARGETS = [
    Target("4 KiB random zcache hits, IOPS vs mergerfs uncached on a hot source, one reader", 1.0,
           "hits-4k", readers_text(1), "cleanfs", "mergerfs"),
    Target("128 KiB sequential zcache hits vs mergerfs, one reader", 2.0,
           "hits-128k", readers_text(1), "cleanfs", "mergerfs"),
    Target("re-read of 1 GiB in 680 MiB of RAM, 125 MB/s disk, vs the page cache alone", 8.0,
           "equal RAM", f"{equal_ram.REREAD}, {CLOUD_DISK.name}", "cleanfs", who.NATIVE),
    Target("4 KiB random, the same, 150 IOPS disk, vs the page cache alone", 50.0,
           "equal RAM", f"{equal_ram.RANDOM}, {HARD_DISK.name}", "cleanfs", who.NATIVE),
    Target("kernel tree grep at equal RAM on the 150 IOPS disk vs native", 3.0,
           "tree", tree.GREP_TREE, "cleanfs", who.NATIVE, times=True),
    Target("kernel compile at equal RAM on the 150 IOPS disk vs native", 1.3,
           "tree", tree.COMPILE, "cleanfs", who.NATIVE, times=True),
    Target("cold sequential read from a throttled disk vs native", 0.97,
           "overhead", overhead.COLD, "cleanfs", who.NATIVE),
    Target("incompressible stream, unthrottled, vs mergerfs", 0.8,
           "overhead", overhead.RANDOM_DISK, "cleanfs", "mergerfs"),
    Target("128 KiB sequential writes vs plain passthrough", 0.9,
           "write-128k", "buffered", "cleanfs", CONTESTANTS["passthrough"]),
    Target("4 KiB random writes vs plain passthrough", 0.9,
           "write-4k", "buffered", "cleanfs", CONTESTANTS["passthrough"]),
    Target("128 KiB sequential writes vs mergerfs", 0.9,
           "write-128k", "buffered", "cleanfs", "mergerfs"),
    Target("4 KiB random writes vs mergerfs", 0.9,
           "write-4k", "buffered", "cleanfs", "mergerfs"),
]  # fmt: skip
WAKE_UPS = 10
"""What an idle daemon may have in 5 seconds."""


def judge(results: Results) -> list[tuple[str, str, str, str]]:
    """Return target, goal, measured, verdict; for those that were measured."""
    rows = []
    for target in TARGETS:
        ours = results.get(target.section, target.workload, target.ours)
        theirs = results.get(target.section, target.workload, target.theirs)
        if ours is None or theirs is None or not ours.median or not theirs.median:
            continue
        ratio = theirs.median / ours.median if target.times else ours.median / theirs.median
        bound = "≥ " if theirs.at_least else ""
        if ours.at_least:
            verdict = "not decided: cleanfs hit its time limit"
        elif ratio >= target.goal:
            verdict = "met"
        elif theirs.at_least:
            verdict = "not decided: a lower bound"
        else:
            verdict = f"missed by {(1 - ratio / target.goal) * 100:.0f} %"
        rows.append((target.text, f"≥ {target.goal:g}x", f"{bound}{number(ratio)}x", verdict))
    switches = results.get("idle", daemon.SWITCHES, "cleanfs")
    ticks = results.get("idle", daemon.TICKS, "cleanfs")
    if switches and ticks:
        met = switches.median <= WAKE_UPS and ticks.median <= 1
        rows.append((
            f"idle daemon, {daemon.IDLE_SECONDS} s", f"≤ {WAKE_UPS} wake-ups, ≤ 1 tick",
            f"{switches.median:.0f} wake-ups, {ticks.median:.0f} ticks", "met" if met else "missed",
        ))  # fmt: skip
    return rows
