"""Use a mount whose source fails at random: what succeeds must be what is in the source.

Rounds of a few seconds, each with a mount and a failing source of its own. Faults come and go: errors,
short transfers, done but reported as failed, delays, hangs. After each of them everything is compared
with the source, and with a model of what programs were told.
"""

import argparse
import contextlib
import errno
import mmap
import os
import random
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.harness import mounting
from tests.harness.faulty import Faulty, faulty
from tests.harness.mounting import MountedFs

FILES = 4
SIZE = 300_000
ERRORS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.ETIMEDOUT, errno.EACCES)
OPS = ("lookup", "getattr", "open", "read", "write", "flush", "fsync", "setattr", "opendir", "readdir")


class WrongError(AssertionError):
    """Says that something was read that the source does not have, or an error was not the one made."""


class Campaign:
    """Holds one mount, some files, and a program that uses them."""

    def __init__(self, rng: random.Random, source: Faulty, fs: MountedFs, loud: bool) -> None:
        """The files are made."""
        self._rng = rng
        self._source = source
        self._fs = fs
        self._loud = loud
        self.counts = {"calls": 0, "errors": 0, "faults": 0, "hangs": 0}
        self._allowed = set[int]()
        for number in range(FILES):
            (source.real / f"f{number}").write_bytes(rng.randbytes(rng.randrange(SIZE)))
        time.sleep(0.05)

    def run(self, deadline: float) -> None:
        """Make fault after fault."""
        while time.monotonic() < deadline:
            if self._rng.random() < 0.1:
                self._hang()
            else:
                self._fail()
            self._compare()

    def _fail(self) -> None:
        rng, op = self._rng, self._rng.choice(OPS)
        how: dict[str, Any] = {"name": rng.choice([None, f"f{rng.randrange(FILES)}"])}
        number = 0
        kind = rng.choice(["error", "error", "error", "short", "slow"])
        if kind == "error":
            number = rng.choice(ERRORS)
            how["late"] = op == "setattr" and rng.random() < 0.5
            how["count"] = rng.choice([1, 2, -1])
            if op in ("read", "write"):
                how["start"] = rng.choice([0, rng.randrange(SIZE)])
                how["stop"] = rng.choice([1 << 62, how["start"] + rng.randrange(1, 20_000)])
        elif kind == "short":
            op = rng.choice(["read", "write"])
            how["short"] = rng.randrange(1, 9000)
        else:
            how["seconds"] = rng.choice([0.01, 0.1])
            how["count"] = 3
        self._say(op, number, how)
        self.counts["faults"] += 1
        self._allowed = {number} - {0}
        self._source.fault(op, number, **how)
        for _ in range(rng.randrange(1, 15)):
            self._step()
        self._source.heal()
        self._allowed = set()

    def _hang(self) -> None:
        """One file hangs, all others are used meanwhile."""
        rng = self._rng
        stuck = rng.randrange(FILES)
        path = self._fs.path / f"f{stuck}"
        self.counts["hangs"] += 1
        self._say("hang", 0, {"name": path.name})
        self._allowed = set()
        with contextlib.ExitStack() as stack:
            fd = os.open(path, os.O_RDWR)
            stack.callback(os.close, fd)
            self._source.fault("read", name=path.name, hang=True)
            self._source.fault("write", name=path.name, hang=True)

            def read(at: int) -> None:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.pread(fd, 5000, at)

            self._fs.control("drop").write_text("3\n")
            threads = [
                threading.Thread(target=read, args=(rng.randrange(SIZE),), daemon=True)
                for _ in range(rng.choice([1, 10, 100]))
            ]
            for thread in threads:
                thread.start()
            for _ in range(20):
                self._step(besides=stuck)
            self._fs.stats()
            self._source.heal()
            self._allowed = set()
            for thread in threads:
                thread.join(60)
                if thread.is_alive():
                    raise WrongError("a read hangs for ever")

    def _step(self, besides: int = -1) -> None:
        rng = self._rng
        number = rng.choice([n for n in range(FILES) if n != besides])
        path = self._fs.path / f"f{number}"
        self.counts["calls"] += 1
        act = rng.choice(
            [self._read, self._read, self._map, self._write, self._append, self._truncate, self._stat]
        )
        try:
            act(path)
        except OSError as exc:
            self.counts["errors"] += 1
            # A mapping that fails is read by read(2) here, so there is no SIGBUS to expect.
            if exc.errno not in self._allowed:
                raise WrongError(f"{act.__name__} {path.name}: {exc}, with {self._allowed}") from exc

    def _read(self, path: Path) -> None:
        with _opened(path, os.O_RDONLY) as fd:
            if self._rng.random() < 0.5:
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            at, size = self._rng.randrange(SIZE), self._rng.randrange(1, 100_000)
            self._same(path, at, os.pread(fd, size, at), size)

    def _map(self, path: Path) -> None:
        """Map what is in memory of a mapping, and nothing that a fault could make SIGBUS of."""
        with _opened(path, os.O_RDONLY) as fd:
            size = os.fstat(fd).st_size
            data = os.pread(fd, size, 0)
            if size and len(data) == size:
                with mmap.mmap(fd, size, prot=mmap.PROT_READ):
                    self._same(path, 0, data, size)

    def _write(self, path: Path) -> None:
        with _opened(path, os.O_RDWR) as fd:
            data = self._rng.randbytes(self._rng.randrange(1, 60_000))
            at = self._rng.randrange(SIZE)
            count = os.pwrite(fd, data, at)
            self._same(path, at, data[:count], count)
            if self._rng.random() < 0.3:
                os.fsync(fd)

    def _append(self, path: Path) -> None:
        before = (self._source.real / path.name).stat().st_size
        if before > 2 * SIZE:
            return
        with _opened(path, os.O_WRONLY | os.O_APPEND) as fd:
            data = self._rng.randbytes(self._rng.randrange(1, 30_000))
            count = os.write(fd, data)
            self._same(path, before, data[:count], len(data))

    def _truncate(self, path: Path) -> None:
        size = self._rng.randrange(SIZE)
        os.truncate(path, size)
        if (self._source.real / path.name).stat().st_size != size:
            raise WrongError(f"{path.name} was not truncated")

    def _stat(self, path: Path) -> None:
        if os.stat(path).st_size != (self._source.real / path.name).stat().st_size:
            raise WrongError(f"{path.name} has another size")
        if path.name not in os.listdir(self._fs.path):
            raise WrongError(f"{path.name} is not listed")

    def _same(self, path: Path, at: int, data: bytes, size: int) -> None:
        with open(self._source.real / path.name, "rb") as file:
            file.seek(at)
            expected = file.read(size)
        # What comes before an error is a short read.
        short = len(data) < min(len(expected), size) and not self._allowed
        if expected[: len(data)] != data or short:
            where = next(
                (i for i, (a, b) in enumerate(zip(data, expected, strict=False)) if a != b), -1
            )
            raise WrongError(
                f"{path.name}: {len(data)} bytes at {at}, the source has {len(expected)}; "
                f"they differ from {where} on"
            )

    def _compare(self) -> None:
        """Nothing fails any more: all is as in the source, by whatever way it is read."""
        for number in range(FILES):
            path = self._fs.path / f"f{number}"
            expected = (self._source.real / path.name).read_bytes()
            for drop in (False, True):
                with _opened(path, os.O_RDONLY) as fd:
                    if drop:
                        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    if os.fstat(fd).st_size != len(expected):
                        raise WrongError(f"{path.name}: size {os.fstat(fd).st_size}, {len(expected)}")
                    self._same(path, 0, os.pread(fd, 3 * SIZE, 0), 3 * SIZE)
                    if expected:
                        with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapping:
                            if mapping[:] != expected:
                                raise WrongError(f"{path.name}: mapped, it differs")

    def _say(self, op: str, number: int, how: dict[str, object]) -> None:
        if self._loud:
            told = {key: value for key, value in how.items() if value not in (None, False)}
            print("   ", op, errno.errorcode.get(number, ""), told, flush=True)


