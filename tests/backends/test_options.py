"""Options choose the engine and its behaviour; wrong ones are refused with a message."""

from typing import Any

import pytest

from cleanfs import backends
from cleanfs.backends import zcache
from cleanfs.backends.ops import Backend
from cleanfs.backends.options import BackendOptions
from cleanfs.backends.reference import ReferenceZcache
from tests.backends.engines import ZBUD, make, needs_native
from tests.backends.pages import KEY, MIB, PAGE_SIZE, UUID_A, text
from tests.backends.programs import run


def test_a_backend_is_found_by_name() -> None:
    assert "zcache" in backends.names()
    made = backends.load("zcache")(BackendOptions(MIB, "lz4hc:3"))
    assert (made.name, made.engine, made.pool_limit) == ("zcache", zcache.engine_name(), MIB)
    with pytest.raises(backends.UnknownBackendError, match=r"nosuch.*zcache"):
        backends.load("nosuch")


@needs_native
def test_make_returns_the_native_engine_with_every_option() -> None:
    options = BackendOptions(64 * MIB, "zstd:3+dict", "zbud", "refuse", "was-active", checksum=False)
    made = zcache.make(options)
    assert (made.name, made.engine, made.pool_limit) == ("zcache", "native", 64 * MIB)
    assert zcache.make(BackendOptions(MIB, allocator="zbud")).engine == "native"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool_limit": MIB - 1}, "limit"),
        ({"pool_limit": 0}, "limit"),
        ({"pool_limit": -1}, "limit"),
        ({"pool_limit": 4 * MIB - 1, "compression": "zstd"}, "limit"),
        ({"pool_limit": 8 * MIB - 1, "compression": "zstd+dict"}, "limit"),
        ({"pool_limit": MIB - 1, "compression": "lz4hc"}, "limit"),
        ({"pool_limit": MIB, "compression": "zip"}, "compression"),
        ({"pool_limit": MIB, "compression": "none", "allocator": "zbud"}, "--compression"),
        ({"pool_limit": MIB, "allocator": "zbud", "poor": "keep"}, "--poor refuse"),
    ],
)
@needs_native
def test_wrong_options_are_refused_with_a_message(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zcache.make(BackendOptions(**options))


@pytest.mark.parametrize(
    "options",
    [
        {"method": "LZ4"},
        {"method": ""},
        {"allocator": "slab"},
        {"level": 0},
        {"level": -1},
        {"level": 65538},
        {"method": "lz4hc", "level": 13},
        {"method": "zstd", "level": 23},
        {"dictionary": True},
        {"method": "none", "dictionary": True},
        {"allocator": "zbud"},
        {**ZBUD, "method": "none"},
    ],
)
def test_the_native_engine_refuses_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        make("log", 64 * MIB, **options)


def test_an_unknown_compression_is_refused() -> None:
    with pytest.raises(ValueError, match="compression"):
        ReferenceZcache(BackendOptions(MIB, "zip"))


@pytest.mark.parametrize(
    "options",
    [
        BackendOptions(MIB, "zstd"),
        BackendOptions(MIB, "zstd:3+dict"),
        BackendOptions(MIB, "none"),
        BackendOptions(MIB, allocator="zbud"),
        BackendOptions(MIB, poor="refuse"),
        BackendOptions(MIB, admission="was-active"),
    ],
)
def test_options_of_the_native_engine_are_refused_in_python(options: BackendOptions) -> None:
    with pytest.raises(ValueError, match="needs the native engine"):
        ReferenceZcache(options)


def test_options_that_match_the_python_engine_are_accepted() -> None:
    ReferenceZcache(BackendOptions(MIB, "lz4hc:3", "log", "keep", "all", checksum=False))


@pytest.mark.parametrize("limit", [-1, 0, MIB - 1])
def test_a_limit_that_is_too_small_is_refused_and_changes_nothing(
    engine: str, z: Backend, pool: int, limit: int
) -> None:
    z.put_page(pool, KEY, 0, text("a"))
    with pytest.raises(ValueError, match="limit"):
        z.resize(limit)
    with pytest.raises(ValueError, match="limit"):
        make(engine, limit)
    assert z.pool_limit == 2 * MIB
    assert z.get_page(pool, KEY, 0) == text("a")


@pytest.mark.parametrize("page_size", [-4096, 0, 1, 2048, 4095, 4097, 3 * 4096, 2 * MIB, 1 << 63])
def test_a_page_size_other_than_a_power_of_two_in_range_is_refused(z: Backend, page_size: int) -> None:
    assert z.init_fs(page_size) < 0
    assert z.init_shared_fs(UUID_A, page_size) < 0


@pytest.mark.parametrize("page", [b"", text("x")[:-1], text("x") + b"y"])
def test_a_page_of_the_wrong_size_is_refused(z: Backend, pool: int, page: bytes) -> None:
    with pytest.raises(ValueError, match="4096"):
        z.put_pages(pool, KEY, [(0, text("a")), (1, page)])
    with pytest.raises(ValueError, match="4096"):
        z.put_page(pool, KEY, 0, page)
    assert z.counters()["obj_count"] == 0


def test_pool_ids_are_never_reused(z: Backend) -> None:
    seen = set()
    for _ in range(5):
        pool = z.init_fs(PAGE_SIZE)
        assert pool not in seen
        seen.add(pool)
        z.flush_fs(pool)


PRINT_ENGINE = """
    import sys

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name == "cleanfs.backends._zcache":
                raise ImportError("blocked")

    if "blocked" in sys.argv:
        sys.meta_path.insert(0, Blocker())
    from cleanfs.backends import zcache
    from cleanfs.backends.options import BackendOptions

    try:
        z = zcache.make(BackendOptions(1 << 20))
        print(z.engine, zcache.engine_name())
    except ValueError as exc:
        print(exc)
"""


@needs_native
@pytest.mark.parametrize(
    ("built", "pure", "require", "expected"),
    [
        ("built", "", "", "native native"),
        ("built", "0", "1", "native native"),
        ("built", "1", "", "python python"),
        ("built", "1", "1", "python python"),
        ("blocked", "", "", "python python"),
        ("blocked", "", "0", "python python"),
        ("blocked", "", "false", "python python"),
        ("built", "OFF", "no", "native native"),
        ("blocked", "1", "1", "python python"),
        ("blocked", "", "1", "CLEANFS_REQUIRE_NATIVE is set, but there is no native engine: blocked"),
    ],
)
def test_the_environment_selects_the_engine(built: str, pure: str, require: str, expected: str) -> None:
    printed = run(PRINT_ENGINE, built, CLEANFS_PUREPYTHON=pure, CLEANFS_REQUIRE_NATIVE=require)
    assert printed.strip() == expected
