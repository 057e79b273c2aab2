"""Measure the kernel's source tree at equal RAM on a slow disk: grep, tar, and a compile."""

import os
import shutil
from pathlib import Path

from . import contestants as who
from .contestants import Contestant
from .data import count_files
from .disks import HARD_DISK, UNTHROTTLED
from .lab import Clock, Lab, Session
from .machine import MIB, SkippedError, call, need, timed
from .results import Sample, Section
from .workloads import GREP, TAR

GREP_TREE = "grep -r, second time"
TAR_TREE = "tar, third time"
COMPILE = "make -j2 kernel/, after another grep"
PARTS = {
    "whole": "The kernel's source",
    "part": "The kernel's source without documentation, sound, foreign architectures and some drivers",
    "small": "A small part of the kernel's source",
}
FASTER = 3.2
"""No contestant gets more time than this many times what cleanfs took: that is slow enough to tell."""


def bench(lab: Lab, clock: Clock) -> None:
    """Read the tree until it is warm, then measure."""
    plan = lab.plan
    disk = lab.disk("ext4")
    with disk.mounted(lab.scratch / "count") as mount:
        if not (mount / "data/tree").exists():
            raise SkippedError("no kernel tree on the disk")
        count, size = count_files(mount / "data/tree")
    section = lab.results.section(
        "tree",
        f"Source tree at equal RAM: {count:,} files, {size / MIB:,.0f} MiB, "
        f"{plan.tree_ram} MiB of RAM, {HARD_DISK.name}",
        f"{PARTS[plan.tree]}, in seconds; after a semicolon the MiB that came from the disk. Throttled "
        "only while measured; the grep before was not. Objects go to another disk. ≥ is where the time "
        "limit ended it. The compile starts with what a grep over the tree left in RAM.",
    )
    entrants = [
        entrant
        for entrant in who.equal_ram(plan.tree_ram * MIB, plan.tree_spare)
        if _enters(plan.only, entrant)
    ]
    # cleanfs first: the others' limits follow from its times.
    entrants.sort(key=lambda entrant: entrant.name != "cleanfs")
    for entrant in lab.rounds(entrants, 1, clock, "source tree"):
        if clock.up:
            lab.skip(f"source tree, {entrant.name}", "the time is used")
            continue
        objects = lab.scratch / "objects"
        try:
            with lab.session(entrant, plan.tree_ram * MIB) as session:
                objects.mkdir()
                _measure(lab, section, entrant, session, objects)
        except SkippedError as exc:
            lab.skip(f"source tree, {entrant.name}", exc)
        finally:
            shutil.rmtree(objects, ignore_errors=True)


def _enters(only: tuple[str, ...], entrant: Contestant) -> bool:
    names = {"cleanfs", who.NATIVE} if only else {"cleanfs", who.NATIVE, who.BTRFS_ZSTD}
    return entrant.name in names


def _measure(lab: Lab, section: Section, entrant: Contestant, session: Session, objects: Path) -> None:
    plan, group, tree = lab.plan, session.group, session.path / "tree"
    os.environ["LC_ALL"] = "C"
    grep = group.inside(*GREP, tree)

    def record(workload: str, command: tuple[str | Path | int, ...], accept: tuple[int, ...]) -> None:
        limit = plan.tree_limit
        if first := section.get(workload, "cleanfs"):
            limit = min(limit, max(10, first.median * FASTER))
        session.throttle(HARD_DISK)
        before = session.disk.read_mib
        seconds, cut = timed(group.inside(*command), limit, tree, accept)
        read = session.disk.read_mib - before
        session.throttle(UNTHROTTLED)
        section.add(workload, entrant.name, "s", Sample(seconds, read, at_least=cut))

    make: tuple[str | Path | int, ...] = ("make", "-s", "-C", tree, f"O={objects}", "-j2")
    compiles = plan.compile
    if compiles:
        try:
            need("make", "gcc", "flex", "bison", "bc")
            call(*group.inside(*make, "tinyconfig"))
            call(*group.inside(*make, "prepare"))
        except SkippedError as exc:
            compiles = False
            lab.skip(f"compile, {entrant.name}", exc)
    timed(grep, 2 * plan.tree_limit, accept=(1,))
    record(GREP_TREE, (*GREP, "."), (1,))
    record(TAR_TREE, TAR, (0,))
    if compiles:
        timed(grep, 2 * plan.tree_limit, accept=(1,))
        record(COMPILE, (*make, "kernel/"), (0,))
