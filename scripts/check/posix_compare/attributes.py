"""Compare chmod, chown, times, and what statx and statvfs say."""

import os
import stat

from .calls import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    AT_SYMLINK_NOFOLLOW,
    UTIME_NOW,
    UTIME_OMIT,
    fchmodat2,
    fchownat,
    ioctl,
    readlink,
    statx,
    utimensat,
)
from .case import OWNER, TEAM, USERS, Case, Cases
from .objects import make, then

MODES = (0, 0o644, 0o777, 0o1777, 0o2755, 0o2644, 0o4755, 0o4644, 0o6755, 0o7777)
KINDS = ("file", "dir", "to-file", "fifo", "socket", "null")

IDS = {
    "nothing": (-1, -1),
    "same": (OWNER, TEAM),
    "same user": (OWNER, -1),
    "same group": (-1, TEAM),
    "other user": (USERS["other"].uid, -1),
    "other group": (-1, USERS["other"].gid),
    "both": (USERS["other"].uid, USERS["other"].gid),
    "member's": (USERS["member"].uid, USERS["member"].gid),
    "root": (0, 0),
    "nobody": (65534, 65534),
    "large": ((1 << 32) - 2, (1 << 31) + 5),
}

TIMES = {
    "omit": (0, UTIME_OMIT),
    "now": (0, UTIME_NOW),
    "zero": (0, 0),
    "exact": (1_234_567_890, 123_456_789),
    "before 1970": (-1, 999_999_999),
    "1901": (-(1 << 31), 0),
    "before 1901": (-(1 << 31) - 1, 0),
    "2038": (1 << 31, 1),
    "2446": (15_032_385_535, 999_999_999),
    "after 2446": (15_032_385_536, 0),
    "2^40": (1 << 40, 0),
    "nanoseconds beyond": (5, 1_000_000_000),
    "nanoseconds negative": (5, -1),
}


def _chmods() -> Cases:
    for kind in KINDS:
        for mode in MODES:
            yield Case(
                f"attributes/chmod {mode:o}/{kind}",
                make(kind),
                lambda kind=kind, mode=mode: os.chmod(kind, mode),
            )
    for mode in MODES:  # a group that its owner does not belong to takes the set-gid bit away
        setup = make("file", "dir", gid=USERS["other"].gid)
        yield Case(
            f"attributes/chmod {mode:o} of a foreign group",
            setup,
            lambda mode=mode: [os.chmod("file", mode), os.chmod("dir", mode)],
            ("root", "owner"),
        )
    for mode in MODES:
        yield Case(
            f"attributes/fchmod {mode:o}",
            make("file"),
            lambda mode=mode: os.fchmod(os.open("file", os.O_RDONLY), mode),
        )
    for kind in ("file", "to-file", "dir"):
        yield Case(
            f"attributes/fchmodat2, no follow/{kind}",
            make(kind),
            lambda kind=kind: fchmodat2(AT_FDCWD, kind, 0o711, AT_SYMLINK_NOFOLLOW),
        )


def _chowns() -> Cases:
    for kind in KINDS:
        for name, (uid, gid) in IDS.items():
            yield Case(
                f"attributes/chown to {name}/{kind}",
                make(kind),
                lambda kind=kind, uid=uid, gid=gid: os.chown(kind, uid, gid),
            )
    for name, (uid, gid) in IDS.items():
        yield Case(
            f"attributes/lchown to {name}",
            make("to-file"),
            lambda uid=uid, gid=gid: os.lchown("to-file", uid, gid),
        )
        yield Case(
            f"attributes/fchownat by descriptor to {name}",
            make("file"),
            lambda uid=uid, gid=gid: fchownat(os.open("file", os.O_PATH), "", uid, gid, AT_EMPTY_PATH),
        )


