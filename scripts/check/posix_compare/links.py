"""Make hard links to every kind of object, by every way, with other people's files."""

import os

from .calls import AT_EMPTY_PATH, AT_FDCWD, AT_SYMLINK_FOLLOW, linkat
from .case import OWNER, TEAM, USERS, Case, Cases, attempt
from .objects import make

KINDS = (
    "file",
    "empty",
    "dir",
    "to-file",
    "to-dir",
    "dangling",
    "loop",
    "fifo",
    "socket",
    "null",
    "missing",
)


def _then_look(name: str) -> list[object]:
    return [os.lstat(name).st_nlink, os.path.samestat(os.lstat(name), os.lstat("new"))]


def _link(kind: str, flags: int) -> list[object]:
    linkat(AT_FDCWD, kind, "new", flags)
    return _then_look("file" if flags and kind == "to-file" else kind)


def _by_descriptor(kind: str, flags: int) -> None:
    linkat(os.open(kind, flags | os.O_NONBLOCK), "", "new", AT_EMPTY_PATH)


def _ring() -> list[object]:
    """Make many names, each from the one before."""
    for n in range(20):
        os.link(f"{n - 1}" if n else "file", f"{n}")
    os.unlink("file")
    counts = {os.stat(str(n)).st_nlink for n in range(20)}
    os.rename("3", "4")
    return [counts, os.path.exists("3"), os.stat("4").st_nlink]


def cases() -> Cases:
    for kind in KINDS:
        for name, flags in (
            ("plain", 0),
            ("follow", AT_SYMLINK_FOLLOW),
            ("empty path", AT_EMPTY_PATH),
            ("unknown", 1),
        ):
            yield Case(
                f"links/{kind}, {name}",
                make(kind),
                lambda k=kind, f=flags: _link(k, f),
            )
    for kind in ("file", "dir", "to-file", "fifo"):
        for name, flags in ("reading", os.O_RDONLY), ("path", os.O_PATH | os.O_NOFOLLOW):
            yield Case(
                f"links/{kind} by descriptor for {name}",
                make(kind),
                lambda k=kind, f=flags: _by_descriptor(k, f),
            )
    for mode in (0o600, 0o644, 0o666, 0o664, 0o4755, 0o2755, 0o4666):
        for owner in (OWNER, USERS["other"].uid):
            yield Case(
                f"links/mode {mode:o} of {owner}",
                make("file", mode=mode, uid=owner, gid=TEAM),
                lambda: os.link("file", "new"),
            )
    yield Case("links/ring", make("file"), lambda: attempt(lambda: [str(x) for x in _ring()]))
