"""Take the locks of programs in the source, so that programs that work there see them.

A lock belongs to an *owner*: a process for fcntl(2), an open file for flock(2) and open file
description locks. The kernel gives each a number. Here each owner gets an open file description of its
own in the source, and holds its locks on a file there: as OFD locks, or by flock(2). The source then
decides what conflicts, between owners here as with others. All locks of an owner go when its
description is closed.

A lock that must wait is tried again: at once when one of the file is given up here, and else at growing
intervals. So a wait can be given up, which a thread that waits in the source could not.

What the owners here hold is remembered. It tells F_GETLK which process holds a lock, and whether a wait
would never end, as the source knows neither of OFD locks.
"""

import contextlib
import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

import trio

from cleanfs.vfs.handles import FileHandle, Services, Use
from cleanfs.vfs.inode import Inode

F_OFD_GETLK: Final = 36
F_OFD_SETLK: Final = 37

FLOCK: Final = struct.Struct("hhqqi4x")
"""struct flock: l_type, l_whence, l_start, l_len (0: to the end), l_pid."""

OFFSET_MAX: Final = (1 << 63) - 1
"""The last byte of a lock that reaches to the end of the file."""

FLOCK_KINDS: Final = {
    fcntl.F_RDLCK: fcntl.LOCK_SH,
    fcntl.F_WRLCK: fcntl.LOCK_EX,
    fcntl.F_UNLCK: fcntl.LOCK_UN,
}

FIRST_RETRY_SECONDS: Final = 0.001
MAX_RETRY_SECONDS: Final = 0.05
"""When to try a lock again that others hold in the source. A try takes some 10 us."""


class Locks(StrEnum):
    """Says where the locks of programs are held."""

    LOCAL = "local"
    """In the kernel, for this mount alone."""
    SOURCE = "source"
    """In the source."""


@dataclass(frozen=True, slots=True)
class Lock:
    """The bytes ``start <= i <= end`` of a file, locked."""

    kind: int
    """F_RDLCK, F_WRLCK, or F_UNLCK for none."""
    start: int
    end: int
    pid: int = 0
    """The process that holds it; 0 if that is not known."""

    def overlaps(self, other: "Lock") -> bool:
        """Tell whether a byte is in both."""
        return self.start <= other.end and other.start <= self.end

    def conflicts(self, other: "Lock") -> bool:
        """Tell whether two owners cannot have both."""
        return self.overlaps(other) and fcntl.F_WRLCK in (self.kind, other.kind)

    def pack(self) -> bytes:
        """Make a struct flock."""
        length = 0 if self.end == OFFSET_MAX else self.end - self.start + 1
        return FLOCK.pack(self.kind, os.SEEK_SET, self.start, length, 0)

    @classmethod
    def unpack(cls, data: bytes) -> "Lock":
        """Read a struct flock."""
        kind, _, start, length, pid = FLOCK.unpack(data)
        return cls(kind, start, start + length - 1 if length else OFFSET_MAX, max(pid, 0))


def after(held: list[Lock], new: Lock) -> list[Lock]:
    """Return what an owner holds after it took ``new``, or gave up its bytes."""
    rest = []
    for lock in held:
        if not lock.overlaps(new):
            rest.append(lock)
            continue
        if lock.start < new.start:
            rest.append(replace(lock, end=new.start - 1))
        if lock.end > new.end:
            rest.append(replace(lock, start=new.end + 1))
    return rest if new.kind == fcntl.F_UNLCK else [*rest, new]


@dataclass(eq=False, slots=True)
class _Owner:
    """Holds the locks of one owner on one file."""

    inode: Inode
    fd: int
    locks: list[Lock] = field(default_factory=list)
    """Those of fcntl(2)."""
    fhs: set[int] = field(default_factory=set)
    """The open files through which it locked. When all are closed, it is gone."""
    use: Use = field(default_factory=Use)


_Key = tuple[Inode, int, bool]
"""A file, the number of an owner, and whether its locks are flock(2)'s."""


