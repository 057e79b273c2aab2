"""``get_pages_into`` copies pages into the caller's buffer and makes no loans."""

import pytest

from tests.backends.native import Engine
from tests.backends.pages import KEY, MIB, PAGE_SIZE, UUID_A, halves, noise, same, text


@pytest.fixture
def engine() -> str:
    """Use one allocator: it makes no difference to buffers."""
    return "log"


@pytest.mark.parametrize("size", [1, 4095, 4097, 3 * 4096 + 8])
def test_a_buffer_of_partial_pages_is_refused(z: Engine, pool: int, size: int) -> None:
    z.put_page(pool, KEY, 0, text("a"))
    with pytest.raises(ValueError, match="4096"):
        z.get_pages_into(pool, KEY, 0, bytearray(size))
    assert z.get_page(pool, KEY, 0) == text("a")


@pytest.mark.parametrize(
    "buffer",
    [
        bytes(PAGE_SIZE),
        memoryview(bytes(PAGE_SIZE)),
        memoryview(bytearray(2 * PAGE_SIZE))[::2],
        "x" * PAGE_SIZE,
        None,
        [0] * PAGE_SIZE,
    ],
    ids=["bytes", "read-only view", "strided view", "str", "None", "list"],
)
def test_an_object_other_than_a_writable_buffer_is_refused(
    z: Engine, pool: int, buffer: object
) -> None:
    z.put_page(pool, KEY, 0, text("a"))
    with pytest.raises((TypeError, BufferError)):
        z.get_pages_into(pool, KEY, 0, buffer)  # type: ignore[arg-type]  # wrong on purpose
    assert z.get_page(pool, KEY, 0) == text("a")


def test_an_empty_buffer_gets_no_pages(z: Engine, pool: int) -> None:
    z.put_page(pool, KEY, 0, text("a"))
    assert z.get_pages_into(pool, KEY, 0, bytearray()) == b""
    assert z.get_page(pool, KEY, 0) == text("a")


@pytest.mark.parametrize("synced", [False, True])
def test_only_the_pages_found_are_written(z: Engine, pool: int, synced: bool) -> None:
    z.put_pages(pool, KEY, [(1, text(1)), (3, noise(3)), (4, same(4)), (6, text(6))])
    if synced:
        z.sync()
    buffer = bytearray(b"\xa5" * 8 * PAGE_SIZE)
    assert z.get_pages_into(pool, KEY, 0, memoryview(buffer)[PAGE_SIZE:-PAGE_SIZE]) == bytes(
        [0, 1, 0, 1, 1, 0]
    )
    untouched = b"\xa5" * PAGE_SIZE
    pages = [bytes(buffer[i * PAGE_SIZE : (i + 1) * PAGE_SIZE]) for i in range(8)]
    assert pages == [
        untouched,
        untouched,
        text(1),
        untouched,
        noise(3),
        same(4),
        untouched,
        untouched,
    ]
    assert z.get_pages(pool, KEY, 0, 8) == [None] * 6 + [text(6), None]


def test_a_get_into_a_buffer_makes_no_loan(z: Engine, pool: int) -> None:
    z.put_pages(pool, KEY, halves(range(10)))
    z.get_pages_into(pool, KEY, 0, bytearray(10 * PAGE_SIZE))
    assert z.counters()["loaned_zpages"] == z.counters()["eph_zpages"] == 0


def test_a_buffer_of_any_item_type_counts_in_bytes(z: Engine, pool: int) -> None:
    buffer = memoryview(bytearray(2 * PAGE_SIZE)).cast("Q")
    z.put_page(pool, KEY, 1, same(5))
    assert z.get_pages_into(pool, KEY, 0, buffer) == b"\0\1"
    assert buffer[511:513].tolist() == [0, 5]


def test_large_pages_fill_a_large_buffer() -> None:
    z = Engine(64 * MIB)
    pools = [z.init_fs(MIB), z.init_shared_fs(UUID_A, MIB)]
    pages = [text(0, MIB), noise(1, MIB), bytes(MIB), text(3, MIB)]
    for pool in pools:
        z.put_pages(pool, KEY, list(enumerate(pages)))
        z.sync()
        buffer = bytearray(16 * MIB)  # large enough for the GIL to be released
        assert z.get_pages_into(pool, KEY, 0, buffer) == bytes([1] * 4 + [0] * 12)
        assert buffer == b"".join(pages) + bytes(12 * MIB)
    z.check()
