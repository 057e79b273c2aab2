"""Measure writes: large and small, mixed with reads, with fsync, by a database."""

from collections.abc import Iterator
from dataclasses import replace

from .machine import MIB, SkippedError, call
from .programs import run_program
from .rows import Figure, Place, Row
from .workloads import fio

STREAMS = ("source", "cleanfs", "passthrough", "mergerfs")
DD_WRITES = 20_000


def _mixed(place: Place) -> Iterator[Figure]:
    yield from _small(place, "randrw", place.plan.job_file, "--rwmixread=70", "--numjobs=4")


def _fsync(place: Place) -> Iterator[Figure]:
    yield from _small(place, "randwrite", place.plan.job_file // 4, "--fsync=1")


def _small(place: Place, rw: str, mib: int, *more: str) -> Iterator[Figure]:
    """Run a plain fio job, which drops the file from the kernel's cache when it begins."""
    options = (*more, "--invalidate=1")
    size = mib * MIB
    fio(None, place.path, rw, "4k", seconds=60, whole=True, size=size, more=(*more, "--create_only=1"))
    with place.metered() as meter:
        io = fio(
            None, place.path, rw, "4k", seconds=place.plan.seconds, whole=True, size=size,
            seed=place.seed + 1, more=options,
        )  # fmt: skip
    for file in place.path.glob("job.*"):
        file.unlink()
    yield Figure("calls", "calls/s", io.iops)
    yield from meter.cost("calls", "calls", io.count)


def _sqlite(place: Place) -> Iterator[Figure]:
    count = place.plan.transactions
    for title, mode in (("rollback journal", "delete"), ("write-ahead log", "wal")):
        with place.metered() as meter:
            seconds = run_program("insert", place.path / mode, count, mode)
        yield from replace(meter, seconds=seconds).rate(title, "transactions", count)


def _create(place: Place) -> Iterator[Figure]:
    count = place.plan.small_files
    directory = place.path / "files"
    directory.mkdir()
    for size, kind in ((0, "empty"), (1024, "1 KiB")):
        with place.metered() as meter:
            seconds = run_program("create", directory, count, size)
        yield from replace(meter, seconds=seconds).rate(f"create, {kind}", "files", count)
        with place.metered() as meter:
            seconds = run_program("unlink", directory, count)
        yield from replace(meter, seconds=seconds).rate(f"unlink, {kind}", "files", count)
    directory.rmdir()


def _modify(place: Place) -> Iterator[Figure]:
    """Read a page, then write it, in the order of a random walk over all pages of the file."""
    file, pages = place.path / "file", place.plan.write * MIB // 4096
    fio(None, file, "write", "128k", seconds=60, whole=True, size=pages * 4096)
    with place.metered() as meter:
        seconds = run_program("modify", file, pages, place.seed)
    file.unlink()
    yield from replace(meter, seconds=seconds).rate("read a page, write it", "pages", pages)


def _dd(place: Place) -> Iterator[Figure]:
    file = place.path / "file"
    with place.metered() as meter:
        call("dd", "if=/dev/zero", f"of={file}", "bs=512", f"count={DD_WRITES}")
    file.unlink()
    yield from meter.rate("writes of 512 bytes", "writes", DD_WRITES)


def _stream(place: Place) -> Iterator[Figure]:
    yield from _new_file(place, "write", "128k", place.plan.write * MIB)


def _random(place: Place) -> Iterator[Figure]:
    yield from _new_file(place, "randwrite", "4k", place.plan.write * MIB // 4)


def _new_file(place: Place, rw: str, block: str, size: int) -> Iterator[Figure]:
    """Write a new file in one go; the fsync at its end is in the time."""
    for workload, direct in (("buffered", False), ("O_DIRECT", True)):
        file = place.path / "file"
        try:
            with place.metered() as meter:
                io = fio(
                    None, file, rw, block, seconds=60, whole=True, size=size, direct=direct,
                    seed=place.seed + 1, more=("--end_fsync=1",),
                )  # fmt: skip
        except SkippedError:
            # mergerfs hands O_DIRECT on to the source, with buffers that are not aligned for it.
            if direct:
                return
            raise
        finally:
            file.unlink(missing_ok=True)
        if block == "4k":
            yield Figure(workload, "writes/s", io.iops)
        else:
            yield Figure(workload, "MB/s", io.mb_per_second)
        yield from meter.cost(workload, "writes", io.count)


ROWS = {
    "mixed": Row("4 KiB, 70 % reads, 4 jobs", _mixed),
    "fsync": Row("4 KiB random writes, fsync after each", _fsync),
    "sqlite": Row("SQLite, one insert a transaction", _sqlite),
    "create": Row("Create files, unlink them", _create),
    "modify": Row("Read a page of 4 KiB, then write it", _modify),
    "dd": Row(f"dd bs=512, {DD_WRITES:,} writes", _dd),
    "write-128k": Row("128 KiB sequential writes, fsync at the end", _stream, STREAMS, mergerfs="off"),
    "write-4k": Row("4 KiB random writes, fsync at the end", _random, STREAMS, mergerfs="off"),
}
