"""Open many files in a test."""

import contextlib
import resource
from collections.abc import Iterator


@contextlib.contextmanager
def many_files() -> Iterator[None]:
    """Let this process open as many files as its hard limit allows; a login often gets 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
