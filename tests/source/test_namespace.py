"""What the system calls behind the metadata handlers give."""

import errno
import os
import stat
import sys
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleanfs.linux import syscalls
from cleanfs.source import namespace
from cleanfs.source.errors import HalfDoneError
from cleanfs.source.namespace import Actor, Names

NAMES = st.lists(st.binary(min_size=1, max_size=255).filter(lambda name: b"/" not in name))


@given(NAMES, st.integers(0, 20), st.integers(0, 20))
def test_names_are_what_was_packed(names: list[bytes], position: int, count: int) -> None:
    packed = Names(names)
    assert len(packed) == len(names)
    assert [packed[i] for i in range(len(packed))] == names
    assert packed.some(position, count) == names[position : position + count]
    with pytest.raises(IndexError):
        packed[len(names)]


def test_names_take_little() -> None:
    packed = Names([b"%011d" % i for i in range(1000)])
    parts = [getattr(packed, name) for name in Names.__slots__]
    assert [type(part) for part in parts] == [bytes, array]
    assert sum(map(sys.getsizeof, parts)) < 1000 * (11 + 10)


NOBODY = Actor(12345, 12345)
"""For whom things are made by the daemon, and then given."""


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
def test_a_rename_is_not_made_again_when_its_whiteout_can_not_be_given(
    tmp_path: Path, directory: int, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    """The second one would put the whiteout in the place of what was moved."""
    (tmp_path / "a").write_bytes(b"dear")
    monkeypatch.setattr(Actor, "take", fail(number))
    try:
        with pytest.raises(HalfDoneError) as raised:
            namespace.rename(directory, b"a", directory, b"b", syscalls.RENAME_WHITEOUT, NOBODY)
    except OSError as exc:
        assert exc.errno == errno.EINVAL  # noqa: PT017  # the only other thing that it may be
        pytest.skip("this file system has no whiteouts")
    assert raised.value.errno == number
    assert (tmp_path / "b").read_bytes() == b"dear"


MAKERS: dict[str, Callable[[int], object]] = {
    "file": lambda parent: namespace.create_file(parent, b"new", 0o644, os.O_RDWR, NOBODY),
    "directory": lambda parent: namespace.make_node(parent, b"new", stat.S_IFDIR, 0, b"", NOBODY),
    "fifo": lambda parent: namespace.make_node(parent, b"new", stat.S_IFIFO, 0, b"", NOBODY),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_what_can_not_be_undone_is_not_made_again(
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
