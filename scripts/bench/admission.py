"""Compare who gets into a full pool: every page, or only what was seen before (``--admission``).

The real page cache with its reclaim, cleancache and the native zcache, over a source in memory; pages
are real (Python source). What is counted is the part of the reads that needed the source, in the second
half of each run. Deterministic but for when the worker compresses.

* hot: Zipf reads of a set that fits into the pool
* hot + scans: the same, with a pass over other data, three times the pool, every so often
* loop: one pass after the other over one and a half times what fits
* uniform: reads at random of twice what fits
* moving: a hot set that is another one every so often
"""

import json
import sys
import sysconfig
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

import click
import trio
from rich.console import Console
from rich.table import Table

from cleanfs.backends import zcache
from cleanfs.backends.ops import FileKey
from cleanfs.backends.options import Admission, BackendOptions
from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.fingerprint import Fingerprint
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.resident import PythonResident

PAGE = 4096
POOL = 16 << 20
PAGE_CACHE = 1 << 20
FITS = 2 * POOL // PAGE
"""Pages that the pool holds, about: they compress to a half."""

Reads = Iterator[int]


def zipf(random: Random, count: int, first: int, pages: int) -> Reads:
    """Reads of ``pages`` from ``first`` on, the n-th most popular with a weight of 1/n."""
    order = list(range(first, first + pages))
    random.shuffle(order)
    weights = list(accumulate(1 / n for n in range(1, pages + 1)))
    yield from random.choices(order, cum_weights=weights, k=count)


def hot(random: Random) -> Reads:
    """See the module."""
    yield from zipf(random, 12 * FITS, 0, FITS * 3 // 4)


def hot_and_scans(random: Random) -> Reads:
    """See the module."""
    where = FITS
    for _ in range(6):
        yield from zipf(Random(1), 2 * FITS, 0, FITS * 3 // 4)
        yield from range(where, where + 3 * FITS)
        where += 3 * FITS


def loop(random: Random) -> Reads:
    """See the module."""
    for _ in range(8):
        yield from range(FITS * 3 // 2)


def uniform(random: Random) -> Reads:
    """See the module."""
    for _ in range(12 * FITS):
        yield random.randrange(2 * FITS)


def moving(random: Random) -> Reads:
    """See the module."""
    for turn in range(8):
        yield from zipf(random, 2 * FITS, turn * FITS, FITS * 3 // 4)


WORKLOADS: dict[str, Callable[[Random], Reads]] = {
    "hot": hot,
    "hot + scans": hot_and_scans,
    "loop": loop,
    "uniform": uniform,
    "moving": moving,
}


@click.command()
@click.option("--json", "json_file", type=click.Path(dir_okay=False), help="Write all values here.")
def main(json_file: str | None) -> None:
    """Compare the two admissions."""
    if zcache.native_module() is None:
        sys.exit("admission: was-active needs the native engine")
    text = b"".join(
        path.read_bytes() for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    )
    table = Table(
        title=f"reads of the source, %; pool {POOL >> 20} MiB, page cache {PAGE_CACHE >> 20} MiB"
    )
    for heading in ("workload", "all", "was-active", "refused"):
        table.add_column(heading, justify="right")
    report: dict[str, Any] = {}
    for name, workload in WORKLOADS.items():
        everyone, _ = trio.run(run, text, workload, "all")
        active, refused = trio.run(run, text, workload, "was-active")
        report[name] = {"all": everyone, "was-active": active, "refused": refused}
        table.add_row(name, f"{everyone:.1%}", f"{active:.1%}", f"{refused:,}")
    Console().print(table)
    if json_file:
        Path(json_file).write_text(json.dumps(report, indent=2) + "\n")


class TextSource:
    """A file with a page of its own, nearly, for each index."""

    def __init__(self, text: bytes) -> None:
        """Cut pages out of ``text``."""
        self._text = text
        self.reads = 0

    async def read(self, offset: int, size: int, file_size: int) -> bytes:
        """Read one page."""
        self.reads += 1
        at = offset * 61 % (len(self._text) - PAGE)
        return self._text[at : at + PAGE]


async def run(
    text: bytes, workload: Callable[[Random], Reads], admission: Admission
) -> tuple[float, int]:
    """Part of the reads of the second half that needed the source, and puts that were refused."""
    backend = zcache.make(BackendOptions(POOL, admission=admission))
    cleancache = Cleancache()
    cleancache.register(backend)
    cache = PageCache(PAGE_CACHE, cleancache.init_fs(PAGE), PythonResident(PAGE))
    file = cache.file(FileKey(1, 2, b""))
    file.fingerprint = Fingerprint(1 << 40, 1, 1, racy=False)
    file.size = 1 << 40
    source = TextSource(text)

    reads = list(workload(Random(7)))
    half = len(reads) // 2
    for number, index in enumerate(reads):
        if number == half:
            source.reads = 0
        await cache.read(file, source, index * PAGE, PAGE)
    return source.reads / (len(reads) - half), backend.counters()["eph_nonactive_puts_ignored"]


if __name__ == "__main__":
    main(prog_name="scripts/run bench/admission")
