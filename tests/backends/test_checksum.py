"""With checksums, a page whose stored bytes were corrupted becomes a miss."""

import pytest

from tests.backends.engines import needs_native
from tests.backends.programs import run

pytestmark = needs_native

CORRUPT = """
    import sys
    from cleanfs.backends._zcache import Engine
    from tests.backends.pages import KEY, UUID_A, noise

    MARK = noise(5)[100:164]

    def regions():
        # The engine's mappings are those left out of core dumps.
        for line in open("/proc/self/smaps"):
            words = line.split()
            if "-" in words[0] and not words[0].endswith(":"):
                start, end = (int(word, 16) for word in words[0].split("-"))
            elif words[0] == "VmFlags:" and "dd" in words and "wr" in words:
                yield start, end

    def corrupt(first, last):
        \"""Change bytes of stored pages, at offsets relative to the mark.\"""
        times = 0
        with open("/proc/self/mem", "r+b", buffering=0) as memory:
            for start, end in list(regions()):
                try:
                    memory.seek(start)
                    at = memory.read(end - start).find(MARK)
                except OSError:  # unmapped meanwhile
                    continue
                while at + first >= 0:
                    for here in range(start + at + first, start + at + last):
                        memory.seek(here)
                        byte = memory.read(1)[0]
                        memory.seek(here)
                        memory.write(bytes([byte ^ 0x55]))
                    times += 1
                    memory.seek(start)
                    at = memory.read(end - start).find(MARK, at + 1)
        return times

    method, sharing, checks, kind = sys.argv[1:]
    level = 0 if method == "none" else 1
    z = Engine(8 << 20, method=method, level=level, checksum=checks == "checked")
    pool = z.init_shared_fs(UUID_A, 4096) if sharing == "shared" else z.init_fs(4096)
    page = noise(5) if kind == "raw" else noise(5)[:1800].ljust(4096, b"x")
    z.put_page(pool, KEY, 0, page)
    z.put_page(pool, KEY, 1, bytes(4096))
    z.sync()
    # Offset 100 of the page; before a page that compressed are 8 bytes of lengths, and then its header.
    assert corrupt(0, 1) if kind == "raw" else corrupt(-105, -100)
    buffer = bytearray(4096)
    hit = z.get_pages_into(pool, KEY, 0, buffer)[0]
    z.check()
    again = z.get_page(pool, KEY, 0)
    rest = z.get_page(pool, KEY, 1)
    differ = sum(a != b for a, b in zip(buffer, page))
    print(hit, z.counters()["corrupt_zpages"], buffer == page, differ)
    print(buffer == bytes(4096), again is None, rest == bytes(4096))
"""


def after_corruption(method: str, pool: str, checked: str, kind: str) -> list[int]:
    """Corrupt a page in a process of its own and get it.

    Return seven numbers: the hit, ``corrupt_zpages``, and 1 if the page is unchanged; the number of
    bytes that differ; and 1 each if the buffer is untouched, the next get misses, and the neighbour is
    right.
    """
    printed = run(CORRUPT, method, pool, checked, kind)
    return [int(word) if word.isdecimal() else int(word == "True") for word in printed.split()]


@pytest.mark.parametrize("pool", ["private", "shared"])
@pytest.mark.parametrize(
    ("method", "kind"), [("none", "raw"), ("lz4", "raw"), ("zstd", "raw"), ("lz4", "zpage")]
)
def test_with_checksums_a_corrupt_page_becomes_a_miss(pool: str, method: str, kind: str) -> None:
    result = after_corruption(method, pool, "checked", kind)
    assert result[:3] == [0, 1, 0]
    assert result[4:] == [1, 1, 1]


@pytest.mark.parametrize("pool", ["private", "shared"])
@pytest.mark.parametrize("method", ["none", "lz4"])
def test_without_checksums_a_corrupt_raw_page_is_returned(pool: str, method: str) -> None:
    result = after_corruption(method, pool, "unchecked", "raw")
    assert result == [1, 0, 0, 1, 0, pool == "private", 1]


@pytest.mark.parametrize("pool", ["private", "shared"])
def test_without_checksums_a_page_that_does_not_decompress_is_a_miss(pool: str) -> None:
    result = after_corruption("lz4", pool, "unchecked", "zpage")
    assert result[:3] == [0, 1, 0]
    assert result[5:] == [1, 1]
