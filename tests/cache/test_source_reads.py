"""Test that concurrent misses share the reads of the source."""

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.cache.rig import PAGE, Readers, Rig, held


async def test_concurrent_misses_of_one_page_share_one_read(rig: Rig) -> None:
    async with held(rig.source) as nursery:
        readers = Readers(rig, nursery)
        for _ in range(3):
            await readers.start(0, PAGE)
    assert readers.results == [bytes(rig.source.data[:PAGE])] * 3
    assert rig.source.reads == [(0, PAGE)]
    assert rig.cache.stats().shared_reads == 2


async def test_an_overlapping_read_reads_only_the_rest(rig: Rig) -> None:
    async with held(rig.source) as nursery:
        readers = Readers(rig, nursery)
        await readers.start(2 * PAGE, 2 * PAGE)
        await readers.start(100, 6 * PAGE - 200)
        await readers.start(3 * PAGE, PAGE)
    data = bytes(rig.source.data)
    assert readers.results == [
        data[2 * PAGE : 4 * PAGE],
        data[100 : 6 * PAGE - 100],
        data[3 * PAGE : 4 * PAGE],
    ]
    assert sorted(rig.source.pages_read()) == [0, 1, 2, 3, 4, 5]


async def test_an_error_reaches_every_reader_that_joined_and_is_not_kept(rig: Rig) -> None:
    async with held(rig.source) as nursery:
        readers = Readers(rig, nursery)
        await readers.start(0, PAGE)
        await readers.start(0, 2 * PAGE)
        rig.source.error = OSError(110, "timed out")
    errors = [result for result in readers.results if isinstance(result, OSError)]
    assert [error.errno for error in errors] == [110, 110]
    assert errors[0] is not errors[1]
    rig.source.error = None
    await rig.read_pages(0, 1)


@pytest.mark.parametrize(("offset", "size"), [(2 * PAGE, PAGE), (PAGE + 5, 10), (0, 2 * PAGE)])
async def test_an_error_does_not_reach_a_reader_of_other_bytes(
    rig: Rig, offset: int, size: int
) -> None:
    async with held(rig.source) as nursery:
        readers = Readers(rig, nursery)
        await readers.start(0, 4 * PAGE)
        await readers.start(offset, size)
        rig.source.bad = 3 * PAGE + 1
    assert isinstance(readers.results[0], OSError)
    assert readers.results[1] == bytes(rig.source.data[offset : offset + size])
    rig.source.bad = None
    await rig.read_pages(0, 1, 2, 3)


async def test_an_error_of_one_run_is_the_error_of_the_read(rig: Rig) -> None:
    await rig.read_pages(1)
    rig.source.error = PermissionError(13, "no")
    with pytest.raises(PermissionError):
        await rig.read(0, 3 * PAGE)


async def test_a_reader_that_joined_a_cancelled_read_gets_an_error_not_an_end_of_file(rig: Rig) -> None:
    scope = trio.CancelScope()

    async def cancelled() -> None:
        with scope:
            await rig.read(0, PAGE)

    async with held(rig.source) as nursery:
        nursery.start_soon(cancelled)
        await wait_all_tasks_blocked()
        readers = Readers(rig, nursery)
        await readers.start(0, PAGE)
        scope.cancel()
    assert scope.cancelled_caught
    assert isinstance(readers.results[0], OSError)
    await rig.read_pages(0)
