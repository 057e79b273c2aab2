"""Make zcache's engines by name, with the same helpers for each.

``python`` is the reference; ``log`` and ``zbud`` are the native engine with either allocator.
"""

from typing import Any

import pytest

from cleanfs.backends import zcache
from cleanfs.backends.ops import Backend, FileKey
from cleanfs.backends.options import BackendOptions
from cleanfs.backends.reference import ReferenceZcache
from tests.backends.books import check_books
from tests.backends.pages import KEY, MIB, PAGE_SIZE

NATIVE = zcache.native_module()
NO_NATIVE = "the native engine was not built, or is not wanted"
needs_native = pytest.mark.skipif(NATIVE is None, reason=NO_NATIVE)

ZBUD: dict[str, Any] = {"allocator": "zbud", "keep_poor": False}

VARIANTS: dict[str, dict[str, Any]] = {
    "lz4": {},
    "lz4-checked": {"checksum": True},
    "lz4-refuse": {"keep_poor": False},
    "lz4hc": {"method": "lz4hc", "level": 9},
    "zstd": {"method": "zstd"},
    "zstd-dict": {"method": "zstd", "dictionary": True},
    "none": {"method": "none", "level": 0},
    "was-active": {"was_active": True},
    "zbud": ZBUD,
    "zbud-zstd": {**ZBUD, "method": "zstd"},
}
"""Options of the native engine that between them use every module of it."""


SEGMENT = 64 << 10
"""Bytes of a segment of the log where the limit is small: the unit of eviction."""


def least_limit(options: dict[str, Any]) -> int:
    """Return the smallest limit that the native engine accepts with these options."""
    return MIB * (8 if options.get("dictionary") else 4 if options.get("method") == "zstd" else 1)


def make(engine: str, limit: int, **options: Any) -> Any:  # noqa: ANN401  # one of two engine classes
    """Make an engine by name, or skip the test if it was not built. ``options`` are for native ones."""
    if engine == "python":
        assert not options
        return ReferenceZcache(BackendOptions(limit))
    if NATIVE is None:
        pytest.skip(NO_NATIVE)
    return NATIVE.Engine(limit, **({**ZBUD, **options} if engine == "zbud" else options))


def check(z: Backend) -> None:
    """Fail unless the engine's counters agree with its data structures."""
    if isinstance(z, ReferenceZcache):
        check_books(z)
    else:
        z.check()  # type: ignore[attr-defined]  # only the native engine has it


def sync(z: Backend) -> None:
    """Wait until every page is compressed."""
    if not isinstance(z, ReferenceZcache):
        z.sync()  # type: ignore[attr-defined]  # only the native engine has it


def put_in_order(z: Backend, pool: int, pages: list[tuple[int, bytes]], key: FileKey = KEY) -> None:
    """Put pages in batches; a page that finds the staging area full would overtake staged ones."""
    for at in range(0, len(pages), 8):
        z.put_pages(pool, key, pages[at : at + 8])
        sync(z)


def found(z: Backend, pool: int, indices: range, key: FileKey = KEY) -> list[int]:
    """Return the indices that a get finds. In a private pool, the get removes those pages."""
    if isinstance(z, ReferenceZcache):
        pages = z.get_pages(pool, key, indices.start, len(indices))
        hits = bytes(page is not None for page in pages)
    else:
        into = bytearray(len(indices) * PAGE_SIZE)
        hits = z.get_pages_into(pool, key, indices.start, into)  # type: ignore[attr-defined]  # only native
    return [i for i, hit in zip(indices, hits, strict=True) if hit]
