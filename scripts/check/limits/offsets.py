"""Use files as large as the source can have them, to the last byte before 2^63-1.

Whatever is done to a file at such an offset, through the mount and to a twin in the source directly,
has the same result.
"""

import errno
import os
from collections.abc import Callable
from pathlib import Path

from tests.harness.mounting import MountedFs

from .lab import Lab, NotHereError

END = (1 << 63) - 1
SOURCES: dict[str, tuple[str, ...]] = {"tmpfs": (), "ext4": ("-q",), "xfs": ("-q",), "btrfs": ("-q",)}


def run(lab: Lab) -> None:
    """See the module."""
    for kind, options in SOURCES.items():
        try:
            if kind == "tmpfs":
                _on(lab, kind, lab.directory("tmpfs"))
            else:
                with lab.loop(kind, 1 << 30, *options) as where:
                    _on(lab, kind, where)
        except NotHereError as exc:
            lab.inform(kind, f"skipped: {exc}")


def _on(lab: Lab, kind: str, top: Path) -> None:
    largest = _largest(top / "probe")
    lab.inform(f"{kind}: the largest file", f"{largest:,} bytes")
    for page_size in ("4096", "65536", "1M"):
        source = top / f"source-{page_size}"
        source.mkdir()
        caches = ("--page-cache", "8M", "--pool-limit", "64M", "--page-size", page_size)
        with lab.mount(source, *caches, "--attr-timeout", "0") as fs:
            different = _compare(fs, largest, int(page_size.replace("M", "048576")))
            lab.same(f"{kind}, pages of {page_size}: differences to the source", different, [])
            _through_cleancache(lab, f"{kind}, pages of {page_size}", fs, largest)


def _largest(path: Path) -> int:
    """Return the largest size that truncate takes."""
    path.touch()
    low, high = 0, END
    while low < high:
        middle = (low + high + 1) // 2
        try:
            os.truncate(path, middle)
            low = middle
        except OSError:
            high = middle - 1
    path.unlink()
    return low


def _compare(fs: MountedFs, largest: int, page_size: int) -> list[str]:
    """Make steps on a file and on its twin."""
    files = [os.open(top / "f", os.O_RDWR | os.O_CREAT) for top in (fs.path, fs.source)]
    os.close(files[1])
    files[1] = os.open(fs.source / "twin", os.O_RDWR | os.O_CREAT)
    different = []

    def step(what: str, call: Callable[[int], object]) -> None:
        results = []
        for fd in files:
            try:
                results.append(str(call(fd))[:60])
            except OSError as exc:
                results.append(errno.errorcode[exc.errno or 0])
        if results[0] != results[1]:
            different.append(f"{what}: {results[0]} != {results[1]}")

    ends = sorted({largest, largest - 1, largest - page_size, largest // page_size * page_size})
    offsets = sorted({e + d for e in (*ends, END) for d in (-4097, -3, -1, 0, 1) if 0 <= e + d <= END})
    for size in (*ends, largest + 1, END):
        if size <= END:
            step(f"truncate {size}", lambda fd, to=size: os.ftruncate(fd, to))  # type: ignore[misc]  # mypy does not infer it
            step(f"size {size}", lambda fd: os.fstat(fd).st_size)
    step("truncate", lambda fd: os.ftruncate(fd, largest))
    for at in offsets:
        step(f"write at {at}", lambda fd, at=at: os.pwrite(fd, b"%d" % (at % 10), at))  # type: ignore[misc]  # mypy does not infer it
        for length in (1, 3, 4096, page_size):
            for _ in "from the source", "again":
                step(
                    f"read {length} at {at}",
                    lambda fd, at=at, length=length: os.pread(fd, length, at).rstrip(b"\0"),  # type: ignore[misc]  # mypy does not infer it
                )
        os.posix_fadvise(files[0], 0, 0, os.POSIX_FADV_DONTNEED)
    for by in (0, 1, largest, END, -1):
        # Beyond the source's largest file a program may seek on the mount, not on the source.
        if by <= largest:
            step(f"seek to {by}", lambda fd, by=by: os.lseek(fd, by, os.SEEK_SET))  # type: ignore[misc]  # mypy does not infer it
        if 0 <= by <= largest:
            step(f"back by {by}", lambda fd, by=by: os.lseek(fd, -by, os.SEEK_END))  # type: ignore[misc]  # mypy does not infer it
        step("on by the largest", lambda fd: os.lseek(fd, END, os.SEEK_CUR) if largest == END else 0)
        step("to the start", lambda fd: os.lseek(fd, 0, os.SEEK_SET))
    step("truncate by one", lambda fd: os.ftruncate(fd, largest - 1))
    step("read the end", lambda fd: os.pread(fd, 5000, largest - 4000).rstrip(b"\0"))
    step("truncate to 1", lambda fd: os.ftruncate(fd, 1))
    step("grow again", lambda fd: os.ftruncate(fd, largest))
    step("zeros then", lambda fd: os.pread(fd, 5000, largest - 5000).strip(b"\0"))
    for fd in files:
        os.close(fd)
    return different


def _through_cleancache(lab: Lab, what: str, fs: MountedFs, largest: int) -> None:
    """The very last page goes to cleancache and comes back, and is discarded when it is written."""
    at = largest - 3
    path = fs.path / "last"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, largest)
    os.pwrite(fd, b"old", at)
    _read(fd, at)
    fs.control("drop").write_text("1\n")
    before = fs.stats()["succ_gets"]
    got = _read(fd, at)
    hit = fs.stats()["succ_gets"] > before
    lab.same(f"{what}: the last bytes, from cleancache", (got, hit), (b"old", True))
    fs.control("drop").write_text("1\n")
    os.pwrite(fd, b"new", at)
    lab.same(f"{what}: and after a write", _read(fd, at), b"new")
    os.close(fd)
    path.unlink()


def _read(fd: int, at: int) -> bytes:
    """Read from the daemon, not from what the kernel kept."""
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    return os.pread(fd, 3, at)
