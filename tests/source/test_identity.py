"""Test how files are identified: rules by type, dentries, and the inode table on a simulated source."""

import gc
import os
import stat as stat_module
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from cleanfs.backends.ops import FileKey
from cleanfs.linux import syscalls
from cleanfs.linux.mounts import LOCAL_FILE_SYSTEMS
from cleanfs.source import file_handles
from cleanfs.source.errors import StaleError
from cleanfs.source.identity import BY_PATH, Dentries, Rule, Rules, rule_of
from cleanfs.source.namespace import PATH_FLAGS
from cleanfs.source.space_retry import SpaceRetry
from cleanfs.vfs import inodes
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.kernel_view import stamps_of
from cleanfs.vfs.parking import open_parked


@pytest.mark.parametrize(
    ("fs_type", "expected"),
    [
        *(
            (name, Rule.INODE)
            for name in sorted(LOCAL_FILE_SYSTEMS | {"squashfs", "erofs", "nfs4", "ceph"})
        ),
        ("", Rule.INODE),
        *((name, Rule.PATH) for name in ("fuse", "fuse.sshfs", "fuseblk", "virtiofs", "9p", "cifs")),
        *((name, Rule.PATH) for name in ("vfat", "exfat", "fuse.cleanfs", "some-new-one")),
    ],
)
def test_the_rule_of_a_type(fs_type: str, expected: Rule) -> None:
    assert rule_of(fs_type) is expected


def test_a_rule_is_logged_once_and_follows_a_type_that_becomes_known_later(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    types = {1: "ext4", 2: ""}
    rules = Rules(types)
    assert [rules[1], rules[1], rules[2]] == [Rule.INODE] * 3
    types[2] = "fuse"
    assert rules[2] is Rule.PATH
    assert [record.getMessage() for record in caplog.records] == [
        "files on ext4 are known by their inode",
        "files on fuse are known by their path",
    ]


def test_dentries_live_as_long_as_they_are_referenced_and_keys_are_never_reused() -> None:
    dentries = Dentries()
    top = dentries.make(1, None, (1, b""))
    directory = dentries.make(1, top, (top.key, b"d"))
    file = dentries.make(1, directory, (directory.key, b"f"))
    keys = {top.key, directory.key, file.key}
    assert len(keys) == 3
    assert {key.generation for key in keys} == {BY_PATH}

    del directory, top
    gc.collect()
    assert len(dentries) == 3, "a child keeps its parents"
    dentries.move(file, None, (1, b"elsewhere"))
    gc.collect()
    assert len(dentries) == 1
    dentries.remove(file)
    assert dentries.at((1, b"elsewhere")) is None
    assert dentries.make(1, None, (1, b"elsewhere")).key not in keys


class Renumbering:
    """Serves a directory whose files have simulated numbers and handles, as a FUSE server makes them.

    A file keeps its number and handle while the table holds it. Afterwards it gets others, often those
    that another file had before.
    """

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.numbers: dict[int, int] = {}  # real number -> number
        root_fd = os.open(path, PATH_FLAGS)
        monkeypatch.setattr(syscalls, "event_handle", self.handle)
        monkeypatch.setattr(file_handles, "name_to_handle", self.handle)
        device = os.fstat(root_fd).st_dev
        self.lost: list[FileKey] = []
        self.table = InodeTable(
            root_fd, 100, 1000, SpaceRetry(), Rules({device: "fuse.test"}), self.lost.append
        )
        os.close(root_fd)

    def number(self, real: int) -> int:
        if real not in self.numbers:
            taken = set(self.numbers.values())
            self.numbers[real] = next(n for n in range(2, 1000) if n not in taken)
        return self.numbers[real]

    def handle(self, fd: int, flags: int = 0) -> bytes:
        return b"node" + bytes([self.number(FSTAT(fd).st_ino)])

    def stat(self, fd: int) -> os.stat_result:
        """Return the server's attributes: the stamps of all files are equal, in whole seconds."""
        real = FSTAT(fd)
        fields = list(real)
        fields[stat_module.ST_INO] = self.number(real.st_ino)
        stamps = (0.0, 1.0, 1.0, 0, 10**9, 10**9)
        return os.stat_result([*fields[:7], 0, 1, 1, *stamps])

    def forget(self) -> None:
        """Forget the numbers of all files that the table does not hold."""
        held = {os.fstat(inode.fd).st_ino for inode in self.table.all() if inode.fd >= 0}
        self.numbers = {real: number for real, number in self.numbers.items() if real in held}

    def look_up(self, name: str, parent: Inode | None = None) -> Inode:
        parent = parent or self.table.root
        fd = os.open(name, PATH_FLAGS, dir_fd=parent.fd)
        inode = self.table.looked_up(fd, self.stat(fd), parent, name.encode())
        inode.kernel.sent = stamps_of(self.stat(inode.fd))
        return inode

    def list(self, name: str, parent: Inode | None = None) -> Inode:
        parent = parent or self.table.root
        fd = os.open(name, PATH_FLAGS, dir_fd=parent.fd)
        try:
            return self.table.listed(self.stat(fd), parent, name.encode())
        finally:
            os.close(fd)

    def park_all(self) -> None:
        budget, self.table.fd_budget = self.table.fd_budget, 0
        least, inodes.LEAST_HELD = inodes.LEAST_HELD, 0
        self.table.shrink()
        self.table.fd_budget, inodes.LEAST_HELD = budget, least


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Renumbering]:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    (tmp_path / "d").mkdir()
    (tmp_path / "d/f").write_text("f")
    made = Renumbering(tmp_path, monkeypatch)
    yield made
    made.table.close()