def _times() -> Cases:
    for first, atime in TIMES.items():
        for second, mtime in TIMES.items():
            if first != second and not {first, second} & {"omit", "now"}:
                continue
            yield Case(
                f"attributes/utimensat {first}, {second}",
                make("file"),
                lambda times=(*atime, *mtime): utimensat(AT_FDCWD, "file", times),
                ("root", "owner", "member", "other"),
            )
    few = {name: TIMES[name] for name in ("omit", "now", "exact")}
    for kind in KINDS:
        for first, atime in few.items():
            for second, mtime in few.items():
                both = (*atime, *mtime)
                yield Case(
                    f"attributes/utimensat, no follow, {first}, {second}/{kind}",
                    make(kind),
                    lambda kind=kind, times=both: utimensat(AT_FDCWD, kind, times, AT_SYMLINK_NOFOLLOW),
                    ("root", "member"),
                )
    for name, flags in ("reading", os.O_RDONLY), ("writing", os.O_WRONLY), ("path", os.O_PATH):
        for times in (None, (5, 0, 6, 0), (0, UTIME_NOW, 0, UTIME_OMIT)):
            yield Case(
                f"attributes/futimens {times and times[0]}, open for {name}",
                make("file"),
                lambda flags=flags, times=times: utimensat(os.open("file", flags), None, times),
            )


STATX_FIELDS = ("nlink", "uid", "gid", "mode", "size", "blksize")


def _statx(kind: str, mask: int) -> dict[str, int]:
    said = statx(kind, AT_SYMLINK_NOFOLLOW, mask)
    return {name: said[name] for name in STATX_FIELDS}


def _birth(path: str) -> list[object]:
    said = statx(path)
    return [bool(said["mask"] & 0x800), said["btime"] > 1_600_000_000]


def _statvfs(path: str) -> list[object]:
    st = os.statvfs(path)
    return [st.f_bsize, st.f_frsize, st.f_blocks, st.f_files, st.f_namemax, st.f_flag & ~0o10000]


FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FIONREAD = 0x80086601, 0x40086602, 0x541B


def _flag(flag: int) -> None:
    fd = os.open("file", os.O_RDONLY)
    ioctl(fd, FS_IOC_SETFLAGS, flag)
    os.close(fd)


def _statistics() -> Cases:
    for kind in (*KINDS, "full"):
        yield Case(f"attributes/statx/{kind}", make(kind), lambda kind=kind: _statx(kind, 0xFFF))
        yield Case(
            f"attributes/statx, number of blocks/{kind}",
            make(kind),
            lambda kind=kind: [os.lstat(kind).st_blocks, os.lstat(kind).st_rdev],
        )
    yield Case("attributes/birth time", make("file"), lambda: _birth("file"), ("root",))
    yield Case(
        "attributes/statx attributes", make("file"), lambda: statx("file")["attributes"], ("root",)
    )
    yield Case("attributes/statx, bad flags", make("file"), lambda: statx("file", 0x6000))
    yield Case("attributes/statx, bad mask", make("file"), lambda: statx("file", 0, 1 << 31))
    yield Case("attributes/statx, empty path", make("file"), lambda: statx("", 0))
    yield Case(
        "attributes/statx by descriptor",
        make("file"),
        lambda: statx("", AT_EMPTY_PATH, fd=os.open("file", os.O_PATH))["size"],
    )
    for kind in ("file", "dir", "fifo"):
        yield Case(f"attributes/statvfs/{kind}", make(kind), lambda kind=kind: _statvfs(kind))
    for name, request in ("get flags", FS_IOC_GETFLAGS), ("FIONREAD", FIONREAD), ("unknown", 0x1234):
        yield Case(
            f"attributes/ioctl, {name}",
            make("file"),
            lambda request=request: ioctl(os.open("file", os.O_RDONLY), request),
        )
    yield Case("attributes/ioctl, set flags", make("file"), lambda: _flag(0x80), ("root", "owner"))
    for size in (-1, 0, 1, 3, 4, 5, 100):
        setup = then(make("to-file"))
        yield Case(
            f"attributes/readlink into {size} bytes",
            setup,
            lambda size=size: readlink("to-file", size),
            ("member",),
        )
    for length in (1, 59, 60, 255, 1000, 4000, 4094, 4095, 4096):
        yield Case(
            f"attributes/symlink of {length} bytes",
            make(),
            lambda n=length: _long_link(n),
            ("member",),
        )
    yield Case("attributes/symlink of 0 bytes", make(), lambda: os.symlink("", "l"), ("member",))


def _long_link(length: int) -> list[object]:
    os.symlink("x" * length, "link")
    st = os.lstat("link")
    return [len(os.readlink("link")), st.st_size, stat.filemode(st.st_mode)]


def cases() -> Cases:
    yield from _chmods()
    yield from _chowns()
    yield from _times()
    yield from _statistics()
