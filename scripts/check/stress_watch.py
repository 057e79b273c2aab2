"""Let writers change the source of a mount that watches it: nobody reads old bytes for long.

Every block of a file holds the number of the version that it belongs to. Writers, one process for each
file, note when each version was complete. A reader that finds a version in a block looks up when the
next one was complete: had it been longer before the read began than the limit, the block was stale.
Some files are also written through the mount, in blocks of their own, which the source must have at
once and the mount must never take back.

Exits with 1 if a block was stale or wrong.
"""

import argparse
import ctypes
import mmap
import multiprocessing
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.queues import Queue
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from queue import Empty

from tests.harness import mounting

BLOCK = 4096
BLOCKS = 48
OURS = 16
"""Blocks at the end of a file that are written through the mount."""

HISTORY = 1 << 14
"""Versions of which it is remembered when they were complete."""

UNPRIVILEGED = ("setpriv", "--bounding-set=-dac_read_search", "--inh-caps=-dac_read_search")


Result = tuple[str, float, int]
"""Who read, for how long what it read was out of date at most, and how many reads it made."""


class History:
    """When each version was complete, for all processes (CLOCK_MONOTONIC)."""

    def __init__(self) -> None:
        """No version yet."""
        self._last: Synchronized[int] = multiprocessing.Value(ctypes.c_long, 0, lock=False)  # type: ignore[assignment]
        self._when = multiprocessing.Array(ctypes.c_double, HISTORY, lock=False)

    @property
    def last(self) -> int:
        """The last complete version."""
        return self._last.value

    def complete(self, version: int) -> None:
        """It is there for everybody to read."""
        self._when[version % HISTORY] = time.monotonic()
        self._last.value = version

    def age(self, version: int, began: float) -> float:
        """For how long, when a read began, that version had been out of date; 0 if it was not."""
        if version >= self.last:
            return 0.0
        if version + 1 <= self.last - HISTORY + 8:
            return float("inf")
        return max(began - self._when[(version + 1) % HISTORY], 0.0)


def block(version: int) -> bytes:
    """Compressible, and told from its neighbours at both ends."""
    return version.to_bytes(8, "little") * (BLOCK // 8)


def whole(version: int, blocks: int) -> bytes:
    """The part of a file that is written in the source."""
    return block(version) * blocks


def first_and_last(data: bytes) -> set[int]:
    """Versions at the ends of a block; a read may see a write half done."""
    return {int.from_bytes(data[:8], "little"), int.from_bytes(data[-8:], "little")}


# -- writers in the source -----------------------------------------------------------------------


def write(path: Path, fd: int, version: int, blocks: int) -> None:
    """In place."""
    os.pwrite(fd, whole(version, blocks), 0)


def restamp(path: Path, fd: int, version: int, blocks: int) -> None:
    """In place, and mtime set back."""
    st = os.fstat(fd)
    os.pwrite(fd, whole(version, blocks), 0)
    os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))


def store(path: Path, fd: int, version: int, blocks: int) -> None:
    """Through a mapping, which is closed; that is when it counts as complete."""
    again = os.open(path, os.O_RDWR)
    with mmap.mmap(again, blocks * BLOCK) as area:
        area[:] = whole(version, blocks)
    os.close(again)


def cut(path: Path, fd: int, version: int, blocks: int) -> None:
    """Emptied, then written."""
    os.ftruncate(fd, 0)
    os.pwrite(fd, whole(version, blocks), 0)


def replace(path: Path, fd: int, version: int, blocks: int) -> None:
    """By another file."""
    new = path.with_name(path.name + ".new")
    new.write_bytes(whole(version, blocks))
    new.rename(path)


WRITERS: dict[str, Callable[[Path, int, int, int], None]] = {
    "write": write, "restamp": restamp, "store": store, "cut": cut, "replace": replace,
}  # fmt: skip


