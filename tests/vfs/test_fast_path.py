"""Test each rule that holds a request back from the fast path."""

import errno
import os
import resource
import struct
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from cleanfs.backends.engines import native_module
from cleanfs.cache.state import CacheState
from cleanfs.fuse.protocol import FUSE_WRITE_KILL_SUIDGID
from cleanfs.fuse.session import native
from cleanfs.source import file as source_file
from cleanfs.source.drop_behind import AHEAD, Span
from cleanfs.vfs.coherency import Coherency
from tests.cache.rig import Store
from tests.harness.served import PAGE, READ, READ_IN, WRITE, WRITE_IN, Served

pytestmark = pytest.mark.skipif(
    native is None or not CacheState.native, reason="the native modules are not in use"
)

SIZE = 64 * PAGE
DATA = bytes(range(256)) * (SIZE // 256)

Prepare = Callable[[Served, int], None]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    (tmp_path / "f").write_bytes(DATA)
    return tmp_path


@pytest.fixture
async def served(source: Path) -> AsyncIterator[Served]:
    served = Served(source)
    yield served
    served.close()


async def opened(served: Served, flags: int = os.O_RDWR) -> int:
    """Open the file; all that lets the fast path serve it is so."""
    fh = await served.open("f", flags)
    await served.read(fh, SIZE - PAGE, PAGE)  # the opener runs
    served.trust(fh)
    return fh


async def is_served(served: Served, request: str, fh: int, *arguments: int) -> bool:
    """Make a READ of the first page, or a WRITE to it. Tell whether the fast path served it."""
    before = served.served
    if request == "read":
        reply = await served.read(fh, *(arguments or (0, PAGE)))
    else:
        reply = await served.write(fh, 0, b"new", file_flags=arguments[0] if arguments else os.O_RDWR)
    assert not reply.errno
    return served.served > before


def change_behind(served: Served, fh: int) -> None:
    os.utime(served.source / "f", ns=(1, 1))


def set_file(name: str, value: object) -> Prepare:
    def prepare(served: Served, fh: int) -> None:
        setattr(served.handle(fh).file, name, value)

    return prepare


def set_fs(**values: object) -> Prepare:
    """Set what is known of the source's file system, or (``reads``, ``writes``) a policy's field."""

    def prepare(served: Served, fh: int) -> None:
        fs = served.handle(fh)._source._fs  # noqa: SLF001  # no public access
        for name, value in values.items():
            policy, _, field = name.partition("__")
            setattr(getattr(fs, policy) if field else fs, field or name, value)

    return prepare


def drop_due(served: Served, fh: int) -> None:
    served.handle(fh).drops_pages()


def a_larger_size_is_known(served: Served, fh: int) -> None:
    file = served.handle(fh).file
    file.size = 100
    served.handle(fh).inode.kernel.size = SIZE


READS: dict[str, Prepare] = {
    "a write under way": set_file("pending_writes", 1),
    "reads are remembered": set_file("remembers_reads", True),
    "distrusted": lambda served, fh: served.coherency.distrust(served.handle(fh).file),
    "the kernel knows a later end": a_larger_size_is_known,
}

SOURCE_READS: dict[str, Prepare] = {
    "another read of the source": set_file("reads_in_flight", 1),
    "NOWAIT is not supported": set_fs(nowait=False, reads__inline=False),
    "no call has just returned": set_fs(nowait=False, reads__returned_at=0.0),
    "NOWAIT was refused often": set_fs(refused=17),
    "the file ends early": lambda served, _: os.truncate(served.source / "f", 10),
}

WRITES: dict[str, Prepare] = {
    "a change under way": set_file("mutations", 1),
    "a write under way": set_file("pending_writes", 1),
    "reads are remembered": set_file("remembers_reads", True),
    "no fingerprint": lambda served, fh: served.coherency.distrust(served.handle(fh).file),
    "another fingerprint": change_behind,
    "writes are slow": set_fs(writes__inline=False),
    "no call has just returned": set_fs(writes__returned_at=0.0),
}


@pytest.mark.parametrize("request_by", ["read", "write"])
async def test_a_request_shows_that_the_opener_has_run(served: Served, request_by: str) -> None:
    fh = await served.open("f")
    drop_due(served, fh)
    handle = served.handle(fh)
    kernel = handle.inode.kernel
    kernel.drops_pages_for(handle.state.serial)
    served.trust(fh)
    before = served.served
    if request_by == "read":
        await served.read(fh, 0, 10)
    else:
        await served.write(fh, 0, b"0123456789")
    assert served.served == before + 1
    assert (handle.state.drop_due, handle.file.drops_due, kernel.dropped_for) == (False, 0, 0)
    kernel.drops_pages_for(handle.state.serial + 1)  # of another open
    await served.read(fh, 0, 10)
    assert kernel.dropped_for == handle.state.serial + 1


@pytest.mark.parametrize("name", READS)
async def test_a_read_is_held_back(served: Served, name: str) -> None:
    fh = await opened(served)
    await served.read(fh, 0, PAGE)
    assert await is_served(served, "read", fh)
    READS[name](served, fh)
    assert not await is_served(served, "read", fh)


@pytest.mark.parametrize("name", SOURCE_READS)
async def test_a_read_of_the_source_is_held_back(served: Served, name: str) -> None:
    fh = await opened(served)
    assert await is_served(served, "read", fh)
    await served.fs_cleared()
    assert await is_served(served, "read", fh), "it is in the source's page cache"
    await served.fs_cleared()
    SOURCE_READS[name](served, fh)
    assert not await is_served(served, "read", fh)


@pytest.mark.parametrize("name", WRITES)
async def test_a_write_is_held_back(served: Served, name: str) -> None:
    fh = await opened(served)
    assert await is_served(served, "write", fh)
    WRITES[name](served, fh)
    assert not await is_served(served, "write", fh)
    file = served.handle(fh).file
    assert (file.size, file.stamps is not None) == (SIZE, True)


@pytest.mark.parametrize(
    ("flags", "coherency", "fast"),
    [
        (os.O_SYNC, Coherency.NONE, False),
        (os.O_DSYNC, Coherency.NONE, False),
        (os.O_APPEND, Coherency.OPEN, False),
        (os.O_APPEND, Coherency.WATCH, False),
        (os.O_APPEND, Coherency.NONE, True),
    ],
)
async def test_flags_of_the_file_hold_a_write_back(
    source: Path, flags: int, coherency: Coherency, fast: bool
) -> None:
    served = Served(source, coherency=coherency)
    fh = await opened(served)
    assert await is_served(served, "write", fh, os.O_RDWR | flags) == fast
    served.close()


@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_RDWR | os.O_SYNC, os.O_RDWR | os.O_DSYNC])
async def test_flags_of_the_open_hold_a_write_back(served: Served, flags: int) -> None:
    fh = await opened(served, flags)
    before = served.served
    await served.write(fh, 0, b"new")
    assert served.served == before


