"""Control groups (version 1) whose memory the kernel reclaims: by a limit, or when told to."""

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MEMORY = Path("/sys/fs/cgroup/memory")
JOIN = 'echo $$ > "$0" && exec "$@"'


@contextmanager
def memory_group() -> Iterator[Path]:
    """Make a group until the end of the block, and until the last process has left it. Raises OSError.

    A write to ``memory.force_empty`` has the kernel reclaim what it caches for processes of the group.
    """
    group = MEMORY / f"cleanfs-tests-{os.getpid()}-{time.monotonic_ns()}"
    group.mkdir()
    try:
        yield group
    finally:
        _remove(group)


@contextmanager
def memory_limit(size: int) -> Iterator[list[str]]:
    """Yield the prefix of a command that runs in a group of that size; skip the test if impossible."""
    if not os.access(MEMORY / "memory.limit_in_bytes", os.W_OK):
        pytest.skip("no control groups (version 1) for memory")
    with memory_group() as group:
        (group / "memory.limit_in_bytes").write_text(str(size))
        yield ["sh", "-c", JOIN, str(group / "cgroup.procs")]


def _remove(group: Path) -> None:
    for _ in range(200):
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"{group} is in use")


def run(prefix: list[str], *command: str | Path) -> str:
    """Run a command with a prefix. Returns its output."""
    words = [*prefix, *map(str, command)]
    return subprocess.run(words, check=True, timeout=60, capture_output=True, text=True).stdout
