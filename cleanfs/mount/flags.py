"""Flags of a mount that the kernel keeps to (mount(2)): their words, and how they change."""

import errno
import os
from collections.abc import Iterable
from typing import Final

from cleanfs.linux import syscalls
from cleanfs.linux.mounts import MountPoint
from cleanfs.mount.config import MountError

RDONLY: Final = 1
NOSUID: Final = 2
NODEV: Final = 4
NOEXEC: Final = 8
SYNCHRONOUS: Final = 16
DIRSYNC: Final = 128
NOSYMFOLLOW: Final = 256
NOATIME: Final = 1024
NODIRATIME: Final = 2048
RELATIME: Final = 1 << 21
STRICTATIME: Final = 1 << 24
LAZYTIME: Final = 1 << 25

FLAGS: Final = {
    "ro": (RDONLY, True),
    "rw": (RDONLY, False),
    "nosuid": (NOSUID, True),
    "suid": (NOSUID, False),
    "nodev": (NODEV, True),
    "dev": (NODEV, False),
    "noexec": (NOEXEC, True),
    "exec": (NOEXEC, False),
    "sync": (SYNCHRONOUS, True),
    "async": (SYNCHRONOUS, False),
    "dirsync": (DIRSYNC, True),
    "nosymfollow": (NOSYMFOLLOW, True),
    "symfollow": (NOSYMFOLLOW, False),
    "noatime": (NOATIME, True),
    "atime": (NOATIME, False),
    "nodiratime": (NODIRATIME, True),
    "diratime": (NODIRATIME, False),
    "relatime": (RELATIME, True),
    "norelatime": (RELATIME, False),
    "strictatime": (STRICTATIME, True),
    "nostrictatime": (STRICTATIME, False),
    "lazytime": (LAZYTIME, True),
    "nolazytime": (LAZYTIME, False),
}
"""A word's flag, and whether it sets it."""

ACCESS_TIMES: Final = NOATIME | RELATIME | STRICTATIME
"""One of them holds."""

PRIVILEGES: Final = NOSUID | NODEV

LIBFUSE: Final = frozenset(
    {"nosuid", "suid", "nodev", "dev", "noexec", "exec", "sync", "async", "dirsync", "noatime"}
)
"""Words that libfuse 3.14 and its fusermount3 understand. It refuses all others."""


def last_of_each(words: Iterable[str]) -> tuple[str, ...]:
    """Of words about one flag the last one, in the order in which they hold."""
    last: dict[int, str] = {}
    for word in words:
        flag, _ = FLAGS[word]
        last.pop(flag, None)
        last[flag] = word
    return tuple(last.values())


def with_words(flags: int, words: Iterable[str]) -> int:
    """Flags changed by words, of which the last holds."""
    for word in words:
        flag, is_set = FLAGS[word]
        if is_set and flag & ACCESS_TIMES:
            flags &= ~ACCESS_TIMES
        flags = flags | flag if is_set else flags & ~flag
    return flags


def flags_of(point: MountPoint) -> int:
    """The flags of a mount, as mountinfo has them."""
    flags = 0
    for options in (point.options, point.super_options):
        flags |= with_words(0, (word for word in options.split(",") if word in FLAGS))
    return flags if flags & ACCESS_TIMES else flags | STRICTATIME  # which it does not show


def remounted(flags: int, words: Iterable[str]) -> int:
    """The flags that a remount asks for.

    mount(8) names all flags that there are to be and leaves out the others, so what it does not name
    is taken away. But ``suid`` and ``dev`` it does not name, and they are not lifted by its silence:
    where ``nosuid`` and ``nodev`` hold, they hold until somebody says ``allow_suid`` or ``allow_dev``.
    """
    wanted = with_words(flags & PRIVILEGES, words)
    return wanted if wanted & ACCESS_TIMES else wanted | flags & ACCESS_TIMES


def set_flags(point: MountPoint, flags: int) -> None:
    """Give a mount these flags, and no others. Raises MountError."""
    if flags == flags_of(point):
        return
    try:
        syscalls.remount(point.path, flags)
    except OSError as exc:
        if exc.errno == errno.EBUSY and flags & RDONLY:
            raise MountError(f"{point.path} is busy: files are open for writing there") from exc
        if exc.errno == errno.EPERM and os.geteuid():
            raise MountError("only root can change flags of a mount, such as ro and rw") from exc
        raise MountError(f"can not remount {point.path}: {exc.strerror}") from exc
