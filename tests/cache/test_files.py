"""Test the records of files with cached pages."""

import pytest

from cleanfs.backends.ops import FileKey
from cleanfs.cache.files import MIN_FILES, CachedFile, max_files
from tests.cache.rig import KEY, PAGE, Readers, Rig, Source, Store, held


def test_a_new_file_record_is_empty() -> None:
    file = CachedFile(KEY, 1)
    assert (file.size, file.fingerprint, file.pins, file.in_flight) == (0, None, 0, [])


def key(i: int) -> FileKey:
    return FileKey(5, i, b"")


async def test_a_key_has_one_record(rig: Rig) -> None:
    assert rig.cache.known(key(1)) is None
    file = rig.cache.file(key(1))
    assert rig.cache.file(key(1)) is file is rig.cache.known(key(1))


def test_the_number_of_records_follows_from_the_pool_limit() -> None:
    assert max_files(1 << 20) == MIN_FILES
    assert max_files(512 << 20) == 131_072


@pytest.mark.parametrize("max_files", [1, 8, 64])
async def test_records_are_bounded_and_the_least_recently_used_is_dropped(
    store: Store, max_files: int
) -> None:
    rig = Rig(4, Source(16), store, max_files)
    rig.file.pins = 0
    for i in range(200):
        rig.cache.file(key(i))
    assert rig.cache.stats().files <= max_files
    assert rig.cache.known(key(199)) is not None
    assert rig.cache.known(key(0)) is None


async def test_a_dropped_record_flushes_its_pages(store: Store) -> None:
    rig = Rig(2, Source(16), store, max_files=16)
    await rig.read_pages(0, 1, 2)
    rig.file.pins = 0
    for i in range(16):
        rig.cache.file(key(i))
    assert rig.cache.known(KEY) is None
    assert store.pages == {}
    assert rig.cache.stats().resident == 0
    rig.check()


async def test_a_record_in_use_is_not_dropped(store: Store) -> None:
    rig = Rig(4, Source(16), store, max_files=16)
    await rig.read_pages(0)
    used = rig.cache.file(key(0))
    for i in range(1, 100):
        rig.cache.file(key(i))
        rig.cache.file(key(0))  # used again and again
    assert rig.cache.known(KEY) is rig.file  # pinned
    assert rig.resident() == {0}
    assert rig.cache.known(key(0)) is used
    assert rig.cache.known(key(50)) is None


async def test_a_removed_file_is_flushed_and_its_record_dropped(rig: Rig, store: Store) -> None:
    await rig.read_pages(0, 1, 2, 3, 4)
    rig.cache.forget(rig.file)
    assert store.pages == {}
    assert rig.resident() == set()
    assert rig.cache.known(KEY) is rig.file  # pinned: still readable through open fds
    await rig.read_pages(0)
    rig.file.pins = 0
    rig.cache.forget(rig.file)
    assert rig.cache.known(KEY) is None
    assert rig.cache.stats().resident == 0
    rig.file.pins = 1


async def test_a_read_in_progress_pins_the_record(rig: Rig) -> None:
    rig.file.pins = 0
    async with held(rig.source) as nursery:
        await Readers(rig, nursery).start(0, PAGE)
        assert rig.file.pins == 1
        rig.cache.forget(rig.file)
        assert rig.cache.known(KEY) is rig.file
    assert rig.file.pins == 0
    rig.file.pins = 1
