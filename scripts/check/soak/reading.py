"""Do what changes nothing: reads of every kind, and looks at sizes and names."""

import errno
import mmap
import os
import stat as stat_module
import time

from . import rules
from .model import Slot
from .plan import MAPPED, PLAIN, SLACK
from .process import Handle, IllegalError, Process, place

BLOCK = 4096

SIZES = (1, 100, 512, 1024, 4095, 4096, 5000, 16384, 32768, 40000, 65536, 131072, 300000)


def any_handle(p: Process) -> Handle | None:
    """Return one that is open and can be read, or a new one."""
    readable = [h for h in p.handles if h.flags & os.O_ACCMODE != os.O_WRONLY]
    if readable and p.choose.random() < 0.6:
        return p.choose.choice(readable)
    return fresh(p)


def fresh(p: Process) -> Handle | None:
    """Open some name."""
    name = p.choose.randrange(len(p.model.names))
    flags = p.choose.choice((os.O_RDONLY, os.O_RDONLY, os.O_RDWR, os.O_RDONLY | os.O_DIRECT))
    if p.choose.random() < 0.3:
        return p.open_settled(name, flags)
    return p.open_anytime(name, flags)


def span(p: Process, handle: Handle) -> tuple[int, int]:
    """Choose an offset and a size; aligned if the handle is O_DIRECT."""
    slot = handle.slots[0][0]
    most = slot.bound(slot.cells)
    end = slot.size.latest if p.choose.random() < 0.9 else most
    offset = int(p.choose.random() * max(1, end))
    size = p.choose.choice(SIZES)
    if handle.flags & os.O_DIRECT or p.choose.random() < 0.3:
        offset -= offset % BLOCK
    if handle.flags & os.O_DIRECT:
        size = -(-size // BLOCK) * BLOCK
    return offset, size


def pread(p: Process) -> None:
    """Read anywhere, of any size."""
    if (handle := any_handle(p)) is None:
        return
    offset, size = span(p, handle)
    if handle.flags & os.O_DIRECT:
        p.read(handle, offset, size, "O_DIRECT", lambda: direct_read(handle.fd, offset, size))
        return
    if p.choose.random() < 0.3:
        os.posix_fadvise(handle.fd, 0, 0, os.POSIX_FADV_DONTNEED)
        p.counts["fadvise DONTNEED"] += 1
    p.read(handle, offset, size, "pread", lambda: os.pread(handle.fd, size, offset))


def direct_read(fd: int, offset: int, size: int) -> bytes:
    """Read past the kernel's page cache."""
    with mmap.mmap(-1, size) as buffer:
        return buffer[: os.preadv(fd, [buffer], offset)]


def preadv(p: Process) -> None:
    """Read into several buffers."""
    handle = any_handle(p)
    if handle is None or handle.flags & os.O_DIRECT:
        return
    offset, _ = span(p, handle)
    sizes = [p.choose.choice(SIZES) for _ in range(3)]

    def call() -> bytes:
        buffers = [bytearray(size) for size in sizes]
        got = os.preadv(handle.fd, buffers, offset)
        return b"".join(buffers)[:got]

    p.read(handle, offset, sum(sizes), "preadv", call)


def stream(p: Process) -> None:
    """Read some steps in sequence, as tar does."""
    handle = any_handle(p)
    if handle is None or handle.flags & os.O_DIRECT:
        return
    size = p.choose.choice((4096, 32768, 65536, 131072))
    for _ in range(p.choose.randrange(1, 8)):
        at = handle.position
        got = p.read(handle, at, size, "stream", lambda at=at: os.pread(handle.fd, size, at))  # type: ignore[misc]  # mypy does not infer it
        handle.position = at + got if got == size else 0
        if got < size:
            break


def whole(p: Process) -> None:
    """Open, read all, close, as cat does."""
    name = p.choose.randrange(len(p.model.names))
    handle = p.open_anytime(name, os.O_RDONLY)
    if handle is None:
        return
    size = handle.slots[0][0].bound(handle.slots[0][0].cells) + 1
    p.read(handle, 0, size, "whole file", lambda: _all(handle.fd, size))
    p.close(handle)


def _all(fd: int, size: int) -> bytes:
    # One call: what two calls find need not fit together.
    return os.pread(fd, size, 0)


def sendfile(p: Process) -> None:
    """Copy through a pipe, in the kernel."""
    handle = any_handle(p)
    if handle is None or handle.flags & os.O_DIRECT:
        return
    offset, size = span(p, handle)
    size = min(size, 65536)

    def call() -> bytes:
        memory = os.memfd_create("soak")
        try:
            got = os.sendfile(memory, handle.fd, offset, size)
            return os.pread(memory, got, 0)
        finally:
            os.close(memory)

    p.read(handle, offset, size, "sendfile", call, may_be_short=True)


def mapping(p: Process) -> None:
    """Look into a mapping of a file that nobody cuts."""
    handle = any_handle(p)
    if handle is None or handle.flags & os.O_DIRECT or handle.known is None:
        return
    slot = handle.known
    if slot.kind == PLAIN:
        return
    size = slot.size.floor_value
    if size == 0:
        return
    if handle.mapping is None or p.choose.random() < 0.2:
        if handle.mapping is not None:
            handle.mapping.close()
        writable = handle.flags & os.O_ACCMODE == os.O_RDWR and slot.kind == MAPPED
        prot = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
        handle.mapping = mmap.mmap(handle.fd, size, mmap.MAP_SHARED, prot)
    mapped = handle.mapping
    offset = int(p.choose.random() * len(mapped))
    length = min(p.choose.choice(SIZES), len(mapped) - offset)
    p.read(handle, offset, length, "mapping", lambda: mapped[offset : offset + length])


def look_at_size(p: Process) -> None:
    """Ask for the size by stat of an open file, or by its end."""
    if (handle := any_handle(p)) is None:
        return
    before = [(slot, slot.size.floor) for slot, _ in handle.slots]
    how = p.choose.choice(("fstat", "SEEK_END"))
    size = os.fstat(handle.fd).st_size if how == "fstat" else _end(p, handle, before)
    wrong = []
    for slot, floor in before:
        legal = slot.size.legal(floor)
        wrong.append(rules.check_size(size, legal) if legal else None)
    p.journal.note(f"{how} {handle.label}: {size}")
    p.counts["sizes checked"] += 1
    if None not in wrong:
        raise IllegalError(f"{how} of {handle.label}: {wrong[0]}")


def _end(p: Process, handle: Handle, before: list[tuple[Slot, int]]) -> int:
    """Return the end of a file as the kernel sees it, which may be an old one for a while."""
    deadline = time.monotonic() + SLACK
    while True:
        size = os.lseek(handle.fd, 0, os.SEEK_END)
        old = any(size in slot.missed_sizes(floor) for slot, floor in before)
        if p.plan.opens_handles or not old or time.monotonic() > deadline:
            return size
        time.sleep(0.01)


def look_at_name(p: Process) -> None:
    """Check whether a name is there and what it leads to has a legal size."""
    name = p.choose.randrange(len(p.model.names))
    series = p.model.names[name]
    with p.locks.creation(shared=True):
        floor = series.floor
        sizes = {s: slot.size.floor for s in series.legal(floor) if (slot := p.model.find(s))}
        try:
            st = os.stat(p.path(name))
        except FileNotFoundError:
            st = None
        legal = series.legal(floor)
        p.journal.note(f"stat of name {name}: {st and st.st_size}, may be {legal}")
        if not legal:
            return
        p.counts["names checked"] += 1
        if st is None:
            if 0 not in legal:
                raise IllegalError(f"stat: name {name} is not there; it must lead to {legal}")
            return
        found = [(p.model.find(s), s) for s in legal if s]
        if not found:
            raise IllegalError(f"stat: name {name} is there and must not be")
        wrong = []
        for slot, serial in found:
            values = slot.size.legal(sizes[serial]) if slot and serial in sizes else []
            wrong.append(rules.check_size(st.st_size, values) if values else None)
        if None not in wrong:
            raise IllegalError(f"stat of name {name}, which is one of {legal}: {wrong}")


def listing(p: Process) -> None:
    """List all names of a directory."""
    which = p.choose.randrange(2)
    names = [n for n in range(len(p.model.names)) if n % 2 == which]
    floors = {n: p.model.names[n].floor for n in names}
    listed = {entry.name for entry in os.scandir(f"{p.plan.mount}/{'ab'[which]}")}
    for name in names:
        legal = p.model.names[name].legal(floors[name])
        is_there = place(name)[2:] in listed
        if legal and all(legal) and not is_there:
            raise IllegalError(f"listing: name {name} is missing; it must lead to {legal}")
        if legal and not any(legal) and is_there:
            raise IllegalError(f"listing: name {name} is there and must not be")
    p.counts["listings checked"] += 1


def links(p: Process) -> None:
    """Check what fstat says of an open file in general."""
    if (handle := any_handle(p)) is None:
        return
    st = os.fstat(handle.fd)
    if not stat_module.S_ISREG(st.st_mode):
        raise IllegalError(f"fstat of {handle.label}: mode {st.st_mode:o}, errno {errno.EIO}")


OPERATIONS = {
    pread: 40, stream: 12, whole: 8, preadv: 6, sendfile: 6, mapping: 16,
    look_at_size: 4, look_at_name: 4, listing: 1, links: 1,
}  # fmt: skip
"""With how often each is done."""
