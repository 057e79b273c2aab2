"""The native engine refuses wrong arguments, and its pages stay unchanged."""

from collections.abc import Callable
from typing import Any

import pytest

from cleanfs.backends.ops import FileKey
from tests.backends.native import Engine
from tests.backends.pages import KEY, LAST_INDEX, MIB, PAGE_SIZE, PAGE_SIZES, same, text


@pytest.fixture
def engine() -> str:
    """Use one allocator: it makes no difference to arguments."""
    return "log"


Call = Callable[[Engine, Any, Any, Any], object]
CALLS: dict[str, Call] = {
    "get_page": lambda z, pool, key, index: z.get_page(pool, key, index),
    "get_pages": lambda z, pool, key, index: z.get_pages(pool, key, index, 3),
    "get_pages_into": lambda z, pool, key, index: z.get_pages_into(pool, key, index, bytearray(8192)),
    "put_page": lambda z, pool, key, index: z.put_page(pool, key, index, text("x")),
    "put_pages": lambda z, pool, key, index: z.put_pages(pool, key, [(index, text("x"))]),
    "flush_page": lambda z, pool, key, index: z.flush_page(pool, key, index),
    "flush_pages": lambda z, pool, key, index: z.flush_pages(pool, key, index, None),
    "flush_inode": lambda z, pool, key, _: z.flush_inode(pool, key),
    "flush_fs": lambda z, pool, _, __: z.flush_fs(pool),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_an_unknown_pool_id_is_a_key_error(z: Engine, pool: int, call: Call) -> None:
    closed = z.init_fs(PAGE_SIZE)
    z.put_page(closed, KEY, 0, text("closed"))
    z.flush_fs(closed)
    for wrong in (closed, -1, pool + 1000, (1 << 31) - 1):
        with pytest.raises(KeyError):
            call(z, wrong, KEY, 0)
    for no_id in (1 << 31, -(1 << 31) - 1, 1 << 80, "0", None, 1.0):
        with pytest.raises(TypeError):
            call(z, no_id, KEY, 0)


@pytest.mark.parametrize("call", list(CALLS.values())[:-2], ids=list(CALLS)[:-2])
def test_a_wrong_index_raises_and_changes_nothing(z: Engine, pool: int, call: Call) -> None:
    z.put_page(pool, KEY, 0, text("a"))
    for wrong in (-1, 1 << 64, 1 << 80, "0", None, 1.0):
        with pytest.raises((TypeError, ValueError)):
            call(z, pool, KEY, wrong)
    for wrong in ((1 << 52) + 1, 1 << 60, (1 << 64) - 1):
        if call in (CALLS["flush_page"], CALLS["flush_pages"]):
            call(z, pool, KEY, wrong)
        else:
            with pytest.raises(ValueError, match="index"):
                call(z, pool, KEY, wrong)
    assert z.get_page(pool, KEY, 0) == text("a")


@pytest.mark.parametrize("call", list(CALLS.values())[:-1], ids=list(CALLS)[:-1])
@pytest.mark.parametrize(
    "key",
    [
        None,
        0,
        (),
        (1, 2),
        (1, 2, b"", 3),
        [1, 2, b""],
        (1, 2, "x"),
        (1, 2, None),
        (1, 2, bytearray(b"x")),
        ("1", 2, b""),
        (1, None, b""),
        (1.0, 2, b""),
        (-1, 2, b""),
        (1, -2, b""),
        (1 << 64, 2, b""),
        (1, 1 << 64, b""),
    ],
)
def test_a_wrong_key_raises_and_changes_nothing(z: Engine, pool: int, call: Call, key: object) -> None:
    with pytest.raises((TypeError, ValueError, OverflowError)):
        call(z, pool, key, 0)
    assert z.counters()["eph_zpages"] == 0


def test_put_pages_takes_only_sequences_of_pairs(z: Engine, pool: int) -> None:
    z.put_pages(pool, KEY, ((0, text(0)), (1, text(1))))
    for wrong in (None, 5, [5], [(0,)], [(0, 1, 2)], [[0, text(0)]], [(0, "x" * PAGE_SIZE)]):
        with pytest.raises((TypeError, ValueError)):
            z.put_pages(pool, KEY, wrong)  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(TypeError):
        z.put_pages(pool, KEY, [(0, bytearray(PAGE_SIZE))])  # type: ignore[list-item]  # wrong on purpose
    assert z.get_pages(pool, KEY, 0, 3) == [text(0), text(1), None]


@pytest.mark.parametrize("uuid", [None, 5, "x", b"x" * 16])
def test_a_wrong_uuid_raises(z: Engine, uuid: object) -> None:
    with pytest.raises((TypeError, AttributeError)):
        z.init_shared_fs(uuid, PAGE_SIZE)  # type: ignore[arg-type]  # wrong on purpose


def test_a_huge_count_is_an_error_and_not_a_crash(z: Engine, pool: int) -> None:
    for count in (1 << 52, (1 << 52) + 1, (1 << 62)):
        with pytest.raises((MemoryError, ValueError)):
            z.get_pages(pool, KEY, 0, count)
    for count in (-1, 1 << 64):
        with pytest.raises(TypeError):
            z.get_pages(pool, KEY, 0, count)
    assert z.get_pages(pool, KEY, 0, 0) == []


def test_a_count_of_half_the_address_space_is_an_error(z: Engine, pool: int) -> None:
    with pytest.raises((MemoryError, ValueError)):
        z.get_pages(pool, KEY, 0, 1 << 63)


@pytest.mark.parametrize("mode", ["staged", "stored"])
def test_keys_of_every_size_work(z: Engine, mode: str) -> None:
    numbers = (0, 1, (1 << 32) + 1, (1 << 63), (1 << 64) - 1)
    keys = [FileKey(device, inode, b"g") for device in numbers for inode in numbers]
    keys += [FileKey(1, 1, b"\0" * n) for n in range(129)]
    pool = z.init_fs(PAGE_SIZE)
    for key in keys:
        z.put_pages(pool, key, [(LAST_INDEX, same(hash(key) & 0xFFFF)), (0, same(7))])
    if mode == "stored":
        z.sync()
    assert z.counters()["obj_count"] == len(keys)
    for key in keys:
        assert z.get_page(pool, key, LAST_INDEX) == same(hash(key) & 0xFFFF)
        assert z.get_page(pool, key, LAST_INDEX - 1) is None


@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_an_index_beyond_the_longest_file_is_refused(page_size: int) -> None:
    z = Engine(64 * MIB)
    pool = z.init_fs(page_size)
    beyond = (1 << 63) // page_size
    with pytest.raises(ValueError, match="index"):
        z.put_page(pool, KEY, beyond, text("x", page_size))
    z.put_page(pool, KEY, beyond - 1, text("x", page_size))
    z.sync()
    z.check()
