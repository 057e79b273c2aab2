"""Compare reading, writing, seeking and truncating, at the edges."""

import ctypes
import fcntl
import os
import resource
import signal

from .calls import check, libc
from .case import ROOT_AND_MEMBER, Case, Cases, attempt
from .objects import CONTENT, make

SIZE = len(CONTENT)
LAST = (1 << 63) - 1
EXT4_LAST = (1 << 44) - 4096

OFFSETS = (
    -1,
    0,
    1,
    4095,
    SIZE - 1,
    SIZE,
    SIZE + 1,
    1 << 32,
    EXT4_LAST - 1,
    EXT4_LAST,
    1 << 44,
    LAST - 1,
    LAST,
)
OPENED = {
    "reading": os.O_RDONLY,
    "writing": os.O_WRONLY,
    "both": os.O_RDWR,
    "appending": os.O_RDWR | os.O_APPEND,
}


def _fd(flags: int = os.O_RDWR, path: str = "file") -> int:
    return os.open(path, flags)


def _seeks(kind: str) -> Cases:
    whences = {"set": 0, "cur": 1, "end": 2, "data": 3, "hole": 4, "unknown": 5}
    for name, whence in whences.items():
        for offset in (-SIZE - 1, -SIZE, -1, 0, 1, SIZE - 1, SIZE, SIZE + 1, 1 << 44, LAST):
            yield Case(
                f"data/lseek {name} {offset}/{kind}",
                make(kind),
                lambda w=whence, o=offset: _seek(kind, o, w),
                ("member",),
            )


def _seek(kind: str, offset: int, whence: int) -> list[object]:
    fd = os.open(kind, os.O_RDONLY | os.O_NONBLOCK)
    said = [attempt(os.lseek, fd, 1, os.SEEK_SET), attempt(os.lseek, fd, offset, whence)]
    return [*said, attempt(os.lseek, fd, 0, os.SEEK_CUR)] if kind != "dir" else said


def _truncates() -> Cases:
    for size in (
        -1,
        0,
        1,
        SIZE - 1,
        SIZE,
        SIZE + 1,
        4096,
        1 << 32,
        EXT4_LAST,
        EXT4_LAST + 1,
        1 << 44,
        LAST,
    ):
        yield Case(f"data/truncate to {size}", make("file"), lambda s=size: os.truncate("file", s))
        for name, flags in OPENED.items():
            yield Case(
                f"data/ftruncate to {size}, open for {name}",
                make("file"),
                lambda s=size, f=flags: os.ftruncate(_fd(f), s),
                ROOT_AND_MEMBER,
            )
        yield Case(
            f"data/truncate to {size} and back",
            make("file"),
            lambda s=size: _there_and_back(s),
            ("member",),
        )
    for kind in ("dir", "fifo", "socket", "null", "to-file", "dangling"):
        yield Case(f"data/truncate/{kind}", make(kind), lambda kind=kind: os.truncate(kind, 5))


def _there_and_back(size: int) -> list[object]:
    fd = _fd()
    said = [
        attempt(os.ftruncate, fd, size),
        attempt(os.ftruncate, fd, 100),
        attempt(os.ftruncate, fd, 200),
    ]
    return [*said, os.pread(fd, 300, 0)]


def _one(call: str, offset: int, flags: int) -> list[object]:
    fd = _fd(flags)
    calls = {
        "pread": lambda: os.pread(fd, 10, offset),
        "pwrite": lambda: os.pwrite(fd, b"0123456789", offset),
        "pwrite of nothing": lambda: os.pwrite(fd, b"", offset),
        "preadv": lambda: os.preadv(fd, [bytearray(3), bytearray(9)], offset),
        "pwritev": lambda: os.pwritev(fd, [b"one", b"", b"three"], offset),
        "seek, write": lambda: [os.lseek(fd, offset, 0), os.write(fd, b"xyz"), os.lseek(fd, 0, 1)],
        "seek, read": lambda: [os.lseek(fd, offset, 0), os.read(fd, 9), os.lseek(fd, 0, 1)],
    }
    return [attempt(calls[call]), os.lseek(fd, 0, os.SEEK_CUR), os.fstat(fd).st_size]


