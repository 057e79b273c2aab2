"""Measure reads of a file none of whose pages the kernel keeps: each reaches the file system."""

from collections.abc import Iterator
from pathlib import Path

from scripts.lib.content import write_compressible

from .lab import Plan
from .machine import MIB, SkippedError
from .rows import CONTESTANTS, Figure, Place, Row
from .workloads import fio, read_through

PEERS = ("cleanfs", "uring", "passthrough", "mergerfs", "bindfs")
ENGINES = ("cleanfs", "uring", "zstd", "python", "passthrough", "mergerfs", "bindfs")
HITS = ("--page-cache", "4M")
"""So small that nearly every page comes from zcache."""


def readers_text(readers: int) -> str:
    """Say how many."""
    return "1 reader" if readers == 1 else f"{readers} readers"


def _file(source: Path, plan: Plan) -> None:
    write_compressible(source / "file", plan.hot_file * MIB)
    read_through(source / "file", keep=True)


def _warm(path: Path) -> None:
    for _ in range(3):  # of what the kernel drops in one go, a part may be lost on a busy machine
        read_through(path / "file")


def _random(place: Place) -> Iterator[Figure]:
    for readers in (1, 4):
        yield from _read(place, readers_text(readers), "randread", "4k", readers)


def _sequential(place: Place) -> Iterator[Figure]:
    for readers in (1, 4):
        yield from _read(place, readers_text(readers), "read", "128k", readers)


def _queue(place: Place) -> Iterator[Figure]:
    more = ("--ioengine=libaio", "--iodepth=16")
    yield from _read(place, "16 in flight", "randread", "4k", 1, *more)


def _read(
    place: Place, workload: str, rw: str, block: str, readers: int, *more: str
) -> Iterator[Figure]:
    # mergerfs would hand O_DIRECT on, and read the disk. Without its page cache all reads reach it.
    direct = place.name != CONTESTANTS["mergerfs"]
    before = place.stats()
    with place.metered() as meter:
        io = fio(
            None, place.path / "file", rw, block, seconds=place.plan.seconds,
            direct=direct, readers=readers, seed=place.seed + 1, more=more,
        )  # fmt: skip
    after = place.stats()
    if before and before["backend"] != "none":
        from_source = after["source_read_bytes"] - before["source_read_bytes"]
        if from_source > place.plan.hot_file * MIB * 0.02:
            raise SkippedError(f"{from_source / MIB:.0f} MiB came from the source, not from zcache")
    if block == "4k":
        yield Figure(workload, "reads/s", io.iops)
    else:
        yield Figure(workload, "MB/s", io.mb_per_second)
    yield from meter.cost(workload, "reads", io.count)


ROWS = {
    "hits-4k": Row(
        "4 KiB random reads, from zcache", _random, ENGINES, HITS, "off", data=_file, warm=_warm
    ),
    "hits-128k": Row(
        "128 KiB sequential reads, from zcache", _sequential, ENGINES, HITS, "off", _file, _warm
    ),
    "hits-queue": Row(
        "4 KiB random reads, libaio, from zcache", _queue, PEERS, HITS, "off", _file, _warm
    ),
}  # fmt: skip
