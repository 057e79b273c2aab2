"""Compare flock, fcntl and open file description locks, and leases."""

import fcntl
import itertools
import os
import struct
from collections.abc import Callable

from .case import ROOT_AND_MEMBER, Case, Cases, attempt
from .objects import make

F_OFD_GETLK, F_OFD_SETLK = 36, 37
TYPES = {"read": fcntl.F_RDLCK, "write": fcntl.F_WRLCK, "unlock": fcntl.F_UNLCK}
RANGES = {"all": (0, 0), "first": (0, 10), "second": (10, 10), "overlap": (5, 10)}


def _lock(fd: int, command: int, kind: int, start: int, length: int) -> object:
    """Return the type that the call returns: of the lock in the way, with F_GETLK."""
    data = struct.pack("hhqqi4x", kind, os.SEEK_SET, start, length, 0)
    return struct.unpack_from("h", fcntl.fcntl(fd, command, data))[0]


def in_child(call: Callable[[], object]) -> object:
    """Return what a call returns in another process."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.write(writer, repr(attempt(call)).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as said:
        text = said.read().decode()
    os.waitpid(pid, 0)
    return text


def _flocks(first: int, second: int, flags: tuple[int, int]) -> list[object]:
    one, two = (os.open("file", each) for each in flags)
    said = [
        attempt(fcntl.flock, one, first | fcntl.LOCK_NB),
        attempt(fcntl.flock, two, second | fcntl.LOCK_NB),
    ]
    said.append(in_child(lambda: fcntl.flock(os.open("file", os.O_RDONLY), second | fcntl.LOCK_NB)))
    os.close(one)
    return [*said, attempt(fcntl.flock, two, second | fcntl.LOCK_NB)]


def _records(
    command: int, get: int, types: tuple[int, int], ranges: tuple[tuple[int, int], tuple[int, int]]
) -> list[object]:
    one = os.open("file", os.O_RDWR)
    said = [attempt(_lock, one, command, types[0], *ranges[0])]

    def other() -> list[object]:
        fd = os.open("file", os.O_RDWR)
        return [
            attempt(_lock, fd, get, types[1], *ranges[1]),
            attempt(_lock, fd, command, types[1], *ranges[1]),
        ]

    said.append(in_child(other))
    two = os.open("file", os.O_RDWR)
    said += [attempt(_lock, two, command, types[1], *ranges[1])]
    os.close(two)
    return [*said, in_child(other)]


def _wrong(flags: int) -> list[object]:
    """Take locks that the way a file was opened does not allow."""
    fd = os.open("file", flags)
    said = [attempt(_lock, fd, fcntl.F_SETLK, kind, 0, 0) for kind in (*TYPES.values(), 7)]
    said += [attempt(_lock, fd, F_OFD_SETLK, kind, 0, 0) for kind in TYPES.values()]
    said += [
        attempt(_lock, fd, fcntl.F_SETLK, fcntl.F_RDLCK, *where)
        for where in ((-1, 0), (5, -10), (5, -3))
    ]
    said += [attempt(fcntl.flock, fd, operation) for operation in (0, 3, fcntl.LOCK_EX | fcntl.LOCK_NB)]
    return said


def _lease(flags: int, kind: int) -> list[object]:
    fd = os.open("file", flags)
    return [
        attempt(fcntl.fcntl, fd, fcntl.F_SETLEASE, kind),
        attempt(fcntl.fcntl, fd, fcntl.F_GETLEASE),
    ]


def cases() -> Cases:
    flocks = {"shared": fcntl.LOCK_SH, "exclusive": fcntl.LOCK_EX, "none": fcntl.LOCK_UN}
    for (a, first), (b, second) in itertools.product(flocks.items(), repeat=2):
        for name, flags in ("reading", (os.O_RDONLY,) * 2), ("writing", (os.O_WRONLY, os.O_RDONLY)):
            yield Case(
                f"locks/flock {a}, {b}, open for {name}",
                make("file"),
                lambda x=first, y=second, f=flags: _flocks(x, y, f),
                ROOT_AND_MEMBER,
            )
    for kind, command, get in (
        ("fcntl", fcntl.F_SETLK, fcntl.F_GETLK),
        ("ofd", F_OFD_SETLK, F_OFD_GETLK),
    ):
        for a, b in itertools.product(TYPES, repeat=2):
            for x, y in itertools.product(RANGES, repeat=2):
                yield Case(
                    f"locks/{kind} {a} {x}, {b} {y}",
                    make("file"),
                    lambda c=command, g=get, t=(TYPES[a], TYPES[b]), r=(RANGES[x], RANGES[y]): _records(
                        c, g, t, r
                    ),
                    ("member",),
                )
    for access in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_PATH):
        yield Case(f"locks/wrong {access}", make("file"), lambda f=access: _wrong(f), ROOT_AND_MEMBER)
        for name, number in TYPES.items():
            yield Case(
                f"locks/lease {name} {access}",
                make("file"),
                lambda f=access, n=number: _lease(f, n),
                ("root", "owner", "member"),
            )
