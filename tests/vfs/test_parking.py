"""Test that inodes are parked, and found again as the same file only."""

import errno
import os
import stat as stat_module
import threading
import time
from pathlib import Path

import pytest

from cleanfs.linux import syscalls
from cleanfs.source import file_handles
from cleanfs.source.errors import StaleError
from cleanfs.source.namespace import PATH_FLAGS
from cleanfs.vfs.inodes import LEAST_HELD
from cleanfs.vfs.node_ids import DYNAMIC_BASE
from cleanfs.vfs.parking import is_parked, open_parked
from tests.vfs.inode_rig import Rig, needs_root, open_fds

# -- parking ----------------------------------------------------------------------------------


def test_held_inodes_are_parked_for_open_files(rig: Rig) -> None:
    rig.table.fd_budget = 20
    for i in range(20):
        (rig.path / f"{i}").touch()
    held = [rig.lookup(f"{i}") for i in range(20)]
    assert all(inode.fd >= 0 for inode in held)
    for fd in range(1000, 1022):
        rig.table.opened(held[-1], fd)
    assert [inode.fd < 0 for inode in held] == [True, True] + [False] * 18
    for fd in range(1022, 1040):
        rig.table.opened(held[-1], fd)
    assert rig.table.stats().held == 1 + LEAST_HELD
    with pytest.raises(OSError, match="Too many open files"):
        rig.table.check_may_open()
    with rig.table.closing(held[-1], 1000):
        pass
    rig.table.check_may_open()


def test_the_least_recently_looked_up_is_parked_beyond_the_budget(rig: Rig) -> None:
    rig.table.fd_budget = 2
    a, b = rig.lookup("a"), rig.lookup("b")
    rig.lookup("a")
    c = rig.lookup("c")
    assert [inode.fd >= 0 for inode in (a, b, c)] == [True, False, True]
    assert b.handle is not None
    stats = rig.table.stats()
    assert (stats.inodes, stats.held, stats.parked_total) == (4, 3, 1)


def test_an_inode_in_use_is_not_parked(rig: Rig) -> None:
    a, b = rig.lookup("a"), rig.lookup("b")
    with rig.table.using(a):
        rig.table.fd_budget = 0
        rig.table.shrink()
        assert a.fd >= 0
        assert b.fd == -1
    rig.table.shrink()
    assert a.fd == -1


def test_the_root_is_never_parked(rig: Rig) -> None:
    rig.park()
    assert rig.refers_to(rig.table.root, ".")


def test_a_lookup_of_a_parked_inode_gives_it_the_fd(rig: Rig) -> None:
    a = rig.lookup("a")
    rig.park(a)
    assert rig.lookup("a") is a
    assert rig.refers_to(a, "a")


def test_a_parked_inode_can_be_forgotten(rig: Rig) -> None:
    a = rig.lookup("a")
    rig.park(a)
    rig.table.forget(a.node, 1)
    assert len(rig.table) == 1


# -- unparking ----------------------------------------------------------------------------------


@needs_root
@pytest.mark.parametrize("name", ["a", "link", "dir"])
def test_a_handle_finds_a_moved_file(rig: Rig, name: str) -> None:
    inode = rig.lookup(name)
    if syscalls.name_to_handle(inode.fd) == b"":
        pytest.skip("no file handles here")
    rig.park(inode)
    os.rename(rig.path / name, rig.path / "elsewhere")
    assert rig.refers_to(rig.reopen(inode), "elsewhere")


def test_an_open_file_finds_an_inode_without_a_name(rig: Rig) -> None:
    a = rig.lookup("a")
    fd = os.open(rig.path / "a", os.O_RDONLY)
    st = os.fstat(fd)
    rig.table.opened(a, fd)
    rig.park(a)
    (rig.path / "a").unlink()
    opened, ino = open_parked(a, -1, -1)
    assert os.path.samestat(os.fstat(opened), st)
    rig.table.unpark(a, opened, ino)
    with rig.table.closing(a, fd):
        pass
    os.close(fd)


def test_an_fd_number_reused_for_another_file_is_not_taken_for_it(rig: Rig) -> None:
    # The file handle was released and its fd number reused while open_parked ran in its thread.
    a = rig.lookup("a")
    fd = os.open(rig.path / "b", os.O_RDONLY)
    a.add_open_fd(fd)
    rig.park(a)
    try:
        opened, _ = open_parked(a, rig.table.mount_fd(a.device), rig.table.root.fd)
    except StaleError:
        pass
    else:
        same = os.path.samestat(os.fstat(opened), (rig.path / "a").stat())
        os.close(opened)
        assert same
    finally:
        a.remove_open_fd(fd)
        os.close(fd)


