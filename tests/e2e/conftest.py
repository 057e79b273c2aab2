"""Fixtures: a source directory, a mount point, and a factory of mounts of the one on the other."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.e2e.mounting import MountedFs, mounted

Mounter = Callable[..., MountedFs]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """An empty source directory."""
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    """An empty directory to mount on."""
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@pytest.fixture
def mount(source: Path, mountpoint: Path) -> Iterator[Mounter]:
    """``mount(*options)``: the source mounted until the test ends, with a small page cache."""
    with ExitStack() as stack:

        def mounter(*options: str) -> MountedFs:
            return stack.enter_context(
                mounted(source, mountpoint, "--page-cache", "1M", "--pool-limit", "64M", *options)
            )

        yield mounter
