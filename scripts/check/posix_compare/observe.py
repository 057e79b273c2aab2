"""Describe a case's directory, in a form that is the same wherever the same was done."""

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Iterator
from typing import Any

LONG_AGO = 1_000_000_000
"""mtime of all that setups make, in seconds; atime is one more."""

MAX_CONTENT = 8 << 20

State = dict[str, dict[str, Any]]
"""Path -> field -> value."""

Stats = dict[str, os.stat_result]


def paths(top: str) -> list[str]:
    """Return all that is there, relative to ``top``, and that itself. Moves directories' atimes."""
    return [".", *(os.path.relpath(path, top) for path in _walk(top))]


def age(top: str, known: list[str]) -> None:
    """Give everything the times of long ago."""
    for path in known:
        times = ((LONG_AGO + 1) * 10**9, LONG_AGO * 10**9)
        os.utime(os.path.join(top, path), ns=times, follow_symlinks=False)


def stats(top: str, known: list[str]) -> Stats:
    """Return the lstat of what is still there. Moves no time."""
    found: Stats = {}
    for path in known:
        above = found.get(os.path.dirname(path))
        if above is not None and not stat.S_ISDIR(above.st_mode):
            continue  # to look through a symbolic link would move the link's atime
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found[path] = os.lstat(os.path.join(top, path))
    return found


def state(top: str, before: Stats, after: Stats) -> State:
    """Describe what is there now. What took another's place is held against itself before."""
    inodes = {st.st_ino: st for st in before.values()}
    return {
        path: _describe(
            os.path.join(top, path), inodes.get(st.st_ino, before[path]) if path in before else None, st
        )
        for path, st in after.items()
    }


def _walk(top: str) -> Iterator[str]:
    with os.scandir(top) as entries:
        for entry in entries:
            yield entry.path
            if entry.is_dir(follow_symlinks=False) and not os.path.ismount(entry.path):
                yield from _walk(entry.path)


def _describe(path: str, before: os.stat_result | None, st: os.stat_result) -> dict[str, Any]:
    described: dict[str, Any] = {
        "mode": stat.filemode(st.st_mode),
        "owner": f"{st.st_uid}:{st.st_gid}",
        "nlink": st.st_nlink,
        "size": st.st_size,
        "atime": _time(st.st_atime_ns, before and before.st_atime_ns),
        "mtime": _time(st.st_mtime_ns, before and before.st_mtime_ns),
        "ctime": _time(st.st_ctime_ns, before and before.st_ctime_ns),
    }
    if stat.S_ISREG(st.st_mode) and st.st_size <= MAX_CONTENT:
        with open(path, "rb") as file:
            described["content"] = hashlib.sha256(file.read()).hexdigest()[:12]
    if stat.S_ISLNK(st.st_mode):
        described["target"] = os.readlink(path)
    if stat.S_ISCHR(st.st_mode) or stat.S_ISBLK(st.st_mode):
        described["device"] = st.st_rdev
    names = os.listxattr(path, follow_symlinks=False)
    if names:
        values = {name: os.getxattr(path, name, follow_symlinks=False).hex() for name in sorted(names)}
        described["xattrs"] = {name: value[:200] for name, value in values.items()}
    return described


def _time(now: int, before: int | None) -> str:
    """A time that was set is shown, one of the clock only as what became of it."""
    if before == now:
        return "still"
    if abs(now - time.time_ns()) > 86_400 * 10**9:
        return str(now)
    return "new" if before is None else "moved"
