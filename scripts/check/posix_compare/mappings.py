"""Map files, shared and private: what may be mapped, and what lies beyond the end."""

import ctypes
import mmap
import os

from .calls import check, libc
from .case import ROOT_AND_MEMBER, Case, Cases, attempt
from .objects import CONTENT, make

PAGE = mmap.PAGESIZE
SHARED, PRIVATE, VALIDATE = 1, 2, 3
MAP_SYNC = 0x80000


def _map(kind: str, flags: int, protection: int, sharing: int, offset: int = 0) -> object:
    fd = os.open(kind, flags | os.O_NONBLOCK)
    address = libc.mmap(None, PAGE, protection, sharing, fd, ctypes.c_long(offset))
    return "mapped" if address != ctypes.c_void_p(-1).value else attempt(check, -1)


def _touch(offset: int, size: int, writes: bool, sharing: int) -> object:
    """Read or write one byte of a mapping of three pages, of a file that was then cut to ``size``."""
    fd = os.open("file", os.O_RDWR)
    os.ftruncate(fd, 3 * PAGE)
    with mmap.mmap(fd, 3 * PAGE, flags=sharing) as area:
        os.ftruncate(fd, size)
        if writes:
            area[offset] = 120
        return [area[offset], os.fstat(fd).st_size]


def _both_ways(sharing: int) -> list[object]:
    """Writes by the one are seen by the other, or not."""
    fd = os.open("file", os.O_RDWR)
    with mmap.mmap(fd, 0, flags=sharing) as area:
        said: list[object] = [area[:3]]
        os.pwrite(fd, b"written", 10)
        said.append(area[8:20])
        area[30:36] = b"mapped"
        said += [os.pread(fd, 10, 28), os.pread(os.open("file", os.O_RDONLY), 10, 28)]
        area.flush()
        os.ftruncate(fd, 5000)
        os.ftruncate(fd, len(CONTENT))
        said += [area[4998:5003], attempt(area.resize, 1000)]
    return said


def _after_unlink() -> list[object]:
    fd = os.open("file", os.O_RDWR)
    area = mmap.mmap(fd, 0)
    os.close(fd)
    os.unlink("file")
    area[:3] = b"new"
    area.flush()
    return [area[:5], len(area)]


def _tail() -> list[object]:
    """What is written beyond the end within the last page is not of the file."""
    fd = os.open("file", os.O_RDWR)
    with mmap.mmap(fd, 2 * PAGE) as area:
        area[len(CONTENT) + 10] = 120
        area.flush()
        os.ftruncate(fd, len(CONTENT) + 100)
        return [area[len(CONTENT) + 10], os.pread(fd, 200, len(CONTENT)).count(b"x")]


def _child_sees() -> list[object]:
    area = mmap.mmap(os.open("file", os.O_RDWR), 0)
    pid = os.fork()
    if not pid:
        area[:5] = b"child"
        os._exit(0)
    os.waitpid(pid, 0)
    return [area[:7]]


def cases() -> Cases:
    for kind in ("file", "empty", "dir", "fifo", "null"):
        for opened, flags in (
            ("r", os.O_RDONLY),
            ("w", os.O_WRONLY),
            ("rw", os.O_RDWR),
            ("a", os.O_RDWR | os.O_APPEND),
        ):
            for protection in (0, 1, 2, 3, 4):
                for name, sharing in ("shared", SHARED), ("private", PRIVATE):
                    yield Case(
                        f"mappings/{kind}, {opened}, protection {protection}, {name}",
                        make(kind, mode=0o666),
                        lambda k=kind, f=flags, p=protection, s=sharing: _map(k, f, p, s),
                        ("member",),
                    )
    for name, sharing in (
        ("sync", VALIDATE | MAP_SYNC),
        ("validate", VALIDATE),
        ("unknown", VALIDATE | 1 << 30),
        ("none", 0),
    ):
        yield Case(
            f"mappings/{name}",
            make("file"),
            lambda s=sharing: _map("file", os.O_RDWR, 3, s),
            ("member",),
        )
    for offset in (1, PAGE, 100 * PAGE, 1 << 44, (1 << 63) - PAGE):
        yield Case(
            f"mappings/offset {offset}",
            make("file"),
            lambda o=offset: _map("file", os.O_RDWR, 3, SHARED, o),
            ("member",),
        )
    for size in (0, 100, PAGE, PAGE + 100, 2 * PAGE, 3 * PAGE):
        for offset in (0, 200, PAGE - 1, PAGE, PAGE + 200, 2 * PAGE + 5):
            for writes in (False, True):
                for name, sharing in ("shared", SHARED), ("private", PRIVATE):
                    yield Case(
                        f"mappings/{'write' if writes else 'read'} at {offset} of {size}, {name}",
                        make("file"),
                        lambda o=offset, n=size, w=writes, s=sharing: _touch(o, n, w, s),
                        ("member",),
                    )
    for name, sharing in ("shared", SHARED), ("private", PRIVATE):
        yield Case(
            f"mappings/both ways, {name}",
            make("file"),
            lambda s=sharing: _both_ways(s),
            ROOT_AND_MEMBER,
        )
    yield Case("mappings/after unlink", make("file"), _after_unlink, ROOT_AND_MEMBER)
    yield Case("mappings/tail", make("file"), _tail, ROOT_AND_MEMBER)
    yield Case("mappings/child", make("file"), _child_sees, ROOT_AND_MEMBER)