def run_writer(
    kind: str, path: Path, blocks: int, history: History, deadline: float, seed: int
) -> None:
    """Version after version, in bursts, and with pauses that are longer than the limit."""
    choose = random.Random(seed)
    with path.open("r+b") as file:
        version = history.last
        while time.monotonic() < deadline:
            for _ in range(choose.choice((1, 1, 5, 50))):
                version += 1
                WRITERS[kind](path, file.fileno(), version, blocks)
                history.complete(version)
            time.sleep(choose.choice((0.001, 0.02, 0.3, 6.0)))


# -- readers, and writers, of the mount ----------------------------------------------------------


def read_held(path: Path, fd: int, area: mmap.mmap | None, offset: int) -> bytes:
    """By a descriptor that was always open."""
    return os.pread(fd, BLOCK, offset)


def read_path(path: Path, fd: int, area: mmap.mmap | None, offset: int) -> bytes:
    """By the name."""
    again = os.open(path, os.O_RDONLY)
    try:
        return os.pread(again, BLOCK, offset)
    finally:
        os.close(again)


def read_mapped(path: Path, fd: int, area: mmap.mmap | None, offset: int) -> bytes:
    """From a mapping that was always there."""
    assert area is not None
    return area[offset : offset + BLOCK]


def read_direct(path: Path, fd: int, area: mmap.mmap | None, offset: int) -> bytes:
    """Past the kernel's cache."""
    with mmap.mmap(-1, BLOCK) as buffer:
        return buffer[: os.preadv(fd, [buffer], offset)]


READERS = {"held": read_held, "direct": read_direct, "path": read_path, "mapped": read_mapped}


def run_reader(
    how: str,
    path: Path,
    blocks: int,
    history: History,
    deadline: float,
    limit: float,
    out: "Queue[Result]",
) -> None:
    """Read blocks until something is wrong."""
    choose = random.Random()
    worst, reads = 0.0, 0
    fd = os.open(path, os.O_RDONLY | (os.O_DIRECT if how == "direct" else 0))
    area = mmap.mmap(fd, blocks * BLOCK, prot=mmap.PROT_READ) if how == "mapped" else None
    while time.monotonic() < deadline:
        number = choose.randrange(blocks)
        began = time.monotonic()
        data = READERS[how](path, fd, area, number * BLOCK)
        reads += 1
        if len(data) == BLOCK:
            worst = max([worst, *(history.age(version, began) for version in first_and_last(data))])
        if worst > limit:
            break
        if choose.random() < 0.3:
            time.sleep(choose.choice((0.0, 0.001, 0.05)))
    out.put((f"{path.name} {how}", worst, reads))
    out.close()
    out.join_thread()
    os._exit(0)  # the mapping may outlive the mount


def run_partner(path: Path, source: Path, deadline: float, out: "Queue[Result]") -> None:
    """Write our blocks through the mount; there they are at once, here they stay."""
    choose = random.Random()
    model = [0] * OURS
    wrong, turns = 0.0, 0
    with path.open("r+b") as mount, source.open("rb") as below:
        while time.monotonic() < deadline and not wrong:
            turns += 1
            number = choose.randrange(OURS)
            offset = (BLOCKS - OURS + number) * BLOCK
            model[number] += 1
            os.pwrite(mount.fileno(), block(model[number]), offset)
            expected = block(model[number])
            here = os.pread(mount.fileno(), BLOCK, offset)
            there = os.pread(below.fileno(), BLOCK, offset)
            if here != expected or there != expected:
                wrong = float("inf")
            time.sleep(choose.choice((0.0, 0.001, 0.05)))
    out.put((f"{path.name} written through the mount", wrong, turns))


# -- rounds ---------------------------------------------------------------------------------------