class SourceLocks:
    """Holds the locks of one mount's programs in the source. ``run`` it."""

    def __init__(self, services: Services) -> None:
        """Start without locks."""
        self._services = services
        self._owners: dict[_Key, _Owner] = {}
        self._given_up: dict[Inode, trio.Event] = {}  # of files that are waited for
        self._waits: dict[int, list[tuple[Inode, Lock]]] = {}  # for locks of fcntl(2), by owner
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Close the files of owners that are gone; never ends. At last, close all."""
        try:
            async with trio.open_nursery() as self._nursery:
                await trio.sleep_forever()
        finally:
            self._nursery = None
            for owner in self._owners.values():
                if not owner.use:
                    os.close(owner.fd)
            self._owners.clear()

    async def find_conflict(self, handle: FileHandle, owner: int, wanted: Lock) -> Lock:
        """Return a lock that is in the way (F_GETLK); of kind F_UNLCK if none is. Raises OSError."""
        held = self._owners.get((handle.inode, owner, False))
        fd, use = (handle.fd, handle.use) if held is None else (held.fd, held.use)
        with use:
            found = await self._services.inline_if_local(
                handle.inode, fcntl.fcntl, fd, F_OFD_GETLK, wanted.pack()
            )
        conflict = Lock.unpack(found)
        if conflict.pid or conflict.kind == fcntl.F_UNLCK:
            return conflict
        for _, lock in self._others(handle.inode, owner):
            if lock.kind == conflict.kind and lock.overlaps(conflict):
                return replace(conflict, pid=lock.pid)
        return conflict

    async def set(
        self, handle: FileHandle, fh: int, owner: int, lock: Lock, *, flock: bool, waits: bool
    ) -> None:
        """Take or give up a lock. Raises OSError: EAGAIN if others hold it, unless it ``waits``.

        A wait can be cancelled. It is never cancelled while the source is asked. Raises EDEADLK if the
        wait would never end, as the others wait for the owner.
        """
        key = handle.inode, owner, flock
        with handle.use:
            if await self._take(handle, fh, key, lock):
                return
            if not waits:
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            with contextlib.nullcontext() if flock else self._waiting(handle.inode, owner, lock):
                seconds = FIRST_RETRY_SECONDS
                while True:
                    await self._given_up_within(seconds, handle.inode)
                    if await self._take(handle, fh, key, lock):
                        return
                    seconds = min(2 * seconds, MAX_RETRY_SECONDS)

    async def _take(self, handle: FileHandle, fh: int, key: _Key, lock: Lock) -> bool:
        """Take or give up a lock; False if others hold it. Never cancelled."""
        with trio.CancelScope(shield=True):
            try:
                await self._try(handle, fh, key, lock)
            except BlockingIOError:
                return False
        return True

    @contextlib.contextmanager
    def _waiting(self, inode: Inode, owner: int, lock: Lock) -> Iterator[None]:
        """Note that an owner waits. Raises EDEADLK if it would wait for ever."""
        if self._is_deadlock(inode, owner, lock):
            raise OSError(errno.EDEADLK, os.strerror(errno.EDEADLK))
        waits = self._waits.setdefault(owner, [])
        waits.append(wait := (inode, lock))
        try:
            yield
        finally:
            waits.remove(wait)
            if not waits:
                del self._waits[owner]

    def _is_deadlock(self, inode: Inode, owner: int, lock: Lock) -> bool:
        """Tell whether one that holds the lock waits for the owner, perhaps by way of others."""
        seen, pending = {owner}, [(inode, owner, lock)]
        while pending:
            inode, waiter, wanted = pending.pop()
            holders = {other for other, held in self._others(inode, waiter) if held.conflicts(wanted)}
            if waiter != owner and owner in holders:
                return True
            for holder in holders - seen:
                seen.add(holder)
                pending += [(file, holder, lock) for file, lock in self._waits.get(holder, ())]
        return False

    def _others(self, inode: Inode, owner: int) -> Iterator[tuple[int, Lock]]:
        """Return the locks of fcntl(2) that other owners here hold on a file."""
        for (file, other, _), held in self._owners.items():
            if file is inode and other != owner:
                yield from ((other, lock) for lock in held.locks)

    async def _given_up_within(self, seconds: float, inode: Inode) -> None:
        """Wait until a lock of a file is given up here, at most so long."""
        given_up = self._given_up.setdefault(inode, trio.Event())
        try:
            with trio.move_on_after(seconds):
                await given_up.wait()
        finally:
            if self._given_up.get(inode) is given_up and not given_up.statistics().tasks_waiting:
                del self._given_up[inode]

    async def _try(self, handle: FileHandle, fh: int, key: _Key, lock: Lock) -> None:
        inode, _, flock = key
        owner = self._owners.get(key)
        if owner is None:
            if lock.kind == fcntl.F_UNLCK:
                return
            fd = await self._services.inline_if_local(inode, _open_again, handle.fd)
            owner = self._owners.setdefault(key, _Owner(inode, fd))
            if owner.fd != fd:  # another thread of the process was faster
                os.close(fd)
        owner.fhs.add(fh)
        with owner.use:
            if flock:
                kind = FLOCK_KINDS[lock.kind] | fcntl.LOCK_NB
                await self._services.inline_if_local(inode, fcntl.flock, owner.fd, kind)
            else:
                await self._services.inline_if_local(
                    inode, fcntl.fcntl, owner.fd, F_OFD_SETLK, lock.pack()
                )
                owner.locks = after(owner.locks, lock)
        if lock.kind != fcntl.F_WRLCK:  # given up, or perhaps now shared
            self._wake(inode)

    def drop(self, inode: Inode, owner: int, *, flock: bool = False) -> None:
        """Give up all locks of an owner on a file: a process that closed an fd of it."""
        held = self._owners.pop((inode, owner, flock), None)
        if held is not None and self._nursery is not None:
            self._nursery.start_soon(self._close, held)

    def drop_file(self, inode: Inode, fh: int) -> None:
        """Give up the locks of an open file that was closed."""
        for key in [key for key, held in self._owners.items() if fh in held.fhs]:
            self._owners[key].fhs.remove(fh)
            if not self._owners[key].fhs:
                _, owner, flock = key
                self.drop(inode, owner, flock=flock)

    async def _close(self, owner: _Owner) -> None:
        await owner.use.ended()
        with contextlib.suppress(OSError):
            await self._services.inline_if_local(owner.inode, os.close, owner.fd)
        self._wake(owner.inode)

    def _wake(self, inode: Inode) -> None:
        """Let those that wait for locks of a file try again."""
        if (given_up := self._given_up.pop(inode, None)) is not None:
            given_up.set()


def _open_again(fd: int) -> int:
    """Open a file once more: to write, if possible, as a write lock demands that."""
    path = f"/proc/self/fd/{fd}"
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in (errno.EMFILE, errno.ENFILE):
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK)) from exc
    mode = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE
    return os.open(path, mode | os.O_CLOEXEC)
