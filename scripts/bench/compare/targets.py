"""What is aimed at, as ratios within one run, and what was measured."""

from dataclasses import dataclass

from . import contestants as who
from . import equal_ram, metadata, overhead, round_trip, tree
from .disks import CLOUD_DISK, HARD_DISK
from .results import Results, number


@dataclass(frozen=True)
class Target:
    """cleanfs over somebody else, or the inverse where less is better."""

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
           "round trip", f"{round_trip.RANDOM}, 1 reader", round_trip.HITS, round_trip.MERGERFS),
    Target("128 KiB sequential zcache hits vs mergerfs, one reader", 2.0,
           "round trip", f"{round_trip.SEQUENTIAL}, 1 reader", round_trip.HITS, round_trip.MERGERFS),
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
           "metadata", metadata.WRITE, "cleanfs", metadata.PLAIN),
    Target("4 KiB random writes vs plain passthrough", 0.9,
           "metadata", metadata.REWRITE, "cleanfs", metadata.PLAIN),
    Target("128 KiB sequential writes vs mergerfs", 0.9,
           "metadata", metadata.WRITE, "cleanfs", "mergerfs"),
    Target("4 KiB random writes vs mergerfs", 0.9,
           "metadata", metadata.REWRITE, "cleanfs", "mergerfs"),
]  # fmt: skip
WAKE_UPS = 10
"""What an idle daemon may have in 5 seconds."""


def judge(results: Results) -> list[tuple[str, str, str, str]]:
    """Target, goal, measured, verdict; for those that were measured."""
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
    switches = results.get("idle", "voluntary context switches", "cleanfs")
    ticks = results.get("idle", "CPU ticks of 10 ms", "cleanfs")
    if switches and ticks:
        met = switches.median <= WAKE_UPS and ticks.median <= 1
        rows.append((
            f"idle daemon, {round_trip.IDLE_SECONDS} s", f"≤ {WAKE_UPS} wake-ups, ≤ 1 tick",
            f"{switches.median:.0f} wake-ups, {ticks.median:.0f} ticks", "met" if met else "missed",
        ))  # fmt: skip
    return rows
