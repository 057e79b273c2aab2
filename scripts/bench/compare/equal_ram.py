"""Give each the same RAM for program, daemon and caches, on disks of three classes."""

from . import contestants as who
from .contestants import Contestant
from .disks import CLOUD_DISK, HARD_DISK, UNTHROTTLED
from .lab import Clock, Lab, Session
from .machine import MIB, SkippedError
from .results import Sample, Section
from .workloads import ZIPF, fio

REREAD = "re-read"
RANDOM = "4 KiB random"
SKEWED = "4 KiB Zipf 0.99"
SCAN = "hot set after a scan"
SMALLEST = 64
"""MiB that a group must have."""
WARM = 2
"""Passes before anything is measured."""


def bench(lab: Lab, clock: Clock) -> None:
    """Measure re-reads, random reads and a scan of a working set larger than RAM."""
    plan = lab.plan
    text = round(plan.oversize * plan.ram)
    section = lab.results.section(
        "equal RAM",
        f"Equal RAM: {text:,} MiB of Python source, {plan.ram} MiB of RAM",
        f"A memory control group of {plan.ram} MiB around program, daemon and page cache. First the "
        "file is read twice, unthrottled, and what is shown is measured after that; after a semicolon "
        "the MiB that came from the disk meanwhile. zram's own memory is taken off its group, so that "
        "its RAM is equal, too; its data was copied there first, and no class of disk applies. "
        "rclone's cache is on the throttled disk.",
    )
    entrants = [
        entrant
        for entrant in who.equal_ram(plan.ram * MIB)
        if (entrant.name in plan.only if plan.only else entrant.name != who.DENSE)
    ]
    failed: set[str] = set()
    # The smaller number of rounds: this part is the longest.
    for turn, entrant in enumerate(lab.rounds(entrants, max(1, plan.rounds - 1), clock, "equal RAM")):
        if entrant.name in failed:
            continue
        try:
            memory = _memory(lab, entrant, plan.ram, text)
            with lab.session(entrant, memory) as session:
                _measure(lab, section, entrant, session, text, seed=turn // len(entrants))
        except SkippedError as exc:
            failed.add(entrant.name)
            lab.skip(f"equal RAM, {entrant.name}", exc)


def _memory(lab: Lab, entrant: Contestant, ram: int, text: int) -> int:
    """Return the bytes for the group."""
    if entrant.disk != "zram":
        return ram * MIB
    lab.disk("zram")
    left = int(ram - lab.data_ram["zram"] * text)
    if left < SMALLEST:
        raise SkippedError(f"{text} MiB compressed leave less than {SMALLEST} of {ram} MiB")
    return left * MIB


def _measure(
    lab: Lab, section: Section, entrant: Contestant, session: Session, text: int, seed: int
) -> None:
    plan, group, file = lab.plan, session.group, session.path / "text"
    size = text * MIB

    def record(workload: str, unit: str, value: float, before: float) -> None:
        section.add(
            workload, entrant.name, unit, Sample(value, disk_mib=session.disk.read_mib - before)
        )

    for _ in range(WARM):
        fio(group, file, "read", "1m", seconds=20, whole=True, size=size)
    for disk in plan.classes:
        session.throttle(disk)
        before = session.disk.read_mib
        io = fio(group, file, "read", "1m", seconds=plan.reread_limit, whole=True, size=size)
        record(f"{REREAD}, {disk.name}", "MB/s", io.mb_per_second, before)
    # rclone's unit is the whole file.
    classes = (CLOUD_DISK,) if entrant.name == who.RCLONE else plan.classes
    for number, (workload, distribution) in enumerate(((RANDOM, "random"), (SKEWED, ZIPF))):
        if distribution == ZIPF and lab.plan.rounds > 1:
            session.throttle(UNTHROTTLED)
            fio(
                group, file, "randread", "4k", seconds=2, size=size, distribution=distribution,
                seed=1000 + seed,
            )  # fmt: skip
        for place, disk in enumerate(classes):
            session.throttle(disk)
            before = session.disk.read_mib
            io = fio(
                group, file, "randread", "4k", seconds=plan.seconds, size=size,
                distribution=distribution, seed=1 + seed * 100 + number * 10 + place,
            )  # fmt: skip
            record(f"{workload}, {disk.name}", "IOPS", io.iops, before)
    if entrant.name == who.RCLONE or not plan.scan:
        return
    session.throttle(UNTHROTTLED)
    hot = session.path / "hot"
    for part in (hot, hot, file):
        fio(group, part, "read", "1m", seconds=20, whole=True, size=size if part == file else 0)
    session.throttle(HARD_DISK)
    before = session.disk.read_mib
    io = fio(group, hot, "read", "1m", seconds=plan.reread_limit, whole=True)
    record(f"{SCAN}, {HARD_DISK.name}", "MB/s", io.mb_per_second, before)


def sweep(lab: Lab, clock: Clock) -> None:
    """Measure re-reads and random reads of working sets from half of RAM to three times RAM."""
    plan = lab.plan
    section = lab.results.section(
        "sweep",
        f"Working set over RAM, {plan.ram} MiB of RAM, {CLOUD_DISK.name}",
        "As above. Where zram has no column the compressed data leaves no RAM.",
    )
    names = [who.NATIVE, "cleanfs"]
    if plan.sweep_all:
        names += [who.DENSE, who.BTRFS_ZSTD, who.ZRAM]
    everybody = {entrant.name: entrant for entrant in who.equal_ram(plan.ram * MIB)}
    cases = [(ratio, everybody[name]) for ratio in plan.sweep for name in names]
    failed: set[str] = set()
    for ratio, entrant in lab.rounds(cases, 1, clock, "sweep"):
        text = int(ratio * plan.ram)
        size = text * MIB
        if entrant.name in failed:
            continue
        if clock.up:
            lab.skip(f"sweep, {entrant.name} at {ratio}", "the time is used")
            continue
        try:
            with lab.session(entrant, _memory(lab, entrant, plan.ram, text)) as session:
                file = session.path / "text"
                for _ in range(WARM):
                    fio(session.group, file, "read", "1m", seconds=20, whole=True, size=size)
                session.throttle(CLOUD_DISK)
                before = session.disk.read_mib
                io = fio(
                    session.group, file, "read", "1m", seconds=plan.reread_limit, whole=True, size=size
                )
                read = session.disk.read_mib - before
                section.add(
                    f"{REREAD}, {ratio}x RAM", entrant.name, "MB/s", Sample(io.mb_per_second, read)
                )
                before = session.disk.read_mib
                io = fio(session.group, file, "randread", "4k", seconds=plan.seconds, size=size, seed=7)
                read = session.disk.read_mib - before
                section.add(f"{RANDOM}, {ratio}x RAM", entrant.name, "IOPS", Sample(io.iops, read))
        except SkippedError as exc:
            if entrant.name != who.ZRAM:
                failed.add(entrant.name)
            lab.skip(f"sweep, {entrant.name} at {ratio}", exc)
