"""Test the system calls behind the metadata handlers."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cleanfs.linux import syscalls
from cleanfs.source import namespace
from cleanfs.source.errors import HalfDoneError
from cleanfs.source.namespace import Actor

NOBODY = Actor(12345, 12345)
"""The owner of new files: the daemon makes them and then changes their owner."""


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path, os.O_PATH)
    yield fd
    os.close(fd)


def fail(number: int) -> Callable[..., None]:
    def call(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.EMFILE])
def test_a_rename_is_not_repeated_when_the_owner_of_its_whiteout_cannot_be_set(
    tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """A second rename would put the whiteout in the place of the moved file."""
    (tmp_path / "a").write_bytes(b"dear")
    monkeypatch.setattr(Actor, "take", fail(number))
    try:
        with pytest.raises(HalfDoneError) as raised:
            namespace.rename(directory, b"a", directory, b"b", syscalls.RENAME_WHITEOUT, NOBODY)
    except OSError as exc:
        assert exc.errno == errno.EINVAL  # noqa: PT017  # the only other error allowed
        pytest.skip("this file system has no whiteouts")
    assert raised.value.errno == number
    assert (tmp_path / "b").read_bytes() == b"dear"


MAKERS: dict[str, Callable[[int], object]] = {
    "file": lambda parent: namespace.create_file(parent, b"new", 0o644, os.O_RDWR, NOBODY),
    "directory": lambda parent: namespace.make_node(parent, b"new", stat.S_IFDIR, 0, b"", NOBODY),
    "fifo": lambda parent: namespace.make_node(parent, b"new", stat.S_IFIFO, 0, b"", NOBODY),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_a_creation_that_cannot_be_undone_is_not_repeated(
    tmp_path: Path,
    directory: int,
    monkeypatch: pytest.MonkeyPatch,
    make: Callable[[int], object],
) -> None:
    monkeypatch.setattr(Actor, "take", fail(errno.EDQUOT))
    for undo in ("unlink", "rmdir"):
        monkeypatch.setattr(os, undo, fail(errno.ENOSPC))
    with pytest.raises(HalfDoneError):
        make(directory)
    assert (tmp_path / "new").exists()