@pytest.mark.parametrize("flags", [0, FUSE_WRITE_KILL_SUIDGID])
@pytest.mark.parametrize("mode", [0o4755, 0o2755])
async def test_a_write_to_a_set_id_file_is_python_s(served: Served, mode: int, flags: int) -> None:
    """The bits may go, and the mount's kernel must hear of it."""
    (served.source / "f").chmod(mode)
    fh = await opened(served)
    before = served.served
    assert not (await served.write(fh, 0, b"new", flags=flags)).errno
    assert served.served == before


async def test_without_others_no_fingerprint_is_compared(source: Path) -> None:
    served = Served(source, coherency=Coherency.NONE)
    fh = await opened(served)
    change_behind(served, fh)
    assert await is_served(served, "write", fh)
    served.close()


@pytest.mark.parametrize(
    ("offset", "size", "length", "error"),
    [
        (SIZE, PAGE, 0, 0),
        (SIZE + 1, PAGE, 0, 0),
        (1 << 62, PAGE, 0, 0),
        ((1 << 63) - PAGE, PAGE, 0, 0),
        (0, 0, 0, 0),
        (PAGE, 0, 0, 0),
    ],
)
async def test_a_read_of_nothing_or_too_much_is_python_s(
    served: Served, offset: int, size: int, length: int, error: int
) -> None:
    fh = await opened(served)
    before = served.served
    reply = await served.read(fh, offset, size)
    assert (reply.errno, len(reply.body)) == (error, length)
    assert served.served == before


