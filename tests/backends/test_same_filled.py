"""A page that repeats one 8-byte word is kept as that word."""

import pytest

from cleanfs.backends.ops import Backend
from tests.backends.engines import sync
from tests.backends.pages import KEY, PAGE_SIZE, same


@pytest.mark.parametrize("word", [0, 1, 0xFF, 0x0102030405060708, (1 << 64) - 1])
def test_a_same_filled_page_is_kept_as_its_word(z: Backend, pool: int, word: int) -> None:
    z.put_page(pool, KEY, 0, same(word))
    sync(z)
    c = z.counters()
    assert (c["same_filled_pages"], c["zero_filled_pages"], c["eph_zbytes"]) == (1, word == 0, 0)
    assert z.get_page(pool, KEY, 0) == same(word)


@pytest.mark.parametrize("at", [0, 7, 8, 15, 16, 2048, 4088, 4095])
def test_a_page_with_one_other_byte_is_not_same_filled(z: Backend, pool: int, at: int) -> None:
    page = bytes(at) + b"x" + bytes(PAGE_SIZE - 1 - at)
    z.put_page(pool, KEY, 0, page)
    sync(z)
    assert z.counters()["same_filled_pages"] == 0
    assert z.get_page(pool, KEY, 0) == page
