"""Change files through the mount."""

import ctypes
import errno
import fcntl
import mmap
import os
import time

from .content import CELL, is_zero
from .model import Slot
from .plan import MAPPED, PLAIN
from .process import Handle, IllegalError, Process

_libc = ctypes.CDLL(None, use_errno=True)

FICLONE = 0x40049409
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 1, 2, 16
CELLS_PER_BLOCK = 4


def writable(p: Process) -> tuple[Handle, Slot] | None:
    """Return an open file to write to, or a new one."""
    found = [h for h in p.handles if h.flags & os.O_ACCMODE == os.O_RDWR and h.known is not None]
    if found and p.choose.random() < 0.7:
        handle = p.choose.choice(found)
    else:
        name = p.choose.randrange(len(p.model.names))
        more = p.choose.choice((0, 0, 0, os.O_SYNC, os.O_DSYNC, os.O_NOATIME))
        opened = p.open_settled(name, os.O_RDWR | more)
        if opened is None:
            return None
        handle = opened
    slot = handle.known
    return None if slot is None else (handle, slot)


def overwrite(p: Process) -> None:
    """Write within the file."""
    if (found := writable(p)) is None:
        return
    handle, slot = found
    many = p.choose.choice((1, 1, 2, 3, 8, 40, 130))
    at, how = p.choose.random(), p.choose.choice((_pwrite, _pwrite, _pwritev, _direct, _copy, _splice))
    size = slot.size_in_cells()
    if size == 0:
        return
    first = int(at * size)
    stop = min(first + many, size)
    if how is _direct:
        first -= first % CELLS_PER_BLOCK
        stop = first + max(1, (stop - first) // CELLS_PER_BLOCK) * CELLS_PER_BLOCK
        if slot.kind == MAPPED or slot.shift != CELL or stop > size:
            how, stop = _pwrite, min(stop, size)
    with p.locks.cells(slot, first, stop):
        if stop > slot.size_in_cells():
            return
        offset = slot.bound(first)
        p.journal.note(f"{how.__name__[1:]} {handle.label} cells {first}-{stop} at {offset}")
        p.change(slot, first, stop, lambda data: how(p, handle, slot, offset, data))
        p.journal.note(f"{how.__name__[1:]} {handle.label} cells {first}-{stop} done")
    p.counts[f"write: {how.__name__[1:]}"] += 1


def _pwrite(p: Process, handle: Handle, slot: Slot, offset: int, data: bytes) -> None:
    _all_written(os.pwrite(handle.fd, data, offset), data)


def _pwritev(p: Process, handle: Handle, slot: Slot, offset: int, data: bytes) -> None:
    middle = len(data) // 3
    _all_written(os.pwritev(handle.fd, [data[:middle], data[middle:]], offset), data)


def _direct(p: Process, handle: Handle, slot: Slot, offset: int, data: bytes) -> None:
    fd = p.reopened(handle, slot, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            _all_written(os.pwrite(fd, buffer, offset), data)
    finally:
        os.close(fd)


def _stash(p: Process, data: bytes) -> int:
    """Make a private file with the data, on the same file system."""
    fd = os.open(
        f"{p.plan.mount}/.stash-{p.index}", os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600
    )
    _all_written(os.pwrite(fd, data, 0), data)
    return fd


def _copy(p: Process, handle: Handle, slot: Slot, offset: int, data: bytes) -> None:
    """Do what cp does: clone, else ``copy_file_range``."""
    stash = _stash(p, data)
    try:
        try:
            fcntl.ioctl(stash, FICLONE, stash)
        except OSError:
            p.counts["reflinks refused"] += 1
        done = 0
        while done < len(data):
            got = os.copy_file_range(stash, handle.fd, len(data) - done, done, offset + done)
            if got == 0:
                raise IllegalError(f"copy_file_range stopped after {done} of {len(data)} bytes")
            done += got
    finally:
        os.close(stash)


def _splice(p: Process, handle: Handle, slot: Slot, offset: int, data: bytes) -> None:
    """Copy by ``sendfile`` from another file."""
    stash = _stash(p, data)
    try:
        os.lseek(handle.fd, offset, os.SEEK_SET)
        done = 0
        while done < len(data):
            got = os.sendfile(handle.fd, stash, done, len(data) - done)
            if got == 0:
                raise IllegalError(f"sendfile stopped after {done} of {len(data)} bytes")
            done += got
    finally:
        os.close(stash)


def _all_written(count: int, data: bytes) -> None:
    if count != len(data):
        raise IllegalError(f"short write: {count} of {len(data)} bytes")


def extend(p: Process) -> None:
    """Append, or write beyond the end."""
    if (found := writable(p)) is None:
        return
    handle, slot = found
    many, gap = p.choose.choice((1, 1, 2, 5, 20, 60)), p.choose.choice((0, 0, 0, 1, 7))
    append = gap == 0 and p.choose.random() < 0.7
    old = slot.size_in_cells()
    if old + gap >= slot.cells:
        return
    if slot.kind == MAPPED and slot.bound(old) % mmap.PAGESIZE:
        return  # docs/trust.md: Linux 6.18 loses it if a mapping has something dirty in that page
    with p.locks.cells(slot, old, None):
        if slot.size_in_cells() != old:
            return
        first = old + gap
        stop = min(first + many, slot.cells)
        # Opened after all that the source did to the size.
        fd = p.reopened(handle, slot, os.O_RDWR | (os.O_APPEND if append else 0))
        # The kernel appends where it sees the end, and requests the size only if a program looks.
        os.fstat(fd)
        offset = slot.bound(first)

        def call(data: bytes) -> None:
            if append:
                _all_written(os.write(fd, data), data)
            else:
                _all_written(os.pwrite(fd, data, offset), data)

        how = "append" if append else "extend"
        p.journal.note(f"{how} {handle.label} cells {first}-{stop} at {offset}")
        try:
            p.change(slot, first, stop, call, size=slot.bound(stop))
        finally:
            os.close(fd)
        p.journal.note(f"{how} {handle.label} cells {first}-{stop} done")
    p.counts[f"write: {how}"] += 1


def cut(p: Process) -> None:
    """Truncate, to less or to more."""
    if (found := writable(p)) is None:
        return
    handle, slot = found
    at, how = p.choose.random(), p.choose.choice(("ftruncate", "truncate", "O_TRUNC", "ftruncate"))
    old = slot.size_in_cells()
    new = int(at * (min(old * 2, slot.cells) + 1))
    if how == "O_TRUNC":
        new = 0
    if slot.kind != PLAIN and new < old:
        return
    with p.locks.cells(slot, min(new, old), None):
        if slot.size_in_cells() != old:
            return
        fd = p.reopened(handle, slot, os.O_RDWR)
        size = slot.bound(new) if new else 0

        def call(_: bytes) -> None:
            if how == "ftruncate":
                os.ftruncate(fd, size)
            elif how == "truncate":
                os.truncate(f"/proc/self/fd/{fd}", size)
            else:
                os.close(os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_TRUNC))

        p.journal.note(f"{how} {handle.label} {old} to {new} cells, {size} bytes")
        try:
            stop = slot.cells if new < old else new
            p.change(slot, new, stop, call, zeros=True, size=size)
        finally:
            os.close(fd)
        p.journal.note(f"{how} {handle.label} done")
    p.counts["truncate down" if new < old else "truncate up"] += 1


def punch(p: Process) -> None:
    """Punch a hole, or write zeros, where the file system can."""
    if (found := writable(p)) is None:
        return
    handle, slot = found
    size = slot.size_in_cells()
    if size == 0 or slot.kind == MAPPED:
        return
    first = int(p.choose.random() * size)
    stop = min(first + p.choose.choice((1, 4, 16)), size)
    kind = p.choose.choice(("punch", "zero"))
    mode = FALLOC_FL_KEEP_SIZE | (FALLOC_FL_PUNCH_HOLE if kind == "punch" else FALLOC_FL_ZERO_RANGE)
    with p.locks.cells(slot, first, stop):
        if stop > slot.size_in_cells():
            return
        offset, length = slot.bound(first), slot.bound(stop) - slot.bound(first)
        if not p.plan.holes:
            if fallocate(handle.fd, mode, offset, length) != errno.EOPNOTSUPP:
                raise IllegalError("fallocate was refused at first, and now it is not")
            p.counts["holes refused"] += 1
            return
        p.journal.note(f"{kind} {handle.label} cells {first}-{stop}")
        p.change(
            slot, first, stop, lambda _: must_fallocate(handle.fd, mode, offset, length), zeros=True
        )
    p.counts[kind] += 1


def reserve(p: Process) -> None:
    """Reserve space beyond the end, which changes nothing that is seen."""
    if (found := writable(p)) is None or not p.plan.holes:
        return
    must_fallocate(found[0].fd, FALLOC_FL_KEEP_SIZE, p.choose.randrange(1 << 17), 1 << 16)
    p.counts["space reserved"] += 1


def seek(p: Process) -> None:
    """SEEK_DATA must find what was written, also if the kernel has not written it back yet."""
    if (found := writable(p)) is None:
        return
    handle, slot = found
    size = slot.size_in_cells()
    if size == 0:
        return
    cell = int(p.choose.random() * size)
    with p.locks.cells(slot, cell, cell + 1):
        if cell >= slot.size_in_cells() or is_zero(slot.latest.get(cell, cell + 1)[0]):
            return
        offset = slot.bound(cell)
        p.journal.note(f"seek {handle.label} cell {cell} at {offset}")
        data = os.lseek(handle.fd, offset, os.SEEK_DATA)
        if data != offset:
            raise IllegalError(f"{handle.label}: SEEK_DATA skipped cell {cell}: {offset} to {data}")
    p.counts["seek"] += 1


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    """Return what became of a fallocate: its errno, 0 if it was done."""
    off_t = ctypes.c_int64
    failed = _libc.fallocate(fd, mode, off_t(offset), off_t(length))
    return ctypes.get_errno() if failed else 0


def must_fallocate(fd: int, mode: int, offset: int, length: int) -> None:
    """Call it. Raises OSError."""
    if number := fallocate(fd, mode, offset, length):
        raise OSError(number, os.strerror(number))


def store(p: Process) -> None:
    """Store through a mapping, and perhaps msync."""
    if (found := writable(p)) is None:
        return
    handle, slot = found
    size = slot.size.floor_value
    if slot.kind != MAPPED or size == 0:
        return
    if handle.mapping is None or p.choose.random() < 0.1:
        if handle.mapping is not None:
            handle.mapping.close()
        handle.mapping = mmap.mmap(handle.fd, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    mapped = handle.mapping
    cells = (len(mapped) - slot.shift) // CELL + 1
    first = int(p.choose.random() * cells)
    stop = min(first + p.choose.choice((1, 1, 2, 8, 30)), cells)
    sync = p.choose.random() < 0.3
    with p.locks.cells(slot, first, stop):

        def call(data: bytes) -> None:
            mapped[slot.bound(first) : slot.bound(stop)] = data

        p.journal.note(f"store {handle.label} cells {first}-{stop}")
        p.change(slot, first, stop, call)
        p.journal.note(f"store {handle.label} cells {first}-{stop} done")
    p.counts["write: mapping"] += 1
    if sync:
        mapped.flush()
        p.journal.note(f"msync {handle.label} done")
        p.counts["msync"] += 1


def sync(p: Process) -> None:
    """Make the file durable."""
    if (found := writable(p)) is None:
        return
    p.choose.choice((os.fsync, os.fdatasync))(found[0].fd)
    p.counts["fsync"] += 1


def attributes(p: Process) -> None:
    """Change attributes: chmod, utimes set back, an extended attribute."""
    if (found := writable(p)) is None:
        return
    handle, _ = found
    which = p.choose.randrange(3)
    if which == 0:
        os.fchmod(handle.fd, p.choose.choice((0o600, 0o644, 0o755)))
    elif which == 1:
        st = os.fstat(handle.fd)
        back = p.choose.choice((0, 10**6, 10**9))
        os.utime(handle.fd, ns=(st.st_atime_ns, st.st_mtime_ns - back))
    else:
        os.setxattr(handle.fd, "user.soak", b"%d" % time.monotonic_ns())
    p.counts["attributes set"] += 1


def close(p: Process) -> None:
    """Close some open file."""
    if p.handles:
        p.close(p.choose.choice(p.handles))


OPERATIONS = {
    overwrite: 20, extend: 6, cut: 3, punch: 3, reserve: 1, seek: 3, store: 6, sync: 1,
    attributes: 2, close: 2,
}  # fmt: skip
"""With how often each is done."""
