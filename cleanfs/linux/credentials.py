"""Acting in the source as the caller of a request: one thread, for a system call or two.

What is made that way belongs to the caller from the first moment: there is no chown afterwards, which
could hit what somebody else has put in its place. And what is removed is removed with the caller's
rights in a sticky directory, which are checked by the source against what is there now; the kernel has
checked them for the mount, against attributes that may be as old as the attribute timeout.

The thread's file system uid and gid are changed (setfsuid(2)). With the uid the kernel takes
capabilities away; those that stand for checks that were made already are taken back. CAP_FOWNER is not:
it is what would make a sticky directory like any other.
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
"""Permissions, set-id bits and device nodes were the kernel's to check, with the caller's groups."""

NEEDED: Final = KEPT | 1 << CAP_SETGID | 1 << CAP_SETUID

NOBODY: Final = ctypes.c_uint32(-1)
"""No id: only asks."""


class _CapHeader(ctypes.Structure):
    """``struct __user_cap_header_struct``."""

    _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]


class _CapData(ctypes.Structure):
    """``struct __user_cap_data_struct``; two of them make 64 bits."""

    _fields_ = [
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    ]


@functools.cache
def can_act() -> bool:
    """Whether this process may act as others: root, with the capabilities that it takes."""
    if os.geteuid() != 0:
        return False
    low = _capabilities()[0]
    return bool(low.effective & NEEDED == NEEDED)


@contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    """The block, without an await, with the caller's file system ids. Only if ``can_act``.

    Raises PermissionError, and nothing has changed, for ids that are not of this user namespace.
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
        _set(_libc.setfsuid, ctypes.c_uint32(own_uid))  # the kernel gives the capabilities back
        _set(_libc.setfsgid, ctypes.c_uint32(own_gid))


def _capabilities() -> "ctypes.Array[_CapData]":
    data = (_CapData * 2)()
    if _libc.capget(ctypes.byref(_CapHeader(CAPABILITY_VERSION_3, 0)), data):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return data


def _set(call: "ctypes._FuncPointer", number: ctypes.c_uint32) -> int:
    """``setfsuid`` or ``setfsgid``: the id from before. It does not tell whether it did anything."""
    before: int = call(number)
    return before & 0xFFFFFFFF


def _change(call: "ctypes._FuncPointer", number: int) -> None:
    _set(call, ctypes.c_uint32(number))
    if _set(call, NOBODY) != number:
        raise PermissionError(1, os.strerror(1))