def test_the_path_finds_only_the_same_file(rig: Rig) -> None:
    a = rig.lookup("a")
    rig.park(a)
    assert rig.refers_to(rig.reopen(a, by_path=True), "a")
    rig.park(a)
    os.rename(rig.path / "b", rig.path / "a")
    before = open_fds()
    with pytest.raises(StaleError):
        rig.reopen(a, by_path=True)
    assert open_fds() == before


def test_a_removed_path_is_stale(rig: Rig) -> None:
    a = rig.lookup("a")
    rig.park(a)
    (rig.path / "a").unlink()
    for by_path in (True, False):
        with pytest.raises(StaleError):
            rig.reopen(a, by_path=by_path)


@needs_root
def test_a_file_is_stale_also_while_its_number_is_being_reused(tmp_path: Path) -> None:
    other, stop, errors = os.fspath(tmp_path / "other"), threading.Event(), set()

    def make_and_remove() -> None:
        while not stop.is_set():
            os.mknod(other)
            os.unlink(other)

    maker = threading.Thread(target=make_and_remove)
    mount_fd = os.open(tmp_path, os.O_RDONLY)
    if not syscalls.name_to_handle(mount_fd):
        os.close(mount_fd)
        pytest.skip("no file handles here")
    maker.start()
    try:
        deadline = time.monotonic() + 0.3
        while time.monotonic() < deadline:
            with (tmp_path / "f").open("wb") as file:
                handle = syscalls.name_to_handle(file.fileno())
            (tmp_path / "f").unlink()
            for _ in range(100):
                try:
                    os.close(syscalls.open_by_handle(mount_fd, handle, os.O_PATH))
                except OSError as exc:
                    errors.add(exc.errno)
    finally:
        stop.set()
        maker.join()
        os.close(mount_fd)
    assert errors == {errno.ESTALE}


def test_without_the_privilege_for_handles_the_path_is_tried(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = rig.lookup("a")
    rig.park(a)

    def refused(*_: object) -> int:
        raise PermissionError(errno.EPERM, "no")

    monkeypatch.setattr(syscalls, "open_by_handle", refused)
    rig.table.unpark(a, *open_parked(a, rig.table.mount_fd(a.device), rig.table.root.fd))
    assert rig.refers_to(a, "a")


def test_an_error_of_the_source_is_not_stale(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    a = rig.lookup("a")
    rig.park(a)
    a.handle = b"\0\0\0\0handle"

    def failing(*_: object, **__: object) -> int:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(syscalls, "open_by_handle", failing)
    with pytest.raises(OSError, match="broken") as caught:
        open_parked(a, rig.table.mount_fd(a.device), -1)
    assert not isinstance(caught.value, StaleError)


def test_the_second_unpark_closes_its_fd(rig: Rig) -> None:
    a = rig.lookup("a")
    rig.park(a)
    first, second = (
        (open_parked(a, -1, rig.table.root.fd)[0] for _ in range(2))
        if not a.handle
        else (
            os.open(rig.path / "a", PATH_FLAGS),
            os.open(rig.path / "a", PATH_FLAGS),
        )
    )
    rig.table.unpark(a, first, a.ino)
    rig.table.unpark(a, second, a.ino)
    assert a.fd == first
    assert second not in open_fds()


# -- reused numbers -------------------------------------------------------------------------------


def test_a_parked_inode_whose_number_was_reused_is_another_file(rig: Rig) -> None:
    a = rig.lookup("a")
    rig.park(a)
    a.handle = b"\0\0\0\0of the former file"
    again = rig.lookup("a")
    assert again is not a
    assert again.node >= DYNAMIC_BASE, "the kernel still refers to the old inode by the number"
    assert again.generation != a.generation
    assert rig.table[a.node] is a
    assert rig.table.find((rig.path / "a").stat()) is again
    rig.table.forget(a.node, 1)
    assert rig.table.find((rig.path / "a").stat()) is again


def test_is_parked_compares_kind_and_handle(rig: Rig) -> None:
    a, b = rig.lookup("a"), rig.lookup("b")
    st = os.fstat(a.fd)
    assert is_parked(a, a.fd, st)
    assert not is_parked(a, b.fd, os.fstat(b.fd))
    a.handle = b"other"
    assert not is_parked(a, a.fd, st)
    a.handle = b""
    assert is_parked(a, a.fd, st)
    a.kind = stat_module.S_IFDIR
    assert not is_parked(a, a.fd, st)


def test_a_failing_handle_call_neither_leaks_nor_fails_a_lookup(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: int) -> bytes:
        raise OSError(errno.EIO, "broken")

    a = rig.lookup("a")
    rig.table.fd_budget = 1
    monkeypatch.setattr(file_handles, "name_to_handle", failing)
    b = rig.lookup("b")
    assert (a.nlookup, b.nlookup) == (1, 1)
    assert rig.table.stats().held <= 3
