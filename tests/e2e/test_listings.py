"""Test that a listing has every entry once, while entries come and go."""

import ctypes
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter, Place
from tests.harness.mounting import mounted, tmpfs

libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def stream_of(directory: Path) -> Iterator[ctypes.c_void_p]:
    """Open a directory with opendir(3) until the end of the block."""
    libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    stream = ctypes.c_void_p(libc.opendir(os.fsencode(directory)))
    assert stream
    try:
        yield stream
    finally:
        libc.closedir(stream)


def next_entry(stream: ctypes.c_void_p) -> tuple[bytes, int] | None:
    """Return the name and d_ino of the next entry."""
    entry = libc.readdir(stream)
    return (ctypes.string_at(entry + 19), ctypes.c_ulong.from_address(entry).value) if entry else None


def test_2000_entries_created_quickly_are_all_listed(place: Place) -> None:
    names = [f"entry-{i}" for i in range(2000)]
    for i, name in enumerate(names):
        if i % 500:
            os.close(os.open(place.path / name, os.O_CREAT | os.O_WRONLY, 0o644))
        else:
            (place.path / name).mkdir()
    assert sorted(os.listdir(place.path)) == sorted(names)
    with os.scandir(place.path) as entries:
        kinds = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    assert kinds == {name: i % 500 == 0 for i, name in enumerate(names)}
    assert sorted(os.listdir(place.source)) == sorted(names)


@pytest.mark.parametrize("where", ["mount", "source"])
def test_a_listing_is_stable_while_entries_are_made_and_removed(place: Place, where: str) -> None:
    changed = place.path if where == "mount" else place.source
    for i in range(1500):
        (place.source / f"stays-{i}").touch()
        (place.source / f"goes-{i}").touch()
    seen = []
    with os.scandir(place.path) as entries:
        for n, entry in enumerate(entries):
            seen.append(entry.name)
            if n == 50:
                for i in range(1500):
                    (changed / f"goes-{i}").unlink()
                    if i < 300:
                        (changed / f"comes-{i}").touch()
    assert len(seen) == len(set(seen))
    assert {name for name in seen if name.startswith("stays")} == {f"stays-{i}" for i in range(1500)}
    assert sorted(os.listdir(place.path)) == sorted(os.listdir(place.source))


def test_entries_deleted_while_they_are_listed_are_all_deleted(place: Place) -> None:
    for i in range(1000):
        (place.source / f"f{i}").touch()
        if i % 10 == 0:
            (place.source / f"d{i}").mkdir()
            (place.source / f"d{i}" / "x").touch()
    shutil.rmtree(place.path)
    assert not place.source.exists()


def test_an_open_directory_shows_new_entries_when_it_is_rewound(place: Place) -> None:
    fd = os.open(place.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert os.listdir(fd) == []
        (place.path / "a").touch()
        assert os.listdir(fd) == ["a"]
        (place.source / "b").touch()
        assert sorted(os.listdir(fd)) == ["a", "b"]
        (place.source / "a").unlink()
        assert os.listdir(fd) == ["b"]
    finally:
        os.close(fd)


def test_seekdir_returns_to_the_position_of_telldir(place: Place) -> None:
    for i in range(1000):
        (place.source / f"f{i}").touch()
    with stream_of(place.path) as stream:
        before = [next_entry(stream) for _ in range(400)]
        position = libc.telldir(stream)
        rest = list(iter(lambda: next_entry(stream), None))
        libc.seekdir(stream, ctypes.c_long(position))
        assert list(iter(lambda: next_entry(stream), None)) == rest
    assert len({*before, *rest}) == 1002


def test_one_broken_entry_does_not_hide_its_neighbours(source: Path, mount: Mounter) -> None:
    for name in ("inner", "broken", "good"):
        (source / name).mkdir()
    with mounted(source / "inner", source / "broken", "--attr-timeout", "0") as inner:
        inner.kill()
        assert {"broken", "good", "inner"} <= set(os.listdir(source))
        fs = mount()
        assert {"good", "inner"} <= set(os.listdir(fs.path))
        assert {"good", "inner"} <= {entry.name for entry in os.scandir(fs.path) if entry.is_dir()}
        with pytest.raises(OSError, match="not connected"):
            os.listdir(fs.path / "broken")


def test_listings_and_stat_have_the_same_inode_numbers(place: Place) -> None:
    (place.source / "d").mkdir()
    (place.source / "d" / "f").touch()
    with tmpfs(place.source / "d" / "t"):
        (place.source / "d" / "t" / "f").touch()
        for directory in (place.path, place.path / "d", place.path / "d" / "t"):
            with stream_of(directory) as stream:
                listed = dict(iter(lambda: next_entry(stream), None))
            shown = {name: os.stat(os.fsencode(directory) + b"/" + name).st_ino for name in listed}
            assert listed == shown
