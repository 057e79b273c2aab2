"""Do things again and again with one daemon: its memory, descriptors and tables stay as they are."""

import mmap
import os
import threading
import time
from collections.abc import Callable

from tests.harness.mounting import MountedFs

from .lab import Daemon, Lab

GROWTH_MIB = 4.0
WARM = 10
"""The part of all that is done before the first look."""

Work = Callable[[MountedFs, int, int], None]


def run(lab: Lab) -> None:
    """See the module."""
    source = lab.directory("source")
    for i in range(100):
        (source / f"f{i}").write_bytes(b"%d" % i * 1000)
    with lab.mount(source, "--page-cache", "8M", "--pool-limit", "32M") as fs:
        daemon = Daemon(fs)
        for what, (count, work) in _works(lab).items():
            start = time.monotonic()
            work(fs, 0, count // WARM)
            first = daemon.settled()
            work(fs, count // WARM, count)
            last = daemon.settled()
            seconds = time.monotonic() - start
            lab.inform(f"{count:,} times: {what}", f"{seconds:.0f} s")
            lab.at_most(f"{what}: growth of PSS", last.pss - first.pss, GROWTH_MIB, "MiB")
            lab.at_most(f"{what}: growth in descriptors", last.fds - first.fds, 2)
            lab.at_most(f"{what}: growth in inodes", last.inodes - first.inodes, 2)
            lab.at_most(f"{what}: growth in file records", last.files - first.files, 2)
        lab.same("open files in the end", daemon.open_files(), 0)
        lab.inform("PSS in the end", f"{daemon.sample().pss:.0f} MiB")


def _works(lab: Lab) -> dict[str, tuple[int, Work]]:
    def times(full: int) -> int:
        return lab.pick(full, full // 50)

    return {
        "open, read, close": (times(1_000_000), _open_close),
        "create, write, unlink": (times(200_000), _create_unlink),
        "rename": (times(50_000), _rename),
        "mkdir, rmdir": (times(20_000), _mkdir),
        "xattr set, get, list, remove": (times(20_000), _xattrs),
        "symlink, readlink, link, unlink": (times(20_000), _links),
        "truncate, chmod, utime": (times(20_000), _attributes),
        "look up what is not there": (times(200_000), _absent),
        "list": (times(5_000), _list),
        "control file read": (times(80_000), _control_read),
        "control file written": (times(20_000), _control_write),
        "drop": (times(5_000), _drop),
        "backend unregistered, registered": (times(1_000), _backend),
        "pool resized": (times(10_000), _pool),
        "page cache resized": (times(10_000), _page_cache),
        "changed in the source": (times(10_000), _changed),
        "mapped": (times(20_000), _mapped),
        "two handles, unlinked, one closed": (times(20_000), _unlinked),
        "requests that fail": (times(50_000), _failing),
        "processes killed in a read": (times(2_000), _killed),
    }


def _open_close(fs: MountedFs, first: int, stop: int) -> None:
    paths = [str(fs.path / f"f{i}") for i in range(100)]
    for i in range(first, stop):
        fd = os.open(paths[i % 100], os.O_RDONLY)
        if i % 10 == 0:
            os.read(fd, 100)
        os.close(fd)


def _create_unlink(fs: MountedFs, first: int, stop: int) -> None:
    for i in range(first, stop):
        path = f"{fs.path}/new{i}"
        fd = os.open(path, os.O_CREAT | os.O_WRONLY)
        if i % 4 == 0:
            os.write(fd, b"something")
        os.close(fd)
        os.unlink(path)


def _rename(fs: MountedFs, first: int, stop: int) -> None:
    path = fs.path / "renamed"
    path.touch()
    for i in range(first, stop):
        path = path.rename(fs.path / f"renamed{i}")
    path.unlink()


def _mkdir(fs: MountedFs, first: int, stop: int) -> None:
    for i in range(first, stop):
        path = fs.path / f"dir{i}"
        path.mkdir()
        if i % 4 == 0:
            os.listdir(path)
        path.rmdir()


def _xattrs(fs: MountedFs, first: int, stop: int) -> None:
    path = fs.path / "f1"
    for i in range(first, stop):
        os.setxattr(path, f"user.name{i}", b"value")
        os.getxattr(path, f"user.name{i}")
        os.listxattr(path)
        os.removexattr(path, f"user.name{i}")


def _links(fs: MountedFs, first: int, stop: int) -> None:
    for i in range(first, stop):
        link = fs.path / f"link{i}"
        link.symlink_to(f"target{i}")
        os.readlink(link)
        link.unlink()
        os.link(fs.path / "f2", link)
        link.unlink()


def _attributes(fs: MountedFs, first: int, stop: int) -> None:
    path = fs.path / "f3"
    for i in range(first, stop):
        os.truncate(path, i % 10_000)
        path.chmod(0o600 + i % 64)
        os.utime(path, ns=(i, i))


def _absent(fs: MountedFs, first: int, stop: int) -> None:
    for i in range(first, stop):
        assert not os.path.lexists(f"{fs.path}/absent{i}")


def _list(fs: MountedFs, first: int, stop: int) -> None:
    for _ in range(first, stop):
        os.listdir(fs.path)


def _control_read(fs: MountedFs, first: int, stop: int) -> None:
    names = ("stats", "stats.json", "puts", "pool_limit", "backend", "zcache/pool_used")
    paths = [fs.control(name) for name in names]
    for i in range(first, stop):
        paths[i % len(paths)].read_text()
        if i % 50 == 0:
            fs.control("metrics").read_text()


def _control_write(fs: MountedFs, first: int, stop: int) -> None:
    for i in range(first, stop):
        fs.control("pool_limit").write_text("32M\n")
        if i % 10 == 0:
            try:
                fs.control("pool_limit").write_text("nonsense\n")
            except OSError:
                continue


def _drop(fs: MountedFs, first: int, stop: int) -> None:
    for i in range(first, stop):
        (fs.path / f"f{i % 100}").read_bytes()
        fs.drop_kernel(fs.path / f"f{i % 100}")
        fs.control("drop").write_text(f"{i % 3 + 1}\n")


def _backend(fs: MountedFs, first: int, stop: int) -> None:
    for i in range(first, stop):
        fs.control("backend").write_text("none\n")
        fs.control("backend").write_text("zcache\n")
        _fill(fs, i)


def _fill(fs: MountedFs, i: int) -> None:
    """Make some pages for the pool."""
    path = fs.path / f"f{i % 100}"
    path.read_bytes()
    fs.drop_kernel(path)
    path.read_bytes()
    fs.control("drop").write_text("1\n")


def _pool(fs: MountedFs, first: int, stop: int) -> None:
    for i in range(first, stop):
        fs.control("pool_limit").write_text(f"{1 + i % 64}M\n")
        if i % 10 == 0:
            _fill(fs, i)
    fs.control("pool_limit").write_text("32M\n")


def _page_cache(fs: MountedFs, first: int, stop: int) -> None:
    for i in range(first, stop):
        fs.control("page_cache").write_text(f"{i % 16}M\n")
        if i % 10 == 0:
            _fill(fs, i)
    fs.control("page_cache").write_text("8M\n")


def _changed(fs: MountedFs, first: int, stop: int) -> None:
    for i in range(first, stop):
        (fs.source / "f4").write_bytes(b"%d" % i)
        (fs.path / "f4").read_bytes()


def _mapped(fs: MountedFs, first: int, stop: int) -> None:
    for _ in range(first, stop):
        with (
            (fs.path / "f5").open("rb") as file,
            mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as map_,
        ):
            map_[0]


def _unlinked(fs: MountedFs, first: int, stop: int) -> None:
    for i in range(first, stop):
        path = fs.path / f"unlinked{i}"
        with path.open("wb", buffering=0) as one:
            one.write(b"x" * 5000)
            with path.open("rb") as two:
                two.read(10)
                path.unlink()
            one.write(b"y")


def _failing(fs: MountedFs, first: int, stop: int) -> None:
    path = fs.path / "f6"
    for i in range(first, stop):
        for call in (
            lambda: os.rmdir(path),
            lambda: os.mkdir(path),
            lambda: os.rename(path, fs.path / "none" / "x"),
            lambda: os.getxattr(path, "user.none"),
            lambda: os.open(path / "below", os.O_RDONLY),
            lambda: os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL),
        ):
            try:
                call()
            except OSError:
                continue
            raise AssertionError(i)


def _killed(fs: MountedFs, first: int, stop: int) -> None:
    for i in range(first, stop):
        fs.drop_kernel(fs.path / f"f{i % 100}")
        pid = os.fork()
        if pid == 0:
            fd = os.open(fs.path / f"f{i % 100}", os.O_RDONLY)
            while True:
                os.pread(fd, 1000, 0)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        threading.Event().wait(0.002)
        os.kill(pid, 9)
        os.waitpid(pid, 0)
