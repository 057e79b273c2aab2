"""Read and write one open file of the source.

A read first tries the source's page cache without waiting (RWF_NOWAIT). A worker thread reads the rest.
What was read does not stay in the source's page cache where cleanfs keeps it, as one copy of a page is
enough. A lone read in the middle of a file leaves nothing (RWF_DONTCACHE, before Linux 6.14
POSIX_FADV_DONTNEED). What streams and reads of a beginning bring is dropped behind them, and the rest,
with what was read ahead, when the file is closed (``drop_behind``).

Some local file systems prove as fast as memory (tmpfs, writes into the page cache). There calls that
cannot be told not to wait are made inline altogether, until one of them waits (``inline_policy``).
"""

import contextlib
import errno
import os
import time
from dataclasses import dataclass
from typing import Final

from cleanfs.cache.state import HandleState
from cleanfs.linux.syscalls import RWF_DONTCACHE
from cleanfs.source.attributes import without_set_id
from cleanfs.source.caller import Caller
from cleanfs.source.drop_behind import Span, Stream
from cleanfs.source.errors import HalfDoneError
from cleanfs.source.io import Backing, SourceFs, watched

UNSUPPORTED = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)

MAX_OFFSET: Final = (1 << 63) - 1
"""Where the largest file ends, in bytes. A read that reaches beyond is refused with EINVAL, which says
nothing about what the source can do; and the last page of such a file is a byte short."""


@dataclass(frozen=True, slots=True)
class Written:
    """Says what a write did: bytes written, and the file's attributes right before and right after."""

    count: int
    before: os.stat_result
    after: os.stat_result


class SourceFile:
    """One open file of the source. The descriptor stays its owner's, to be closed by the owner."""

    __slots__ = ("_backing", "_durable", "_fd", "_fs", "_handle", "_stream")

    def __init__(
        self,
        fd: int,
        fs: SourceFs,
        backing: Backing,
        stream: Stream | None = None,
        *,
        durable: bool = False,
    ) -> None:
        """Read and write by ``fd``; ``durable`` writes wait for the disk (O_SYNC, O_DSYNC)."""
        self._fd = fd
        self._fs = fs
        self._backing = backing
        self._durable = durable
        self._stream = stream or Stream()
        self._handle: HandleState | None = None

    def serve(self, handle: HandleState, *, writable: bool) -> None:
        """Let the channel make calls by this handle that do not wait."""
        self._handle = handle
        fs = self._fs
        if fs.local:
            handle.read_inline(fs.reads, fs, self._stream)
            if writable and not self._durable:
                handle.write_inline(fs.writes)

    # -- reads ------------------------------------------------------------------------------

    async def read(self, offset: int, size: int, file_size: int) -> memoryview | bytearray:
        """Read ``size`` bytes from ``offset`` on; short only at the end of the file. Raises OSError.

        ``file_size`` is what is known of the file's size, 0 if nothing is.
        """
        size = min(size, MAX_OFFSET - offset)
        buffer = bytearray(size)
        drops = self._backing.drop_behind
        lingers = drops and self._stream.lingers(offset, size, file_size)
        traffic = self._backing.traffic
        try:
            got = await self._fill(buffer, offset, drop=drops and not lingers)
        except OSError:
            traffic.errors += 1
            raise
        traffic.reads += 1
        traffic.read_bytes += got
        if lingers and (span := self._stream.passed(offset, size)) is not None:
            await self._drop(span)
        return buffer if got == size else memoryview(buffer)[:got]

    async def drop_rest(self) -> None:
        """Drop what the reads left in the source's page cache: the file is about to be closed."""
        if (span := self._stream.rest()) is not None:
            await self._drop(span)

    async def _drop(self, span: Span) -> None:
        await self._backing.in_thread(_drop_span, self._fd, span)

    async def _fill(self, buffer: bytearray, offset: int, drop: bool) -> int:
        """Fill the buffer, on the main thread where that does not wait. Returns the bytes that came."""
        fs = self._fs
        if fs.reads.inline and not fs.nowait and fs.reads.recent:
            return self._read_inline(buffer, offset, drop)
        got = self._read_nowait(buffer, offset, drop)
        if got == len(buffer):
            self._backing.traffic.reads_inline += 1
            return got
        got, fs.dontcache, seconds = await self._backing.in_thread(
            _preadv_all_timed, self._fd, buffer, offset, got, fs.dontcache, drop
        )
        if fs.local and not fs.nowait:
            fs.reads.took(seconds, len(buffer))
        return got

    def _read_inline(self, buffer: bytearray, offset: int, drop: bool) -> int:
        """Read on the main thread; if that waits, the next read is made in a thread."""
        fs = self._fs
        with watched(fs.reads):
            got, fs.dontcache = _preadv_all(self._fd, buffer, offset, 0, fs.dontcache, drop)
        self._backing.traffic.reads_inline += 1
        return got

    def _read_nowait(self, buffer: bytearray, offset: int, drop: bool) -> int:
        """Read what the source's page cache has. Returns its bytes, 0 if it would have to wait."""
        fs = self._fs
        if self._channel_tried(offset) or not fs.nowait or not fs.nowait_probe.worthwhile():
            return 0
        dontcache = fs.dontcache and drop
        flags = os.RWF_NOWAIT | (RWF_DONTCACHE if dontcache else 0)
        got = 0
        try:
            got = os.preadv(self._fd, [buffer], offset, flags)
        except BlockingIOError:
            pass
        except OSError as exc:
            if exc.errno not in UNSUPPORTED:
                return 0  # the waiting read gets the error again, and reports it
            if dontcache:
                fs.dontcache = False
            else:
                fs.nowait = False
            return 0
        fs.nowait_probe.tried(got > 0)
        return got

    def _channel_tried(self, offset: int) -> bool:
        """Tell, once, whether the channel tried in vain to read here without waiting."""
        handle = self._handle
        if handle is None or handle.nowait_tried_at < 0:
            return False
        tried_at, handle.nowait_tried_at = handle.nowait_tried_at, -1
        return tried_at == offset

    # -- writes -----------------------------------------------------------------------------

    async def write_all(
        self, offset: int, data: bytes, *, append: bool = False, writer: Caller | None = None
    ) -> Written:
        """Write all of ``data`` at ``offset``, or at the end of the file wherever that is.

        What is appended may come short (see ``_pwritev_all``). ``writer`` is the process that writes,
        if its write may take set-id bits away. (The source itself takes capabilities away with every
        write.) Raises OSError, possibly after a part was written.
        """
        backing, traffic = self._backing, self._backing.traffic
        traffic.writes += 1
        try:
            if self._fs.local and not self._durable:
                written = await backing.space_retry.retrying(self._write_local, offset, data, append)
            else:  # its error may be an earlier write's, and is reported only once
                written, _ = await backing.in_thread(
                    _pwritev_all_timed, self._fd, offset, data, append, 0, None
                )
        except OSError:
            traffic.errors += 1
            raise
        traffic.write_bytes += written.count
        if writer is not None and without_set_id(written.after, writer) is not None:
            written = await backing.in_thread(_clear_set_id, self._fd, written, writer)
        return written

    async def _write_local(self, offset: int, data: bytes, append: bool) -> Written:
        """Write without waiting; what is left inline if that is fast, else in a thread."""
        fd, fs, traffic = self._fd, self._fs, self._backing.traffic
        before = os.fstat(fd)
        # On a frozen file system even a write with RWF_NOWAIT waits.
        at_once = fs.writes.recent
        count = self._write_nowait(offset, data, append) if at_once else 0
        if count == len(data):
            traffic.writes_inline += 1
            fs.writes.took(0.0, len(data))
            return Written(count, before, os.fstat(fd))
        try:
            if at_once and fs.writes.inline:
                with watched(fs.writes):
                    written = _pwritev_all(fd, offset, data, append, count, before)
                traffic.writes_inline += 1
                return written
            written, seconds = await self._backing.in_thread(
                _pwritev_all_timed, fd, offset, data, append, count, before
            )
        except OSError as exc:
            if append and os.fstat(fd).st_size != before.st_size:
                raise HalfDoneError(exc) from exc  # it may be this that was appended
            raise
        fs.writes.took(seconds, len(data))
        return written

    def _write_nowait(self, offset: int, data: bytes, append: bool) -> int:
        """Write what can be written without waiting. Returns its bytes; few file systems can tell."""
        fs = self._fs
        if not fs.write_nowait or not fs.nowait_write_probe.worthwhile():
            return 0
        flags = os.RWF_NOWAIT | (os.RWF_APPEND if append else 0)
        count = 0
        try:
            count = os.pwritev(self._fd, [data], offset, flags)
        except BlockingIOError:
            pass
        except OSError as exc:
            if exc.errno in UNSUPPORTED:
                fs.write_nowait = False
            return 0  # the waiting write gets any other error again, and reports it
        fs.nowait_write_probe.tried(count > 0)
        return count


