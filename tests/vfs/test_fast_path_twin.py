"""Compare the fast path with Python: the same requests and changes, once with it and once without.

The replies must be the same, and so must what is known and counted afterwards, with these exceptions:

* An insertion of the fast path evicts ``AHEAD`` pages more than it must; here none.
* A read of the source up to the end of the file counts as inline in the fast path. Python sends it to
  a thread, to see that it is the end.
* Versions: Python counts an invalidation before a write and one after it, and the fast path one.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from cleanfs.backends import load
from cleanfs.cache import fingerprint, pagecache
from cleanfs.cache.state import CacheState
from cleanfs.fuse.protocol import FUSE_WRITE_CACHE, FUSE_WRITE_KILL_SUIDGID
from cleanfs.fuse.session import native
from cleanfs.source.attributes import NewAttributes
from cleanfs.vfs.coherency import Coherency
from tests.harness.fuzzing import examples
from tests.harness.served import CTX, PAGE, Served

pytestmark = pytest.mark.skipif(
    native is None or not CacheState.native, reason="the native modules are not in use"
)

FILES = ("a", "b")
SIZE = 10 * PAGE + 100

offsets = st.one_of(st.integers(0, 12).map(lambda page: page * PAGE), st.integers(0, 12 * PAGE))
sizes = st.one_of(st.integers(1, 6).map(lambda page: page * PAGE), st.integers(1, 3 * PAGE))
handles = st.integers(0, 7)
names = st.sampled_from(FILES)
file_flags = st.sampled_from([os.O_RDWR] * 4 + [os.O_RDWR | os.O_APPEND, os.O_RDWR | os.O_SYNC])
write_flags = st.sampled_from([0] * 4 + [FUSE_WRITE_CACHE, FUSE_WRITE_KILL_SUIDGID])

writes = st.tuples(
    st.just("write"), handles, offsets, sizes, st.integers(0, 255), file_flags, write_flags
)

steps = st.lists(
    st.one_of(
        *[st.tuples(st.just("read"), handles, offsets, sizes)] * 8,
        *[writes] * 8,
        st.tuples(st.just("open"), names, st.sampled_from([os.O_RDWR, os.O_RDONLY])),
        st.tuples(st.just("close"), handles),
        st.tuples(st.just("truncate"), handles, offsets),
        st.tuples(st.just("getattr"), handles),
        st.tuples(st.just("overwrite"), names, offsets, sizes),
        st.tuples(st.just("cut"), names, offsets),
        st.tuples(st.just("chmod"), names, st.sampled_from([0o644, 0o6755])),
        st.tuples(st.just("distrust"), handles),
        st.tuples(st.just("drop"), st.integers(1, 3)),
        st.tuples(st.just("resize"), st.sampled_from([0, PAGE, 6 * 5000, 1 << 20])),
        st.tuples(st.just("swap"), st.sampled_from([None, "zcache"])),
    ),
    min_size=30,
    max_size=60,
)


class Twin:
    """Applies steps to one served directory."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self.handles: list[int] = []
        self._stamp = 10**18

    async def apply(self, step: tuple[Any, ...]) -> object:
        """Apply a step. Returns what is to be compared."""
        what, *arguments = step
        if what in ("read", "write", "close", "truncate", "getattr", "distrust"):
            if not self.handles:
                return None
            arguments[0] = self.handles[arguments[0] % len(self.handles)]
            self.served.trust(arguments[0])
        return await getattr(self, what)(*arguments)

    async def read(self, fh: int, offset: int, size: int) -> object:
        return await self.served.read(fh, offset, size)

    async def write(
        self, fh: int, offset: int, size: int, byte: int, file_flags: int, flags: int
    ) -> object:
        data = bytes([byte]) * size
        return await self.served.write(fh, offset, data, flags=flags, file_flags=file_flags)

    async def open(self, name: str, flags: int) -> None:
        self.handles.append(await self.served.open(name, flags))

    async def close(self, fh: int) -> None:
        self.handles.remove(fh)
        await self.served.release(fh)

    async def truncate(self, fh: int, size: int) -> None:
        handle = self.served.handle(fh)
        fd = handle.fd if handle.writable else -1
        await self.served.fs._tree.set_attributes(handle.inode, fd, NewAttributes(size=size))  # noqa: SLF001  # no public access

    async def getattr(self, fh: int) -> int:
        handle = self.served.handle(fh)
        return (await self.served.fs.getattr(handle.inode.node, CTX)).st_size

    async def overwrite(self, name: str, offset: int, size: int) -> None:
        fd = os.open(self.served.source / name, os.O_WRONLY)
        os.pwrite(fd, os.fsencode(name) * size, offset)
        os.close(fd)
        self._touch(name)

    async def cut(self, name: str, size: int) -> None:
        os.truncate(self.served.source / name, size)
        self._touch(name)

    async def chmod(self, name: str, mode: int) -> None:
        (self.served.source / name).chmod(mode)
        self._touch(name)

    def _touch(self, name: str) -> None:
        """Give a change of the source a stamp of its own, however fast it comes."""
        self._stamp += 10**9
        os.utime(self.served.source / name, ns=(self._stamp, self._stamp))

    async def distrust(self, fh: int) -> None:
        self.served.coherency.distrust(self.served.handle(fh).file)

    async def drop(self, what: int) -> None:
        if what & 1:
            self.served.pagecache.drop()
        if what & 2:
            self.served.fs_caches.drop_pool()

    async def resize(self, limit: int) -> None:
        self.served.pagecache.resize(limit)

    async def swap(self, backend: str | None) -> None:
        self.served.cleancache.unregister()
        if backend is not None:
            self.served.cleancache.register(load(backend)(self.served.options))

    async def state(self) -> dict[str, object]:
        """Return what must be the same in both."""
        served = self.served
        cleancache, pages = served.cleancache.stats(), served.pagecache.stats()
        latencies = served.latencies.stats() + served.channel.latencies()
        writes = served.channel.latencies()
        traffic = served.backing.stats(
            served.channel.source_reads(), (writes.write.total, writes.write_bytes)
        )
        state: dict[str, object] = {
            "cleancache": cleancache,
            "pages": pages,
            "latencies": [histogram.total for histogram in latencies.by_kind().values()],
            "bytes": (latencies.read_bytes, latencies.write_bytes),
            "source": (
                traffic.source_reads,
                traffic.source_read_bytes,
                traffic.source_writes,
                traffic.source_write_bytes,
                traffic.source_errors,
            ),
            "found": (served.coherency.changes_found, served.coherency.doubtful_flushes),
            "kept": served.fs_caches.kept_pages(),
            "told": [(what, served.names[node]) for what, node in served.notifier.told],
        }
        for fh in self.handles:
            handle = served.handle(fh)
            file, kernel, now = handle.file, handle.inode.kernel, os.fstat(handle.fd)
            stamps = (now.st_size, now.st_mtime_ns, now.st_ctime_ns)
            state[f"handle {fh}"] = (
                file.size,
                file.stamps is None,
                file.stamps == stamps,
                file.racy,
                file.mutations,
                file.pending_writes,
                file.reads_in_flight,
                kernel.size,
                kernel.sent == stamps,
                kernel.size_doubt == kernel.doubts,
                sorted(served.pagecache._resident.indices(file.serial)),  # noqa: SLF001  # no public access
            )
        return state


