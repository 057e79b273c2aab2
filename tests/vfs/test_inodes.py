"""Test the inode table on real directories and fds."""

# ruff: noqa: SLF001  # invariants are checked on private tables

import errno
import os
import stat as stat_module
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cleanfs.linux import syscalls
from cleanfs.linux.mounts import FileSystemTypes
from cleanfs.source.errors import StaleError
from cleanfs.source.identity import Rules
from cleanfs.source.namespace import PATH_FLAGS
from cleanfs.source.space_retry import SpaceRetry
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import LEAST_HELD, InodeTable
from cleanfs.vfs.kernel_view import NOT_TOLD
from cleanfs.vfs.node_ids import CONTROL_BASE, CONTROL_END, DEVICE_SHIFT, DYNAMIC_BASE, ROOT
from cleanfs.vfs.parking import is_parked, open_parked

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


def open_fds() -> set[int]:
    """Return the open fds of this process, without the one that lists them."""
    fds = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            os.fstat(int(name))
        except OSError:
            continue
        fds.add(int(name))
    return fds


class Rig:
    """Holds a table over a directory, and makes lookups as the handlers do."""

    def __init__(self, path: Path, fd_budget: int = 100, max_inodes: int = 1000) -> None:
        self.path = path
        root_fd = os.open(path, PATH_FLAGS)
        self.table = InodeTable(root_fd, fd_budget, max_inodes, SpaceRetry(), Rules(FileSystemTypes()))
        os.close(root_fd)

    def lookup(self, name: str, parent: Inode | None = None) -> Inode:
        parent = parent or self.table.root
        fd = os.open(name, PATH_FLAGS, dir_fd=parent.fd)
        return self.table.looked_up(fd, os.fstat(fd), parent, name.encode())

    def list(self, name: str) -> Inode:
        return self.table.listed((self.path / name).lstat(), self.table.root, name.encode())

    def park(self, *inodes: Inode) -> None:
        """Park every inode that can be parked."""
        budget, self.table.fd_budget = self.table.fd_budget, 0
        self.table.shrink()
        self.table.fd_budget = budget
        assert all(inode.fd == -1 for inode in inodes)

    def reopen(self, inode: Inode, *, by_path: bool = False) -> Inode:
        """Reopen a parked inode as the file system does."""
        mount_fd = -1 if by_path else self.table.mount_fd(inode.device)
        parent_fd = self.table.root.fd if by_path else -1
        self.table.unpark(inode, *open_parked(inode, mount_fd, parent_fd))
        return inode

    def refers_to(self, inode: Inode, name: str) -> bool:
        return os.path.samestat(os.fstat(inode.fd), (self.path / name).lstat())


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    """Make a table with files a, b, c, a symbolic link and a directory. No fd may leak."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a", "b", "c"):
        (source / name).write_text(name)
    (source / "link").symlink_to("a")
    (source / "dir").mkdir()
    (source / "dir" / "x").write_text("x")
    before = open_fds()
    made = Rig(source)
    yield made
    nodes = made.table._nodes
    assert all(inode.node == node for node, inode in nodes.items())
    assert set(made.table._index) <= set(nodes.values())
    held = {inode.node for inode in nodes.values() if inode.fd >= 0 and inode.node != ROOT}
    assert set(made.table._held) == held
    made.table.close()
    assert open_fds() == before


# -- lookups --------------------------------------------------------------------------------------


def test_the_root_exists_from_the_start_and_cannot_be_forgotten(rig: Rig) -> None:
    root = rig.table[ROOT]
    assert root is rig.table.root
    assert root.is_dir
    assert rig.refers_to(root, ".")
    rig.table.forget(ROOT, 5)
    assert rig.table[ROOT] is root


def test_a_lookup_makes_an_inode_whose_node_id_is_its_number(rig: Rig) -> None:
    a = rig.lookup("a")
    st = (rig.path / "a").stat()
    assert (a.node, a.id, a.kind) == (st.st_ino, (st.st_dev, st.st_ino), stat_module.S_IFREG)
    assert (a.nlookup, a.parent, a.name) == (1, rig.table.root, b"a")
    assert rig.table[a.node] is rig.table.find(st) is a
    assert rig.refers_to(a, "a")


def test_a_lookup_of_the_root_by_a_name_returns_the_root(rig: Rig) -> None:
    assert rig.lookup(".") is rig.table.root


def test_a_second_lookup_counts_and_closes_its_fd(rig: Rig) -> None:
    a = rig.lookup("a")
    before = open_fds()
    assert rig.lookup("a") is a
    assert a.nlookup == 2
    assert open_fds() == before


def test_hard_links_are_one_inode_with_the_last_path(rig: Rig) -> None:
    a = rig.lookup("a")
    os.link(rig.path / "a", rig.path / "dir" / "hard")
    directory = rig.lookup("dir")
    assert rig.lookup("hard", directory) is a
    assert (a.parent, a.name) == (directory, b"hard")


def test_symbolic_links_are_not_followed(rig: Rig) -> None:
    link = rig.lookup("link")
    assert link.kind == stat_module.S_IFLNK
    assert link is not rig.lookup("a")


def test_an_unknown_node_is_stale(rig: Rig) -> None:
    with pytest.raises(StaleError) as caught:
        rig.table[12345]
    assert caught.value.errno == errno.ESTALE


def test_a_move_changes_the_path(rig: Rig) -> None:
    a, directory = rig.lookup("a"), rig.lookup("dir")
    rig.table.moved(a, directory, b"new")
    assert (a.parent, a.name) == (directory, b"new")


# -- forget -----------------------------------------------------------------------------------


def test_an_inode_is_dropped_with_the_last_reference(rig: Rig) -> None:
    a = rig.lookup("a")
    rig.lookup("a")
    fd = a.fd
    rig.table.forget(a.node, 1)
    assert rig.table[a.node] is a
    rig.table.forget(a.node, 1)
    with pytest.raises(StaleError):
        rig.table[a.node]
    assert a.fd == -1
    assert fd not in open_fds()
    assert rig.table.find((rig.path / "a").stat()) is None


def test_forgetting_an_unknown_inode_does_nothing(rig: Rig) -> None:
    rig.table.forget(12345, 1)
    assert len(rig.table) == 1


def test_an_inode_in_use_outlives_its_last_reference(rig: Rig) -> None:
    a = rig.lookup("a")
    with rig.table.using(a):
        rig.table.forget(a.node, 1)
        assert rig.table[a.node] is a
        assert rig.refers_to(a, "a")
    assert a.fd == -1
    assert len(rig.table) == 1


def test_an_open_file_keeps_its_inode(rig: Rig) -> None:
    a = rig.lookup("a")
    rig.table.opened(a, 777)
    rig.table.forget(a.node, 1)
    assert rig.table[a.node] is a
    with rig.table.closing(a, 777):
        assert rig.table[a.node] is a  # its space has not been freed
    assert len(rig.table) == 1


def test_a_lookup_during_use_revives_a_forgotten_inode(rig: Rig) -> None:
    a = rig.lookup("a")
    with rig.table.using(a):
        rig.table.forget(a.node, 1)
        assert rig.lookup("a") is a
    assert rig.table[a.node] is a


def test_an_inode_that_returns_has_another_generation(rig: Rig) -> None:
    a = rig.lookup("a")
    rig.table.forget(a.node, 1)
    again = rig.lookup("a")
    assert (again is a, again.node) == (False, a.node)
    assert again.generation != a.generation


# -- listings -----------------------------------------------------------------------------------


def test_a_listed_inode_is_parked_with_its_path(rig: Rig) -> None:
    a = rig.list("a")
    assert (a.fd, a.nlookup, a.name, a.handle) == (-1, 0, b"a", None)
    rig.table.referenced(a, os.lstat(rig.path / "a"), rig.table.root, b"a")
    assert a.nlookup == 1
    assert rig.refers_to(rig.reopen(a, by_path=True), "a")


def test_an_entry_that_did_not_fit_is_dropped_unless_known_before(rig: Rig) -> None:
    a = rig.list("a")
    rig.table.referenced(a, os.lstat(rig.path / "a"), rig.table.root, b"a")
    rig.table.forget(a.node, 1)
    assert len(rig.table) == 1
    b = rig.lookup("b")
    assert rig.list("b") is b
    rig.table.referenced(b, os.lstat(rig.path / "b"), rig.table.root, b"b")
    rig.table.forget(b.node, 1)
    assert rig.table[b.node] is b


def test_a_lookup_of_a_listed_inode_gives_it_an_fd(rig: Rig) -> None:
    a = rig.list("a")
    rig.table.referenced(a, os.lstat(rig.path / "a"), rig.table.root, b"a")
    assert rig.lookup("a") is a
    assert a.nlookup == 2
    assert rig.refers_to(a, "a")


def test_a_listed_number_of_another_kind_is_another_file(rig: Rig) -> None:
    a = rig.list("a")
    a.kind = stat_module.S_IFDIR  # the kind of the number's former file
    rig.table.referenced(a, os.lstat(rig.path / "a"), rig.table.root, b"a")
    again = rig.list("a")
    assert again is not a
    assert rig.table[a.node] is a
    assert rig.table[again.node] is again


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
    a.open_fds = (fd,)
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
        a.open_fds = ()
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
    monkeypatch.setattr(syscalls, "name_to_handle", failing)
    b = rig.lookup("b")
    assert (a.nlookup, b.nlookup) == (1, 1)
    assert rig.table.stats().held <= 3


# -- node ids -------------------------------------------------------------------------------------


def fake_stat(device: int, ino: int) -> os.stat_result:
    return os.stat_result((stat_module.S_IFREG | 0o644, ino, device, 1, 0, 0, 0, 0, 0, 0))


@pytest.mark.parametrize("ino", [0, 1, DYNAMIC_BASE, CONTROL_BASE, CONTROL_END - 1, (1 << 64) - 1])
def test_numbers_reserved_by_fuse_get_dynamic_ids(rig: Rig, ino: int) -> None:
    device = rig.table.root.device
    inode = rig.table.listed(fake_stat(device, ino), rig.table.root, b"f")
    assert inode.node >= DYNAMIC_BASE
    assert inode.node < 1 << 64
    assert not CONTROL_BASE <= inode.node < CONTROL_END


@pytest.mark.parametrize("ino", [2, CONTROL_BASE - 1, CONTROL_END, DYNAMIC_BASE - 1])
def test_all_other_numbers_of_the_first_device_are_node_ids(rig: Rig, ino: int) -> None:
    inode = rig.table.listed(fake_stat(rig.table.root.device, ino), rig.table.root, b"f")
    assert inode.node == ino


def test_node_ids_of_further_devices_contain_their_index_and_are_unique(rig: Rig) -> None:
    here = rig.table.root.device
    nodes = [
        rig.table.listed(fake_stat(device, ino), rig.table.root, b"f").node
        for device in (here, here + 1000, here + 2000)
        for ino in (2, 3, 1 << DEVICE_SHIFT | 3, 2 << DEVICE_SHIFT | 2, (1 << DEVICE_SHIFT) - 1)
    ]
    assert len(set(nodes)) == len(nodes)
    assert nodes[5] == 1 << DEVICE_SHIFT | 2
    assert nodes[10] != 2 << DEVICE_SHIFT | 2, "taken by a number of the first device"


@needs_root
def test_a_mount_below_the_source_is_a_device_of_its_own(rig: Rig) -> None:
    mountpoint = rig.path / "dir"
    subprocess.run(["mount", "-t", "tmpfs", "cleanfs-test", str(mountpoint)], check=True)
    try:
        (mountpoint / "f").write_text("f")
        directory = rig.lookup("dir")
        assert rig.table.wants_mount_fd(directory)
        rig.table.add_mount_fd(directory.device, os.open(directory.path(), os.O_RDONLY))
        f = rig.lookup("f", directory)
        assert not rig.table.wants_mount_fd(f)
        ino = (mountpoint / "f").stat().st_ino
        assert f.device == directory.device != rig.table.root.device
        assert f.node == 1 << DEVICE_SHIFT | ino
        mount_fd = rig.table.mount_fd(f.device)
        assert mount_fd >= 0
        rig.park(f, directory)
        if f.handle:
            os.rename(mountpoint / "f", mountpoint / "g")
            assert rig.refers_to(rig.reopen(f), "dir/g")
    finally:
        rig.table.close()  # closes the fds on the mount
        subprocess.run(["umount", str(mountpoint)], check=True)


def test_an_unknown_device_has_no_mount_fd(rig: Rig) -> None:
    assert rig.table.mount_fd(rig.table.root.device) >= 0
    assert rig.table.mount_fd(987654) == -1


# -- forgettable ----------------------------------------------------------------------------------


def test_nothing_is_forgettable_within_the_bound(rig: Rig) -> None:
    rig.table.max_inodes = 4
    for name in ("a", "b", "c"):
        rig.lookup(name)
    assert rig.table.forgettable(10) == []


def test_the_oldest_idle_files_are_forgettable_in_turn(rig: Rig) -> None:
    rig.table.max_inodes = 2
    a, directory, b, c = (rig.lookup(name) for name in ("a", "dir", "b", "c"))
    rig.table.opened(b, 777)
    with rig.table.using(c):
        assert rig.table.forgettable(10) == [(ROOT, b"a")]
    with rig.table.closing(b, 777):
        pass
    assert rig.table.forgettable(10) == [(ROOT, b"a"), (ROOT, b"b"), (ROOT, b"c")]
    found = [place for _ in range(5) for place in rig.table.forgettable(1)]
    assert sorted(found) == [(ROOT, b"a"), (ROOT, b"b"), (ROOT, b"c")], (
        "each one is returned once in turn"
    )
    assert len(rig.table) == 5
    assert directory.is_dir
    assert not a.is_dir


def regular() -> Inode:
    return Inode(1, 2, stat_module.S_IFREG, 3, 4)


def test_the_size_is_the_one_told_last_or_made_by_a_write() -> None:
    kernel = regular().kernel
    assert kernel.size == NOT_TOLD
    kernel.written_to(170)
    kernel.written_to(40)
    assert kernel.size == 170
    before = kernel.told
    kernel.written_to(300)
    kernel.rollback(before)
    assert kernel.size == 170
