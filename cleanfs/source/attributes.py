"""Attributes of the source's files: mode, owner, size, times and extended attributes.

Plain functions over descriptors, run in worker threads. They touch no state of ours; what the caller
must know afterwards (attributes before and after) they return. All raise OSError.
"""

import errno
import fcntl
import os
import stat as stat_module
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

from cleanfs.linux import syscalls
from cleanfs.source.caller import Caller

ACCESS_ACL = b"system.posix_acl_access"


@dataclass(frozen=True, slots=True)
class FlagsCommand:
    """A pair of ioctls that get and set flags, which are the first 32 bits (linux/fs.h)."""

    getter: int
    setter: int
    size: int
    """The bytes that they transfer."""
    privileged: int
    """The flags that only privileged processes may change: immutable and append-only
    (CAP_LINUX_IMMUTABLE), and ext4's data journal (CAP_SYS_RESOURCE)."""


FLAGS: Final = FlagsCommand(0x80086601, 0x40086602, 4, 0x10 | 0x20 | 0x4000)
"""FS_IOC_GETFLAGS, FS_IOC_SETFLAGS; FS_IMMUTABLE_FL, FS_APPEND_FL, FS_JOURNAL_DATA_FL."""

FSXATTR: Final = FlagsCommand(0x801C581F, 0x401C5820, 28, 0x8 | 0x10)
"""FS_IOC_FSGETXATTR, FS_IOC_FSSETXATTR (struct fsxattr); FS_XFLAG_IMMUTABLE, FS_XFLAG_APPEND."""


@dataclass(frozen=True, slots=True)
class NewAttributes:
    """The attributes that ``setattr`` sets; None leaves a field alone."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


NO_ATTRIBUTES: Final = NewAttributes()


def set_attributes(fd: int, io_fd: int, new: NewAttributes) -> tuple[os.stat_result, os.stat_result]:
    """Set attributes of the object of ``fd`` (O_PATH). Returns its attributes before and after.

    ``io_fd`` is a descriptor that has it open for writing, or -1. It can be truncated through that even
    if its mode no longer permits it.
    """
    path = f"/proc/self/fd/{fd}"
    before = os.fstat(fd)
    if new.uid is not None or new.gid is not None:
        os.chown(path, -1 if new.uid is None else new.uid, -1 if new.gid is None else new.gid)
    if new.size is not None:
        os.truncate(path if io_fd < 0 else io_fd, new.size)
    if new.mode is not None:  # after what clears set-uid bits
        os.chmod(path, stat_module.S_IMODE(new.mode))
    if new.atime_ns is not None or new.mtime_ns is not None:
        syscalls.utimens(path, new.atime_ns, new.mtime_ns)
    return before, os.fstat(fd)


def without_set_id(st: os.stat_result, caller: Caller) -> int | None:
    """Compute the permissions after an unprivileged caller's change of the data; None if the same.

    A set-gid bit without execution for the group stays for the group's members: the kernel's
    ``setattr_should_drop_sgid`` (Linux 6.2).
    """
    mode = st.st_mode
    if not mode & (stat_module.S_ISUID | stat_module.S_ISGID) or not stat_module.S_ISREG(mode):
        return None
    cleared = mode & ~stat_module.S_ISUID
    if mode & stat_module.S_ISGID and (mode & stat_module.S_IXGRP or not caller.in_group(st.st_gid)):
        cleared &= ~stat_module.S_ISGID
    return None if cleared == mode else stat_module.S_IMODE(cleared)


def list_xattrs(path: str) -> list[bytes]:
    """List the names of extended attributes."""
    return [os.fsencode(name) for name in os.listxattr(path)]


def access_acl(fd: int) -> bytes:
    """Read the POSIX ACL of an open file; empty if it has none, or its file system supports none."""
    try:
        return os.getxattr(fd, ACCESS_ACL)
    except OSError as exc:
        if exc.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return b""
        raise


def change_xattr(
    fd: int,
    name: bytes,
    value: bytes | None,
    flags: int = 0,
    clears_set_gid: Callable[[os.stat_result], bool] = lambda _: False,
) -> tuple[os.stat_result, os.stat_result]:
    """Set an extended attribute, or remove it if ``value`` is None.

    ``flags`` are 0, or XATTR_CREATE or XATTR_REPLACE. Returns the file's attributes before and after.
    ``clears_set_gid`` says of the attributes after whether an access ACL clears the set-gid bit.
    """
    path = f"/proc/self/fd/{fd}"
    before = os.fstat(fd)
    if value is None:
        os.removexattr(path, name)
        return before, os.fstat(fd)
    os.setxattr(path, name, value, flags)
    after = os.fstat(fd)
    if after.st_mode & stat_module.S_ISGID and clears_set_gid(after):
        os.chmod(path, stat_module.S_IMODE(after.st_mode) & ~stat_module.S_ISGID)
        after = os.fstat(fd)
    return before, after


def set_flags(
    fd: int,
    command: FlagsCommand,
    value: bytes,
    acting: Callable[[], AbstractContextManager[None]],
    *,
    privileged: bool,
) -> tuple[os.stat_result, os.stat_result]:
    """Set the flags of chattr(1), or what project quotas use, of an open file.

    ``acting`` makes this thread act as the requester, so that the source checks what that may do.
    Where it cannot, and for what fsuid does not decide, only a ``privileged`` requester may change
    some flags. Returns the file's attributes before and after.
    """
    before = os.fstat(fd)
    if not privileged:
        old = fcntl.ioctl(fd, command.getter, bytes(len(value)))
        changed = int.from_bytes(old[:4], sys.byteorder) ^ int.from_bytes(value[:4], sys.byteorder)
        if changed & command.privileged:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
    with acting():
        fcntl.ioctl(fd, command.setter, value)
    return before, os.fstat(fd)


def has_default_acl(directory_fd: int) -> bool:
    """Tell whether a directory has a default ACL, which sets the permissions of what is made in it."""
    try:
        return bool(os.getxattr(f"/proc/self/fd/{directory_fd}", "system.posix_acl_default"))
    except OSError as exc:
        if exc.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return False
        raise
