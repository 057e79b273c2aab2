"""Test which pages a read leaves in the source's page cache: one copy of a page is enough."""

import os
import subprocess
import time
from pathlib import Path

import pytest

from cleanfs.source.drop_behind import WINDOW
from tests.e2e.conftest import Mounter
from tests.harness.mounting import wait_until

SIZE = 4 << 20
PLAIN = ("--backend", "none", "--page-cache", "0")


def resident(path: Path) -> int:
    """Return how many bytes of a file are in the page cache."""
    command = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    return int(done.stdout)


@pytest.fixture
def cold(source: Path) -> Path:
    """Make a file in the source that is not in the page cache."""
    path = source / "f"
    path.write_bytes(os.urandom(SIZE))
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path):
        pytest.skip("a file system in memory drops no pages")
    return path


def test_pages_kept_by_cleanfs_are_dropped_from_the_source(cold: Path, mount: Mounter) -> None:
    fs = mount()
    (fs.path / "f").read_bytes()
    wait_until(lambda: resident(cold) == 0)
    assert fs.stats()["source_cache"] == "auto"


def test_pages_of_random_reads_are_dropped_too(cold: Path, mount: Mounter) -> None:
    fs = mount("--read-ahead", "0")
    with (fs.path / "f").open("rb", buffering=0) as file:
        for offset in (3 << 20, 1 << 20, 2 << 20):
            os.pread(file.fileno(), 4096, offset)
            assert resident(cold) == 0


def test_a_stream_leaves_a_bounded_part_while_it_lasts(cold: Path, mount: Mounter) -> None:
    with cold.open("wb") as file:
        for _ in range(6 * WINDOW >> 20):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with (mount().path / "f").open("rb", buffering=0) as file:
        while file.read(1 << 20):
            assert resident(cold) <= 3 * WINDOW  # with its read-ahead
    wait_until(lambda: resident(cold) == 0)


@pytest.mark.parametrize("read_ahead", ["0", "1M"])
@pytest.mark.parametrize(
    ("offset", "size", "count"), [(0, 65536, 1), (1 << 20, 65536, 8), (1 << 20, 1 << 20, 3)]
)
def test_pages_read_ahead_are_dropped_when_the_file_is_closed(
    cold: Path, mount: Mounter, read_ahead: str, offset: int, size: int, count: int
) -> None:
    with cold.open("ab") as file:
        for _ in range(12):
            file.write(os.urandom(1 << 20))
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    fs = mount("--read-ahead", read_ahead)
    with (fs.path / "f").open("rb", buffering=0) as file:
        for number in range(count):
            os.pread(file.fileno(), size, offset + number * size)
        assert resident(cold)
        still = 0
        while still != (still := resident(cold)):  # pages being read ahead cannot be dropped
            time.sleep(0.2)
    wait_until(lambda: resident(cold) == 0)


def test_plain_passthrough_keeps_the_cache_of_the_source(cold: Path, mount: Mounter) -> None:
    (mount(*PLAIN).path / "f").read_bytes()
    assert resident(cold) == SIZE


def test_keep_keeps_the_pages(cold: Path, mount: Mounter) -> None:
    fs = mount("--source-cache", "keep")
    (fs.path / "f").read_bytes()
    assert fs.stats()["source_cache"] == "keep"
    fs.drop()
    assert resident(cold) == SIZE


@pytest.mark.parametrize("options", [("--source-cache", "drop"), ("-o", "source_cache=drop")])
def test_drop_drops_the_pages(cold: Path, mount: Mounter, options: tuple[str, str]) -> None:
    (mount(*PLAIN, *options).path / "f").read_bytes()
    wait_until(lambda: resident(cold) == 0)


def test_with_a_backend_registered_later_pages_are_dropped(cold: Path, mount: Mounter) -> None:
    fs = mount(*PLAIN)
    fs.control("backend").write_text("zcache")
    (fs.path / "f").read_bytes()
    wait_until(lambda: resident(cold) == 0)
