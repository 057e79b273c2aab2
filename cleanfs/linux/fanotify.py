"""Wrap the calls of fanotify(7) and parse its events: a thin layer without state or policy.

It covers groups that report file handles and names (``FAN_REPORT_FID``, ``FAN_REPORT_DFID_NAME``).
Their events identify an object, or a directory and a name in it, by file system id and file handle. The
kernel opens no fd for them.
"""

import ctypes
import os
import struct
import sys
from dataclasses import dataclass
from typing import Final

_libc = ctypes.CDLL(None, use_errno=True)

FAN_CLOEXEC: Final = 0x1
FAN_NONBLOCK: Final = 0x2
FAN_REPORT_FID: Final = 0x200
FAN_REPORT_DIR_FID: Final = 0x400
FAN_REPORT_NAME: Final = 0x800

FAN_MARK_ADD: Final = 0x1
FAN_MARK_REMOVE: Final = 0x2
FAN_MARK_INODE: Final = 0x0
FAN_MARK_FILESYSTEM: Final = 0x100
FAN_MARK_EVICTABLE: Final = 0x200

FAN_MODIFY: Final = 0x2
FAN_ATTRIB: Final = 0x4
FAN_CLOSE_WRITE: Final = 0x8
FAN_MOVED_FROM: Final = 0x40
FAN_MOVED_TO: Final = 0x80
FAN_CREATE: Final = 0x100
FAN_DELETE: Final = 0x200
FAN_DELETE_SELF: Final = 0x400
FAN_MOVE_SELF: Final = 0x800
FAN_Q_OVERFLOW: Final = 0x4000
FAN_ONDIR: Final = 0x40000000

NAMES_CHANGED: Final = FAN_CREATE | FAN_DELETE | FAN_MOVED_FROM | FAN_MOVED_TO
"""Directory events: a name was added or removed. The kernel may merge several for one name."""

OBJECT_CHANGED: Final = FAN_MODIFY | FAN_ATTRIB | FAN_CLOSE_WRITE | FAN_DELETE_SELF | FAN_MOVE_SELF
"""Events on an object itself.

A write through a mapping has no event. The last close of a file that was open for writing has one, and
a mapping counts as open until it is gone.
"""

METADATA: Final = struct.Struct("=IBBHQii")
"""struct fanotify_event_metadata: event_len, vers, reserved, metadata_len, mask, fd, pid."""

INFO: Final = struct.Struct("=BBHIIIi")
"""struct fanotify_event_info_fid with struct file_handle: info_type, pad, len, the two words of fsid,
handle_bytes, handle_type. The handle follows, then the name, terminated by a zero byte."""

INFO_HEADER: Final = struct.Struct("=BBH")

INFO_FID: Final = 1
INFO_DFID_NAME: Final = 2
INFO_DFID: Final = 3

METADATA_VERSION: Final = 3
MAX_EVENTS_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Place:
    """Identifies an object: the id of its file system (as in ``statvfs``) and its file handle.

    The handle has the form that ``syscalls.name_to_handle`` returns.
    """

    fsid: int
    handle: bytes


@dataclass(frozen=True, slots=True)
class Event:
    """Describes one change."""

    mask: int
    pid: int
    """The process (thread group) that made it; 0 if outside our pid namespace or hidden from an
    unprivileged group."""
    subject: Place | None
    """The object itself."""
    directory: Place | None
    name: bytes
    """The directory and name at which the object is, or was."""


def init() -> int:
    """Create a non-blocking group that reports file handles and names. Raises OSError."""
    flags = FAN_CLOEXEC | FAN_NONBLOCK | FAN_REPORT_FID | FAN_REPORT_DIR_FID | FAN_REPORT_NAME
    group: int = _libc.fanotify_init(flags, os.O_RDONLY)
    if group < 0:
        _raise()
    return group


def mark(group: int, flags: int, mask: int, path: str) -> None:
    """Call ``fanotify_mark(2)``. Raises OSError."""
    name = os.fsencode(path)
    if _libc.fanotify_mark(group, ctypes.c_uint(flags), ctypes.c_uint64(mask), -100, name):
        _raise()


def _raise() -> None:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))


def parse(buffer: bytes) -> list[Event]:
    """Parse the events of one read, in order. Raises ValueError for bytes that no kernel sends."""
    events = []
    start = 0
    while start < len(buffer):
        if len(buffer) - start < METADATA.size:
            raise ValueError("an event is cut short")
        length, version, _, head, mask, _, pid = METADATA.unpack_from(buffer, start)
        if version != METADATA_VERSION:
            raise ValueError(f"events of version {version}")
        if not METADATA.size <= head <= length <= len(buffer) - start:
            raise ValueError("an event with an impossible length")
        events.append(_event(mask, pid, buffer[start + head : start + length]))
        start += length
    return events


def _event(mask: int, pid: int, infos: bytes) -> Event:
    subject = directory = None
    name = b""
    start = 0
    while start < len(infos):
        if len(infos) - start < INFO_HEADER.size:
            raise ValueError("an event's information is cut short")
        kind, _, length = INFO_HEADER.unpack_from(infos, start)
        if not INFO_HEADER.size <= length <= len(infos) - start:
            raise ValueError("an event's information has an impossible length")
        if kind in (INFO_FID, INFO_DFID, INFO_DFID_NAME):
            place, rest = _place(infos[start : start + length])
            if kind == INFO_FID:
                subject = place
            else:
                directory = place
                name = rest.partition(b"\0")[0] if kind == INFO_DFID_NAME else b""
        start += length
    # A directory's own events name it and a dot.
    if subject is None and mask & OBJECT_CHANGED:
        subject = directory
    return Event(mask, pid, subject, directory, name)


def _place(info: bytes) -> tuple[Place, bytes]:
    if len(info) < INFO.size:
        raise ValueError("a file handle is cut short")
    _, _, _, low, high, size, kind = INFO.unpack_from(info)
    if size > len(info) - INFO.size:
        raise ValueError("a file handle with an impossible length")
    body = info[INFO.size : INFO.size + size]
    handle = kind.to_bytes(4, "little", signed=True) + body
    return Place(fsid(low, high), handle), info[INFO.size + size :]


def fsid(first: int, second: int) -> int:
    """Combine the two words of a file system id into one number, as glibc's statvfs does."""
    if sys.byteorder == "little":
        return first | second << 32
    return first << 32 | second
