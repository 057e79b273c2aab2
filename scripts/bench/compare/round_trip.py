"""What a read through a mount costs when nothing has to come from a disk."""

import json
import time
from contextlib import ExitStack
from pathlib import Path

from scripts.lib.content import write_compressible

from . import contestants as who
from .contestants import Contestant
from .lab import Clock, Lab, Mounted
from .machine import MIB, SkippedError
from .results import Sample
from .workloads import fio, read_through

HITS = "cleanfs, hits in zcache"
PLAIN = "cleanfs, passthrough"
MERGERFS = "mergerfs cache.files=off"
BINDFS = "bindfs"
RANDOM = "4 KiB random"
SEQUENTIAL = "128 KiB sequential"
IDLE_SECONDS = 5


def readers_text(readers: int) -> str:
    """How many."""
    return "1 reader" if readers == 1 else f"{readers} readers"


def bench(lab: Lab, clock: Clock) -> None:
    """Reads that the kernel does not keep, so that every read reaches the file system.

    By O_DIRECT, but for mergerfs: it would hand that on, and read the disk. Without its page cache all
    reads reach it anyway.
    """
    plan = lab.plan
    section = lab.results.section(
        "round trip",
        f"Round trip: {plan.hot_file} MiB of Python source",
        "Synchronous readers; every read reaches the file system: by O_DIRECT, or because the mount "
        "has no page cache (mergerfs, which would read the disk with O_DIRECT). "
        "The source is in RAM; hits in zcache do not reach it. Passthrough is `--backend none "
        "--page-cache 0`.",
    )
    source = lab.scratch / "round-trip"
    source.mkdir()
    write_compressible(source / "file", plan.hot_file * MIB)
    entrants = [
        Contestant(HITS, "", who.cleanfs("--page-cache", "4M")),
        Contestant(PLAIN, "", who.cleanfs("--backend", "none", "--page-cache", "0")),
        Contestant(MERGERFS, "", who.mergerfs("off")),
        Contestant(BINDFS, "", who.bindfs),
    ]
    with ExitStack() as stack:
        mounted: dict[str, Mounted] = {}
        for entrant in entrants:
            try:
                mounted[entrant.name] = stack.enter_context(lab.mounted(entrant, source))
            except SkippedError as exc:
                lab.skip(f"round trip, {entrant.name}", exc)
        for path in (source, *(each.path for each in mounted.values())):
            read_through(path / "file")
        _hot(source / "file")
        cases = [
            (workload, rw, block, readers, name)
            for workload, rw, block in ((RANDOM, "randread", "4k"), (SEQUENTIAL, "read", "128k"))
            for readers in (1, 4)
            for name in mounted
        ]
        seed = 0
        for workload, rw, block, readers, name in lab.rounds(cases, plan.rounds, clock, "round trip"):
            seed += 1
            try:
                io = fio(
                    mounted[name].group, mounted[name].path / "file", rw, block, seconds=plan.seconds,
                    direct=name != MERGERFS, readers=readers, seed=seed,
                )  # fmt: skip
            except SkippedError as exc:
                lab.skip(f"round trip, {name}", exc)
                continue
            value, unit = (io.iops, "IOPS") if block == "4k" else (io.mb_per_second, "MB/s")
            section.add(f"{workload}, {readers_text(readers)}", name, unit, Sample(value))
        if HITS in mounted:
            _check_hits(lab, mounted[HITS].path)
    (source / "file").unlink()
    _idle(lab, source)


def _hot(path: Path) -> None:
    """Into RAM."""
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass


def _check_hits(lab: Lab, mountpoint: Path) -> None:
    found = json.loads((mountpoint / ".cleancache/stats.json").read_text())
    read, size = found["source_read_bytes"] / MIB, lab.plan.hot_file
    if read > size * 1.02:
        lab.skip(
            "note on the round trip", f"{read:.0f} MiB came from the source of {size}, not from zcache"
        )


def _idle(lab: Lab, source: Path) -> None:
    """CPU ticks and voluntary context switches of a daemon that nobody asks for anything."""
    section = lab.results.section(
        "idle", f"A daemon with nothing to do, {IDLE_SECONDS} s", "After a few reads, all threads."
    )
    (source / "file").write_bytes(b"text" * 65536)
    entrants = [
        Contestant("cleanfs", "", who.cleanfs()),
        Contestant("mergerfs", "", who.mergerfs("off")),
    ]
    for entrant in entrants if lab.plan.rounds > 1 else entrants[:1]:
        try:
            with lab.mounted(entrant, source) as mounted:
                for _ in range(20):
                    read_through(mounted.path / "file")
                time.sleep(2)
                before = _activity(mounted.group.pids())
                time.sleep(IDLE_SECONDS)
                after = _activity(mounted.group.pids())
        except SkippedError as exc:
            lab.skip(f"idle, {entrant.name}", exc)
            continue
        for name, unit, place in (
            ("CPU ticks of 10 ms", "", 0),
            ("voluntary context switches", "", 1),
        ):
            section.add(name, entrant.name, unit, Sample(after[place] - before[place]))


def _activity(pids: list[int]) -> tuple[int, int]:
    """Ticks of CPU, voluntary context switches."""
    ticks = switches = 0
    for pid in pids:
        for task in Path(f"/proc/{pid}/task").iterdir():
            fields = (task / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
            for line in (task / "status").read_text().splitlines():
                if line.startswith("voluntary_ctxt_switches"):
                    switches += int(line.split()[1])
    return ticks, switches
