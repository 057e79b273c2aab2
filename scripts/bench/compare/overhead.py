"""Measure what cleanfs costs where it cannot help: streams, once through."""

from contextlib import ExitStack

from scripts.lib.content import write_compressible, write_random

from . import contestants as who
from .contestants import Contestant, nothing
from .disks import CLOUD_DISK, UNTHROTTLED, DiskClass
from .lab import Clock, Lab
from .machine import MIB, SkippedError
from .results import Sample
from .workloads import fio, read_through

RANDOM_DISK = "random bytes, unthrottled disk"
RANDOM_HOT = "random bytes, source in RAM"
TEXT_HOT = "Python source, source in RAM"
COLD = f"Python source, cold, {CLOUD_DISK.name}"
CPU = ", CPU"


def bench(lab: Lab, clock: Clock) -> None:
    """Measure sequential reads of a file that nothing has read before, or whose source is in RAM."""
    plan = lab.plan
    section = lab.results.section(
        "overhead",
        f"Where cleanfs cannot help: {plan.stream:,} MiB, read once",
        "Fresh mounts with default limits, 1 MiB reads through the page cache. CPU is that of daemon "
        "and reader, a GB read. The cold read from the throttled disk is of half the file.",
    )
    disk = lab.own("ext4", 2 * plan.stream + 600)
    entrants = [
        Contestant(who.NATIVE, "", nothing),
        Contestant("cleanfs", "", who.cleanfs()),
        Contestant(who.OWN, "", who.cleanfs("--evictions", "own")),
        Contestant(who.WITHOUT, "", who.cleanfs("--backend", "none")),
        Contestant("mergerfs", "", who.mergerfs("auto-full")),
    ]
    mount = lab.scratch / "stream"
    with disk.mounted(mount):
        write_random(mount / "random", plan.stream * MIB)
        write_compressible(mount / "text", plan.stream * MIB)
    workloads: list[tuple[str, str, bool, DiskClass]] = [
        (RANDOM_DISK, "random", False, UNTHROTTLED),
        (COLD, "text", False, CLOUD_DISK),
        (RANDOM_HOT, "random", True, UNTHROTTLED),
        (TEXT_HOT, "text", True, UNTHROTTLED),
    ]
    cases = [(workload, entrant) for workload in workloads for entrant in entrants]
    for (workload, name, hot, disk_class), entrant in lab.rounds(cases, plan.rounds, clock, "overhead"):
        try:
            with ExitStack() as stack:
                source = stack.enter_context(disk.mounted(mount))
                mounted = stack.enter_context(lab.mounted(entrant, source))
                if hot:
                    read_through(source / name, keep=True)
                mounted.group.throttle(disk.number, disk_class.iops, disk_class.bytes_per_second)
                before, cpu = disk.read_mib, mounted.group.cpu_seconds()
                size = plan.stream * MIB // 2 if disk_class is CLOUD_DISK else 0
                io = fio(
                    mounted.group, mounted.path / name, "read", "1m", seconds=30, whole=True, size=size
                )
                cpu = mounted.group.cpu_seconds() - cpu
                read = disk.read_mib - before
        except SkippedError as exc:
            lab.skip(f"overhead, {entrant.name}", exc)
            continue
        section.add(workload, entrant.name, "MB/s", Sample(io.mb_per_second, read))
        section.add(workload + CPU, entrant.name, "s/GB", Sample(cpu / (io.bytes / 1e9)))
