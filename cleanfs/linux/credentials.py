"""Let one thread act in the source as the requester, for a system call or two.

A new file belongs to the requester from the first moment. A chown afterwards could hit another file
that somebody put in its place. A removal in a sticky directory uses the requester's rights, too: the
source checks them against what is there now. The kernel checked them for the mount, against attributes
that may be as old as the attribute timeout.

The thread's file system uid and gid change (setfsuid(2)). With the uid, the kernel drops capabilities;
the thread raises those again whose checks the kernel has already made. It does not raise CAP_FOWNER,
which would make a sticky directory like any other.
"""

import ctypes
import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)

CAPABILITY_VERSION_3: Final = 0x20080522

CAP_DAC_OVERRIDE: Final = 1
CAP_DAC_READ_SEARCH: Final = 2
CAP_FSETID: Final = 4
CAP_SETGID: Final = 6
CAP_SETUID: Final = 7
CAP_MKNOD: Final = 27

KEPT: Final = 1 << CAP_DAC_OVERRIDE | 1 << CAP_DAC_READ_SEARCH | 1 << CAP_FSETID | 1 << CAP_MKNOD
"""The kernel has checked permissions, set-id bits and device nodes, with the requester's groups."""

NEEDED: Final = KEPT | 1 << CAP_SETGID | 1 << CAP_SETUID

NOBODY: Final = ctypes.c_uint32(-1)
"""An invalid id: setfsuid(2) and setfsgid(2) then only return the current one."""


class _CapHeader(ctypes.Structure):
    """Mirror ``struct __user_cap_header_struct``."""

    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapData(ctypes.Structure):
    """Mirror ``struct __user_cap_data_struct``, half of the 64-bit sets."""

    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


@functools.cache
def can_act() -> bool:
    """Return whether this process may act as others: as root, with the capabilities needed."""
    if os.geteuid() != 0:
        return False
    low = _capabilities()[0]
    return bool(low.effective & NEEDED == NEEDED)


@contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    """Run a block, without an await, under the requester's file system ids. Requires ``can_act``.

    Raises PermissionError for ids outside this user namespace; nothing has changed then.
    """
    own_uid, own_gid = _set(_libc.setfsuid, NOBODY), _set(_libc.setfsgid, NOBODY)
    if (own_uid, own_gid) == (uid, gid):
        yield
        return
    try:
        _change(_libc.setfsgid, gid)
        if uid != own_uid:
            _change(_libc.setfsuid, uid)
            data = _capabilities()
            data[0].effective |= data[0].permitted & KEPT
            if _libc.capset(ctypes.byref(_CapHeader(CAPABILITY_VERSION_3, 0)), data):
                number = ctypes.get_errno()
                raise OSError(number, os.strerror(number))
        yield
    finally:
        _set(_libc.setfsuid, ctypes.c_uint32(own_uid))  # the kernel restores the capabilities
        _set(_libc.setfsgid, ctypes.c_uint32(own_gid))


def _capabilities() -> "ctypes.Array[_CapData]":
    data = (_CapData * 2)()
    if _libc.capget(ctypes.byref(_CapHeader(CAPABILITY_VERSION_3, 0)), data):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return data


def _set(call: "ctypes._FuncPointer", number: ctypes.c_uint32) -> int:
    """Call ``setfsuid`` or ``setfsgid`` and return the previous id. Neither reports a failure."""
    before: int = call(number)
    return before & 0xFFFFFFFF


def _change(call: "ctypes._FuncPointer", number: int) -> None:
    _set(call, ctypes.c_uint32(number))
    if _set(call, NOBODY) != number:
        raise PermissionError(1, os.strerror(1))
