"""Measure the daemon itself: its memory, and what it does when nothing asks for anything."""

import time
from collections.abc import Iterator
from pathlib import Path

from scripts.lib.content import write_compressible, write_random

from .machine import MIB
from .rows import Figure, Place, Row
from .workloads import read_through

IDLE_SECONDS = 5
TICKS, SWITCHES = "CPU ticks of 10 ms", "voluntary context switches"


def _memory(place: Place) -> Iterator[Figure]:
    """Measure the daemon's RSS before and after streams that are much larger than its caches."""
    yield Figure("just mounted", "MiB", place.stats()["rss_bytes"] / MIB)
    for kind, size, write in (
        ("compressible", 4 * place.plan.stream, write_compressible),
        ("random", 2 * place.plan.stream, write_random),
    ):
        write(place.source / kind, size * MIB)
        read_through(place.path / kind)
        (place.source / kind).unlink()
        yield Figure(f"after {size:,} MiB of {kind} data", "MiB", place.stats()["rss_bytes"] / MIB)


def _idle(place: Place) -> Iterator[Figure]:
    """Count ticks of CPU and voluntary context switches of all threads, after a few reads."""
    assert place.daemon is not None
    (place.source / "file").write_bytes(b"text" * 65536)
    for _ in range(20):
        read_through(place.path / "file")
    time.sleep(2)
    before = _activity(place.daemon.pids())
    time.sleep(IDLE_SECONDS)
    after = _activity(place.daemon.pids())
    for workload, old, new in zip((TICKS, SWITCHES), before, after, strict=True):
        yield Figure(workload, "", new - old)


def _activity(pids: list[int]) -> tuple[int, int]:
    ticks = switches = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
            for line in (task / "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    switches += int(line.split()[1])
    return ticks, switches


ROWS = {
    "memory": Row(
        "RSS of the daemon, --pool-limit 512M --page-cache 64M", _memory, ("cleanfs",),
        ("--pool-limit", "512M", "--page-cache", "64M"), new_mounts=True,
    ),
    "idle": Row(
        f"A daemon with nothing to do, {IDLE_SECONDS} s", _idle, ("cleanfs", "mergerfs"), mergerfs="off"
    ),
}  # fmt: skip
