"""One copy of a page is enough: what a read leaves in the source's page cache."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter

SIZE = 4 << 20


def resident(path: Path) -> int:
    """Bytes of a file that are in the page cache."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return int(done.stdout)


@pytest.fixture
def cold(source: Path) -> Path:
    """A file of the source that is not in the page cache."""
    path = source / "f"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path):
        pytest.skip("a file system in memory drops nothing")
    return path


def test_what_we_keep_does_not_stay_in_the_source(cold: Path, mount: Mounter) -> None:
    (mount().path / "f").read_bytes()
    assert resident(cold) == 0


def test_plain_passthrough_leaves_the_source_its_cache(cold: Path, mount: Mounter) -> None:
    (mount("--backend", "none", "--page-cache", "0").path / "f").read_bytes()
    assert resident(cold) == SIZE


def test_a_backend_that_comes_later_changes_that(cold: Path, mount: Mounter) -> None:
    fs = mount("--backend", "none", "--page-cache", "0")
    fs.control("backend").write_text("zcache")
    (fs.path / "f").read_bytes()
    assert resident(cold) == 0