def _drop_span(fd: int, span: Span) -> None:
    """Drop a range of a file from the page cache. It may wait, for other processors."""
    with contextlib.suppress(OSError):  # it is only advice
        os.posix_fadvise(fd, *span, os.POSIX_FADV_DONTNEED)


def _clear_set_id(fd: int, written: Written, writer: Caller) -> Written:
    """Clear set-id bits after a write. Runs in a thread."""
    mode = without_set_id(os.fstat(fd), writer)
    if mode is not None:
        os.fchmod(fd, mode)
    return Written(written.count, written.before, os.fstat(fd))


def _preadv_all_timed(
    fd: int, buffer: bytearray, offset: int, got: int, dontcache: bool, drop: bool
) -> tuple[int, bool, float]:
    """Call ``_preadv_all``, in a thread. Returns also the seconds that it took."""
    start = time.perf_counter()
    got, dontcache = _preadv_all(fd, buffer, offset, got, dontcache, drop)
    return got, dontcache, time.perf_counter() - start


def _preadv_all(
    fd: int, buffer: bytearray, offset: int, got: int, dontcache: bool, drop: bool
) -> tuple[int, bool]:
    """Fill ``buffer`` from ``got`` on. It may wait.

    Returns the new count, short at the end of the file, and whether RWF_DONTCACHE works here.
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


def _pwritev_all_timed(
    fd: int, offset: int, data: bytes, append: bool, count: int, before: os.stat_result | None
) -> tuple[Written, float]:
    """Call ``_pwritev_all``, in a thread. Returns also the seconds that it took."""
    start = time.perf_counter()
    before = os.fstat(fd) if before is None else before
    written = _pwritev_all(fd, offset, data, append, count, before)
    return written, time.perf_counter() - start


def _pwritev_all(
    fd: int, offset: int, data: bytes, append: bool, count: int, before: os.stat_result
) -> Written:
    """Write all of ``data`` from ``count`` on. It may wait. Raises OSError.

    What is appended may come short, as only a program appends, and it must not append that part again.
    Any other write that is done in part is reported as failed: the kernel, which writes back what is
    dirty in mappings, takes no notice of how much was written.
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
            raise OSError(errno.EIO, os.strerror(errno.EIO))  # the loop would never end
        count += done
    return Written(count, before, os.fstat(fd))
