"""Test the frontend: registration, pools, hooks, counters, and faults that readers never see."""

import logging
from collections.abc import Callable, Mapping, Sequence
from uuid import UUID

import pytest

from cleanfs.backends.ops import Backend, FileKey
from cleanfs.cache.cleancache import MAX_ERRORS, BackendBusyError, Cleancache, CleancacheFs

KEY = FileKey(1, 2, b"g")
PAGE_SIZE = 4096
PAGE = b"p" * PAGE_SIZE


class Fake:
    """Implements a correct backend over a dict, records calls and fails on demand."""

    name = "fake"
    engine = "python"
    pool_limit = 1 << 20

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.pages: dict[tuple[int, FileKey, int], bytes] = {}
        self.failing: set[str] = set()
        self.refuses = False
        self.wrong_size: set[int] = set()
        self.pools = 0

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failing:
            raise RuntimeError(name)

    def init_fs(self, page_size: int) -> int:
        self._called("init_fs")
        if self.refuses:
            return -1
        self.pools += 1
        return self.pools - 1

    def init_shared_fs(self, uuid: UUID, page_size: int) -> int:
        self._called("init_shared_fs")
        return 1000 + uuid.int

    def get_page(self, pool_id: int, key: FileKey, index: int) -> bytes | None:
        self._called("get_page")
        return self._get(pool_id, key, index)

    def _get(self, pool_id: int, key: FileKey, index: int) -> bytes | None:
        page = self.pages.get((pool_id, key, index))
        return page[:-1] if page and index in self.wrong_size else page

    def put_page(self, pool_id: int, key: FileKey, index: int, page: bytes) -> None:
        self.put_pages(pool_id, key, [(index, page)])

    def get_pages(self, pool_id: int, key: FileKey, first: int, count: int) -> list[bytes | None]:
        self._called("get_pages")
        return [self._get(pool_id, key, index) for index in range(first, first + count)]

    def put_pages(self, pool_id: int, key: FileKey, pages: Sequence[tuple[int, bytes]]) -> None:
        self._called("put_pages")
        for index, page in pages:
            self.pages[pool_id, key, index] = page

    def flush_page(self, pool_id: int, key: FileKey, index: int) -> None:
        self._called("flush_page")
        self.pages.pop((pool_id, key, index), None)

    def flush_pages(self, pool_id: int, key: FileKey, start: int, stop: int | None) -> None:
        self._called(f"flush_pages {start} {stop}")

    def flush_inode(self, pool_id: int, key: FileKey) -> None:
        self._called("flush_inode")

    def flush_fs(self, pool_id: int) -> None:
        self._called(f"flush_fs {pool_id}")

    def resize(self, pool_limit: int) -> None:
        raise NotImplementedError

    def counters(self) -> Mapping[str, int]:
        return {}


@pytest.fixture
def fake() -> Fake:
    assert isinstance(Fake(), Backend)
    return Fake()


@pytest.fixture
def cc(fake: Fake) -> Cleancache:
    cleancache = Cleancache()
    cleancache.register(fake)
    return cleancache


@pytest.fixture
def fs(cc: Cleancache) -> CleancacheFs:
    return cc.init_fs(PAGE_SIZE)


# -- registration -----------------------------------------------------------------------------


def test_a_file_system_that_mounts_after_the_backend_has_a_pool_at_once(
    fs: CleancacheFs, fake: Fake
) -> None:
    assert fs.pool_id == 0
    assert fake.calls == ["init_fs"]


def test_a_late_backend_gives_every_mount_its_pool_exactly_once() -> None:
    cc, fake = Cleancache(), Fake()
    private = [cc.init_fs(PAGE_SIZE), cc.init_fs(PAGE_SIZE)]
    shared = cc.init_fs(PAGE_SIZE, UUID(int=7))
    assert [fs.pool_id for fs in (*private, shared)] == [-1, -1, -1]
    cc.register(fake)
    assert [fs.pool_id for fs in (*private, shared)] == [0, 1, 1007]
    for fs in (*private, shared):
        fs.init_pool()
    assert fake.calls == ["init_fs", "init_fs", "init_shared_fs"]


