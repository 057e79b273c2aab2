"""Measure the memory of a process with a zcache. The program takes JSON options and prints JSON.

It puts several times the limit in mixed pages: text, noise and same-filled pages, in large files and
many small ones. Between puts it makes exclusive gets in both forms, puts pages back and flushes files.
"""

import json
import sys
from collections import deque
from pathlib import Path
from random import Random
from typing import Any

from cleanfs.backends._zcache import Engine
from cleanfs.backends.ops import FileKey
from tests.backends.pages import PAGE_SIZE, noise, text

BATCH = 32
RANDOM = [noise(i)[: 400 + 9 * i].ljust(PAGE_SIZE, b"\0") for i in range(256)]
BASES = [
    page
    for i in range(256)
    for page in (text(i), RANDOM[i], RANDOM[i], RANDOM[255 - i], noise(i), bytes(PAGE_SIZE))
]


def anonymous_bytes() -> int:
    """Return the resident anonymous memory of this process in bytes."""
    status = Path("/proc/self/status").read_text()
    [line] = [line for line in status.splitlines() if line.startswith("RssAnon:")]
    return int(line.split()[1]) * 1024


class Workload:
    """Performs steps of one batch of pages each; one batch in 16 consists of small files."""

    def __init__(self, z: Engine, seed: int, lends: bool) -> None:
        """Start with a seed. ``lends``: whether some gets make loans."""
        self.z, self.choose, self.lends = z, Random(seed), lends
        self.pool = z.init_fs(PAGE_SIZE)
        self.number = 0
        self.put_pages = 0
        self.files: deque[tuple[FileKey, int]] = deque(maxlen=4000)

    def pages(self) -> list[bytes]:
        """Return a batch of new pages of every kind."""
        at = self.choose.randrange(len(BASES) - BATCH)
        self.number += BATCH
        stamps = range(self.number, self.number + BATCH)
        # A word is repeated in a same-filled page only.
        return [
            stamp.to_bytes(8, "little") * (PAGE_SIZE // 8)
            if page == BASES[5]
            else stamp.to_bytes(8, "little") + page[8:]
            for stamp, page in zip(stamps, BASES[at : at + BATCH], strict=True)
        ]

    def step(self) -> None:
        """Put one batch; sometimes get or flush some pages."""
        z, pool, choose = self.z, self.pool, self.choose
        kind = choose.randrange(16)
        if kind == 0:
            for page in self.pages():
                self.number += 1
                z.put_page(pool, FileKey(2, self.number, b"small file"), 0, page)
        else:
            key = FileKey(1, self.number // (BATCH * choose.choice((1, 10, 100))), b"generation")
            first = choose.randrange(64) * BATCH
            z.put_pages(pool, key, list(enumerate(self.pages(), first)))
            self.files.append((key, first))
        self.put_pages += BATCH
        if kind >= 8 and self.files:
            key, first = choose.choice(self.files)
            if kind == 15:
                z.flush_inode(pool, key)
            elif kind % 2 or not self.lends:
                n = choose.choice((1, 8, BATCH))
                z.get_pages_into(pool, key, first + choose.randrange(BATCH), bytearray(n * PAGE_SIZE))
            else:
                got = enumerate(z.get_pages(pool, key, first, BATCH), first)
                back = [(i, page) for i, page in got if page is not None]
                if kind >= 12:
                    z.put_pages(pool, key, back)


def main(
    engine: dict[str, Any], rounds: int, seed: int = 1, lends: bool = True, then: int | None = None
) -> dict[str, Any]:
    """Put ``rounds`` times the limit in pages, then resize to ``then``. Return the measurements."""
    before = anonymous_bytes()
    z = Engine(**engine)
    workload = Workload(z, seed, lends)
    limit = z.pool_limit
    peak = used_peak = 0
    held = []
    for number in range(1, rounds + 1):
        step = 0
        while workload.put_pages * PAGE_SIZE < number * limit:
            workload.step()
            step += 1
            if step % 16 == 0:
                peak = max(peak, anonymous_bytes())
                used_peak = max(used_peak, z.counters()["pool_used"])
        z.sync()
        held.append(z.counters()["eph_zpages"])
    z.check()
    counters = z.counters()
    result = {"limit": limit, "used_peak": used_peak, "rss": peak - before, "held": held}
    result |= {"used": counters["pool_used"], "counters": counters}
    if then is not None:
        z.resize(then)
        result |= {"used_then": z.counters()["pool_used"], "rss_then": anonymous_bytes() - before}
    return result


if __name__ == "__main__":
    json.dump(main(**json.loads(sys.argv[1])), sys.stdout)
