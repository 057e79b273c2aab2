"""Reading and writing the source's files.

A read first asks inline, without waiting, for what the source's page cache has (RWF_NOWAIT). The
rest is read in a worker thread. What was read does not stay in the source's page cache where something
here keeps it, as one copy of a page is enough: lone reads in the middle of a file leave nothing
(RWF_DONTCACHE, before Linux 6.14 POSIX_FADV_DONTNEED); what streams and reads of a beginning bring is
dropped behind them, and with what was read ahead when the file is closed (``stream``).

On local file systems that prove as fast as memory (tmpfs, writes into the page cache), calls that can
not be told not to wait are made inline altogether, for as long as none of them waits (``pace``).
"""

import contextlib
import errno
import functools
import os
import resource
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NoReturn, TypeVar, TypeVarTuple, cast

import trio

from cleanfs.linux.syscalls import RWF_DONTCACHE
from cleanfs.source.caller import Caller
from cleanfs.source.drop_behind import Span, Stream
from cleanfs.source.errors import HalfDoneError
from cleanfs.source.inline_policy import SLOW_SECONDS, InlinePolicy, NowaitProbe
from cleanfs.source.space_retry import SpaceRetry
from cleanfs.source.thread_limiter import ThreadLimiter

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)

MAX_OFFSET: Final = (1 << 63) - 1
"""Where the largest file ends, in bytes. A read that reaches beyond is refused with EINVAL, which says
nothing about what the source can do; and the last page of such a file is a byte short."""


class SourceCache(StrEnum):
    """What reads leave in the source's page cache."""

    AUTO = "auto"
    """Nothing while something here keeps pages; otherwise what the kernel sees fit."""
    KEEP = "keep"
    """What the kernel sees fit."""
    DROP = "drop"
    """Nothing."""


@dataclass(frozen=True, slots=True)
class BackingStats:
    """A snapshot of the traffic with the source."""

    source_reads: int
    source_read_bytes: int
    source_reads_inline: int
    """Reads that were served whole without a thread."""
    source_writes: int
    source_write_bytes: int
    source_writes_inline: int
    """Writes that were done whole without a thread."""
    source_errors: int


@dataclass(frozen=True, slots=True)
class Written:
    """What a write did: bytes written, and the file's attributes right before and right after."""

    count: int
    before: os.stat_result
    after: os.stat_result


class SourceFs:
    """One file system of the source: what it can do, and how fast it was lately."""

    __slots__ = (
        "dontcache",
        "local",
        "names",
        "nowait",
        "nowait_probe",
        "nowait_write_probe",
        "reads",
        "write_nowait",
        "writes",
    )  # fmt: skip

    def __init__(self, local: bool) -> None:
        """Nothing is known of its abilities yet; each is tried until it is refused."""
        self.local = local
        """Whether calls may ever be made inline that could wait."""
        self.nowait = self.write_nowait = self.dontcache = True
        self.reads = InlinePolicy()
        self.writes = InlinePolicy()
        self.names = InlinePolicy(steps=4)  # a rename is two lookups and more
        self.nowait_probe = NowaitProbe()
        self.nowait_write_probe = NowaitProbe()


