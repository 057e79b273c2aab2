"""Make what setups need: one object of each kind, under the name of its kind."""

import os
import socket
import stat
from collections.abc import Callable

from .case import OWNER, TEAM

CONTENT = bytes(range(256)) * 20


def _file() -> None:
    _write("file", CONTENT)


def _empty() -> None:
    _write("empty", b"")


def _hard() -> None:
    _write("hard", CONTENT)
    os.link("hard", "harder")
    _own("harder")


def _full() -> None:
    os.mkdir("full")
    _write("full/inside", b"inside")
    _own("full/inside")
    os.chmod("full/inside", 0o664)


def _socket() -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind("socket")


MAKERS: dict[str, Callable[[], None]] = {
    "file": _file,
    "empty": _empty,
    "hard": _hard,
    "dir": lambda: os.mkdir("dir"),
    "full": _full,
    "to-file": lambda: os.symlink("file", "to-file"),
    "to-dir": lambda: os.symlink("dir", "to-dir"),
    "dangling": lambda: os.symlink("nothing", "dangling"),
    "loop": lambda: os.symlink("loop", "loop"),
    "fifo": lambda: os.mkfifo("fifo"),
    "socket": _socket,
    "null": lambda: os.mknod("null", stat.S_IFCHR | 0o600, os.makedev(1, 3)),
    "missing": lambda: None,
}
"""A symbolic link needs its target made, too."""

TARGETS = {"to-file": ("file",), "to-dir": ("dir",)}


def make(*names: str, mode: int | None = None, uid: int = OWNER, gid: int = TEAM) -> Callable[[], None]:
    """Return a setup that makes objects, with ``mode`` or one by which the group may use them."""

    def setup() -> None:
        for name in names:
            for each in (*TARGETS.get(name, ()), name):
                if each != "missing" and not os.path.lexists(each):
                    MAKERS[each]()
                    _own(each, uid, gid)
            if os.path.lexists(name) and not os.path.islink(name):
                usual = 0o775 if os.path.isdir(name) else 0o664
                os.chmod(name, usual if mode is None else mode)

    return setup


def then(*setups: Callable[[], None]) -> Callable[[], None]:
    """Run one setup after the other."""

    def setup() -> None:
        for each in setups:
            each()

    return setup


def _write(name: str, content: bytes) -> None:
    with open(name, "wb") as file:
        file.write(content)


def _own(name: str, uid: int = OWNER, gid: int = TEAM) -> None:
    os.chown(name, uid, gid, follow_symlinks=False)
