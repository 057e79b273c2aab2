"""Define the part of the FUSE wire protocol that cleanfs uses, with the names of linux/fuse.h.

Source: include/uapi/linux/fuse.h. Fields are in native byte order.
"""

import struct
from typing import Final

FUSE_LOOKUP: Final = 1
FUSE_FORGET: Final = 2
FUSE_SETATTR: Final = 4
FUSE_UNLINK: Final = 10
FUSE_OPEN: Final = 14
FUSE_RELEASE: Final = 18
FUSE_SETXATTR: Final = 21
FUSE_FLUSH: Final = 25
FUSE_INIT: Final = 26
FUSE_GETLK: Final = 31
FUSE_SETLK: Final = 32
FUSE_SETLKW: Final = 33
FUSE_CREATE: Final = 35
FUSE_INTERRUPT: Final = 36
FUSE_IOCTL: Final = 39
FUSE_BATCH_FORGET: Final = 42
FUSE_FALLOCATE: Final = 43
FUSE_LSEEK: Final = 46
FUSE_COPY_FILE_RANGE: Final = 47
FUSE_TMPFILE: Final = 51
FUSE_STATX: Final = 52
FUSE_COPY_FILE_RANGE_64: Final = 53

OPCODES: Final = {
    1: "lookup", 2: "forget", 3: "getattr", 4: "setattr", 5: "readlink", 6: "symlink", 8:
    "mknod", 9: "mkdir", 10: "unlink", 11: "rmdir", 12: "rename", 13: "link", 14: "open", 15:
    "read", 16: "write", 17: "statfs", 18: "release", 20: "fsync", 21: "setxattr", 22:
    "getxattr", 23: "listxattr", 24: "removexattr", 25: "flush", 26: "init", 27: "opendir", 28:
    "readdir", 29: "releasedir", 30: "fsyncdir", 31: "getlk", 32: "setlk", 33: "setlkw", 34: "access",
    35: "create", 36: "interrupt", 37: "bmap", 38: "destroy", 39: "ioctl", 40: "poll", 41:
    "notify_reply", 42: "batch_forget", 43: "fallocate", 44: "readdirplus", 45: "rename2", 46:
    "lseek", 47: "copy_file_range", 48: "setupmapping", 49: "removemapping", 50: "syncfs", 51:
    "tmpfile", 52: "statx", 53: "copy_file_range_64",
}  # fmt: skip
"""The names of all requests, in small letters, by opcode."""

FUSE_POSIX_LOCKS: Final = 1 << 1
FUSE_DONT_MASK: Final = 1 << 6
FUSE_FLOCK_LOCKS: Final = 1 << 10
FUSE_AUTO_INVAL_DATA: Final = 1 << 12
FUSE_PARALLEL_DIROPS: Final = 1 << 18
FUSE_EXPLICIT_INVAL_DATA: Final = 1 << 25
FUSE_HANDLE_KILLPRIV_V2: Final = 1 << 28
FUSE_SETXATTR_EXT: Final = 1 << 29
FUSE_INIT_EXT: Final = 1 << 30
FUSE_OVER_IO_URING: Final = 1 << 41
"""Of Linux 6.14. Flags from bit 32 on are in ``flags2``, with FUSE_INIT_EXT."""

FATTR_KILL_SUIDGID: Final = 1 << 11
"""In ``valid`` of a SETATTR that truncates: the requester lacks CAP_FSETID, so set-id bits must go. One
that changes the owner always has it."""

FUSE_OPEN_KILL_SUIDGID: Final = 1 << 0
"""In ``open_flags``, of an open with O_TRUNC: the opener lacks CAP_FSETID, so set-id bits must go."""

FUSE_WRITE_CACHE: Final = 1 << 0
"""In ``write_flags``: the kernel writes pages back; no process is known that writes."""

FUSE_WRITE_KILL_SUIDGID: Final = 1 << 2
"""In ``write_flags``: the writer lacks CAP_FSETID, so set-id bits must go."""