def one_round(base: Path, args: argparse.Namespace, seed: int, seconds: float) -> bool:
    """One mount. Whether all was right."""
    choose = random.Random(seed)
    prefix = choose.choice(((), UNPRIVILEGED)) if os.geteuid() == 0 else ()
    page_size = choose.choice((4096, 16384))
    options = (
        "--coherency", "watch", "--attr-timeout", choose.choice(("1", "60")),
        "--page-size", str(page_size), "--pool-limit", "8M",
        "--page-cache", choose.choice(("0", "256K", "16M")),
    )  # fmt: skip
    print("   ", *prefix, *options, flush=True)
    source, mnt = base / "source", base / "mnt"
    source.mkdir()
    mnt.mkdir()
    mounting.LIFETIME = seconds + 60
    fork = multiprocessing.get_context("fork")
    out: Queue[Result] = fork.Queue()
    processes = []
    with mounting.mounted(source, mnt, *options, prefix=prefix) as fs:
        deadline = time.monotonic() + seconds
        for kind in WRITERS:
            blocks = BLOCKS - OURS if kind in ("write", "restamp") else BLOCKS
            history = History()
            (source / kind).write_bytes(whole(0, BLOCKS))
            seed = choose.getrandbits(32)
            writer = (kind, source / kind, blocks, history, deadline, seed)
            processes.append(fork.Process(target=run_writer, args=writer))
            # Who holds a file that is replaced, or a mapping of one that is cut, has something else.
            can = {"replace": ("path",), "cut": ("held", "path", "direct")}.get(kind, tuple(READERS))
            # Each open is a look at the file, for the others' benefit: not always all of them.
            for how in choose.choice((can, can[:1], can[:1], can[-1:])):
                reader = (how, mnt / kind, blocks, history, deadline, args.limit, out)
                processes.append(fork.Process(target=run_reader, args=reader))
            if blocks < BLOCKS:
                partner = (mnt / kind, source / kind, deadline, out)
                processes.append(fork.Process(target=run_partner, args=partner))
        results: list[Result] = []
        expected = len(processes) - len(WRITERS)
        try:
            for process in processes:
                process.start()
            with suppress(Empty):
                while len(results) < expected:
                    results.append(out.get(timeout=max(deadline - time.monotonic(), 0) + 15))
        finally:
            for process in processes:
                process.join(10)  # a writer's longest pause is 6 s
                process.kill()
                process.join(5)
        stats = {name: value for name, value in fs.stats().items() if name.startswith("watch")}
    for who, worst, reads in sorted(results):
        print(f"    {who:34} {reads:>9,} reads, out of date for {worst:.3f} s at most")
    print("   ", stats)
    failed = [process for process in processes if process.exitcode]
    late = [who for who, worst, _ in results if worst > args.limit]
    for who in late:
        print(f"stress_watch: {who}: stale or wrong", file=sys.stderr)
    if len(results) < expected or failed:
        ends = ", ".join(f"{process.name} with {process.exitcode}" for process in failed)
        print(
            f"stress_watch: {expected - len(results)} results are missing; ended: {ends}",
            file=sys.stderr,
        )
    return not late and not failed and len(results) == expected


def main() -> None:
    """Rounds until the time is over; exits with 1 at the first failure."""
    parser = argparse.ArgumentParser(
        prog="scripts/run check/stress_watch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=120, help="stop after this time (120)")
    parser.add_argument("--round-seconds", type=float, default=20, help="length of a round (20)")
    parser.add_argument(
        "--limit",
        type=float,
        default=3.0,
        help="seconds that bytes may be old (3; 1 is for machines that have time for the daemon)",
    )
    parser.add_argument("--seed", type=int, help="start with this seed instead of a random one")
    parser.add_argument("--base", type=Path, help="directory whose file system to use")
    args = parser.parse_args()
    if min(args.seconds, args.round_seconds, args.limit) <= 0:
        parser.error("times must be positive")
    if args.base is not None and not args.base.is_dir():
        parser.error(f"{args.base} is not a directory")
    deadline = time.monotonic() + args.seconds
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    while (left := deadline - time.monotonic()) > 1:
        print(f"--seed {seed}", flush=True)
        with tempfile.TemporaryDirectory(prefix="stress-watch", dir=args.base) as base:
            if not one_round(Path(base), args, seed, min(left, args.round_seconds)):
                sys.exit(1)
        seed = random.Random(seed).getrandbits(32)
    print("nobody read old bytes for long")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
