"""Compare the page cache with a bytearray, also under concurrent reads and writes."""

from collections.abc import Iterator
from random import Random

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cleanfs.backends import zcache
from cleanfs.backends.options import BackendOptions
from tests.cache.rig import PAGE, Rig, Source

SIZE = 6 * PAGE
OFFSETS = st.integers(0, SIZE) | st.sampled_from([i * PAGE + d for i in range(6) for d in (-1, 0, 1)])
STEPS = st.lists(
    st.tuples(
        st.sampled_from(["read", "read", "write", "truncate", "source change", "drop", "resize"]),
        OFFSETS.map(lambda offset: max(offset, 0)),
        st.integers(1, 2 * PAGE),
    ),
    max_size=40,
)


@pytest.mark.parametrize("backend", [True, False])
@given(pages=st.integers(0, 4), tail=st.integers(0, PAGE - 1), steps=STEPS)
@settings(max_examples=150, deadline=None)
def test_reads_match_a_bytearray(
    backend: bool, pages: int, tail: int, steps: list[tuple[str, int, int]]
) -> None:
    async def run() -> None:
        source = Source(3, tail)
        rig = Rig(pages, source, zcache.make(BackendOptions(1 << 20)) if backend else None)
        for action, offset, size in steps:
            if action == "read":
                expected = source.data[offset : offset + size]
                assert await rig.read(offset, size) == expected
            elif action == "write":
                async with rig.cache.mutating(rig.file, offset, offset + size):
                    source.data.extend(bytes(max(0, offset - len(source.data))))
                    source.data[offset : offset + size] = bytes([size % 256]) * size
                    rig.update_size()
            elif action == "truncate":
                async with rig.cache.mutating(rig.file, min(offset, rig.file.size)):
                    del source.data[offset:]
                    source.data.extend(bytes(offset - len(source.data)))
                    rig.update_size()
            elif action == "source change":
                source.data[:] = bytes([offset % 256]) * size
                rig.cache.invalidate(rig.file)
                rig.update_size()
            elif action == "drop":
                rig.cache.drop()
            else:
                rig.cache.resize(size * 3)
            rig.check()

    trio.run(run)


BLOCK = 1024


class History:
    """Records the values of each block of a file, and until when a reader may have seen them.

    A write counts from the moment it reaches the source. The value that it replaces may be seen until
    the write has returned.
    """

    def __init__(self, blocks: int) -> None:
        self.now = 0
        self._values: list[list[tuple[int, int, float]]] = [
            [(0, 0, float("inf"))] for _ in range(blocks)
        ]

    def wrote(self, block: int, value: int) -> None:
        self._values[block].append((value, self.now, float("inf")))

    def settle(self, block: int) -> None:
        """End the period in which values before the last write may be seen."""
        values = self._values[block]
        values[:-1] = [(value, start, min(end, self.now)) for value, start, end in values[:-1]]

    def allowed(self, block: int, since: int) -> set[int]:
        return {
            value for value, start, end in self._values[block] if end >= since and start <= self.now
        }


@given(seed=st.integers(0, 2**32), pages=st.integers(0, 6), backend=st.booleans())
@settings(max_examples=200, deadline=None)
def test_concurrent_reads_never_return_values_overwritten_before_they_began(
    seed: int, pages: int, backend: bool
) -> None:
    rng = Random(seed)
    blocks = SIZE // BLOCK

    async def yield_some_times() -> None:
        for _ in range(rng.randrange(4)):
            await trio.lowlevel.checkpoint()

    async def run() -> None:
        source = Source(6)
        source.data[:] = bytes(SIZE)
        rig = Rig(pages, source, zcache.make(BackendOptions(1 << 20)) if backend else None)
        history = History(blocks)

        class SlowSource:
            async def read(self, offset: int, size: int, file_size: int) -> bytes:
                await yield_some_times()
                data = bytes(source.data[offset : offset + size])
                await yield_some_times()
                return data

        async def reader() -> None:
            for _ in range(15):
                first = rng.randrange(blocks)
                count = rng.randrange(1, blocks - first + 1)
                history.now += 1
                since = history.now
                found, _ = await rig.cache.read(rig.file, SlowSource(), first * BLOCK, count * BLOCK)
                data = bytes(found)
                history.now += 1
                assert len(data) == count * BLOCK
                for i in range(count):
                    assert data[i * BLOCK] in history.allowed(first + i, since)
                    assert len(set(data[i * BLOCK : (i + 1) * BLOCK])) == 1
                await yield_some_times()

        async def writer(values: Iterator[int]) -> None:
            for _ in range(8):
                first = rng.randrange(blocks)
                stop = rng.randrange(first, blocks) + 1
                value = next(values)
                async with rig.cache.mutating(rig.file, first * BLOCK, stop * BLOCK):
                    await yield_some_times()
                    history.now += 1
                    source.data[first * BLOCK : stop * BLOCK] = bytes([value]) * (
                        (stop - first) * BLOCK
                    )
                    for block in range(first, stop):
                        history.wrote(block, value)
                    await yield_some_times()
                history.now += 1
                for block in range(first, stop):
                    history.settle(block)
                history.now += 1
                await yield_some_times()
                if rng.random() < 0.2:
                    rig.cache.drop()

        values = iter(range(1, 256))
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(reader)
            for _ in range(2):
                nursery.start_soon(writer, values)
        rig.check()

    trio.run(run)
