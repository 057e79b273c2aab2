"""Open every kind of object, flags by flags."""

import fcntl
import itertools
import os
import stat

from .case import EVERYBODY, MEMBER, ROOT_AND_MEMBER, Case, Cases, attempt
from .objects import make

ACCESS = {"r": os.O_RDONLY, "w": os.O_WRONLY, "rw": os.O_RDWR}
FLAGS = {
    "creat": os.O_CREAT,
    "excl": os.O_EXCL,
    "trunc": os.O_TRUNC,
    "append": os.O_APPEND,
    "directory": os.O_DIRECTORY,
    "nofollow": os.O_NOFOLLOW,
}
KINDS = ("file", "dir", "to-file", "to-dir", "dangling", "missing", "fifo", "null")

OTHER_FLAGS = {
    "noatime": os.O_NOATIME,
    "direct": os.O_DIRECT,
    "sync": os.O_SYNC,
    "dsync": os.O_DSYNC,
    "path": os.O_PATH,
    "path, directory": os.O_PATH | os.O_DIRECTORY,
    "path, creat": os.O_PATH | os.O_CREAT,
    "path, trunc": os.O_PATH | os.O_TRUNC,
    "tmpfile": os.O_TMPFILE,
    "tmpfile, excl": os.O_TMPFILE | os.O_EXCL,
    "tmpfile, creat": os.O_TMPFILE | os.O_CREAT,
    "async": os.O_ASYNC,
    "noctty": os.O_NOCTTY,
    "access mode 3": 3,
    "unknown": 1 << 30,
    "cloexec, sync, append": os.O_CLOEXEC | os.O_SYNC | os.O_APPEND,
}

HIDDEN = os.O_NONBLOCK | 0o100000
"""Set by us, or by the C library."""


def use(path: str, flags: int, mode: int = 0o640) -> list[object]:
    """Open, and try the descriptor out."""
    fd = os.open(path, flags | os.O_NONBLOCK, mode)
    st = os.fstat(fd)
    said: list[object] = [
        oct(fcntl.fcntl(fd, fcntl.F_GETFL) & ~HIDDEN),
        stat.filemode(st.st_mode),
        st.st_nlink,
        st.st_size if stat.S_ISREG(st.st_mode) else None,
    ]
    if stat.S_ISREG(st.st_mode):
        said += [attempt(os.read, fd, 3), attempt(os.write, fd, b"wr"), os.lseek(fd, 0, os.SEEK_CUR)]
        said += [attempt(os.pwrite, fd, b"p", 1), attempt(os.ftruncate, fd, 50), os.fstat(fd).st_size]
    elif stat.S_ISDIR(st.st_mode):
        said += [attempt(os.listdir, fd), attempt(os.read, fd, 3), attempt(os.fchdir, fd)]
    return said


CREATE_MODES = (0o000, 0o444, 0o200, 0o666, 0o777, 0o1777, 0o2755, 0o2745, 0o4755, 0o6777, 0o7777)


def cases() -> Cases:
    sets = [c for n in range(len(FLAGS) + 1) for c in itertools.combinations(FLAGS, n) if n <= 2]
    for access, number in ACCESS.items():
        for chosen in sets:
            flags = number
            for flag in chosen:
                flags |= FLAGS[flag]
            for kind in KINDS:
                yield Case(
                    f"opens/{access} {' '.join(chosen)}/{kind}".replace(" /", "/"),
                    make(kind),
                    lambda kind=kind, flags=flags: use(kind, flags),
                    ROOT_AND_MEMBER if len(chosen) <= 1 else MEMBER,
                )
        for name, other in OTHER_FLAGS.items():
            for kind in (*KINDS, "full"):
                yield Case(
                    f"opens/{access} {name}/{kind}",
                    make(kind),
                    lambda kind=kind, flags=number | other: use(kind, flags),
                    ("owner", "member"),
                )
    for mode in CREATE_MODES:
        for umask in (0, 0o022, 0o077, 0o777):
            for parent in (0o777, 0o2777, 0o1777):
                yield Case(
                    f"opens/create {mode:o}, umask {umask:o}, in {parent:o}",
                    lambda parent=parent: os.chmod(".", parent),
                    lambda mode=mode, umask=umask: create_all(mode, umask),
                    EVERYBODY,
                )


def create_all(mode: int, umask: int) -> list[object]:
    """Create one of each kind that has a mode, under a umask."""
    os.umask(umask)
    return [
        attempt(use, "f", os.O_RDWR | os.O_CREAT | os.O_EXCL, mode),
        attempt(use, "ro", os.O_RDONLY | os.O_CREAT, mode),
        attempt(os.mkdir, "d", mode),
        attempt(os.mknod, "n", stat.S_IFREG | mode),
        attempt(os.mkfifo, "p", mode),
        attempt(os.mknod, "s", stat.S_IFSOCK | mode),
        attempt(os.mknod, "c", stat.S_IFCHR | mode, os.makedev(1, 3)),
        attempt(os.symlink, "x", "l"),
    ]
