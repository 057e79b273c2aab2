"""Provide a source directory, a mount point, and a factory of mounts."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import pytest

from tests.harness import mounting, zygote
from tests.harness.mounting import MountedFs, mounted

Mounter = Callable[..., MountedFs]

SMALL_CACHES = ("--page-cache", "1M", "--pool-limit", "64M")


@pytest.fixture(autouse=True)
def _starts(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """Let the zygote start cleanfs, and restart the limits of its lifetimes."""
    mounting.renew_lifetimes()
    monkeypatch.setattr(zygote, "below", f"{tmp_path_factory.getbasetemp().resolve()}/")
    monkeypatch.setattr(zygote, "in_use", "test_smoke" not in request.node.nodeid)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Make an empty source directory."""
    path = tmp_path / "source"
    path.mkdir()
    return path


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    """Make an empty directory to mount on."""
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@pytest.fixture
def mount(source: Path, mountpoint: Path) -> Iterator[Mounter]:
    """Return ``mount(*options)``: it mounts the source with a small page cache until the test ends."""
    with ExitStack() as stack:

        def mounter(*options: str, prefix: tuple[str, ...] = (), patch: str = "") -> MountedFs:
            return stack.enter_context(
                mounted(source, mountpoint, *SMALL_CACHES, *options, prefix=prefix, patch=patch)
            )

        yield mounter


@pytest.fixture(scope="module")
def share(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounter]:
    """Return ``share(*options)``: a new directory in the module's mount with these options.

    For tests that need neither counters of their own nor an empty cache.
    """
    mounts: dict[tuple[str, ...], MountedFs] = {}
    numbers = count()
    with ExitStack() as stack:

        def shared(*options: str) -> MountedFs:
            if options not in mounts:
                top = tmp_path_factory.mktemp("share")
                for name in ("source", "mnt"):
                    (top / name).mkdir()
                mounts[options] = stack.enter_context(
                    mounted(top / "source", top / "mnt", *SMALL_CACHES, *options)
                )
            directory = mounts[options].below(str(next(numbers)))
            directory.source.mkdir()
            return directory

        yield shared


@dataclass(frozen=True)
class Place:
    """Holds a directory in a source, the same in its mount, and a plain one for comparison."""

    fs: MountedFs
    source: Path
    path: Path
    plain: Path


@pytest.fixture(scope="module")
def shared_fs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedFs]:
    """Provide one mount with ``--allow-other`` for the tests of a module that need no other options."""
    top = tmp_path_factory.mktemp("shared")
    for name in ("source", "mnt", "plain"):
        (top / name).mkdir()
    options = (*SMALL_CACHES, "--attr-timeout", "0.2", "--allow-other")
    with mounted(top / "source", top / "mnt", *options) as fs:
        yield fs


@pytest.fixture
def place(shared_fs: MountedFs) -> Place:
    """Make a place for each test below the shared mount."""
    plains = shared_fs.source.with_name("plain")
    number = len(list(plains.iterdir()))
    plain = plains / str(number)
    made = Place(shared_fs, shared_fs.source / str(number), shared_fs.path / str(number), plain)
    made.source.mkdir()
    made.plain.mkdir()
    return made