def test_puts_before_the_backend_is_registered_are_not_counted() -> None:
    cc, fake = Cleancache(), Fake()
    fs = cc.init_fs(PAGE_SIZE)
    fs.put_page(KEY, 0, PAGE)
    cc.register(fake)
    assert fs.get_page(KEY, 0) is None
    assert cc.stats().puts == 0


def test_an_unmounted_file_system_gets_no_pool_from_a_late_backend() -> None:
    cc, fake = Cleancache(), Fake()
    fs = cc.init_fs(PAGE_SIZE)
    fs.flush_fs()
    cc.register(fake)
    assert fs.pool_id == -1
    assert fake.calls == []


def test_a_second_backend_is_refused_and_changes_nothing(
    cc: Cleancache, fs: CleancacheFs, fake: Fake
) -> None:
    second = Fake()
    with pytest.raises(BackendBusyError, match="fake"):
        cc.register(second)
    assert cc.backend is fake
    assert fs.pool_id == 0
    assert second.calls == []


def test_unregister_surrenders_every_pool_and_allows_another_backend(
    cc: Cleancache, fake: Fake
) -> None:
    mounts = [cc.init_fs(PAGE_SIZE), cc.init_fs(PAGE_SIZE)]
    cc.unregister()
    assert [fs.pool_id for fs in mounts] == [-1, -1]
    assert fake.calls[2:] == ["flush_fs 0", "flush_fs 1"]
    second = Fake()
    cc.register(second)
    assert [fs.pool_id for fs in mounts] == [0, 1]
    assert second.calls == ["init_fs", "init_fs"]


def test_flush_fs_surrenders_the_pool_once(cc: Cleancache, fs: CleancacheFs, fake: Fake) -> None:
    fs.flush_fs()
    fs.flush_fs()
    cc.unregister()
    assert fake.calls == ["init_fs", "flush_fs 0"]
    assert cc.stats().flushes == 1


def test_drop_pool_surrenders_the_pool_and_opens_a_new_one(fs: CleancacheFs, fake: Fake) -> None:
    fs.drop_pool()
    assert fake.calls == ["init_fs", "flush_fs 0", "init_fs"]
    assert fs.pool_id == 1


def test_a_refused_pool_is_logged_and_has_no_other_effect(
    cc: Cleancache, fake: Fake, caplog: pytest.LogCaptureFixture
) -> None:
    fake.refuses = True
    fs = cc.init_fs(PAGE_SIZE)
    assert "refused" in caplog.text
    use_all_hooks(fs)
    assert fake.calls == ["init_fs"]


# -- no backend -----------------------------------------------------------------------------


def use_all_hooks(fs: CleancacheFs) -> None:
    assert fs.get_page(KEY, 0) is None
    assert fs.get_pages(KEY, 0, 3) is None
    fs.put_page(KEY, 0, PAGE)
    fs.put_pages(KEY, [(0, PAGE)])
    fs.flush_page(KEY, 0)
    fs.flush_pages(KEY, 0, None)
    fs.flush_inode(KEY)
    fs.drop_pool()


def test_without_a_backend_hooks_do_and_count_nothing() -> None:
    cc = Cleancache()
    fs = cc.init_fs(PAGE_SIZE)
    before = cc.stats()
    use_all_hooks(fs)
    fs.flush_fs()
    assert cc.stats() == before
    assert set(vars_of(before)) == {0}


def vars_of(stats: object) -> list[int]:
    return [getattr(stats, name) for name in stats.__slots__]  # type: ignore[attr-defined]  # every statistics class has slots


# -- hooks and counters ---------------------------------------------------------------------


def test_gets_count_hits_and_misses_per_page(cc: Cleancache, fs: CleancacheFs, fake: Fake) -> None:
    fs.put_pages(KEY, [(1, PAGE), (2, PAGE)])
    assert fs.get_pages(KEY, 0, 4) == [None, PAGE, PAGE, None]
    assert fs.get_page(KEY, 1) == PAGE
    assert fs.get_page(KEY, 9) is None
    assert vars_of(cc.stats()) == [3, 3, 2, 0, 0]