async def test_a_read_larger_than_the_buffer_may_get_is_python_s(served: Served) -> None:
    (served.source / "f").write_bytes(bytes(8 << 20))
    fh = await opened(served)
    for size, fast in (PAGE, True), ((2 << 20) + 1, False):
        await served.fs_cleared()
        before = served.served
        assert len((await served.read(fh, 0, size)).body) == size
        assert (served.served > before) == fast


async def test_what_a_stream_has_passed_is_dropped(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    dropped = list[Span]()
    monkeypatch.setattr(source_file, "_drop_span", lambda _, span: dropped.append(span))
    os.truncate(served.source / "f", 32 << 20)
    fh = await opened(served)
    before, size = served.served, 128 << 10
    for offset in range(0, 32 << 20, size):
        assert len((await served.read(fh, offset, size)).body) == size
    assert served.served - before > 200
    assert len(dropped) == 3
    await served.release(fh)
    assert sum(dropped[-1]) == (32 << 20) + AHEAD


@pytest.mark.parametrize("offset", [1 << 62, (1 << 63) - PAGE, (1 << 64) - PAGE])
async def test_a_write_at_an_offset_that_no_file_has_is_python_s(served: Served, offset: int) -> None:
    fh = await opened(served)
    fields = WRITE_IN.pack(fh, offset, PAGE, 0, 0, os.O_RDWR, 0)
    assert served.request_natively(WRITE, fields + bytes(PAGE)) is None
    assert (served.source / "f").read_bytes() == DATA


async def test_a_write_of_another_length_than_announced_is_python_s(served: Served) -> None:
    fh = await opened(served)
    fields = WRITE_IN.pack(fh, 0, 3, 0, 0, os.O_RDWR, 0)
    assert served.request_natively(WRITE, fields + b"newer") is None
    assert (served.source / "f").read_bytes() == DATA


async def test_an_unknown_or_released_handle_is_python_s(served: Served) -> None:
    fh = await opened(served)
    await served.release(fh)
    for number in fh, fh + 1, 0, (1 << 64) - 1:
        assert served.request_natively(READ, READ_IN.pack(number, 0, PAGE, 0, 0, 0, 0)) is None


async def test_some_pages_resident_or_some_in_cleancache_is_python_s(served: Served) -> None:
    fh = await opened(served)
    await served.read(fh, 0, PAGE)
    assert not await is_served(served, "read", fh, 0, 2 * PAGE), "one is resident"
    served.pagecache.drop()
    assert await is_served(served, "read", fh, 0, 2 * PAGE)
    assert not await is_served(served, "read", fh, PAGE, 2 * PAGE), "one is in cleancache"


async def test_a_short_read_of_the_source_makes_no_page_of_zeros(served: Served) -> None:
    """The source ends where its size, as known here, does not. What is missing may come back."""
    fh = await opened(served)
    await served.fs_cleared()
    os.truncate(served.source / "f", 100)
    assert (await served.read(fh, 0, 4 * PAGE)).body == DATA[:100]
    (served.source / "f").write_bytes(DATA)
    assert (await served.read(fh, 0, 4 * PAGE)).body == DATA[: 4 * PAGE]


async def test_a_cold_read_tries_once_not_to_wait(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    fh = await opened(served)
    await served.fs_cleared()
    handle = served.handle(fh)
    os.fsync(handle.fd)
    os.posix_fadvise(handle.fd, 0, 0, os.POSIX_FADV_DONTNEED)
    preadv, flags_seen = os.preadv, list[int]()

    def noting(fd: int, buffers: list[memoryview], offset: int, flags: int) -> int:
        flags_seen.append(flags)
        return preadv(fd, buffers, offset, flags)

    monkeypatch.setattr(os, "preadv", noting)
    assert (await served.read(fh, 0, PAGE)).body == DATA[:PAGE]
    fs = handle._source._fs  # noqa: SLF001  # no public access
    if not fs.nowait:
        pytest.skip("the source does not know RWF_NOWAIT")
    assert (fs.refused, len(flags_seen)) == (1, 1)
    assert not flags_seen[0] & os.RWF_NOWAIT


@pytest.mark.parametrize("limit", [0, 100])
async def test_a_write_cut_short_or_refused_is_python_s(served: Served, limit: int) -> None:
    fh = await opened(served)
    file = served.handle(fh).file
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE + limit, hard))
    try:
        reply = await served.write(fh, SIZE, bytes(PAGE))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert reply.errno == errno.EFBIG
    assert (file.size, file.stamps) == (0, None)
    assert served.notifier.told[-1][0] == "inode"


