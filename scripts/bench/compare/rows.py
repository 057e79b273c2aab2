"""Run rows: one workload, beside every contestant in turn, in alternated rounds of one run.

A row says what to do on a mount and which figures come of it. Its daemons run in control groups of
their own and its programs outside, so the CPU time of a group is the daemon's alone.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import contestants as who
from .cgroups import Group
from .contestants import Contestant, Mount
from .lab import Clock, Lab, Mounted, Plan
from .machine import SkippedError
from .results import Sample

CPU = "CPU of the daemon"
ABOUT = "Passthrough is `--backend none --page-cache 0`. The source is a directory of `--directory`."
PASSTHROUGH = ("--backend", "none", "--page-cache", "0")
CONTESTANTS = {
    "source": "the source itself",
    "cleanfs": "cleanfs",
    "uring": "cleanfs, io_uring",
    "own": who.OWN,
    "baseline": "baseline",
    "passthrough": "cleanfs, passthrough",
    "zstd": "cleanfs, zstd:3+dict",
    "python": "cleanfs, Python engine",
    "timeouts": "cleanfs, coherency none",
    "mergerfs": "mergerfs",
    "bindfs": "bindfs",
}
"""Titles by the names on the command line."""


@dataclass(frozen=True)
class Figure:
    """Names a value of a workload."""

    workload: str
    unit: str
    value: float


@dataclass
class Meter:
    """Measures the seconds that a block took, and the CPU seconds that the daemon used meanwhile."""

    seconds: float = 0.0
    cpu: float | None = None
    """None: there is no daemon."""

    def rate(self, workload: str, unit: str, count: int) -> Iterator[Figure]:
        """Give operations per second, and the daemon's microseconds for each."""
        yield Figure(workload, f"{unit}/s", count / self.seconds)
        yield from self.cost(workload, unit, count)

    def cost(self, workload: str, unit: str, count: int) -> Iterator[Figure]:
        """Give the daemon's microseconds for each operation."""
        if self.cpu is not None:
            yield Figure(f"{workload}, {CPU}", f"us/{unit.removesuffix('s')}", self.cpu / count * 1e6)


@dataclass(frozen=True)
class Place:
    """Holds a contestant that is mounted, for one measurement."""

    name: str
    source: Path
    path: Path
    daemon: Group | None
    plan: Plan
    seed: int

    @contextmanager
    def metered(self) -> Iterator[Meter]:
        """Measure the block."""
        meter = Meter()
        before = self.daemon.cpu_seconds() if self.daemon else 0.0
        start = time.monotonic()
        yield meter
        meter.seconds = time.monotonic() - start
        if self.daemon:
            meter.cpu = self.daemon.cpu_seconds() - before

    def stats(self) -> dict[str, Any]:
        """Take a snapshot of the statistics; empty if this is no cleanfs."""
        control = self.path / ".cleancache/stats.json"
        return dict(json.loads(control.read_text())) if control.exists() else {}


Measure = Callable[[Place], Iterator[Figure]]


@dataclass(frozen=True)
class Row:
    """Is one workload."""

    title: str
    measure: Measure
    contestants: tuple[str, ...] = ("source", "cleanfs", "mergerfs", "bindfs")
    """Measured unless the command line names others; the baseline is one more, if there is one."""
    options: tuple[str, ...] = ()
    """Of cleanfs."""
    mergerfs: str = "auto-full"
    """Its cache.files."""
    data: Callable[[Path, Plan], None] | None = None
    """Fills the source, which contestants and rows with the same data share. None: each contestant has
    an empty directory."""
    warm: Callable[[Path], None] | None = None
    """Called once for each mount."""
    new_mounts: bool = False
    """Whether each measurement has a mount of its own."""


class Bench:
    """Holds what rows have in common: the lab, the baseline, and the data that is already there."""

    def __init__(self, lab: Lab, baseline: Path | None) -> None:
        self._lab = lab
        self._baseline = baseline
        self._sources: dict[object, Path] = {}

    def run(self, name: str, row: Row, names: tuple[str, ...]) -> None:
        """Measure one row; names: the contestants, or empty for the row's own."""
        lab = self._lab
        options = f"cleanfs with `{' '.join(row.options)}`. " if row.options else ""
        section = lab.results.section(name, row.title, f"{options}{ABOUT}")
        baseline = ("baseline",) if self._baseline else ()
        chosen = [each for each in CONTESTANTS if each in (names or (*row.contestants, *baseline))]
        with ExitStack() as stack:
            mounted: dict[str, Callable[[], AbstractContextManager[Mounted]]] = {}
            for each in chosen:
                try:
                    mounted[each] = self._mounting(stack, name, row, each)
                except SkippedError as exc:
                    lab.skip(f"{name}, {CONTESTANTS[each]}", exc)
            turns = lab.rounds(list(mounted), lab.plan.rounds, Clock(lab.plan.rounds), name)
            for turn, each in enumerate(turns):
                title = CONTESTANTS[each]
                try:
                    with mounted[each]() as made:
                        daemon = None if each == "source" else made.group
                        place = Place(title, made.source, made.path, daemon, lab.plan, turn)
                        for figure in row.measure(place):
                            section.add(figure.workload, title, figure.unit, Sample(figure.value))
                except SkippedError as exc:
                    lab.skip(f"{name}, {title}", exc)

    def _mounting(
        self, stack: ExitStack, name: str, row: Row, each: str
    ) -> Callable[[], AbstractContextManager[Mounted]]:
        """Choose how to get at a contestant's mount: the one that is there, or a new one each time."""
        contestant = Contestant(CONTESTANTS[each], "", self._mounts(row)[each])
        source = self._source(name, row, each)
        if row.new_mounts:
            return lambda: self._lab.mounted(contestant, source)
        there = stack.enter_context(self._lab.mounted(contestant, source))
        if row.warm:
            row.warm(there.path)

        @contextmanager
        def same() -> Iterator[Mounted]:
            yield there

        return same

    def _mounts(self, row: Row) -> Mapping[str, Mount]:
        options = row.options
        mounts = {
            "source": who.nothing,
            "cleanfs": who.cleanfs(*options),
            "uring": who.uring(*options),
            "own": who.cleanfs(*options, "--evictions", "own"),
            "passthrough": who.cleanfs(*PASSTHROUGH),
            "zstd": who.cleanfs(*options, "--compression", "zstd:3+dict"),
            "python": who.cleanfs(*options, command=("env", "CLEANFS_PUREPYTHON=1", *who.CLEANFS)),
            "timeouts": who.cleanfs(*options, "--coherency", "none"),
            "mergerfs": who.mergerfs(row.mergerfs),
            "bindfs": who.bindfs,
        }
        if self._baseline:
            mounts["baseline"] = who.cleanfs(*options, command=who.cleanfs_of(self._baseline))
        return mounts

    def _source(self, name: str, row: Row, each: str) -> Path:
        key = row.data or (name, each)
        if key not in self._sources:
            source = self._lab.scratch / f"rows-{len(self._sources)}"
            source.mkdir()
            if row.data:
                row.data(source, self._lab.plan)
            self._sources[key] = source
        return self._sources[key]
