"""Provide a source that fails on command, and its mount."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL_CACHES
from tests.e2e.faults.site import Site, fill, make_directories, on
from tests.harness.faulty import Faulty, faulty
from tests.harness.mounting import (
    MountedFs,
    mounted,
    wait_until,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Provide one site for all tests that do not end it."""
    base = tmp_path_factory.mktemp("faults")
    with faulty(*make_directories(base)) as source, on(source.path, base) as fs:
        fs.stats()
        yield Site(source, fs)


@pytest.fixture
def served(site: Site) -> Iterator[Faulty]:
    """Return the source of the site, without faults and with new files."""
    fill(site.source.real)
    wait_until(lambda: site.fs.stats()["open_files"] == 0)
    try:
        yield site.source
    finally:
        site.source.heal()


@pytest.fixture
def fs(site: Site) -> MountedFs:
    """Return the mount of the site."""
    return site.fs


@pytest.fixture(params=["none"])
def long_timeout_fs(
    served: Faulty, tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[MountedFs]:
    """Mount the source once more, with long attribute and entry timeouts."""
    mountpoint = tmp_path / "long-timeout"
    mountpoint.mkdir()
    options = ("--coherency", request.param, "--attr-timeout", "1000")
    with mounted(served.path, mountpoint, *SMALL_CACHES, *options) as fs:
        yield fs