def forget(source: Renumbering, *found: Inode) -> None:
    for inode in found:
        source.table.forget(inode.node, inode.nlookup)
    source.forget()


def test_a_file_is_found_again_by_its_path_while_its_dentry_is_kept(source: Renumbering) -> None:
    a = source.look_up("a")
    key, dentry, names = a.file_key, a.dentry, (a.ino, a.handle)
    assert key is not None
    assert dentry is not None
    assert dentry.key == key
    forget(source, a)
    b = source.look_up("b")
    assert (b.ino, b.handle) == names
    assert b.file_key != key
    again = source.look_up("a")
    assert again is not a
    assert again.file_key == key
    del a, again, dentry


def test_a_held_file_keeps_its_dentry_when_it_is_moved(source: Renumbering) -> None:
    a, b = source.look_up("a"), source.look_up("b")
    for old, new in (("a", "t"), ("b", "a"), ("t", "b")):
        (source.path / old).rename(source.path / new)
    assert source.look_up("a") is b
    assert source.look_up("b") is a
    a_key, b_key, kept = a.file_key, b.file_key, (a.dentry, b.dentry)
    forget(source, a, b)
    assert source.look_up("a").file_key == b_key
    assert source.look_up("b").file_key == a_key
    assert source.lost == []
    del kept


def test_a_file_that_replaces_a_held_one_does_not_get_its_key(source: Renumbering) -> None:
    a = source.look_up("a")
    (source.path / "b").rename(source.path / "a")
    new = source.look_up("a")
    assert new.file_key != a.file_key
    assert source.lost == []
    key = a.file_key
    forget(source, a)
    assert source.lost == [key], "it has neither a name nor an open fd"


def test_a_moved_directory_keeps_the_keys_below(source: Renumbering) -> None:
    d = source.look_up("d")
    f = source.look_up("f", d)
    key, kept = f.file_key, f.dentry
    forget(source, f)
    (source.path / "d").rename(source.path / "e")
    source.table.moved(d, source.table.root, b"e")
    forget(source, d)
    assert source.look_up("f", source.look_up("e")).file_key == key
    (source.path / "d").mkdir()
    (source.path / "d/f").write_text("f")
    assert source.look_up("f", source.look_up("d")).file_key != key
    del kept


def test_the_key_of_a_removed_name_is_not_used_again(source: Renumbering) -> None:
    a = source.look_up("a")
    key, dentry = a.file_key, a.dentry
    forget(source, a)
    source.table.name_gone(a.device, source.table.root, b"a")
    assert source.lost == [key]
    assert source.look_up("a").file_key != key
    del dentry


def test_hard_links_of_one_node_are_one_inode(source: Renumbering) -> None:
    a = source.look_up("a")
    os.link(source.path / "a", source.path / "l")
    assert source.look_up("l") is a
    assert source.look_up("a") is a


