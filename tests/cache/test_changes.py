"""Test that no page from before a change survives it in the page cache."""

# ruff: noqa: SLF001  # invariants are checked on private tables

import pytest
import trio

from cleanfs.backends.ops import FileKey
from tests.cache.rig import PAGE, Readers, Rig, Source, Store, held


async def test_pages_read_before_an_invalidation_are_not_inserted(rig: Rig, store: Store) -> None:
    async with held(rig.source) as nursery:
        await Readers(rig, nursery).start(0, PAGE)
        rig.cache.invalidate(rig.file, PAGE, 2 * PAGE)  # any part of the file
    assert rig.resident() == set()
    assert rig.cache.stats().stale_reads == 1
    assert store.pages == {}
    await rig.read_pages(0)
    assert len(rig.source.reads) == 2


async def test_a_read_does_not_join_a_flight_of_an_older_version(rig: Rig) -> None:
    async with held(rig.source) as nursery:
        readers = Readers(rig, nursery)
        await readers.start(0, PAGE)
        rig.source.data[:PAGE] = b"N" * PAGE
        rig.cache.invalidate(rig.file, 0, PAGE)
        await readers.start(0, PAGE)
    assert readers.results[1] == b"N" * PAGE
    assert await rig.read(0, PAGE) == b"N" * PAGE
    assert len(rig.source.reads) == 2


async def test_a_mutation_hides_the_old_pages_before_it_starts(rig: Rig, store: Store) -> None:
    await rig.read_pages(0, 1, 2, 3, 4)  # 0 is in the store, 1 to 4 are resident
    async with rig.cache.mutating(rig.file, 0, 2 * PAGE):
        rig.source.data[: 2 * PAGE] = b"N" * (2 * PAGE)
        assert await rig.read(0, 2 * PAGE) == b"N" * (2 * PAGE)
    assert await rig.read(0, 3 * PAGE) == rig.source.data[: 3 * PAGE]


async def test_a_mutation_discards_pages_read_during_it(rig: Rig) -> None:
    async with rig.cache.mutating(rig.file, 0, PAGE):
        await rig.read_pages(0)  # the old page, resident now
        rig.source.data[:PAGE] = b"N" * PAGE
    assert await rig.read(0, PAGE) == b"N" * PAGE


async def test_a_read_that_outlives_an_overlapping_mutation_inserts_nothing(rig: Rig) -> None:
    async with held(rig.source) as nursery, rig.cache.mutating(rig.file, 0, PAGE):
        await Readers(rig, nursery).start(0, PAGE)
        rig.source.data[:PAGE] = b"N" * PAGE
    assert rig.resident() == set()
    assert await rig.read(0, PAGE) == b"N" * PAGE


async def test_a_mutation_that_fails_invalidates_as_well(rig: Rig) -> None:
    async def failing() -> None:
        async with rig.cache.mutating(rig.file, 0, PAGE):
            await rig.read_pages(0)
            rig.source.data[:10] = b"N" * 10
            raise OSError(28, "full")

    with pytest.raises(OSError, match="full"):
        await failing()
    await rig.read_pages(0)
    assert rig.file.mutations == 0


async def test_mutations_of_one_file_take_turns_and_pin_it(rig: Rig) -> None:
    order = []

    async def mutate(name: str) -> None:
        async with rig.cache.mutating(rig.file):
            order.append(name)
            assert rig.file.mutations == 1
            assert rig.file.pins > 1
            await trio.lowlevel.checkpoint()
            order.append(name)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(mutate, "a")
        nursery.start_soon(mutate, "b")
    assert order in (["a", "a", "b", "b"], ["b", "b", "a", "a"])
    assert rig.file.mutations == 0


@pytest.mark.parametrize(
    ("start", "stop", "gone"),
    [
        (0, None, {0, 1, 2, 3, 9}),
        (0, 1, {0}),
        (4095, 4097, {0, 1}),
        (4096, 8192, {1}),
        (2 * PAGE, None, {2, 3, 9}),
        (2 * PAGE - 1, None, {1, 2, 3, 9}),
        (PAGE, 1 << 62, {1, 2, 3, 9}),
        (PAGE, 9 * PAGE, {1, 2, 3}),
        (PAGE, 9 * PAGE + 1, {1, 2, 3, 9}),
        (20 * PAGE, None, set()),
        (PAGE, PAGE, set()),
    ],
)
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "cleancache"])
async def test_an_invalidation_discards_every_page_it_touches_and_no_other(
    store: Store, start: int, stop: int | None, gone: set[int], resident: bool
) -> None:
    rig = Rig(8 if resident else 0, Source(16), store)
    await rig.read_pages(0, 1, 2, 3, 9)
    version = rig.file.version
    rig.cache.invalidate(rig.file, start, stop)
    assert rig.resident() | {i for _, i in store.pages} == {0, 1, 2, 3, 9} - gone
    assert rig.file.version > version
    rig.check()


async def test_an_invalidation_leaves_other_files_alone(rig: Rig, store: Store) -> None:
    other = rig.cache.file(FileKey(1, 3, b""))
    other.size = PAGE
    await rig.cache.read(other, rig.source, 0, PAGE)
    await rig.read_pages(0)
    version = other.version
    rig.cache.invalidate(rig.file)
    assert rig.cache._resident.indices(other.serial) == [0]
    assert other.version == version
