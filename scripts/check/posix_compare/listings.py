"""List directories: completeness, positions, and change meanwhile."""

import ctypes
import os

from .calls import check, libc
from .case import ROOT_AND_MEMBER, Case, Cases, attempt
from .objects import make

KINDS = ("file", "empty", "full", "to-file", "to-dir", "dangling", "loop", "fifo", "socket", "null")


class Directory:
    """Is a DIR of the C library."""

    def __init__(self, path: str) -> None:
        self._dir = ctypes.c_void_p(libc.opendir(os.fsencode(path)))
        if not self._dir:
            check(-1)

    def read(self) -> str | None:
        """Return the next name."""
        entry = libc.readdir(self._dir)
        return None if not entry else os.fsdecode(ctypes.string_at(entry + 19))

    def rest(self) -> list[str]:
        """Return all names that follow."""
        found = []
        while (name := self.read()) is not None:
            found.append(name)
        return found

    def tell(self) -> int:
        """Return the position."""
        position: int = libc.telldir(self._dir)
        return position

    def seek(self, position: int) -> None:
        """Go to a position that ``tell`` gave."""
        libc.seekdir(self._dir, ctypes.c_long(position))

    def rewind(self) -> None:
        """Begin anew."""
        libc.rewinddir(self._dir)

    @property
    def fd(self) -> int:
        """Return its descriptor."""
        number: int = libc.dirfd(self._dir)
        return number


def fill(count: int) -> None:
    """Make a directory of many names."""
    os.mkdir("many")
    os.chmod("many", 0o777)
    for n in range(count):
        os.close(os.open(f"many/{n:05}", os.O_CREAT | os.O_WRONLY, 0o666))


def _types() -> dict[str, list[bool]]:
    return {
        e.name: [
            e.is_file(follow_symlinks=False),
            e.is_dir(follow_symlinks=False),
            e.is_symlink(),
            e.is_dir(),
        ]
        for e in sorted(os.scandir("."), key=lambda e: e.name)
    }


def _positions() -> list[object]:
    """From each position the same names follow as before."""
    directory = Directory("many")
    names, positions = [], []
    while True:
        positions.append(directory.tell())
        if (name := directory.read()) is None:
            break
        names.append(name)
    same = []
    for n in (0, 1, 2, len(names) // 2, len(names) - 1, len(names)):
        directory.seek(positions[n])
        same.append(directory.rest() == names[n:])
    return [sorted(names), same, len(set(positions)) == len(positions)]


def _removing() -> list[object]:
    """``rm -r`` reads and removes in turn."""
    directory, seen = Directory("many"), []
    while (name := directory.read()) is not None:
        if name[0] != ".":
            seen.append(name)
            os.unlink(f"many/{name}")
    return [len(seen), len(set(seen)), os.listdir("many"), attempt(os.rmdir, "many")]


def _renaming() -> list[object]:
    """What stays is seen exactly once, whatever else happens."""
    directory, seen = Directory("many"), []
    while (name := directory.read()) is not None:
        seen.append(name)
        if name[0] != "." and name.endswith("0"):
            os.rename(f"many/{name}", f"many/{name}-renamed")
            os.mkdir(f"many/new-{name}")
    stayed = [name for name in seen if not name.startswith(("new", ".")) and name[4] != "0"]
    directory.rewind()
    return [len(stayed), len(set(stayed)), sorted(directory.rest())]


def _rewound() -> list[object]:
    directory = Directory("many")
    first = sorted(directory.rest())
    os.mkdir("many/new")
    os.unlink("many/00001")
    said: list[object] = [len(first), directory.rest()]
    directory.rewind()
    return [*said, sorted(directory.rest())]


def _removed() -> list[object]:
    directory = Directory("many")
    first = directory.read() in (".", "..", "00000", "00001", "00002")
    for name in os.listdir("many"):
        os.unlink(f"many/{name}")
    os.rmdir("many")
    directory.rewind()
    return [first, directory.rest(), os.fstat(directory.fd).st_nlink, attempt(os.listdir, directory.fd)]


def _lseek(offset: int, whence: int) -> list[object]:
    fd = os.open("many", os.O_RDONLY)
    return [attempt(os.lseek, fd, offset, whence), len(attempt(os.listdir, fd))]  # type: ignore[arg-type]  # it returns a list


def _getdents(size: int) -> object:
    fd = os.open("many", os.O_RDONLY)
    buffer = ctypes.create_string_buffer(max(size, 1))
    number = attempt(lambda: check(libc.syscall(217, fd, buffer, size)))
    return number if not isinstance(number, int) else number > 0


CHANGES = {
    "positions": _positions,
    "removing": _removing,
    "renaming": _renaming,
    "rewound": _rewound,
}


def cases() -> Cases:
    yield Case("listings/types", make(*KINDS), _types)
    yield Case("listings/empty", make("dir"), lambda: Directory("dir").rest().sort())
    for count in (3, 60, 400):
        for name, action in CHANGES.items():
            yield Case(
                f"listings/{name}/{count}",
                lambda n=count: fill(n),
                action,
                ROOT_AND_MEMBER,
            )
    yield Case("listings/removed", lambda: fill(3), _removed)
    for offset, whence in ((0, 0), (0, 1), (-1, 0), (5, 7)):
        yield Case(
            f"listings/lseek {offset}, {whence}",
            lambda: fill(5),
            lambda o=offset, w=whence: _lseek(o, w),
        )
    for size in (0, 1, 20, 1000):
        yield Case(f"listings/getdents into {size} bytes", lambda: fill(5), lambda n=size: _getdents(n))