FUSE_SETXATTR_ACL_KILL_SGID: Final = 1 << 0
"""In ``setxattr_flags``: the access ACL is set by a process outside the file's group."""

FUSE_IOCTL_DIR: Final = 1 << 4
"""In ``flags`` of an IOCTL: ``fh`` is that of a directory."""

FUSE_LK_FLOCK: Final = 1 << 0
"""In ``lk_flags``: a lock of flock(2), not of fcntl(2)."""

FOPEN_DIRECT_IO: Final = 1 << 0
FOPEN_KEEP_CACHE: Final = 1 << 1

FUSE_NOTIFY_INVAL_INODE: Final = 2
FUSE_NOTIFY_INVAL_ENTRY: Final = 3

FUSE_EXPIRE_ONLY: Final = 1

FUSE_IN_HEADER: Final = struct.Struct("=IIQQIIIHH")
"""struct fuse_in_header: len, opcode, unique, nodeid, uid, gid, pid, total_extlen, padding.

``pid`` is the id of the requesting thread.
"""

FUSE_OUT_HEADER: Final = struct.Struct("=IiQ")
"""struct fuse_out_header: len, error, unique. In a notification: its code as ``error``, and unique
0."""

FUSE_INIT_IN: Final = struct.Struct("=IIII")
"""The beginning of struct fuse_init_in: major, minor, max_readahead, flags."""

FUSE_INIT_OUT: Final = struct.Struct("=IIII")
"""The beginning of struct fuse_init_out: major, minor, max_readahead, flags."""

FUSE_INIT_IN_FLAGS2: Final = 16
"""The offset of ``flags2``, 32 bits, in struct fuse_init_in (Linux 5.17)."""

FUSE_INIT_OUT_FLAGS2: Final = 32
"""The offset of ``flags2``, 32 bits, in struct fuse_init_out."""

FUSE_FLAGS2: Final = struct.Struct("=I")

FUSE_FORGET_IN: Final = struct.Struct("=Q")
"""struct fuse_forget_in: nlookup."""

FUSE_BATCH_FORGET_IN: Final = struct.Struct("=II")
"""struct fuse_batch_forget_in: count, dummy. As many struct fuse_forget_one follow."""

FUSE_FORGET_ONE: Final = struct.Struct("=QQ")
"""struct fuse_forget_one: nodeid, nlookup."""

FUSE_INTERRUPT_IN: Final = struct.Struct("=Q")
"""struct fuse_interrupt_in: unique of the interrupted request."""

FUSE_NOTIFY_INVAL_INODE_OUT: Final = struct.Struct("=Qqq")
"""struct fuse_notify_inval_inode_out: ino, off (negative: attributes alone), len (0: to the end)."""

FUSE_NOTIFY_INVAL_ENTRY_OUT: Final = struct.Struct("=QII")
"""struct fuse_notify_inval_entry_out: parent, namelen, flags. The name follows, with a zero byte."""

FUSE_ENTRY_OUT: Final = struct.Struct("=QQQQII")
"""The beginning of struct fuse_entry_out: nodeid, generation, entry_valid, attr_valid,
entry_valid_nsec, attr_valid_nsec. A struct fuse_attr follows."""

FUSE_ATTR: Final = struct.Struct("=QQQQQQIIIIIIIIII")
"""struct fuse_attr: ino, size, blocks, atime, mtime, ctime, atimensec, mtimensec, ctimensec, mode,
nlink, uid, gid, rdev, blksize, flags."""

FUSE_ATTR_OUT: Final = struct.Struct("=QII")
"""The beginning of struct fuse_attr_out: attr_valid, attr_valid_nsec, dummy. A struct fuse_attr
follows."""

FUSE_SETATTR_IN: Final = struct.Struct("=IIQQQqqqIIIIIIII")
"""struct fuse_setattr_in: valid, padding, fh, size, lock_owner, atime, mtime, ctime, atimensec,
mtimensec, ctimensec, mode, unused4, uid, gid, unused5."""

