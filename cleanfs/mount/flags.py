"""Translate the names of mount(8) into the flags of mount(2), and change a mount's flags."""

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
"""Flags by name, and whether the name sets or clears the flag."""

ACCESS_TIMES: Final = NOATIME | RELATIME | STRICTATIME
"""Exactly one of them is in force."""

PRIVILEGES: Final = NOSUID | NODEV

LIBFUSE: Final = frozenset(
    {"nosuid", "suid", "nodev", "dev", "noexec", "exec", "sync", "async", "dirsync", "noatime"}
)
"""The names that libfuse 3.14 and its fusermount3 accept; they refuse all others."""


def last_of_each(words: Iterable[str]) -> tuple[str, ...]:
    """Keep only the last name of each flag, in order."""
    last: dict[int, str] = {}
    for word in words:
        flag, _ = FLAGS[word]
        last.pop(flag, None)
        last[flag] = word
    return tuple(last.values())


def with_names(flags: int, words: Iterable[str]) -> int:
    """Return flags after applying names in order."""
    for word in words:
        flag, is_set = FLAGS[word]
        if is_set and flag & ACCESS_TIMES:
            flags &= ~ACCESS_TIMES
        flags = flags | flag if is_set else flags & ~flag
    return flags


def flags_of(point: MountPoint) -> int:
    """Return the flags of a mount, from mountinfo."""
    flags = 0
    for options in (point.options, point.super_options):
        flags |= with_names(0, (word for word in options.split(",") if word in FLAGS))
    return flags if flags & ACCESS_TIMES else flags | STRICTATIME  # mountinfo does not show strictatime


def remounted(flags: int, words: Iterable[str]) -> int:
    """Return the flags after a remount.

    mount(8) names all flags to be set, so a flag without a name is cleared. But it never passes on
    ``suid`` and ``dev``. So ``nosuid`` and ``nodev`` stay in force until the user passes ``allow_suid``
    or ``allow_dev``.
    """
    wanted = with_names(flags & PRIVILEGES, words)
    return wanted if wanted & ACCESS_TIMES else wanted | flags & ACCESS_TIMES


def set_flags(point: MountPoint, flags: int) -> None:
    """Replace all flags of a mount. Raises MountError."""
    if flags == flags_of(point):
        return
    try:
        syscalls.remount(point.path, flags)
    except OSError as exc:
        if exc.errno == errno.EBUSY and flags & RDONLY:
            raise MountError(f"{point.path} is busy: files are open for writing there") from exc
        if exc.errno == errno.EPERM and os.geteuid():
            raise MountError("only root can change flags of a mount, such as ro and rw") from exc
        raise MountError(f"cannot remount {point.path}: {exc.strerror}") from exc
