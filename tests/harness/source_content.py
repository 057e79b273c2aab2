"""Make cached files, change them, and check that a mount shows the content of its source."""

import mmap
import os
import random
import subprocess
import time
from pathlib import Path

from tests.harness.mounting import MountedFs, settle
from tests.harness.source_calls import held

ATTR_TIMEOUT = 0.2
SIZE = 2_000_123
QUICK = ("--attr-timeout", str(ATTR_TIMEOUT))


def expire() -> None:
    """Wait until the kernel's names and attributes have expired."""
    time.sleep(ATTR_TIMEOUT + 0.05)


def noise(seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(SIZE)


def shell(directory: Path, script: str) -> None:
    subprocess.run(["sh", "-ec", script], cwd=directory, check=True, timeout=20, capture_output=True)


def cached(fs: MountedFs, name: str, data: bytes) -> None:
    """Make a file and read it through the mount: then cleancache, page cache and kernel have pages."""
    (fs.source / name).write_bytes(data)
    settle()
    for _ in range(2):
        assert (fs.path / name).read_bytes() == data
    assert fs.stats()["puts"] > 0


def same(fs: MountedFs, name: str) -> None:
    """Check that open, fstat, read and mmap through the mount see the content of the source."""
    expected = (fs.source / name).read_bytes()
    with held(fs.path / name) as fd:
        assert os.fstat(fd).st_size == len(expected)
        if expected:
            with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as area:
                assert area[:] == expected
        assert os.read(fd, len(expected) + 1) == expected
    with held(fs.path / name, os.O_RDONLY | os.O_DIRECT) as fd, mmap.mmap(-1, SIZE * 2) as buffer:
        assert os.preadv(fd, [buffer], 0) == len(expected)
        assert buffer[: len(expected)] == expected
