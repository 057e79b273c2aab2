"""Check the least sizes that pool and page cache can work with."""

from cleanfs.cache.resident import PythonResident
from cleanfs.sizes import format_size

MIN_POOL_LIMIT = 1 << 20
"""Bytes; a smaller pool is not worthwhile with any backend."""


def least_sizes(page_size: int) -> tuple[int, int]:
    """Return the bytes that pool and page cache need to hold one page, with any engine."""
    return max(MIN_POOL_LIMIT, 4 * page_size), page_size + PythonResident.overhead


def check_sizes(pool_limit: int, page_cache: int, page_size: int) -> None:
    """Raise ValueError, with a message for the user, if a limit is too small to hold a page."""
    least_pool, least_page_cache = least_sizes(page_size)
    if pool_limit < least_pool:
        raise ValueError(
            f"--pool-limit {format_size(pool_limit)} is below {format_size(least_pool)}, "
            f"the least with pages of {format_size(page_size)}"
        )
    if 0 < page_cache < least_page_cache:
        raise ValueError(
            f"--page-cache {page_cache} is neither 0 nor at least {least_page_cache} bytes, "
            f"the least with pages of {format_size(page_size)}"
        )