@contextlib.contextmanager
def _opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags)
    try:
        yield fd
    except BaseException:
        with contextlib.suppress(OSError):
            os.close(fd)
        raise
    os.close(fd)


def one_round(seed: int, seconds: float, loud: bool) -> dict[str, int]:
    """Run one mount."""
    rng = random.Random(seed)
    options = ["--page-cache", rng.choice(["0", "40K", "1M"]), "--pool-limit", "64M"]
    options += ["--page-size", rng.choice(["4096", "4096", "16384", "65536"])]
    options += ["--attr-timeout", "0", "--read-ahead", rng.choice(["0", "128K", "1M"])]
    options = [word if word != "40K" else "400K" for word in options]
    print("   ", *options, flush=True)
    mounting.LIFETIME = seconds + 300
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="faults")))
        for name in ("real", "served", "mnt"):
            (base / name).mkdir()
        source = stack.enter_context(faulty(base / "real", base / "served", lifetime=mounting.LIFETIME))
        fs = stack.enter_context(mounting.mounted(source.path, base / "mnt", *options))
        campaign = Campaign(rng, source, fs, loud)
        campaign.run(time.monotonic() + seconds)
        return campaign.counts


def main() -> int:
    """Run rounds until the time is over; exits with 1 at the first difference."""
    parser = argparse.ArgumentParser(
        prog="scripts/run check/faults", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--seconds", type=float, default=120, help="stop after this time (120)")
    parser.add_argument("--round", type=float, default=20, help="seconds per mount (20)")
    parser.add_argument("--seed", type=int, help="start with this seed instead of a random one")
    parser.add_argument("-v", "--verbose", action="store_true", help="say what is made to fail")
    args = parser.parse_args()
    deadline = time.monotonic() + args.seconds
    seed = random.SystemRandom().getrandbits(32) if args.seed is None else args.seed
    total: dict[str, int] = {}
    while (left := deadline - time.monotonic()) > 0:
        print(f"round: --seed {seed}", flush=True)
        try:
            counts = one_round(seed, min(args.round, left), args.verbose)
        except (WrongError, AssertionError) as exc:
            print(f"faults: --seed {seed}: {exc}", file=sys.stderr)
            return 1
        total = {name: total.get(name, 0) + count for name, count in counts.items()}
        seed = random.Random(seed).getrandbits(32)
    print("no difference found:", ", ".join(f"{count} {name}" for name, count in total.items()))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
