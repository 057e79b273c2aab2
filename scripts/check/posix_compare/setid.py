"""Compare what takes set-user-id and set-group-id bits away, and what does not."""

import mmap
import os
from collections.abc import Callable

from .calls import fallocate
from .case import OWNER, TEAM, Case, Cases, attempt
from .objects import CONTENT, make, then

MODES = (0o4755, 0o4644, 0o2755, 0o2745, 0o2777, 0o6777, 0o6666, 0o1777)


def _open(flags: int = os.O_RDWR) -> int:
    return os.open("file", flags)


def _map() -> None:
    with mmap.mmap(_open(), 0) as area:
        area[0:3] = b"new"
        area.flush()


def _copy() -> int:
    return os.copy_file_range(os.open("other", os.O_RDONLY), _open(), 10)


def _chown_within(fd: int) -> list[object]:
    return [attempt(os.fchown, fd, -1, TEAM), attempt(os.write, fd, b"x")]


CALLS = {
    "write": lambda: os.write(_open(), b"new"),
    "write of nothing": lambda: os.write(_open(), b""),
    "pwrite beyond": lambda: os.pwrite(_open(), b"new", 100_000),
    "appended": lambda: os.write(_open(os.O_WRONLY | os.O_APPEND), b"new"),
    "write, direct": lambda: os.pwritev(_open(), [b"new"], 0, os.RWF_DSYNC),
    "two writes": lambda: [os.write(_open(), b"a"), os.write(_open(), b"b")],
    "read": lambda: os.read(_open(os.O_RDONLY), 9),
    "truncate": lambda: os.truncate("file", 10),
    "truncate to same": lambda: os.truncate("file", len(CONTENT)),
    "truncate to more": lambda: os.truncate("file", 10_000),
    "ftruncate": lambda: os.ftruncate(_open(), 10),
    "ftruncate to same": lambda: os.ftruncate(_open(), len(CONTENT)),
    "open, truncate": lambda: os.close(_open(os.O_WRONLY | os.O_TRUNC)),
    "open, create, truncate": lambda: os.close(_open(os.O_WRONLY | os.O_CREAT | os.O_TRUNC)),
    "fallocate": lambda: fallocate(_open(), 0, 0, 10_000),
    "copy_file_range": _copy,
    "mapping": _map,
    "chown to same": lambda: os.chown("file", OWNER, TEAM),
    "chown of nothing": lambda: os.chown("file", -1, -1),
    "chgrp to own": lambda: os.chown("file", -1, os.getgid()),
    "fchown and write": lambda: _chown_within(_open()),
    "chmod": lambda: os.chmod("file", 0o6711),
    "utime": lambda: os.utime("file"),
    "setxattr": lambda: os.setxattr("file", "user.a", b"b"),
    "link": lambda: os.link("file", "linked"),
    "rename": lambda: os.rename("file", "renamed"),
    "rename over": lambda: os.rename("other", "file"),
    "write after fork": lambda: _in_child(lambda: os.write(_open(), b"new")),
}


def _in_child(call: Callable[[], object]) -> int:
    pid = os.fork()
    if not pid:
        try:
            call()
        finally:
            os._exit(0)
    return os.waitpid(pid, 0)[1]


def _other() -> None:
    with open("other", "wb") as file:
        file.write(b"of another file")
    os.chmod("other", 0o666)


CAPABILITY = bytes.fromhex("0100000200040000000000000000000000000000")


def _capable() -> None:
    os.setxattr("file", "security.capability", CAPABILITY)


def cases() -> Cases:
    for mode in MODES:
        for name, action in CALLS.items():
            setup = then(make("file", mode=mode), _other)
            yield Case(f"setid/{mode:o}/{name}", setup, action)
    for mode in (0o666, 0o4777):
        for name, action in CALLS.items():
            setup = then(make("file", mode=mode), _other, _capable)
            yield Case(f"setid/capability {mode:o}/{name}", setup, action)
    for mode in (0o2777, 0o6777):
        for name in ("write", "truncate", "chown of nothing", "chmod"):
            setup = then(make("file", mode=mode, gid=777), _other)
            yield Case(f"setid/foreign group {mode:o}/{name}", setup, CALLS[name])
