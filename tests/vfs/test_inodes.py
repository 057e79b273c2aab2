"""Test lookups, references and listings in the inode table, on real directories and fds."""

import errno
import os
import stat as stat_module

import pytest

from cleanfs.source.errors import StaleError
from cleanfs.vfs.node_ids import ROOT
from tests.vfs.inode_rig import Rig, open_fds

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