@dataclass(frozen=True, slots=True)
class Case:
    """One way to mount."""

    coherency: Coherency = Coherency.OPEN
    page_cache: int = 1 << 20
    backend: str | None = "zcache"
    explicit: bool = True
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "default": Case(),
    "none": Case(coherency=Coherency.NONE),
    "watch": Case(coherency=Coherency.WATCH),
    "no page cache": Case(page_cache=0),
    "no backend": Case(backend=None),
    "no cache": Case(page_cache=0, backend=None),
    "small": Case(page_cache=5 * 5000),
    "zbud": Case(page_cache=5 * 5000, options={"allocator": "zbud"}),
    "checksum": Case(page_cache=5 * 5000, options={"checksum": True}),
    "implicit": Case(explicit=False),
}


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evict no more than must go."""
    monkeypatch.setattr(pagecache, "AHEAD", 0)


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("granularity_ns", [0, 1 << 62], ids=["calm", "racy"])
@pytest.mark.parametrize("name", CASES)
def test_the_fast_path_is_python_s_twin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, granularity_ns: int
) -> None:
    monkeypatch.setattr(fingerprint, "FINE_NS", granularity_ns)
    monkeypatch.setattr(fingerprint, "COARSE_NS", granularity_ns)
    served = 0

    @examples(15)
    @given(steps)
    def run(steps: list[tuple[Any, ...]]) -> None:
        nonlocal served
        served += trio.run(compare, tmp_path, CASES[name], steps)

    run()
    assert served > 5, "the fast path was not tried"


async def compare(top: Path, case: Case, steps: list[tuple[Any, ...]]) -> int:
    """Apply steps to two directories, and compare. Returns how many requests the fast path served."""
    twins = []
    for is_fast in True, False:
        source = top / ("fast" if is_fast else "python")
        source.mkdir(exist_ok=True)
        for name in FILES:
            file = source / name
            file.write_bytes(bytes((3 * i + len(name)) % 251 for i in range(SIZE)))
            file.chmod(0o644)
            os.utime(file, ns=(10**18, 10**18))
        twins.append(
            Twin(
                Served(
                    source,
                    fast=is_fast,
                    coherency=case.coherency,
                    page_cache=case.page_cache,
                    backend=case.backend,
                    explicit=case.explicit,
                    **case.options,
                )
            )
        )
    fast, python = twins
    try:
        for step in (("open", "a", os.O_RDWR), ("open", "b", os.O_RDONLY), *steps):
            found, expected = await fast.apply(step), await python.apply(step)
            assert found == expected, step
            assert await fast.state() == await python.state(), step
        for name in FILES:
            data = [(twin.served.source / name).read_bytes() for twin in twins]
            assert data[0] == data[1]
        assert python.served.served == 0
        return fast.served.served
    finally:
        for twin in twins:
            for fh in list(twin.handles):
                await twin.close(fh)
            twin.served.close()
