"""Simulate three ways to treat pages that compress poorly, and count the hits that they bring.

Pages are real (text, a program, compressed data), compressed once for their sizes; the pool is then
simulated by sizes alone, below a small page cache with the real reclaim policy, as in a mount.

* reject: poor pages are refused, as the kernel's zcache did
* one queue: poor pages are kept raw like any other
* spare room: poor pages are kept raw, but go first and never displace a compressed page
"""

import json
import random
import sys
import sysconfig
import zlib
from collections import OrderedDict
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from cleanfs.backends import codec
from cleanfs.backends.reference import ENTRY_BYTES, POOR
from cleanfs.cache.reclaim import TwoListReclaim

PAGE = 4096

FRONT_SHARE = 1 / 16
"""The page cache above, as part of the data: it takes the hottest pages' hits away."""


class Pool:
    """A pool of sizes under one of the three policies."""

    def __init__(self, limit: int, policy: str) -> None:
        """``limit`` in bytes."""
        self._limit, self._policy = limit, policy
        self._queue: OrderedDict[int, int] = OrderedDict()
        self._raw: OrderedDict[int, int] = OrderedDict()
        self._used = 0

    def take(self, page: int) -> bool:
        """An exclusive get: whether it hit."""
        held = self._queue.pop(page, 0) or self._raw.pop(page, 0)
        self._used -= held
        return held > 0

    def put(self, page: int, size: int) -> None:
        """A put of a page of that compressed size."""
        poor = size == PAGE
        queue = self._raw if self._policy == "spare room" and poor else self._queue
        cost = size + ENTRY_BYTES
        full = self._used + cost > self._limit
        if poor and (self._policy == "reject" or (queue is self._raw and full and not self._raw)):
            return
        queue[page] = cost
        self._used += cost
        while self._used > self._limit:
            self._used -= (self._raw or self._queue).popitem(last=False)[1]


def run(accesses: list[int], sizes: list[int], pool: Pool) -> list[bool]:
    """For each access that the page cache above misses, whether the pool had the page."""
    front = TwoListReclaim()
    resident: set[int] = set()
    hits = []
    for page in accesses:
        if page in resident:
            front.touch([page])
            continue
        hits.append(pool.take(page))
        front.insert([page])
        resident.add(page)
        if len(resident) > len(sizes) * FRONT_SHARE:
            for victim in front.victims(1):
                resident.remove(victim)
                pool.put(victim, sizes[victim])
    return hits


def real_pages(count: int) -> list[int]:
    """Kept sizes of ``count`` pages: a third each of text, libraries and compressed data."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = b"".join(path.read_bytes() for path in sorted(stdlib.glob("*.py")))
    binary = Path(sys.executable).resolve().read_bytes()
    packed = zlib.compress(text + binary)
    compress = codec.lz4_compressor(codec.parse("lz4"))
    sizes = []
    for data in (text, binary, packed):
        pages = [data[i : i + PAGE] for i in range(0, len(data) - PAGE, PAGE)]
        chosen = random.Random(0).choices(pages, k=count // 3)
        sizes += [len(compress(page)) for page in chosen]
    return [PAGE if size > PAGE * POOR else size for size in sizes]


def trace(workload: str, pages: int, length: int) -> list[int]:
    """Page numbers in order of access."""
    rng = random.Random(1)
    if workload == "uniform":
        return [rng.randrange(pages) for _ in range(length)]
    order = list(range(pages))
    rng.shuffle(order)
    if workload == "loop":
        return [order[i % pages] for i in range(length)]
    weights = [1 / (rank + 1) for rank in range(pages)]  # zipf
    return rng.choices(order, weights, k=length)


@click.command()
@click.option("--pages", type=click.IntRange(300), default=12_000, show_default=True)
@click.option("--json", "json_file", type=click.Path(dir_okay=False))
def main(pages: int, json_file: str | None) -> None:
    """Print hit ratios for each workload, pool size and policy."""
    sizes = real_pages(pages)
    policies = ("reject", "one queue", "spare room")
    table = Table("workload", "pool / data", *policies)
    rows = []
    for workload in ("uniform", "loop", "zipf"):
        accesses = trace(workload, len(sizes), 10 * len(sizes))
        for share in (0.25, 0.5, 0.75, 1.0):
            ratios = {}
            for policy in policies:
                pool = Pool(int(len(sizes) * PAGE * share), policy)
                hits = run(accesses, sizes, pool)
                warm = hits[len(hits) // 2 :]
                ratios[policy] = sum(warm) / len(warm)
            rows.append({"workload": workload, "pool_share": share, **ratios})
            table.add_row(workload, f"{share:.2f}", *(f"{ratios[p]:.1%}" for p in policies))
        table.add_section()
    Console().print(f"{sizes.count(PAGE) / len(sizes):.0%} of the pages are poor")
    Console().print(table)
    if json_file:
        Path(json_file).write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main(prog_name="scripts/run bench/poor_pages")
