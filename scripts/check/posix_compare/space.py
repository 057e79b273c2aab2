"""Compare fallocate, holes, and copies that the kernel makes."""

import os

from .calls import fallocate
from .case import ROOT_AND_MEMBER, Case, Cases, attempt
from .objects import CONTENT, make, then

MODES = {
    "": 0,
    "keep size": 1,
    "punch": 2,
    "punch, keep size": 3,
    "collapse": 8,
    "zero": 16,
    "zero, keep size": 17,
    "insert": 32,
    "unshare": 64,
    "unknown": 1 << 20,
}
RANGES = (
    (0, 4096),
    (0, 0),
    (-1, 10),
    (0, -1),
    (100, 50),
    (4096, 4096),
    (100_000, 5000),
    (0, 1 << 44),
    (1 << 62, 1 << 62),
)


def _allocate(mode: int, offset: int, length: int) -> list[object]:
    fd = os.open("file", os.O_RDWR)
    return [attempt(fallocate, fd, mode, offset, length), os.fstat(fd).st_size]


def _holes(path: str) -> list[object]:
    """Return what SEEK_DATA and SEEK_HOLE find."""
    fd = os.open(path, os.O_RDONLY)
    said = []
    for start in (0, 100, 4096, 100_000, 1 << 20, (1 << 20) + 5, 2 << 20):
        said += [attempt(os.lseek, fd, start, whence) for whence in (os.SEEK_DATA, os.SEEK_HOLE)]
    return said


def _sparse() -> None:
    with open("sparse", "wb") as file:
        file.write(b"start")
        file.seek(1 << 20)
        file.write(b"end")
        file.flush()
        os.fsync(file.fileno())
    os.chmod("sparse", 0o666)


def _target() -> None:
    with open("target", "wb") as file:
        file.write(b"t" * 3000)
    os.chmod("target", 0o666)


def _copy(source: int, target: int, count: int, flags: tuple[int, int]) -> list[object]:
    from_fd, to_fd = os.open("file", flags[0]), os.open("target", flags[1])
    said = [attempt(os.copy_file_range, from_fd, to_fd, count, source, target)]
    said += [os.lseek(from_fd, 0, 1), os.lseek(to_fd, 0, 1), os.fstat(to_fd).st_size]
    return said


def _copy_within(source: int, target: int, count: int) -> list[object]:
    fd = os.open("file", os.O_RDWR)
    return [attempt(os.copy_file_range, fd, fd, count, source, target), os.fstat(fd).st_size]


def _sendfile(target: str, offset: int | None, count: int) -> list[object]:
    from_fd = os.open("file", os.O_RDONLY)
    to_fd = os.open(target, os.O_RDWR | os.O_CREAT, 0o644)
    said = [attempt(os.sendfile, to_fd, from_fd, offset, count), os.lseek(from_fd, 0, 1)]
    return [*said, os.lseek(to_fd, 0, 1), os.fstat(to_fd).st_size]


def _splice() -> list[object]:
    """Splice a file into a pipe, and the pipe into another file."""
    reader, writer = os.pipe()
    from_fd, to_fd = os.open("file", os.O_RDONLY), os.open("new", os.O_RDWR | os.O_CREAT, 0o644)
    said = [
        attempt(os.splice, from_fd, writer, 3000, 1000),
        attempt(os.splice, reader, to_fd, 3000, None, 10),
    ]
    said.append(attempt(os.splice, from_fd, to_fd, 10))
    append = os.open("new", os.O_WRONLY | os.O_APPEND)
    os.write(writer, b"more")
    said.append(attempt(os.splice, reader, append, 4))
    return [*said, os.fstat(to_fd).st_size]


FICLONE = 0x40049409


def cases() -> Cases:
    for name, mode in MODES.items():
        for offset, length in RANGES:
            yield Case(
                f"space/fallocate {name or 'plain'} {offset}, {length}",
                make("file"),
                lambda m=mode, o=offset, n=length: _allocate(m, o, n),
                ROOT_AND_MEMBER,
            )
    for kind, flags in (
        ("file", os.O_RDONLY),
        ("dir", os.O_RDONLY),
        ("fifo", os.O_RDWR),
        ("file", os.O_RDWR | os.O_APPEND),
    ):
        yield Case(
            f"space/fallocate/{kind} {flags}",
            make(kind),
            lambda k=kind, f=flags: fallocate(os.open(k, f), 0, 0, 10_000),
        )
    yield Case(
        "space/posix_fallocate",
        make("file"),
        lambda: os.posix_fallocate(os.open("file", os.O_RDWR), 0, 20_000),
    )
    for path in ("sparse", "file", "empty"):
        setup = then(make("file", "empty"), _sparse)
        yield Case(f"space/holes/{path}", setup, lambda path=path: _holes(path))
    reads, writes, both = os.O_RDONLY, os.O_WRONLY, os.O_RDWR
    for pair in (
        (reads, writes),
        (reads, both),
        (writes, writes),
        (reads, reads),
        (reads, writes | os.O_APPEND),
    ):
        for source, target, count in (
            (0, 0, 10_000),
            (100, 50, 1000),
            (len(CONTENT), 0, 10),
            (0, 9000, 100),
            (0, 0, 0),
        ):
            yield Case(
                f"space/copy_file_range {source} to {target}, {count}, {pair}",
                then(make("file"), _target),
                lambda s=source, t=target, n=count, f=pair: _copy(s, t, n, f),
                ROOT_AND_MEMBER,
            )
    for source, target, count in (
        (0, 4096, 1000),
        (0, 100, 50),
        (0, 100, 200),
        (0, 0, 10),
        (0, 1 << 44, 10),
        (1 << 44, 0, 10),
    ):
        yield Case(
            f"space/copy_file_range within {source} to {target}, {count}",
            make("file"),
            lambda s=source, t=target, n=count: _copy_within(s, t, n),
            ROOT_AND_MEMBER,
        )
    for to in ("new", "file"):
        for position, count in ((None, 10_000), (0, 10), (100, 5000), (10_000, 10)):
            yield Case(
                f"space/sendfile {position}, {count}/{to}",
                make("file"),
                lambda t=to, o=position, n=count: _sendfile(t, o, n),
                ROOT_AND_MEMBER,
            )
    yield Case("space/splice", make("file"), _splice)
