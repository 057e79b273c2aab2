"""Reading and writing real files, on the way that waits and on the one that does not."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from cleanfs import backing as backing_module
from cleanfs.backing import Backing
from cleanfs.syscalls import RWF_DONTCACHE

DATA = bytes(range(256)) * 40
SIZE = len(DATA)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "f"
    path.write_bytes(DATA)
    opened = os.open(path, os.O_RDWR)
    yield opened
    os.close(opened)


@pytest.fixture(params=["inline", "waiting", "without DONTCACHE"])
def backing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backing:
    """On every path that a read may take."""
    refused = {"inline": 0, "waiting": os.RWF_NOWAIT, "without DONTCACHE": RWF_DONTCACHE}[request.param]
    if refused:
        refuse(monkeypatch, refused, errno.EAGAIN if refused == os.RWF_NOWAIT else errno.EOPNOTSUPP)
    return Backing()


def refuse(monkeypatch: pytest.MonkeyPatch, refused: int, number: int) -> list[int]:
    """Have preadv fail for these flags. The flags that it was called with."""
    preadv, seen = os.preadv, list[int]()

    def picky(fd: int, buffers: list[bytearray], offset: int, flags: int = 0) -> int:
        seen.append(flags)
        if flags & refused:
            raise OSError(number, os.strerror(number))
        return preadv(fd, buffers, offset, flags & os.RWF_NOWAIT)

    monkeypatch.setattr(os, "preadv", picky)
    return seen


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 1), (0, SIZE), (0, SIZE + 1), (100, 5000), (SIZE - 1, 10), (SIZE, 10), (SIZE + 9999, 10)],
)
async def test_a_read_is_short_only_at_the_end(
    backing: Backing, fd: int, offset: int, size: int
) -> None:
    expected = DATA[offset : offset + size]
    assert bytes(await backing.read(fd, offset, size)) == expected
    stats = backing.stats()
    assert (stats.source_reads, stats.source_read_bytes) == (1, len(expected))


async def test_what_the_kernel_has_is_read_inline(fd: int) -> None:
    backing = Backing()
    await backing.read(fd, 0, 4096)
    assert backing.stats().source_reads_inline == 1
    await backing.read(fd, SIZE - 1, 10)  # short: only a read that may wait knows that this is the end
    assert backing.stats().source_reads_inline == 1


async def test_a_read_that_would_wait_goes_to_a_thread(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = refuse(monkeypatch, os.RWF_NOWAIT, errno.EAGAIN)
    backing = Backing()
    assert bytes(await backing.read(fd, 10, 100)) == DATA[10:110]
    assert seen == [os.RWF_NOWAIT | RWF_DONTCACHE, RWF_DONTCACHE]
    assert backing.stats().source_reads_inline == 0


async def test_a_partial_inline_read_is_completed_not_repeated(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, calls = os.preadv, list[tuple[int, int]]()

    def partial(fd: int, buffers: list[bytearray], offset: int, flags: int = 0) -> int:
        calls.append((offset, len(buffers[0])))
        return preadv(fd, [memoryview(buffers[0])[:700]], offset)

    monkeypatch.setattr(os, "preadv", partial)
    backing = Backing()
    assert bytes(await backing.read(fd, 50, 1500)) == DATA[50:1550]
    assert calls == [(50, 1500), (750, 800), (1450, 100)]


async def test_flags_that_the_source_does_not_know_are_not_tried_again(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = refuse(monkeypatch, os.RWF_NOWAIT | RWF_DONTCACHE, errno.EOPNOTSUPP)
    backing = Backing()
    for _ in range(3):
        assert bytes(await backing.read(fd, 0, 100)) == DATA[:100]
    # DONTCACHE is given up first, then NOWAIT; the third read tries neither.
    assert seen == [os.RWF_NOWAIT | RWF_DONTCACHE, 0, os.RWF_NOWAIT, 0, 0]


async def test_without_dontcache_the_kernel_is_told_to_drop_the_range(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse(monkeypatch, os.RWF_NOWAIT | RWF_DONTCACHE, errno.EOPNOTSUPP)
    advice = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: advice.append(args))
    await Backing().read(fd, 4096, 4096)
    assert advice == [(fd, 4096, 4096, os.POSIX_FADV_DONTNEED)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOENT, errno.ESTALE])
async def test_an_error_of_the_source_reaches_the_caller_and_is_counted(
    fd: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    refuse(monkeypatch, ~0, number)
    monkeypatch.setattr(backing_module, "RWF_DONTCACHE", RWF_DONTCACHE)
    backing = Backing()
    with pytest.raises(OSError, match=os.strerror(number)) as caught:
        await backing.read(fd, 0, 10)
    assert caught.value.errno == number
    stats = backing.stats()
    assert (stats.source_errors, stats.source_reads) == (1, 0)


async def test_a_bad_descriptor_is_an_error(backing: Backing) -> None:
    with pytest.raises(OSError, match="Bad file descriptor"):
        await backing.read(-1, 0, 10)
    with pytest.raises(OSError, match="Bad file descriptor"):
        await backing.write(-1, 0, b"x")
    assert backing.stats().source_errors == 2


async def test_a_write_reports_attributes_before_and_after(fd: int) -> None:
    backing = Backing()
    written = await backing.write(fd, SIZE - 10, b"N" * 110)
    assert written.count == 110
    assert (written.before.st_size, written.after.st_size) == (SIZE, SIZE + 100)
    assert written.after.st_mtime_ns >= written.before.st_mtime_ns
    assert os.pread(fd, 1 << 20, 0) == DATA[:-10] + b"N" * 110
    stats = backing.stats()
    assert (stats.source_writes, stats.source_write_bytes) == (1, 110)


async def test_a_write_in_parts_is_written_whole(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pwritev = os.pwritev
    monkeypatch.setattr(
        os, "pwritev", lambda fd, data, offset, flags: pwritev(fd, [data[0][:3]], offset, flags)
    )
    written = await Backing().write(fd, 5, b"0123456789")
    assert written.count == 10
    assert os.pread(fd, 12, 4) == DATA[4:5] + b"0123456789" + DATA[15:16]


async def test_a_write_that_fails_half_way_is_an_error(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwritev, left = os.pwritev, [3]

    def full(fd: int, data: list[memoryview], offset: int, flags: int) -> int:
        if not left:
            raise OSError(errno.ENOSPC, "full")
        return pwritev(fd, [data[0][: left.pop()]], offset, flags)

    monkeypatch.setattr(os, "pwritev", full)
    backing = Backing()
    with pytest.raises(OSError, match="full"):
        await backing.write(fd, 0, b"0123456789")
    assert backing.stats().source_errors == 1
    assert backing.stats().source_write_bytes == 0


async def test_an_append_lands_at_the_end_whatever_the_offset(fd: int) -> None:
    written = await Backing().write(fd, 0, b"end", append=True)
    assert (written.before.st_size, written.after.st_size) == (len(DATA), len(DATA) + 3)
    assert os.pread(fd, 3, len(DATA)) == b"end"
    assert os.pread(fd, 3, 0) == DATA[:3]


async def test_an_empty_write_changes_nothing(fd: int) -> None:
    written = await Backing().write(fd, 0, b"")
    assert written.count == 0
    assert written.before == written.after


async def test_calls_run_off_the_main_thread_and_raise_what_they_raise() -> None:
    backing = Backing()
    assert await backing.run(trio.lowlevel.in_trio_run) is False
    with pytest.raises(FileNotFoundError):
        await backing.run(os.stat, "/no/such/file")


async def test_a_cancelled_call_is_not_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    backing = Backing()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backing.run, os.open, fifo, os.O_RDONLY)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    # Let the thread go: it is the reader that this open waits for.
    os.close(await trio.to_thread.run_sync(os.open, fifo, os.O_WRONLY))
