"""Change the contents of a file, each time by another system call.

The file is ``f``, of SIZE bytes, in a directory with another file, ``other``.
"""

import ctypes
import fcntl
import mmap
import os
import platform
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SIZE = 300_007


@contextmanager
def held(path: Path, flags: int = os.O_RDONLY) -> Iterator[int]:
    """Open a file until the end of the block."""
    fd = os.open(path, flags)
    try:
        yield fd
    finally:
        os.close(fd)


FALLOC_KEEP_SIZE, FALLOC_PUNCH_HOLE, FALLOC_COLLAPSE, FALLOC_ZERO, FALLOC_INSERT = 1, 2, 8, 16, 32
FICLONE = 0x40049409


def fallocate(mode: int) -> Callable[[Path, int], None]:
    def call(_: Path, fd: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.fallocate(fd, mode, ctypes.c_long(8192), ctypes.c_long(16384)):
            pytest.skip(f"fallocate: {os.strerror(ctypes.get_errno())}")

    return call


def copy_range(directory: Path, fd: int) -> None:
    with held(directory / "other") as other:
        assert os.copy_file_range(other, fd, 50_000, 0, 4096) > 0


def clone(directory: Path, fd: int) -> None:
    with held(directory / "other") as other:
        try:
            fcntl.ioctl(fd, FICLONE, other)
        except OSError as exc:
            pytest.skip(f"FICLONE: {exc.strerror}")


def sendfile(directory: Path, fd: int) -> None:
    with held(directory / "other") as other:
        os.lseek(fd, 9000, os.SEEK_SET)
        assert os.sendfile(fd, other, 0, 50_000) > 0


def splice(_: Path, fd: int) -> None:
    reader, writer = os.pipe()
    os.write(writer, b"spliced" * 100)
    assert os.splice(reader, fd, 700, offset_dst=100_000) == 700
    os.close(reader)
    os.close(writer)


def write_through_mapping(_: Path, fd: int) -> None:
    with mmap.mmap(fd, SIZE) as area:
        area[100_000:100_006] = b"mapped"


def write_asynchronously(_: Path, fd: int) -> None:
    """Write by io_submit(2), which causes no event."""
    numbers = {"x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2)}.get(platform.machine())
    if numbers is None:
        pytest.skip("the numbers of these system calls are unknown here")
    setup, destroy, getevents, submit = numbers
    libc = ctypes.CDLL(None, use_errno=True)
    context = ctypes.c_ulong(0)
    assert libc.syscall(setup, 1, ctypes.byref(context)) == 0
    data = ctypes.create_string_buffer(b"asynchronous", 12)
    iocb = ctypes.create_string_buffer(
        struct.pack("<QIIHhIQQqQII", 0, 0, 0, 1, 0, fd, ctypes.addressof(data), 12, 70_000, 0, 0, 0)
    )
    pointer = ctypes.pointer(iocb)
    assert libc.syscall(submit, context, ctypes.c_long(1), ctypes.byref(pointer)) == 1
    event = ctypes.create_string_buffer(32)
    assert libc.syscall(getevents, context, ctypes.c_long(1), ctypes.c_long(1), event, None) == 1
    libc.syscall(destroy, context)


CONTENTS: dict[str, Callable[[Path, int], object]] = {
    "write": lambda _, fd: os.write(fd, b"changed"),
    "pwritev": lambda _, fd: os.pwritev(fd, [b"chan", b"ged"], 100_000),
    "append": lambda _, fd: os.pwrite(fd, b"appended", SIZE),
    "truncate": lambda directory, _: os.truncate(directory / "f", 5000),
    "ftruncate": lambda _, fd: os.ftruncate(fd, 2 * SIZE),
    "fallocate": fallocate(0),
    "punch a hole": fallocate(FALLOC_PUNCH_HOLE | FALLOC_KEEP_SIZE),
    "zero a range": fallocate(FALLOC_ZERO),
    "collapse a range": fallocate(FALLOC_COLLAPSE),
    "insert a range": fallocate(FALLOC_INSERT),
    "copy_file_range": copy_range,
    "reflink": clone,
    "sendfile": sendfile,
    "splice": splice,
    "mmap": write_through_mapping,
    "io_submit": write_asynchronously,
}
