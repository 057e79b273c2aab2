"""Open 10,000 files at once; at the limit programs get EMFILE, and everything else goes on."""

import errno
import os
import resource
from collections.abc import Callable
from contextlib import ExitStack

from tests.harness.mounting import MountedFs

from .directory import fill
from .lab import Daemon, Lab

RESERVED = 128


def run(lab: Lab) -> None:
    """See the module."""
    wanted = lab.pick(10_000, 2000)
    own = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = min(lab.pick(20_000, 4000), own[1])
    resource.setrlimit(resource.RLIMIT_NOFILE, (own[1], own[1]))
    source = lab.directory("source")
    fill(source / "many", limit + 1000)
    fill(source / "others", 100)
    try:
        with lab.mount(source, prefix=("prlimit", f"--nofile={limit}:{limit}")) as fs:
            _open_unlinked(lab, fs, wanted)
            _open_all(lab, fs, limit)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, own)


def _open_unlinked(lab: Lab, fs: MountedFs, wanted: int) -> None:
    """Write and unlink a file: it is still there for those that have it open."""
    names = [fs.path / "many" / f"open-{i}" for i in range(wanted)]
    with ExitStack() as stack:
        files = [stack.enter_context(name.open("w+b", buffering=0)) for name in names]
        for i, (name, file) in enumerate(zip(names, files, strict=True)):
            file.write(b"%d" % i)
            name.unlink()
        lab.same(f"of {wanted:,} open and unlinked files", Daemon(fs).open_files(wanted), wanted)
        right = 0
        for i, file in enumerate(files):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            right += os.pread(file.fileno(), 100, 0) == b"%d" % i
        lab.same("have what was written", right, wanted)
        lab.at_most("descriptors of the daemon", Daemon(fs).sample().fds, 2 * wanted + 200)


def _open_all(lab: Lab, fs: MountedFs, limit: int) -> None:
    fds: list[int] = []
    first = Daemon(fs).sample()
    try:
        number = 0
        while True:
            try:
                fds.append(os.open(fs.path / "many" / f"file-{number:06}", os.O_RDONLY))
            except OSError as exc:
                lab.same("error at the limit", errno.errorcode[exc.errno or 0], "EMFILE")
                break
            number += 1
        promise = limit - RESERVED - 2
        lab.hold("files open then", len(fds), f">= {promise:,}", len(fds) >= promise)
        for what, call in _calls(fs).items():
            lab.same(f"at the limit: {what}", _outcome(call), "works")
        sample = Daemon(fs).sample()
        left = limit - sample.fds
        lab.hold("descriptors left", left, f">= {RESERVED // 2}", left >= RESERVED // 2)
        lab.at_most("PSS for each open file", (sample.pss - first.pss) * 1024 / len(fds), 4, "KiB")
    finally:
        for fd in fds:
            os.close(fd)
    lab.same("afterwards: open", _outcome((fs.path / "many" / "file-000001").read_bytes), "works")
    lab.same("open files of the daemon then", Daemon(fs).open_files(), 0)


def _calls(fs: MountedFs) -> dict[str, Callable[[], object]]:
    top = fs.path / "others"
    return {
        "stat": lambda: [os.stat(top / f"file-{i:06}") for i in range(100)],
        "mkdir": (top / "d").mkdir,
        "rmdir": (top / "d").rmdir,
        "symlink": lambda: (top / "s").symlink_to("x"),
        "link": lambda: os.link(top / "file-000000", top / "l"),
        "rename": lambda: (top / "l").rename(top / "r"),
        "unlink": (top / "r").unlink,
        "truncate": lambda: os.truncate(top / "file-000001", 10),
        "chmod": lambda: (top / "file-000001").chmod(0o600),
        "statvfs": lambda: os.statvfs(top),
        "statistics": lambda: fs.control("stats").read_text(),
    }


def _outcome(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    return "works"