def test_flushes_count_per_call(cc: Cleancache, fs: CleancacheFs, fake: Fake) -> None:
    fs.flush_page(KEY, 0)
    fs.flush_pages(KEY, 3, 9)
    fs.flush_pages(KEY, 3, None)
    fs.flush_inode(KEY)
    fs.flush_fs()
    assert cc.stats().flushes == 5
    assert fake.calls[1:] == [
        "flush_page",
        "flush_pages 3 9",
        "flush_pages 3 None",
        "flush_inode",
        "flush_fs 0",
    ]


# -- faults ---------------------------------------------------------------------------------


def test_a_get_that_raises_is_a_miss(cc: Cleancache, fs: CleancacheFs, fake: Fake) -> None:
    fake.failing = {"get_page", "get_pages"}
    assert fs.get_page(KEY, 0) is None
    assert fs.get_pages(KEY, 0, 3) == [None] * 3
    assert cc.stats().failed_gets == 4
    assert cc.stats().backend_errors == 2
    assert cc.backend is fake


def test_a_put_that_raises_discards_its_pages(cc: Cleancache, fs: CleancacheFs, fake: Fake) -> None:
    fs.put_pages(KEY, [(0, PAGE), (1, PAGE), (2, PAGE)])
    fake.failing = {"put_pages"}
    fs.put_pages(KEY, [(0, PAGE), (2, PAGE)])
    assert fake.calls[-2:] == ["flush_page", "flush_page"]
    assert fs.get_pages(KEY, 0, 3) == [None, PAGE, None]
    assert cc.stats().backend_errors == 1
    assert cc.stats().flushes == 0


@pytest.mark.parametrize("one", [False, True])
def test_a_page_of_the_wrong_size_is_a_miss_and_discarded(
    cc: Cleancache, fs: CleancacheFs, fake: Fake, one: bool
) -> None:
    fs.put_pages(KEY, [(4, PAGE), (5, PAGE), (6, PAGE)])
    fake.wrong_size = {5}
    if one:
        assert fs.get_page(KEY, 5) is None
    else:
        assert fs.get_pages(KEY, 4, 3) == [PAGE, None, PAGE]
    assert cc.stats().backend_errors == 1
    assert cc.stats().failed_gets == 1
    assert set(fake.pages) == {(0, KEY, 4), (0, KEY, 6)}


@pytest.mark.parametrize("pages", [[], [PAGE], [PAGE] * 3])
def test_a_get_that_returns_the_wrong_number_of_pages_is_a_fault_and_a_miss(
    cc: Cleancache, fs: CleancacheFs, fake: Fake, pages: list[bytes | None]
) -> None:
    fake.get_pages = lambda *_: pages  # type: ignore[method-assign]  # fail on purpose
    assert fs.get_pages(KEY, 0, 2) == [None, None]
    assert cc.stats().failed_gets == 2
    assert cc.stats().backend_errors == 1


def test_an_init_that_raises_leaves_the_mount_without_a_pool(cc: Cleancache, fake: Fake) -> None:
    fake.failing = {"init_fs", "init_shared_fs"}
    fs = cc.init_fs(PAGE_SIZE)
    assert fs.pool_id == -1
    assert cc.init_fs(PAGE_SIZE, UUID(int=1)).pool_id == -1
    assert cc.stats().backend_errors == 2
    use_all_hooks(fs)


def test_an_init_that_raises_during_registration_does_not_stop_the_others() -> None:
    cc, fake = Cleancache(), Fake()
    shared, private = cc.init_fs(PAGE_SIZE, UUID(int=1)), cc.init_fs(PAGE_SIZE)
    fake.failing = {"init_shared_fs"}
    cc.register(fake)
    assert (shared.pool_id, private.pool_id) == (-1, 0)


FLUSHES: dict[str, Callable[[CleancacheFs], None]] = {
    "flush_page": lambda fs: fs.flush_page(KEY, 0),
    "flush_pages 0 2": lambda fs: fs.flush_pages(KEY, 0, 2),
    "flush_inode": lambda fs: fs.flush_inode(KEY),
    "flush_fs 0": lambda fs: fs.flush_fs(),
}