class Backing:
    """The source, as seen by the file handlers. Counts its traffic."""

    def __init__(self) -> None:
        """No file system of it was used yet."""
        self.drop_behind = True
        """Whether what was read is to leave the source's page cache."""
        self.thread_limiter = ThreadLimiter()
        self.space_retry = SpaceRetry()
        self.orphans = 0
        """Requests under way whose programs are gone."""
        self._file_systems: dict[int, SourceFs] = {}
        self._reads = self._read_bytes = self._reads_inline = 0
        self._writes = self._write_bytes = self._writes_inline = self._errors = 0

    def file_system(self, device: int, local: bool) -> SourceFs:
        """What is known of the file system of a device; one of another kind has taken its number."""
        known = self._file_systems.get(device)
        if known is None or known.local != local:
            known = self._file_systems[device] = SourceFs(local)
        return known

    async def in_thread(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a call that may wait for the source in a worker thread."""
        limiter = cast(
            trio.CapacityLimiter, self.thread_limiter
        )  # trio asks for no more than its two calls
        return await trio.to_thread.run_sync(call, *args, abandon_on_cancel=True, limiter=limiter)

    async def run_on_names(self, fs: SourceFs, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a call on names of a local file system: at once, if those before it did not wait."""
        pace = fs.names
        if pace.inline and pace.recent:
            with _watched(pace):
                return call(*args)
        seconds, outcome = await self.in_thread(_timed, call, *args)
        pace.took(seconds, 0)
        return outcome()

    async def read(
        self, fs: SourceFs, stream: Stream, fd: int, offset: int, size: int, file_size: int
    ) -> memoryview | bytearray:
        """``size`` bytes from ``offset`` on; short only at the end of the file. Raises OSError.

        ``file_size`` is what is known of the file's size, 0 if nothing is.
        """
        size = min(size, MAX_OFFSET - offset)
        buffer = bytearray(size)
        lingers = self.drop_behind and stream.lingers(offset, size, file_size)
        drop = self.drop_behind and not lingers
        try:
            if fs.reads.inline and not fs.nowait and fs.reads.recent:
                got = self._read_inline(fs, fd, buffer, offset, drop)
            else:
                got = self._read_nowait(fs, fd, buffer, offset, drop)
                if got < size:
                    got, fs.dontcache, seconds = await self.in_thread(
                        _read_timed, fd, buffer, offset, got, fs.dontcache, drop
                    )
                    if fs.local and not fs.nowait:
                        fs.reads.took(seconds, size)
                else:
                    self._reads_inline += 1
        except OSError:
            self._errors += 1
            raise
        self._reads += 1
        self._read_bytes += got
        if lingers and (span := stream.passed(offset, size)) is not None:
            await self.in_thread(drop_span, fd, span)
        return buffer if got == size else memoryview(buffer)[:got]

    async def write(
        self,
        fs: SourceFs,
        fd: int,
        offset: int,
        data: bytes,
        *,
        append: bool = False,
        durable: bool = False,
        writer: Caller | None = None,
    ) -> Written:
        """Write all of ``data`` at ``offset``, or at the end of the file wherever that is.

        What is appended may come short (see ``_write``).

        ``durable`` says that the write itself waits for the disk (O_SYNC, O_DSYNC), ``writer`` whose
        it is, if it may take set-id bits away. Capabilities go with every write: the source sees to
        that. Raises OSError, possibly after a part of it was written.
        """
        self._writes += 1
        try:
            if fs.local and not durable:
                written = await self.space_retry.retrying(
                    self._write_locally, fs, fd, offset, data, append
                )
            else:  # its error may be one of an earlier write, and is told once
                written, _ = await self.in_thread(_write_timed, fd, offset, data, append, 0, None)
        except OSError:
            self._errors += 1
            raise
        self._write_bytes += written.count
        if writer is not None and without_set_id(written.after, writer) is not None:
            written = await self.in_thread(_clear_set_id, fd, written, writer)
        return written

    async def _write_locally(
        self, fs: SourceFs, fd: int, offset: int, data: bytes, append: bool
    ) -> Written:
        before = os.fstat(fd)
        # Also a write that says when it would wait (RWF_NOWAIT) waits for a frozen file system.
        at_once = fs.writes.recent
        count = self._write_nowait(fs, fd, offset, data, append) if at_once else 0
        if count == len(data):
            self._writes_inline += 1
            fs.writes.returned()
            return Written(count, before, os.fstat(fd))
        try:
            if at_once and fs.writes.inline:
                return self._write_inline(fs, fd, offset, data, append, count, before)
            written, seconds = await self.in_thread(
                _write_timed, fd, offset, data, append, count, before
            )
        except OSError as exc:
            if append and os.fstat(fd).st_size != before.st_size:
                raise HalfDoneError(exc) from exc  # it may be this that was appended
            raise
        fs.writes.took(seconds, len(data))
        return written

    def stats(self) -> BackingStats:
        """A snapshot."""
        return BackingStats(
            self._reads,
            self._read_bytes,
            self._reads_inline,
            self._writes,
            self._write_bytes,
            self._writes_inline,
            self._errors,
        )

    def _read_nowait(self, fs: SourceFs, fd: int, buffer: bytearray, offset: int, drop: bool) -> int:
        """How many bytes the source's page cache had. 0 if it would have to wait."""
        if not fs.nowait or not fs.nowait_probe.worthwhile():
            return 0
        dontcache = fs.dontcache and drop
        flags = os.RWF_NOWAIT | (RWF_DONTCACHE if dontcache else 0)
        got = 0
        try:
            got = os.preadv(fd, [buffer], offset, flags)
        except BlockingIOError:
            pass
        except OSError as exc:
            if exc.errno not in UNSUPPORTED:
                return 0  # the waiting read meets it again, and reports it
            if dontcache:
                fs.dontcache = False
            else:
                fs.nowait = False
            return 0
        fs.nowait_probe.answered(got > 0)
        return got

    def _read_inline(self, fs: SourceFs, fd: int, buffer: bytearray, offset: int, drop: bool) -> int:
        """Read here and now; how long that took decides where the next read is made."""
        with _watched(fs.reads):
            got, fs.dontcache = _read_waiting(fd, buffer, offset, 0, fs.dontcache, drop)
        self._reads_inline += 1
        return got

    def _write_nowait(self, fs: SourceFs, fd: int, offset: int, data: bytes, append: bool) -> int:
        """How many bytes could be written without waiting. Few file systems can tell."""
        if not fs.write_nowait or not fs.nowait_write_probe.worthwhile():
            return 0
        flags = os.RWF_NOWAIT | (os.RWF_APPEND if append else 0)
        count = 0
        try:
            count = os.pwritev(fd, [data], offset, flags)
        except BlockingIOError:
            pass
        except OSError as exc:
            if exc.errno in UNSUPPORTED:
                fs.write_nowait = False
            return 0  # the waiting write meets any other again, and reports it
        fs.nowait_write_probe.answered(count > 0)
        return count

    def _write_inline(
        self,
        fs: SourceFs,
        fd: int,
        offset: int,
        data: bytes,
        append: bool,
        count: int,
        before: os.stat_result,
    ) -> Written:
        """Write here and now; how long that took decides where the next write is made."""
        with _watched(fs.writes):
            written = _write(fd, offset, data, append, count, before)
        self._writes_inline += 1
        return written


def drop_span(fd: int, span: Span) -> None:
    """Drop a range of a file from the page cache. It may wait, for other processors."""
    with contextlib.suppress(OSError):  # it is only advice
        os.posix_fadvise(fd, *span, os.POSIX_FADV_DONTNEED)


def without_set_id(st: os.stat_result, caller: Caller) -> int | None:
    """The permissions that somebody's change of the data leaves; None if it leaves them as they are.

    A set-gid bit without execution for the group stays for the group's members: the kernel's
    ``setattr_should_drop_sgid`` (Linux 6.2).
    """
    mode = st.st_mode
    if not mode & (stat.S_ISUID | stat.S_ISGID) or not stat.S_ISREG(mode) or caller.privileged:
        return None
    cleared = mode & ~stat.S_ISUID
    if mode & stat.S_ISGID and (mode & stat.S_IXGRP or not caller.in_group(st.st_gid)):
        cleared &= ~stat.S_ISGID
    return None if cleared == mode else stat.S_IMODE(cleared)


def _clear_set_id(fd: int, written: Written, writer: Caller) -> Written:
    """In a thread: clear set-id bits after a write."""
    mode = without_set_id(os.fstat(fd), writer)
    if mode is not None:
        os.fchmod(fd, mode)
    return Written(written.count, written.before, os.fstat(fd))


def _sleeps() -> int:
    """How often this thread has slept. One that was only preempted did not wait for anything."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nvcsw


@contextlib.contextmanager
def _watched(pace: InlinePolicy) -> Iterator[None]:
    """A block on the main thread: if it waits, the next call of its kind is made in a thread."""
    sleeps, start = _sleeps(), time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - start
        pace.returned()
        if seconds > SLOW_SECONDS and _sleeps() > sleeps:
            pace.waited(seconds)


def _timed(call: Callable[[*Ts], T], *args: *Ts) -> tuple[float, Callable[[], T]]:
    """In a thread: a call, the seconds that it took, and what gives its result or raises its error."""
    start = time.perf_counter()
    try:
        result = call(*args)
    except OSError as exc:
        return time.perf_counter() - start, functools.partial(_raise, exc)
    return time.perf_counter() - start, lambda: result


def _raise(exc: OSError) -> NoReturn:
    raise exc


def _read_timed(
    fd: int, buffer: bytearray, offset: int, got: int, dontcache: bool, drop: bool
) -> tuple[int, bool, float]:
    """In a thread: ``_read_waiting``, and the seconds that it took."""
    start = time.perf_counter()
    got, dontcache = _read_waiting(fd, buffer, offset, got, dontcache, drop)
    return got, dontcache, time.perf_counter() - start


def _read_waiting(
    fd: int, buffer: bytearray, offset: int, got: int, dontcache: bool, drop: bool
) -> tuple[int, bool]:
    """Fill ``buffer`` from ``got`` on.

    The new count, short at the end of the file, and whether RWF_DONTCACHE works here.
    """
    view = memoryview(buffer)
    while got < len(buffer):
        flags = RWF_DONTCACHE if dontcache and drop else 0
        try:
            count = os.preadv(fd, [view[got:]], offset + got, flags)
        except OSError as exc:
            if flags and exc.errno in UNSUPPORTED:
                dontcache = False
                continue
            raise
        if count == 0:
            break
        got += count
    if drop and not dontcache:
        os.posix_fadvise(fd, offset, len(buffer), os.POSIX_FADV_DONTNEED)
    return got, dontcache


def _write_timed(
    fd: int, offset: int, data: bytes, append: bool, count: int, before: os.stat_result | None
) -> tuple[Written, float]:
    """In a thread: ``_write``, and the seconds that it took."""
    start = time.perf_counter()
    written = _write(fd, offset, data, append, count, os.fstat(fd) if before is None else before)
    return written, time.perf_counter() - start


def _write(
    fd: int, offset: int, data: bytes, append: bool, count: int, before: os.stat_result
) -> Written:
    """Write all of ``data`` from ``count`` on.

    What is appended may come short, as only a program appends, and it must not append that part again.
    Anything else is reported as failed if a part of it did: the kernel, which writes back what is
    dirty in mappings, takes no notice of how much was written. Raises OSError.
    """
    flags = os.RWF_APPEND if append else 0
    while count < len(data):
        try:
            rest = memoryview(data)[count:] if count else data
            done = os.pwritev(fd, [rest], offset + count, flags)
        except OSError:
            if append and count:
                break
            raise
        if not done:
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # it would be so for ever
        count += done
    return Written(count, before, os.fstat(fd))