async def test_a_backend_that_is_python_s_holds_back_all_but_resident_pages(source: Path) -> None:
    served = Served(source, backend=None)
    served.cleancache.register(Store())
    fh = await opened(served)
    assert not await is_served(served, "write", fh)
    assert not await is_served(served, "read", fh), "it may be in cleancache"
    assert await is_served(served, "read", fh)
    served.cleancache.unregister()
    assert await is_served(served, "write", fh)
    assert await is_served(served, "read", fh)
    served.close()


async def test_a_backend_out_of_service_is_not_called(served: Served) -> None:
    fh = await opened(served)
    await served.read(fh, 0, PAGE)
    served.pagecache.drop()
    kept = served.cleancache.backend
    served.cleancache.out_of_service("it failed")
    assert kept is not None
    before = kept.counters()
    assert await is_served(served, "read", fh)
    assert await is_served(served, "write", fh)
    assert kept.counters() == before


async def test_a_growing_write_moves_the_end(served: Served) -> None:
    fh = await opened(served)
    before = served.served
    served.handle(fh).file.racy = False
    assert struct.unpack("=II", (await served.write(fh, SIZE + 10, b"end")).body) == (3, 0)
    assert served.served == before + 1
    handle = served.handle(fh)
    st = os.fstat(handle.fd)
    assert handle.file.size == handle.inode.kernel.size == st.st_size == SIZE + 13
    assert (
        handle.file.stamps == handle.inode.kernel.sent == (st.st_size, st.st_mtime_ns, st.st_ctime_ns)
    )
    assert handle.file.racy
    assert (await served.read(fh, SIZE, 100)).body == bytes(10) + b"end"


async def test_a_write_makes_reads_and_stats_from_before_it_stale(served: Served) -> None:
    fh = await opened(served)
    file, before = served.handle(fh).file, served.pagecache.clock
    assert await is_served(served, "write", fh)
    assert file.version == served.pagecache.clock > before


async def test_a_write_does_not_hide_that_the_kernel_knew_another_state(served: Served) -> None:
    fh = await opened(served)
    kernel = served.handle(fh).inode.kernel
    kernel.sent = (1, 2, 3)
    assert await is_served(served, "write", fh)
    assert kernel.sent == (1, 2, 3)


async def test_evictions_of_the_fast_path_reach_cleancache(source: Path) -> None:
    served = Served(source, page_cache=8 * 5000)
    fh = await opened(served)
    for offset in range(0, SIZE, PAGE):
        assert await is_served(served, "read", fh, offset, PAGE)
    stats = served.pagecache.stats()
    assert stats.used <= stats.limit
    assert stats.evictions == SIZE // PAGE - stats.resident
    os.truncate(source / "f", 0)
    for offset in range(0, SIZE, PAGE):
        assert (await served.read(fh, offset, PAGE)).body == DATA[offset : offset + PAGE]
    served.close()


def test_stamps_of_any_time_fit() -> None:
    module = native_module("cleanfs.cache._pagecache")
    assert module is not None
    for time in 0, -1, 2**63 - 1, 2**63, -(2**63), -(2**63) - 1, 2**62, 2**90, -(2**90):
        kernel = module.KernelState()
        kernel.sent = (1, time, -time)
        assert kernel.sent == (1, time, -time)