@pytest.mark.parametrize("name", FLUSHES)
def test_a_backend_that_fails_to_discard_is_out_of_service_at_once(
    cc: Cleancache, fs: CleancacheFs, fake: Fake, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    other = cc.init_fs(PAGE_SIZE)
    fs.put_page(KEY, 0, PAGE)
    other.put_page(KEY, 0, PAGE)
    fake.failing = {name}
    FLUSHES[name](fs)
    assert fake.calls[-1] == name
    assert cc.backend is None
    assert [record.levelno for record in caplog.records][-1] == logging.ERROR
    del fake.calls[:]
    use_all_hooks(fs)
    use_all_hooks(other)
    assert fake.calls == []


def test_a_drop_whose_discard_fails_leaves_no_pool(
    cc: Cleancache, fs: CleancacheFs, fake: Fake
) -> None:
    fake.failing = {"flush_fs 0"}
    fs.drop_pool()
    assert (cc.backend, fs.pool_id) == (None, -1)


def test_a_put_that_raises_and_cannot_be_discarded_ends_the_service(
    cc: Cleancache, fs: CleancacheFs, fake: Fake
) -> None:
    fake.failing = {"put_pages", "flush_page"}
    fs.put_pages(KEY, [(0, PAGE), (1, PAGE)])
    assert cc.backend is None
    assert fake.calls.count("flush_page") == 1


def test_repeated_failing_gets_end_the_service(cc: Cleancache, fs: CleancacheFs, fake: Fake) -> None:
    fake.failing = {"get_pages"}
    for _ in range(MAX_ERRORS - 1):
        fs.get_pages(KEY, 0, 1)
    assert cc.backend is fake
    assert fs.get_pages(KEY, 0, 1) == [None]
    assert cc.backend is None
    assert fs.pool_id == -1


@pytest.mark.parametrize("success", ["put", "hit"])
def test_a_success_in_between_resets_the_count(
    cc: Cleancache, fs: CleancacheFs, fake: Fake, success: str
) -> None:
    fs.put_page(KEY, 5, PAGE)
    for _ in range(3 * MAX_ERRORS):
        fake.failing = {"get_pages"}
        fs.get_pages(KEY, 0, 1)
        if success == "put":
            fs.put_page(KEY, 0, PAGE)
        else:
            assert fs.get_page(KEY, 5) == PAGE
    assert cc.backend is fake
    assert cc.stats().backend_errors == 3 * MAX_ERRORS


def test_repeated_failing_puts_end_the_service(cc: Cleancache, fs: CleancacheFs, fake: Fake) -> None:
    fake.failing = {"put_pages"}
    for _ in range(MAX_ERRORS):  # the discard after each of them succeeds
        fs.put_page(KEY, 0, PAGE)
    assert cc.backend is None


def test_repeated_pages_of_the_wrong_size_end_the_service(
    cc: Cleancache, fs: CleancacheFs, fake: Fake
) -> None:
    fake.wrong_size = set(range(MAX_ERRORS))
    for i in range(MAX_ERRORS):
        fs.put_page(KEY, i, PAGE)
    fs.get_pages(KEY, 0, MAX_ERRORS)
    assert cc.backend is None


def test_after_the_end_of_service_another_backend_can_register(
    cc: Cleancache, fs: CleancacheFs, fake: Fake
) -> None:
    fs.put_page(KEY, 0, PAGE)
    fake.failing = {"flush_inode"}
    fs.flush_inode(KEY)
    second = Fake()
    cc.register(second)
    assert fs.pool_id == 0
    assert fs.get_page(KEY, 0) is None
    for _ in range(MAX_ERRORS - 1):
        second.failing = {"get_page"}
        fs.get_page(KEY, 0)
    assert cc.backend is second


def test_only_exceptions_are_caught_not_interrupts(fs: CleancacheFs, fake: Fake) -> None:
    def interrupted(*_: object) -> bytes | None:
        raise KeyboardInterrupt

    fake.get_page = interrupted  # type: ignore[method-assign,assignment]  # fail on purpose
    with pytest.raises(KeyboardInterrupt):
        fs.get_page(KEY, 0)