ONES = ("pread", "pwrite", "pwrite of nothing", "preadv", "pwritev", "seek, write", "seek, read")


def _limited(limit: int, call: str) -> list[object]:
    """Write with a limit on the size of files; SIGXFSZ is ignored, or deadly."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if "signal" in call else signal.SIG_IGN)
    fd = _fd()
    said = []
    if call.startswith("write"):
        said += [
            attempt(os.pwrite, fd, bytes(3000), offset) for offset in (0, 4000, 5000, 6000, 10_000)
        ]
    elif call.startswith("append"):
        fd = _fd(os.O_WRONLY | os.O_APPEND)
        said += [attempt(os.write, fd, bytes(3000)) for _ in range(4)]
    else:
        said += [attempt(os.ftruncate, fd, size) for size in (100, 5999, 6000, 6001, 7000)]
        said += [attempt(os.truncate, "file", size) for size in (100, 6000, 6001)]
    return [*said, os.fstat(fd).st_size]


RWF = {"hipri": 1, "dsync": 2, "sync": 4, "nowait": 8, "append": 16, "noappend": 32, "atomic": 64,
       "dontcache": 128, "unknown": 1 << 20}  # fmt: skip


def _flagged(flag: int, flags: int) -> list[object]:
    fd = _fd(flags)
    os.pread(fd, 100, 0)
    said = [attempt(os.preadv, fd, [bytearray(9)], 3, flag), attempt(os.pwritev, fd, [b"abc"], 3, flag)]
    said += [attempt(os.pwritev, fd, [b"abc"], -1, flag), os.lseek(fd, 0, 1), os.fstat(fd).st_size]
    return said


def _toggled(first: int, second: int) -> list[object]:
    """Set or clear O_APPEND while the file is open."""
    fd = _fd(os.O_RDWR | first)
    said: list[object] = [os.write(fd, b"first")]
    fcntl.fcntl(fd, fcntl.F_SETFL, second)
    said += [os.pwrite(fd, b"second", 5), os.pwrite(fd, b"third", 4096), os.write(fd, b"fourth")]
    fcntl.fcntl(fd, fcntl.F_SETFL, first)
    said += [os.pwrite(fd, b"fifth", 7), os.lseek(fd, 0, os.SEEK_CUR), os.fstat(fd).st_size]
    return said


def _appenders() -> list[object]:
    """Write by two descriptors, one of them appending, and one in another process."""
    one, two = _fd(os.O_WRONLY | os.O_APPEND), _fd(os.O_RDWR | os.O_APPEND)
    plain = _fd()
    said: list[object] = []
    for turn in range(3):
        os.write(one, b"one" * turn)
        os.write(two, b"two" * 2000)
        os.pwrite(plain, b"plain", os.fstat(plain).st_size)
        pid = os.fork()
        if not pid:
            os.write(one, b"child")
            os._exit(0)
        os.waitpid(pid, 0)
        said.append([os.lseek(fd, 0, os.SEEK_CUR) for fd in (one, two, plain)])
    os.ftruncate(plain, 5)
    os.write(one, b"after")
    return [*said, os.pread(two, 100, 0)]


def _direct(offset: int, size: int, writes: bool) -> list[object]:
    """Use O_DIRECT with and without alignment."""
    fd = _fd(os.O_RDWR | os.O_DIRECT)
    memory = libc.mmap(None, 16384, 3, 0x22, -1, 0)
    call = libc.pwrite if writes else libc.pread
    call.restype = ctypes.c_long
    result = attempt(lambda: check(call(fd, ctypes.c_void_p(memory), size, ctypes.c_long(offset))))
    return [result, os.fstat(fd).st_size]


def _vectors(count: int) -> list[object]:
    fd = _fd()
    return [attempt(os.writev, fd, [b"v"] * count), attempt(os.readv, fd, [bytearray(1)] * count)]


FADVICE = {
    "normal": 0,
    "random": 1,
    "sequential": 2,
    "willneed": 3,
    "dontneed": 4,
    "noreuse": 5,
    "unknown": 9,
}

SYNCS = {
    "fsync": os.fsync,
    "fdatasync": os.fdatasync,
    "syncfs": lambda fd: check(libc.syncfs(fd)),
    "sync_file_range": lambda fd: check(
        libc.sync_file_range(fd, ctypes.c_long(0), ctypes.c_long(100), 7)
    ),
    "sync_file_range, bad": lambda fd: check(
        libc.sync_file_range(fd, ctypes.c_long(-1), ctypes.c_long(1), 7)
    ),
    "readahead": lambda fd: check(libc.readahead(fd, ctypes.c_long(0), 100)),
}


def cases() -> Cases:
    for kind in ("file", "empty", "dir", "fifo", "null"):
        yield from _seeks(kind)
    yield from _truncates()
    for call in ONES:
        for offset in OFFSETS:
            if offset < 0 and "v" in call:
                continue  # -1 means the position there
            for name, flags in OPENED.items():
                yield Case(
                    f"data/{call} at {offset}, open for {name}",
                    make("file"),
                    lambda c=call, o=offset, f=flags: _one(c, o, f),
                    ("member",),
                )
    for limit in (0, 4096, 6000, 8000):
        for call in ("write", "append", "truncate", "write, signal", "truncate, signal"):
            yield Case(
                f"data/file size limit {limit}/{call}",
                make("file"),
                lambda limit=limit, c=call: _limited(limit, c),
                ROOT_AND_MEMBER,
            )
    for flag, number in RWF.items():
        for name, flags in OPENED.items():
            yield Case(
                f"data/readv and writev, {flag}, open for {name}",
                make("file"),
                lambda n=number, f=flags: _flagged(n, f),
                ("member",),
            )
    yield Case("data/append cleared", make("file"), lambda: _toggled(os.O_APPEND, 0))
    yield Case("data/append set", make("file"), lambda: _toggled(0, os.O_APPEND))
    yield Case("data/append cleared, empty", make("empty"), _rewritten)
    yield Case("data/appenders", make("file"), _appenders)
    for writes in (False, True):
        for offset, size in (
            (0, 4096),
            (0, 512),
            (0, 100),
            (4096, 4096),
            (1, 4096),
            (8192, 512),
            (0, 8192),
        ):
            yield Case(
                f"data/direct {'write' if writes else 'read'} of {size} at {offset}",
                make("file"),
                lambda o=offset, s=size, w=writes: _direct(o, s, w),
                ("member",),
            )
    for count in (0, 1, 1024, 1025):
        yield Case(f"data/{count} vectors", make("file"), lambda n=count: _vectors(n), ("member",))
    for kind in ("file", "dir", "fifo"):
        for name, number in FADVICE.items():
            yield Case(
                f"data/fadvise {name}/{kind}",
                make(kind),
                lambda k=kind, n=number: os.posix_fadvise(
                    os.open(k, os.O_RDONLY | os.O_NONBLOCK), 0, 0, n
                ),
                ("member",),
            )
        for name, sync in SYNCS.items():
            yield Case(
                f"data/{name}/{kind}",
                make(kind),
                lambda k=kind, sync=sync: sync(os.open(k, os.O_RDONLY | os.O_NONBLOCK)),
                ("member",),
            )
    for name, flags in OPENED.items():
        yield Case(
            f"data/position, open for {name}",
            make("file"),
            lambda f=flags: _positions(f),
            ("member",),
        )


def _rewritten() -> list[object]:
    """Append, then correct what was appended, as databases and log writers do."""
    fd = os.open("empty", os.O_RDWR | os.O_APPEND)
    said: list[object] = [os.write(fd, b"0123456789")]
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
    said += [os.pwrite(fd, b"AB", 3), os.lseek(fd, 0, 0), os.write(fd, b"C"), os.pread(fd, 99, 0)]
    return said


def _positions(flags: int) -> list[object]:
    fd = _fd(flags)
    said = [
        attempt(os.read, fd, 5),
        os.lseek(fd, 0, 1),
        attempt(os.write, fd, b"abc"),
        os.lseek(fd, 0, 1),
    ]
    other = os.dup(fd)
    said += [attempt(os.lseek, other, 2, 1), os.lseek(fd, 0, 1), attempt(os.read, fd, 1 << 20)]
    said += [attempt(os.read, fd, 5), attempt(os.read, fd, 0), attempt(os.write, fd, b"")]
    return said
