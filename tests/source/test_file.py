"""Read and write real files, inline and in threads."""

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from cleanfs.cache.in_flight import Buffer
from cleanfs.linux.syscalls import RWF_DONTCACHE
from cleanfs.source.drop_behind import AHEAD, NEAR
from cleanfs.source.file import MAX_OFFSET, SourceFile
from cleanfs.source.inline_policy import SLOW_SECONDS, STREAK, NowaitProbe
from cleanfs.source.io import Backing, SourceFs

DATA = bytes(range(256)) * 40
SIZE = len(DATA)


@pytest.fixture
def fs() -> SourceFs:
    """Return a file system on which no call that could wait may run inline."""
    return SourceFs(local=False)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "f"
    path.write_bytes(DATA)
    opened = os.open(path, os.O_RDWR)
    yield opened
    os.close(opened)


async def read(backing: Backing, fs: SourceFs, fd: int, offset: int, size: int) -> Buffer:
    """Make a single read. From offset 0, it covers the file as far as its size is known."""
    file_size = offset + size if offset == 0 else SIZE
    return await SourceFile(fd, fs, backing).read(offset, size, file_size)


@pytest.fixture(params=["inline", "waiting", "without DONTCACHE"])
def backing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backing:
    """Make a backing for each path that a read can take."""
    refused = {"inline": 0, "waiting": os.RWF_NOWAIT, "without DONTCACHE": RWF_DONTCACHE}[request.param]
    if refused:
        refuse(monkeypatch, refused, errno.EAGAIN if refused == os.RWF_NOWAIT else errno.EOPNOTSUPP)
    return Backing()


def refuse(monkeypatch: pytest.MonkeyPatch, refused: int, number: int) -> list[int]:
    """Let preadv fail for the given flags. Return the flags of all calls, as they come."""
    preadv, seen = os.preadv, list[int]()

    def refusing(fd: int, buffers: list[bytearray], offset: int, flags: int = 0) -> int:
        seen.append(flags)
        if flags & refused:
            raise OSError(number, os.strerror(number))
        return preadv(fd, buffers, offset, flags & os.RWF_NOWAIT)

    monkeypatch.setattr(os, "preadv", refusing)
    return seen


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 1), (0, SIZE), (0, SIZE + 1), (100, 5000), (SIZE - 1, 10), (SIZE, 10), (SIZE + 9999, 10)],
)
async def test_a_read_is_short_only_at_the_end(
    backing: Backing, fs: SourceFs, fd: int, offset: int, size: int
) -> None:
    expected = DATA[offset : offset + size]
    assert bytes(await read(backing, fs, fd, offset, size)) == expected
    stats = backing.stats()
    assert (stats.source_reads, stats.source_read_bytes) == (1, len(expected))


async def test_a_read_beyond_the_largest_file_size_is_empty(fs: SourceFs, fd: int) -> None:
    """The kernel refuses the read with EINVAL. This does not mean that RWF_NOWAIT is unsupported."""
    backing = Backing()
    assert len(await read(backing, fs, fd, MAX_OFFSET - 4095, 4096)) == 0
    assert len(await read(backing, fs, fd, MAX_OFFSET, 4096)) == 0
    assert (fs.nowait, fs.dontcache) == (True, True)
    assert backing.stats().source_errors == 0


async def test_data_in_the_kernels_page_cache_is_read_inline(fs: SourceFs, fd: int) -> None:
    backing = Backing()
    await read(backing, fs, fd, 0, 4096)
    assert backing.stats().source_reads_inline == 1
    # A short read: only a read that may wait can tell that this is the end.
    await read(backing, fs, fd, SIZE - 1, 10)
    assert backing.stats().source_reads_inline == 1


