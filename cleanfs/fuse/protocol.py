"""Define the part of the FUSE wire protocol that cleanfs uses, with the names of linux/fuse.h.

Source: include/uapi/linux/fuse.h. Fields are in native byte order.
"""

import struct
from typing import Final

FUSE_FORGET: Final = 2
FUSE_INIT: Final = 26
FUSE_INTERRUPT: Final = 36
FUSE_BATCH_FORGET: Final = 42

OPCODES: Final = {
    1: "lookup", 2: "forget", 3: "getattr", 4: "setattr", 5: "readlink", 6: "symlink", 8:
    "mknod", 9: "mkdir", 10: "unlink", 11: "rmdir", 12: "rename", 13: "link", 14: "open", 15:
    "read", 16: "write", 17: "statfs", 18: "release", 20: "fsync", 21: "setxattr", 22:
    "getxattr", 23: "listxattr", 24: "removexattr", 25: "flush", 26: "init", 27: "opendir", 28:
    "readdir", 29: "releasedir", 30: "fsyncdir", 32: "setlk", 33: "setlkw", 34: "access", 35:
    "create", 36: "interrupt", 37: "bmap", 38: "destroy", 39: "ioctl", 40: "poll", 41:
    "notify_reply", 42: "batch_forget", 43: "fallocate", 44: "readdirplus", 45: "rename2", 46:
    "lseek", 47: "copy_file_range", 48: "setupmapping", 49: "removemapping", 50: "syncfs", 51:
    "tmpfile", 52: "statx",
}  # fmt: skip
"""The names of all requests, in small letters, by opcode."""

FUSE_DONT_MASK: Final = 1 << 6
FUSE_AUTO_INVAL_DATA: Final = 1 << 12
FUSE_PARALLEL_DIROPS: Final = 1 << 18
FUSE_EXPLICIT_INVAL_DATA: Final = 1 << 25
FUSE_HANDLE_KILLPRIV_V2: Final = 1 << 28

FUSE_OPEN_KILL_SUIDGID: Final = 1 << 0
"""In ``open_flags``, of an open with O_TRUNC: the opener lacks CAP_FSETID, so set-id bits must go."""

FUSE_WRITE_CACHE: Final = 1 << 0
"""In ``write_flags``: the kernel writes pages back; no process is known that writes."""

FUSE_WRITE_KILL_SUIDGID: Final = 1 << 2
"""In ``write_flags``: the writer lacks CAP_FSETID, so set-id bits must go."""

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
