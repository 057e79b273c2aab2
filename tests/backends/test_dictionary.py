"""zstd trains a dictionary from the pages that it compresses, and compresses better with it."""

from tests.backends.engines import make, put_in_order
from tests.backends.pages import KEY, MIB, PAGE_SIZE, noise, text


def test_a_trained_dictionary_makes_pages_smaller() -> None:
    def stored_bytes(dictionary: bool) -> int:
        z = make("log", 16 * MIB, method="zstd", dictionary=dictionary)
        pool = z.init_fs(PAGE_SIZE)
        words = [text(i)[:40] + noise(i)[:30] for i in range(400)]

        def page(i: int) -> bytes:
            return b"".join(words[(i * 7 + k * k) % 400] for k in range(60))[:PAGE_SIZE]

        put_in_order(z, pool, [(i % 2000, page(i)) for i in range(8000)])
        assert (z.counters()["dictionary_bytes"] > 0) == dictionary
        for i in range(7000, 8000):
            assert z.get_page(pool, KEY, i % 2000) == page(i)
        z.check()
        zbytes: int = z.counters()["eph_zbytes"]
        return zbytes

    assert stored_bytes(True) < 0.8 * stored_bytes(False)
