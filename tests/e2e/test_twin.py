"""Run random operations on a mounted tree and on a plain twin, and compare them (see ``twin``)."""

import errno
import mmap
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from tests.e2e.conftest import Mounter
from tests.harness.mounting import mounted
from tests.harness.twin import Site, TwinMachine, cache_size, least_pool

QUICK = settings(
    max_examples=6,  # check/stress_twin runs thousands
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    phases=(Phase.generate,),  # a failure is reported unreduced; check/stress_twin reduces it
    suppress_health_check=list(HealthCheck),
)

PAGES = 3
"""The size of the page cache: pages circulate through zcache and the source."""


@contextmanager
def site(
    base: Path,
    attr_timeout: float,
    *options: str,
    page_size: int = 4096,
    changes_source: bool = True,
    writeback: bool = False,
) -> Iterator[Site]:
    """Make a mount with tiny caches and a directory for the twins."""
    for name in ("source", "mnt", "twins"):
        (base / name).mkdir()
    numbers = {
        "--attr-timeout": attr_timeout,
        "--page-size": page_size,
        "--page-cache": cache_size(PAGES, page_size),
        "--pool-limit": least_pool(page_size),
    }
    words = [str(word) for pair in numbers.items() for word in pair]
    with mounted(base / "source", base / "mnt", *words, *options) as fs:
        yield Site(
            fs,
            base / "twins",
            attr_timeout,
            page_size,
            changes_source=changes_source,
            writeback=writeback,
        )


def run(place: Site, chosen: settings = QUICK) -> None:
    """Run machines at a site."""

    class Machine(TwinMachine):
        site = place

    run_state_machine_as_test(Machine, settings=chosen)


def test_nothing_differs_without_an_attribute_timeout(tmp_path: Path) -> None:
    with site(tmp_path, 0) as place:
        run(place)


def test_nothing_differs_after_the_attribute_timeout(tmp_path: Path) -> None:
    with site(tmp_path, 0.05, page_size=16384) as place:
        run(place, settings(QUICK, max_examples=4))


def test_nothing_differs_without_changes_in_the_source(tmp_path: Path) -> None:
    with site(tmp_path, 60, "--coherency", "none", changes_source=False) as place:
        run(place, settings(QUICK, max_examples=4))


def test_nothing_differs_with_write_back(tmp_path: Path) -> None:
    options = ("--coherency", "none", "--writeback")
    with site(tmp_path, 60, *options, changes_source=False, writeback=True) as place:
        run(place, settings(QUICK, max_examples=4))


@pytest.fixture
def coarse_clock(tmp_path: Path) -> Iterator[Path]:
    """Make a directory on a file system whose stamps are as coarse as the clock tick."""
    base = tmp_path / "ramfs"
    base.mkdir()
    made = subprocess.run(
        ["mount", "-t", "ramfs", "twin", str(base)], capture_output=True, check=False, timeout=20
    )
    if made.returncode:
        pytest.skip("mounting a ramfs needs root")
    try:
        yield base
    finally:
        subprocess.run(["umount", "-l", str(base)], check=True, timeout=20)


def test_nothing_differs_when_many_changes_share_one_timestamp(coarse_clock: Path) -> None:
    os.chmod(coarse_clock, 0o755)
    with site(coarse_clock, 0) as place:
        run(place, settings(QUICK, max_examples=4))


# -- failures that the machine found, reduced -------------------------------------------------------


def test_writes_to_a_mapping_of_an_appending_fd_are_not_appended(source: Path, mount: Mounter) -> None:
    (source / "f").write_bytes(b"a" * 10_000)
    fd = os.open(mount().path / "f", os.O_RDWR | os.O_APPEND)
    expected = b"a" * 10_000
    try:
        try:
            mapping = mmap.mmap(fd, 10_000, mmap.MAP_SHARED)
        except OSError as exc:
            if exc.errno != errno.ENODEV:  # a refusal is allowed
                raise
        else:
            with mapping:
                mapping[100:110] = b"B" * 10
                mapping.flush()
            expected = b"a" * 100 + b"B" * 10 + b"a" * 9_890
        assert (source / "f").read_bytes() == expected
        os.write(fd, b"end")
        assert (source / "f").read_bytes() == expected + b"end"
    finally:
        os.close(fd)


def test_an_open_is_exact_right_after_a_listing_found_the_change(source: Path, mount: Mounter) -> None:
    """The mtime is restored, so only ctime shows the change, and the kernel is not yet notified."""
    names = [f"f{number}" for number in range(200)]
    for name in names:
        (source / name).write_bytes(b"x" * 9_000)
    time.sleep(0.12)  # no longer racy
    fs = mount("--attr-timeout", "0")
    for name in names:
        assert (fs.path / name).read_bytes() == b"x" * 9_000
    for name in names:
        with open(source / name, "r+b") as file:
            before = os.fstat(file.fileno())
            file.write(b"y" * 9_000)
            file.flush()
            os.utime(file.fileno(), ns=(before.st_atime_ns, before.st_mtime_ns))
    time.sleep(0.12)
    os.listdir(fs.path)
    stale = [name for name in reversed(names) if (fs.path / name).read_bytes() != b"y" * 9_000]
    assert not stale