def test_a_parked_inode_is_found_by_its_path_if_its_attributes_are_equal(
    source: Renumbering, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, d = source.look_up("a"), source.look_up("d")
    source.park_all()
    source.forget()
    (source.path / "d/new").write_text("")  # changes mtime, of which the table keeps nothing
    assert source.look_up("b").fd >= 0
    for inode in (d, a):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fstat", source.stat)
            opened, ino = open_parked(inode, -1, source.table.root.fd)
        source.table.unpark(inode, opened, ino)
    assert source.look_up("a") is a
    source.park_all()
    source.forget()
    a.kernel.sent = (5, 1, 1)
    assert source.look_up("a") is not a
    with pytest.raises(StaleError):
        open_parked(a, -1, source.table.root.fd)


def test_a_listing_finds_the_inode_of_a_lookup_but_not_that_of_a_replaced_file(
    source: Renumbering,
) -> None:
    a = source.look_up("a")
    assert source.list("a") is a
    (source.path / "b").rename(source.path / "a")
    listed = source.list("a")
    assert listed is not a
    assert listed.fd < 0
    assert source.look_up("a") is listed, "all its attributes that were seen are equal"


FSTAT = os.fstat

NAMES = ("a", "b", "c")


class SourceMachine(RuleBasedStateMachine):
    """Moves and replaces files, in the source and through the mount.

    All files have equal attributes, and numbers are reused. A name that leads to a key of cached pages
    must lead to the file that they were read from. cleanfs sees a change in the source if the file is
    looked up while the inode is held, and otherwise by fingerprints. All fingerprints are equal here,
    so the machine always looks the file up.
    """

    @initialize()
    def make(self) -> None:
        self.patch = pytest.MonkeyPatch()
        self.directory = tempfile.TemporaryDirectory()
        path = Path(self.directory.name)
        self.source = Renumbering(path, self.patch)
        self.read: dict[FileKey, int] = {}  # the real number of the file that pages were read from
        self.kept: dict[FileKey, object] = {}  # the dentries of records
        self.serial = 0
        for name in NAMES:
            self.create(name)

    def teardown(self) -> None:
        if hasattr(self, "source"):
            self.source.table.close()
            self.patch.undo()
            self.directory.cleanup()

    def create(self, name: str) -> None:
        self.serial += 1
        (self.source.path / f"{name}.new").write_text("x")
        (self.source.path / f"{name}.new").rename(self.source.path / name)

    def drop_lost(self) -> None:
        for key in self.source.lost:
            self.read.pop(key, None)
            self.kept.pop(key, None)
        self.source.lost.clear()

    @rule(name=st.sampled_from(NAMES))
    def open_and_read(self, name: str) -> None:
        self.look_up_and_read(name)

    def look_up_and_read(self, name: str) -> None:
        if not (self.source.path / name).exists():
            return
        inode = self.source.look_up(name)
        real = os.fstat(inode.fd).st_ino
        assert (self.source.path / name).stat().st_ino == real
        assert inode.file_key is not None
        self.drop_lost()
        assert self.read.setdefault(inode.file_key, real) == real
        self.kept[inode.file_key] = inode.dentry

    @rule(name=st.sampled_from(NAMES))
    def forget(self, name: str) -> None:
        for inode in self.source.table.all():
            if inode.name == name.encode() and inode is not self.source.table.root:
                self.source.table.forget(inode.node, inode.nlookup)
        self.source.forget()

    def held(self, name: str) -> Inode | None:
        table = self.source.table
        dentry = table._index.dentry(table.root.device, table.root, name.encode())  # noqa: SLF001  # no public access
        return dentry.occupant if dentry is not None else None  # type: ignore[return-value]  # always an Inode

    @rule(name=st.sampled_from(NAMES))
    def replace_in_the_source(self, name: str) -> None:
        if self.held(name) is not None:
            self.create(name)
            self.look_up_and_read(name)

    @rule(one=st.sampled_from(NAMES), other=st.sampled_from(NAMES))
    def swap_in_the_source(self, one: str, other: str) -> None:
        one_path, other_path = self.source.path / one, self.source.path / other
        are_held = self.held(one) and self.held(other) and one != other
        if are_held and one_path.exists() and other_path.exists():
            syscalls.renameat2(-100, bytes(one_path), -100, bytes(other_path), 2)
            self.look_up_and_read(one)
            self.look_up_and_read(other)

    @rule(old=st.sampled_from(NAMES), new=st.sampled_from(NAMES))
    def rename_through_the_mount(self, old: str, new: str) -> None:
        table, path = self.source.table, self.source.path
        if old == new or not (path / old).exists():
            return
        moved = self.source.look_up(old)  # as the kernel does
        (path / old).rename(path / new)
        table.name_gone(moved.device, table.root, old.encode())
        table.name_gone(moved.device, table.root, new.encode())
        table.moved(moved, table.root, new.encode())
        self.drop_lost()

    @rule(name=st.sampled_from(NAMES))
    def replace_through_the_mount(self, name: str) -> None:
        table = self.source.table
        (self.source.path / name).unlink(missing_ok=True)
        table.name_gone(table.root.device, table.root, name.encode())
        self.create(name)
        table.name_gone(table.root.device, table.root, name.encode())
        self.drop_lost()

    @invariant()
    def the_table_is_consistent(self) -> None:
        if not hasattr(self, "source"):
            return
        table = self.source.table
        for inode in table.all():
            assert inode.dentry is not None
            assert inode.dentry.occupant is inode
            assert inode.file_key == inode.dentry.key
        keys = [inode.file_key for inode in table.all()]
        assert len(keys) == len(set(keys))


SourceMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestSource = SourceMachine.TestCase