async def test_a_read_that_would_wait_goes_to_a_thread(
    fs: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags_seen = refuse(monkeypatch, os.RWF_NOWAIT, errno.EAGAIN)
    backing = Backing()
    assert bytes(await read(backing, fs, fd, 10, 100)) == DATA[10:110]
    assert flags_seen == [os.RWF_NOWAIT | RWF_DONTCACHE, RWF_DONTCACHE]
    assert backing.stats().source_reads_inline == 0


async def test_a_partial_inline_read_is_completed_not_repeated(
    fs: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, calls = os.preadv, list[tuple[int, int]]()

    def partial(fd: int, buffers: list[bytearray], offset: int, flags: int = 0) -> int:
        calls.append((offset, len(buffers[0])))
        return preadv(fd, [memoryview(buffers[0])[:700]], offset)

    monkeypatch.setattr(os, "preadv", partial)
    backing = Backing()
    assert bytes(await read(backing, fs, fd, 50, 1500)) == DATA[50:1550]
    assert calls == [(50, 1500), (750, 800), (1450, 100)]


async def test_flags_unsupported_by_the_source_are_not_tried_again(
    fs: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags_seen = refuse(monkeypatch, os.RWF_NOWAIT | RWF_DONTCACHE, errno.EOPNOTSUPP)
    backing = Backing()
    for _ in range(3):
        assert bytes(await read(backing, fs, fd, 0, 100)) == DATA[:100]
    # DONTCACHE is given up first, then NOWAIT; the third read tries neither.
    assert flags_seen == [os.RWF_NOWAIT | RWF_DONTCACHE, 0, os.RWF_NOWAIT, 0, 0]


async def test_without_dontcache_the_range_is_dropped_by_fadvise(
    fs: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, os.RWF_NOWAIT | RWF_DONTCACHE, errno.EOPNOTSUPP)
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: advice.append(args))
    await read(Backing(), fs, fd, 4096, 4096)
    assert advice == [(fd, 4096, 4096, os.POSIX_FADV_DONTNEED)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT, errno.ESTALE])
async def test_an_error_of_the_source_reaches_the_caller_and_is_counted(
    fs: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse(monkeypatch, ~0, number)
    backing = Backing()
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        await read(backing, fs, fd, 0, 10)
    assert caught.value.errno == number
    stats = backing.stats()
    assert (stats.source_errors, stats.source_reads) == (1, 0)


async def test_a_bad_descriptor_is_an_error(backing: Backing, fs: SourceFs) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        await read(backing, fs, -1, 0, 10)
    with pytest.raises(OSError, match="Bad file descriptor"):
        await SourceFile(-1, fs, backing).write_all(0, b"x")
    assert backing.stats().source_errors == 2


async def test_a_write_reports_attributes_before_and_after(fs: SourceFs, fd: int) -> None:
    backing = Backing()
    written = await SourceFile(fd, fs, backing).write_all(SIZE - 10, b"N" * 110)
    assert written.count == 110
    assert (written.before.st_size, written.after.st_size) == (SIZE, SIZE + 100)
    assert written.after.st_mtime_ns >= written.before.st_mtime_ns
    assert os.pread(fd, 1 << 20, 0) == DATA[:-10] + b"N" * 110
    stats = backing.stats()
    assert (stats.source_writes, stats.source_write_bytes) == (1, 110)


async def test_a_write_in_parts_is_written_whole(
    fs: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda fd, data, offset, flags: pwritev(fd, [data[0][:3]], offset, flags)
    )
    written = await SourceFile(fd, fs, Backing()).write_all(5, b"0123456789")
    assert written.count == 10
    assert os.pread(fd, 12, 4) == DATA[4:5] + b"0123456789" + DATA[15:16]


async def test_a_write_that_fails_half_way_is_an_error(
    fs: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev, left = os.pwritev, [3]

    def full(fd: int, data: list[memoryview], offset: int, flags: int) -> int:
        if not left:
            raise OSError(errno.ENOSPC, "full")
        return pwritev(fd, [data[0][: left.pop()]], offset, flags)

    monkeypatch.setattr(os, "pwritev", full)
    backing = Backing()
    with pytest.raises(OSError, match="full"):
        await SourceFile(fd, fs, backing).write_all(0, b"0123456789")
    assert backing.stats().source_errors == 1
    assert backing.stats().source_write_bytes == 0


async def test_an_append_ignores_the_offset(fs: SourceFs, fd: int) -> None:
    written = await SourceFile(fd, fs, Backing()).write_all(0, b"end", append=True)
    assert (written.before.st_size, written.after.st_size) == (len(DATA), len(DATA) + 3)
    assert os.pread(fd, 3, len(DATA)) == b"end"
    assert os.pread(fd, 3, 0) == DATA[:3]


async def test_an_empty_write_changes_nothing(fs: SourceFs, fd: int) -> None:
    written = await SourceFile(fd, fs, Backing()).write_all(0, b"")
    assert written.count == 0
    assert written.before == written.after


def delay_calls(monkeypatch: pytest.MonkeyPatch, name: str, seconds: list[float]) -> None:
    """Delay the first calls of a function of ``os`` by these times, one after the other."""
    call = getattr(os, name)

    def delayed(*args: object) -> object:
        if seconds:
            time.sleep(seconds.pop(0))
        return call(*args)

    monkeypatch.setattr(os, name, delayed)


@pytest.fixture
def local() -> SourceFs:
    """Return a local file system without support for RWF_NOWAIT, such as tmpfs."""
    fs = SourceFs(local=True)
    fs.nowait = fs.write_nowait = False
    return fs


def count_calls_as_fast(monkeypatch: pytest.MonkeyPatch, *, sleeps: bool = False) -> None:
    """Count calls as fast and recent, and as calls without sleeps, however busy the machine is."""
    monkeypatch.setattr("cleanfs.source.inline_policy.FAST_SECONDS", 60)
    monkeypatch.setattr("cleanfs.source.inline_policy.RECENT_SECONDS", 60)
    if not sleeps:
        monkeypatch.setattr("cleanfs.source.io._sleeps", lambda: 0)


async def test_reads_that_are_fast_in_threads_become_inline(
    local: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_calls_as_fast(monkeypatch)
    backing = Backing()
    for _ in range(STREAK + 3):
        assert bytes(await read(backing, local, fd, 0, 100)) == DATA[:100]
    assert backing.stats().source_reads_inline == 3
    assert bytes(await read(backing, local, fd, SIZE - 1, 10)) == DATA[-1:]
    assert backing.stats().source_reads_inline == 4


async def test_writes_that_are_fast_in_threads_become_inline(
    local: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_calls_as_fast(monkeypatch)
    backing = Backing()
    for i in range(STREAK + 3):
        written = await SourceFile(fd, local, backing).write_all(SIZE + i, b"x")
        assert (written.before.st_size, written.after.st_size) == (SIZE + i, SIZE + i + 1)
    assert backing.stats().source_writes_inline == 3


async def test_on_a_server_no_call_that_could_wait_is_inline(
    fs: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_calls_as_fast(monkeypatch)
    fs.nowait = False
    backing = Backing()
    threads = set[int]()
    for name in ("preadv", "pwritev", "fstat"):
        call = getattr(os, name)

        def recorded(*args: object, call: Callable[..., object] = call) -> object:
            threads.add(threading.get_ident())
            return call(*args)

        monkeypatch.setattr(os, name, recorded)
    for _ in range(3 * STREAK):
        await read(backing, fs, fd, 0, 100)
        await SourceFile(fd, fs, backing).write_all(0, b"x")
    assert threading.get_ident() not in threads
    stats = backing.stats()
    assert (stats.source_reads_inline, stats.source_writes_inline) == (0, 0)


@pytest.mark.parametrize("name", ["preadv", "pwritev"])
async def test_a_wait_on_the_main_thread_is_not_followed_by_another(
    local: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    count_calls_as_fast(monkeypatch, sleeps=True)
    backing = Backing()

    async def once() -> None:
        if name == "preadv":
            await read(backing, local, fd, 0, 100)
        else:
            await SourceFile(fd, local, backing).write_all(0, b"x")

    policy = local.reads if name == "preadv" else local.writes
    for _ in range(STREAK):
        await once()
    assert policy.inline
    delay_calls(monkeypatch, name, [20 * SLOW_SECONDS])
    await once()
    for _ in range(2 * STREAK):
        assert not policy.inline
        await once()


async def test_a_durable_write_is_never_inline(
    local: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_calls_as_fast(monkeypatch)
    backing = Backing()
    for _ in range(2 * STREAK):
        await SourceFile(fd, local, backing).write_all(0, b"x")
    inline = backing.stats().source_writes_inline
    assert local.writes.inline
    await SourceFile(fd, local, backing, durable=True).write_all(0, b"x")
    assert backing.stats().source_writes_inline == inline


async def test_writes_that_never_wait_become_inline(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The channel makes inline writes itself, but none with RWF_NOWAIT."""
    monkeypatch.setattr("cleanfs.source.inline_policy.RECENT_SECONDS", 60)
    pwritev = os.pwritev

    def at_once(fd: int, data: list[bytes], offset: int, flags: int) -> int:
        return pwritev(fd, data, offset, flags & ~os.RWF_NOWAIT)

    monkeypatch.setattr(os, "pwritev", at_once)
    fs = SourceFs(local=True)
    fs.writes.returned()
    for _ in range(STREAK):
        assert not fs.writes.inline
        await SourceFile(fd, fs, Backing()).write_all(0, b"x")
    assert fs.writes.inline


async def test_a_write_that_would_wait_is_completed_in_a_thread(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_calls_as_fast(monkeypatch)
    fs, backing, pwritev, calls = SourceFs(local=True), Backing(), os.pwritev, list[tuple[int, int]]()

    def partial(fd: int, data: list[bytes], offset: int, flags: int) -> int:
        calls.append((offset, flags))
        if len(calls) == 3:
            raise BlockingIOError
        return pwritev(fd, [data[0][:4] if flags else data[0]], offset, flags & ~os.RWF_NOWAIT)

    monkeypatch.setattr(os, "pwritev", partial)
    fs.writes.returned()  # a file system that has just completed a call is not frozen
    written = await SourceFile(fd, fs, backing).write_all(10, b"0123456789")
    assert written.count == 10
    assert os.pread(fd, 10, 10) == b"0123456789"
    assert written.after == os.fstat(fd)
    await SourceFile(fd, fs, backing).write_all(50, b"abc")
    assert calls == [(10, os.RWF_NOWAIT), (14, 0), (50, os.RWF_NOWAIT), (50, 0)]
    monkeypatch.setattr(os, "pwritev", lambda *args: 3)
    await SourceFile(fd, fs, backing).write_all(50, b"abc")
    assert backing.stats().source_writes_inline == 1


async def test_writes_try_nowait_once_where_it_is_not_supported(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    count_calls_as_fast(monkeypatch)
    pwritev, flags_seen = os.pwritev, list[int]()

    def refusing(fd: int, data: list[bytes], offset: int, flags: int) -> int:
        flags_seen.append(flags)
        if flags & os.RWF_NOWAIT:
            raise OSError(errno.EOPNOTSUPP, "no")
        return pwritev(fd, data, offset, flags)

    monkeypatch.setattr(os, "pwritev", refusing)
    fs, backing = SourceFs(local=True), Backing()
    for _ in range(3):
        await SourceFile(fd, fs, backing).write_all(0, b"x")
    assert flags_seen == [0, os.RWF_NOWAIT, 0, 0]  # no flag at first: the file system may be frozen


async def test_nowait_is_tried_less_often_on_a_cold_source(
    fs: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags_seen = refuse(monkeypatch, os.RWF_NOWAIT, errno.EAGAIN)
    backing = Backing()
    for _ in range(NowaitProbe.MAX_REFUSALS + 10 * NowaitProbe.STEP):
        await read(backing, fs, fd, 0, 100)
    tries = sum(bool(flags & os.RWF_NOWAIT) for flags in flags_seen)
    assert tries == NowaitProbe.MAX_REFUSALS + 10


async def test_a_stream_is_read_plainly_and_dropped_behind(
    fs: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags_seen = refuse(monkeypatch, 0, 0)
    os.ftruncate(fd, 4 * NEAR)
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: advice.append(args))
    file = SourceFile(fd, fs, Backing())
    for offset in range(0, 4 * NEAR, NEAR // 4):
        await file.read(offset, NEAR // 4, 4 * NEAR)
    assert not any(flags & RWF_DONTCACHE for flags in flags_seen)
    [(_, start, length, kind)] = advice
    assert (start, kind) == (0, os.POSIX_FADV_DONTNEED)
    await file.drop_rest()
    _, (_, rest_start, rest_length, _) = advice
    assert rest_start <= length
    assert rest_start + rest_length == 4 * NEAR + AHEAD


async def test_pages_to_keep_are_not_dropped(
    fs: SourceFs, fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    flags_seen = refuse(monkeypatch, os.RWF_NOWAIT, errno.EAGAIN)
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: advice.append(args))
    backing = Backing()
    backing.drop_behind = False
    file = SourceFile(fd, fs, backing)
    await file.read(0, 100, SIZE)
    await file.drop_rest()
    assert flags_seen == [os.RWF_NOWAIT, 0]
    assert advice == []


def fail_once_after(monkeypatch: pytest.MonkeyPatch, size: int) -> list[int]:
    """Let the first write fail with ENOSPC after ``size`` bytes. Return the flags of all writes."""
    pwritev, seen = os.pwritev, list[int]()

    def full(fd: int, buffers: list[bytes], offset: int, flags: int = 0) -> int:
        if flags & os.RWF_NOWAIT:
            raise BlockingIOError
        seen.append(flags)
        if len(seen) > 1:
            return pwritev(fd, buffers, offset, flags)
        pwritev(fd, [memoryview(buffers[0])[:size]], offset, flags)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwritev", full)
    return seen


async def write_before_space_is_freed(
    fs: SourceFs, fd: int, *, append: bool = False, durable: bool = False
) -> int:
    """Write to a full disk, where a removed file is released shortly after. Return the errno or 0."""
    backing, outcome = Backing(), 0
    backing.space_retry.removed(1)

    async def release() -> None:
        await trio.sleep(0.05)
        backing.space_retry.released(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(release)
        try:
            file = SourceFile(fd, fs, backing, durable=durable)
            await file.write_all(SIZE, b"0123456789", append=append)
        except OSError as exc:
            outcome = exc.errno or -1
    return outcome


@pytest.mark.parametrize(("append", "done"), [(False, 0), (False, 5), (True, 0)])
async def test_a_write_to_a_full_disk_is_retried_once_space_is_free(
    monkeypatch: pytest.MonkeyPatch, fd: int, append: bool, done: int
) -> None:
    seen = fail_once_after(monkeypatch, done)
    monkeypatch.setattr("cleanfs.source.space_retry.LATELY_SECONDS", 60)
    assert await write_before_space_is_freed(SourceFs(local=True), fd, append=append) == 0
    assert os.pread(fd, 2 * SIZE, 0) == DATA + b"0123456789"
    assert len(seen) == 2


async def test_an_append_that_may_have_happened_is_not_repeated(
    monkeypatch: pytest.MonkeyPatch, fd: int
) -> None:
    seen = fail_once_after(monkeypatch, 10)
    outcome = await write_before_space_is_freed(SourceFs(local=True), fd, append=True)
    assert outcome == errno.ENOSPC
    assert os.pread(fd, 2 * SIZE, 0) == DATA + b"0123456789"
    assert len(seen) == 1


@pytest.mark.parametrize(("local", "durable"), [(False, False), (True, True)])
async def test_an_error_that_may_belong_to_an_earlier_write_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, fd: int, local: bool, durable: bool
) -> None:
    """NFS reports the error of a write at the next write, and only once."""
    seen = fail_once_after(monkeypatch, 10)
    outcome = await write_before_space_is_freed(SourceFs(local=local), fd, durable=durable)
    assert outcome == errno.ENOSPC
    assert len(seen) == 1
