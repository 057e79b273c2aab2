"""Attributes of the source's files: mode, owner, size, times and extended attributes.

Plain functions over descriptors, run in worker threads. They touch no state of ours; what the caller
must know afterwards (attributes before and after) they return. All raise OSError.
"""

import errno
import os
import stat as stat_module
from dataclasses import dataclass

from cleanfs.linux import syscalls
from cleanfs.source.caller import Caller

ACCESS_ACL = b"system.posix_acl_access"


@dataclass(frozen=True, slots=True)
class NewAttributes:
    """The attributes that ``setattr`` sets; None leaves a field alone."""

    mode: int | None = None
    uid: int | None = None
    gid: int | None = None
    size: int | None = None
    atime_ns: int | None = None
    mtime_ns: int | None = None


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
    fd: int, name: bytes, value: bytes | None, caller: Caller | None = None
) -> tuple[os.stat_result, os.stat_result]:
    """Set an extended attribute, or remove it if ``value`` is None.

    Returns the file's attributes before and after. ``caller`` is the process that sets an access ACL:
    unless it is in the file's group, that clears the set-gid bit (the kernel's
    ``posix_acl_update_mode``).
    """
    path = f"/proc/self/fd/{fd}"
    before = os.fstat(fd)
    if value is None:
        os.removexattr(path, name)
        return before, os.fstat(fd)
    os.setxattr(path, name, value)
    after = os.fstat(fd)
    set_gid = after.st_mode & stat_module.S_ISGID
    if caller is not None and set_gid and not (caller.privileged or caller.in_group(after.st_gid)):
        os.chmod(path, stat_module.S_IMODE(after.st_mode) & ~stat_module.S_ISGID)
        after = os.fstat(fd)
    return before, after


def has_default_acl(directory_fd: int) -> bool:
    """Tell whether a directory has a default ACL, which sets the permissions of what is made in it."""
    try:
        return bool(os.getxattr(f"/proc/self/fd/{directory_fd}", "system.posix_acl_default"))
    except OSError as exc:
        if exc.errno in (errno.ENODATA, errno.EOPNOTSUPP):
            return False
        raise