FATTR_MODE: Final = 1 << 0
FATTR_UID: Final = 1 << 1
FATTR_GID: Final = 1 << 2
FATTR_SIZE: Final = 1 << 3
FATTR_ATIME: Final = 1 << 4
FATTR_MTIME: Final = 1 << 5
FATTR_FH: Final = 1 << 6
FATTR_ATIME_NOW: Final = 1 << 7
FATTR_MTIME_NOW: Final = 1 << 8

FUSE_OPEN_IN: Final = struct.Struct("=II")
"""struct fuse_open_in: flags, open_flags."""

FUSE_CREATE_IN: Final = struct.Struct("=IIII")
"""struct fuse_create_in: flags, mode, umask, open_flags. A name follows."""

FUSE_OPEN_OUT: Final = struct.Struct("=QII")
"""struct fuse_open_out: fh, open_flags, backing_id."""

FUSE_RELEASE_IN: Final = struct.Struct("=QIIQ")
"""struct fuse_release_in: fh, flags, release_flags, lock_owner."""

FUSE_FLUSH_IN: Final = struct.Struct("=QIIQ")
"""struct fuse_flush_in: fh, unused, padding, lock_owner."""

FUSE_SETXATTR_IN: Final = struct.Struct("=IIII")
"""struct fuse_setxattr_in: size, flags, setxattr_flags, padding. Name and value follow. Without
FUSE_SETXATTR_EXT it ends after ``flags`` (FUSE_COMPAT_SETXATTR_IN_SIZE)."""

FUSE_COMPAT_SETXATTR_IN: Final = struct.Struct("=II")

FUSE_LK_IN: Final = struct.Struct("=QQQQIIII")
"""struct fuse_lk_in: fh, owner, start, end (inclusive), type, pid, lk_flags, padding."""

FUSE_LK_OUT: Final = struct.Struct("=QQII")
"""struct fuse_lk_out: start, end, type, pid."""

FUSE_IOCTL_IN: Final = struct.Struct("=QIIQII")
"""struct fuse_ioctl_in: fh, flags, cmd, arg, in_size, out_size. The input follows."""

FUSE_IOCTL_OUT: Final = struct.Struct("=iIII")
"""struct fuse_ioctl_out: result, flags, in_iovs, out_iovs. The output follows."""

FUSE_FALLOCATE_IN: Final = struct.Struct("=QQQII")
"""struct fuse_fallocate_in: fh, offset, length, mode, padding."""

FUSE_LSEEK_IN: Final = struct.Struct("=QQII")
"""struct fuse_lseek_in: fh, offset, whence, padding."""

FUSE_LSEEK_OUT: Final = struct.Struct("=Q")
"""struct fuse_lseek_out: offset."""

FUSE_COPY_FILE_RANGE_IN: Final = struct.Struct("=QQQQQQQ")
"""struct fuse_copy_file_range_in: fh_in, off_in, nodeid_out, fh_out, off_out, len, flags."""

FUSE_COPY_FILE_RANGE_OUT: Final = struct.Struct("=Q")
"""struct fuse_copy_file_range_out: bytes_copied."""

FUSE_WRITE_OUT: Final = struct.Struct("=II")
"""struct fuse_write_out: size, padding."""

FUSE_STATX_IN: Final = struct.Struct("=IIQII")
"""struct fuse_statx_in: getattr_flags, reserved, fh, sx_flags, sx_mask."""

FUSE_STATX_OUT: Final = struct.Struct("=QII16x")
"""The beginning of struct fuse_statx_out: attr_valid, attr_valid_nsec, flags. A struct fuse_statx
follows."""

FUSE_SX: Final = struct.Struct("=IIQIIIHHQQQQqIiqIiqIiqIiIIII112x")
"""struct fuse_statx: mask, blksize, attributes, nlink, uid, gid, mode, spare, ino, size, blocks,
attributes_mask; seconds, nanoseconds and a reserved field of atime, btime, ctime and mtime; major and
minor numbers of rdev and dev."""
