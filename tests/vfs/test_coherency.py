"""Test fingerprints, and the conclusions of opens, refreshes and the mount's own changes."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cleanfs.backends.ops import FileKey
from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.files import CachedFile
from cleanfs.cache.fingerprint import (
    COARSE_NS,
    FINE_NS,
    SECOND_NS,
    Fingerprint,
    fingerprint,
    granularity_ns,
)
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.resident import make_resident
from cleanfs.vfs.coherency import Coherency, CoherencyChecker

T = 1_700_000_000 * SECOND_NS + 123_456_789
WHOLE = 1_700_000_000 * SECOND_NS


def stat(path: Path, mtime_ns: int = T, ctime_ns: int = T) -> os.stat_result:
    """Return a stat with these stamps."""
    path.write_bytes(b"12345")
    real = path.stat()
    return os.stat_result(
        tuple(real),
        {"st_mtime_ns": mtime_ns, "st_ctime_ns": ctime_ns, "st_atime_ns": 0},
    )


# -- fingerprints -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fs_type", "mtime", "ctime", "expected"),
    [
        ("ext4", T, T, FINE_NS),
        ("tmpfs", T, T, FINE_NS),
        ("xfs", WHOLE, T, FINE_NS),
        ("xfs", T, WHOLE, FINE_NS),
        ("ext4", WHOLE, WHOLE, COARSE_NS),
        ("nfs4", T, T, COARSE_NS),
        ("vfat", WHOLE, WHOLE, COARSE_NS),
        ("", T, T, COARSE_NS),
    ],
)
def test_granularity_is_fine_only_where_stamps_show_it(
    tmp_path: Path, fs_type: str, mtime: int, ctime: int, expected: int
) -> None:
    assert granularity_ns(stat(tmp_path / "f", mtime, ctime), fs_type) == expected


@pytest.mark.parametrize(
    ("mtime", "ctime", "now", "racy"),
    [
        (T, T, T, True),
        (T, T, T + FINE_NS - 1, True),
        (T, T, T + FINE_NS, False),
        (T - SECOND_NS, T, T + FINE_NS - 1, True),
        (T, T - SECOND_NS, T + FINE_NS - 1, True),
        (T, T, T - SECOND_NS, True),  # a stamp from the future
    ],
)
def test_a_fingerprint_is_racy_within_the_granularity_of_the_last_change(
    tmp_path: Path, mtime: int, ctime: int, now: int, racy: bool
) -> None:
    assert fingerprint(stat(tmp_path / "f", mtime, ctime), "ext4", now).racy is racy


def test_a_fingerprint_compares_size_and_both_stamps_whether_racy_or_not(tmp_path: Path) -> None:
    st = stat(tmp_path / "f", T, T + 1)
    young, old = fingerprint(st, "ext4", T), fingerprint(st, "ext4", T + SECOND_NS)
    assert (young.racy, old.racy) == (True, False)
    assert young == old == Fingerprint(5, T, T + 1, racy=True)
    for other in (Fingerprint(6, T, T + 1, False), Fingerprint(5, T + 1, T + 1, False)):
        assert old != other
    assert old != Fingerprint(5, T, T, racy=False)


def test_a_new_file_is_racy_despite_an_old_mtime(tmp_path: Path) -> None:
    path, now = tmp_path / "f", time.time_ns()
    path.write_bytes(b"")
    os.utime(path, ns=(T, T))
    assert fingerprint(path.stat(), "nfs", now).racy


# -- the checker --------------------------------------------------------------------------------

A = Fingerprint(100, 1, 1, racy=False)
A_RACY = Fingerprint(100, 1, 1, racy=True)
B = Fingerprint(200, 2, 2, racy=False)
C = Fingerprint(300, 3, 3, racy=False)


class Rig:
    """Holds a checker, and a page cache with one file."""

    def __init__(self, mode: Coherency) -> None:
        self.pagecache = PageCache(1 << 20, Cleancache().init_fs(4096), make_resident(4096))
        self.checker = CoherencyChecker(self.pagecache, mode)
        self.file: CachedFile = self.pagecache.file(FileKey(1, 2, b""))

    def open_and_read(self, now: Fingerprint) -> None:
        """Simulate an open of the file and a read of a page."""
        self.checker.on_open(self.file, now, self.clock)
        assert self.file.fingerprint == now
        self.cache_a_page()

    def cache_a_page(self) -> None:
        self.pagecache._resident.insert(self.file.serial, 0, [bytes(4096)])  # noqa: SLF001  # no public access

    @property
    def clock(self) -> int:
        return self.pagecache.clock

    @property
    def has_page(self) -> bool:
        return self.pagecache.stats().resident > 0

    @property
    def flushed(self) -> tuple[int, int]:
        """Return the numbers of changes found and of flushes in doubt."""
        return self.checker.changes_found, self.checker.doubtful_flushes

    def assert_distrusted(self) -> None:
        assert (self.file.fingerprint, self.file.size, self.has_page) == (None, 0, False)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig(Coherency.OPEN)
    yield made
    assert made.file.size == (made.file.fingerprint.size if made.file.fingerprint else 0)


def test_the_first_open_records_the_fingerprint_and_makes_the_kernel_drop_its_pages(rig: Rig) -> None:
    assert rig.checker.on_open(rig.file, A, rig.clock)
    assert (rig.file.fingerprint, rig.file.size) == (A, 100)
    assert rig.flushed == (0, 0)


def test_an_open_of_an_unchanged_file_keeps_its_pages(rig: Rig) -> None:
    rig.open_and_read(A)
    version = rig.file.version
    assert not rig.checker.on_open(rig.file, A, rig.clock)
    assert rig.has_page
    assert rig.file.version == version


@pytest.mark.parametrize("now", [B, Fingerprint(100, 1, 2, False), Fingerprint(100, 2, 1, False)])
@pytest.mark.parametrize("hook", ["on_open", "on_refresh"])
def test_a_changed_file_is_flushed_and_its_new_fingerprint_recorded(
    rig: Rig, now: Fingerprint, hook: str
) -> None:
    rig.open_and_read(A)
    as_of = rig.clock
    assert getattr(rig.checker, hook)(rig.file, now, as_of)
    assert not rig.has_page
    assert rig.file.fingerprint == now
    assert rig.file.version > as_of
    assert rig.flushed == (1, 0)


def test_an_open_that_finds_a_racy_fingerprint_flushes_once(rig: Rig) -> None:
    rig.open_and_read(A_RACY)
    assert rig.checker.on_open(rig.file, A, rig.clock)
    assert not rig.has_page
    rig.cache_a_page()
    assert not rig.checker.on_open(rig.file, A, rig.clock)
    assert rig.has_page
    assert rig.flushed == (0, 1)


def test_an_open_while_still_racy_flushes_again(rig: Rig) -> None:
    rig.open_and_read(A_RACY)
    for _ in range(2):
        assert rig.checker.on_open(rig.file, A_RACY, rig.clock)
        assert not rig.has_page
        rig.cache_a_page()


def test_a_refresh_does_not_make_a_racy_fingerprint_reliable(rig: Rig) -> None:
    rig.open_and_read(A_RACY)
    assert not rig.checker.on_refresh(rig.file, A, rig.clock)
    assert rig.has_page
    assert rig.checker.on_open(rig.file, A, rig.clock), (
        "pages may be older than the change that made it racy"
    )


def test_a_refresh_of_an_unknown_file_records_its_fingerprint(rig: Rig) -> None:
    assert not rig.checker.on_refresh(rig.file, A, rig.clock)
    assert rig.file.fingerprint == A


# -- stats that were overtaken ------------------------------------------------------------------


@pytest.mark.parametrize("hook", ["on_open", "on_refresh"])
def test_an_overtaken_stat_that_disagrees_makes_the_file_distrusted(rig: Rig, hook: str) -> None:
    rig.open_and_read(A)
    as_of = rig.clock
    rig.checker.after_own_change(rig.file, A, B)
    rig.cache_a_page()
    assert getattr(rig.checker, hook)(rig.file, A, as_of)
    rig.assert_distrusted()
    assert rig.flushed == (0, 1)


def test_an_overtaken_stat_that_agrees_changes_nothing(rig: Rig) -> None:
    rig.open_and_read(A)
    as_of = rig.clock
    rig.pagecache.new_version(rig.file)
    assert not rig.checker.on_refresh(rig.file, A, as_of)
    assert rig.has_page


def test_a_stat_taken_during_an_own_change_is_overtaken(rig: Rig) -> None:
    rig.open_and_read(A)
    rig.file.mutations = 1
    assert rig.checker.on_refresh(rig.file, B, rig.clock)
    rig.assert_distrusted()


@pytest.mark.parametrize("hook", ["on_open", "on_refresh"])
def test_an_overtaken_stat_gives_a_distrusted_file_no_fingerprint(rig: Rig, hook: str) -> None:
    rig.open_and_read(A)
    as_of = rig.clock
    rig.checker.distrust(rig.file)
    getattr(rig.checker, hook)(rig.file, A, as_of)
    rig.assert_distrusted()
    getattr(rig.checker, hook)(rig.file, B, rig.clock)
    assert rig.file.fingerprint == B


def test_a_newer_fingerprint_overtakes_older_stats(rig: Rig) -> None:
    rig.open_and_read(A)
    as_of = rig.clock
    assert rig.checker.on_refresh(rig.file, C, rig.clock)
    assert rig.checker.on_refresh(rig.file, B, as_of), "either of the two may be the newer"
    rig.assert_distrusted()


def test_distrust_advances_the_version(rig: Rig) -> None:
    rig.open_and_read(A)
    as_of = rig.clock
    rig.checker.distrust(rig.file)
    assert rig.file.version > as_of
    rig.assert_distrusted()


# -- own changes -----------------------------------------------------------------------------------


def test_an_own_change_without_others_keeps_the_pages(rig: Rig) -> None:
    rig.open_and_read(A)
    as_of = rig.clock
    assert not rig.checker.after_own_change(rig.file, A, B)
    assert rig.has_page
    assert (rig.file.fingerprint, rig.file.size) == (B, 200)
    assert rig.file.version > as_of
    assert rig.flushed == (0, 0)


def test_an_own_change_finds_an_earlier_change_by_others(rig: Rig) -> None:
    rig.open_and_read(A)
    assert rig.checker.after_own_change(rig.file, B, C)
    assert not rig.has_page
    assert rig.file.fingerprint == C
    assert rig.flushed == (1, 0)


def test_after_an_own_change_a_distrusted_file_has_a_fingerprint_again(rig: Rig) -> None:
    rig.open_and_read(A)
    rig.checker.distrust(rig.file)
    assert not rig.checker.after_own_change(rig.file, B, C)
    assert (rig.file.fingerprint, rig.file.size) == (C, 300)


@pytest.mark.parametrize("hook", ["after_own_change", "after_name_change"])
def test_a_change_by_others_during_an_own_change_is_found_by_the_next_open(rig: Rig, hook: str) -> None:
    # The other change came between the two stats of the own one. The call or its result was late (a
    # loaded loop, a stalled server), so the second stat was judged when its stamps were old: not racy
    # by the clock.
    rig.open_and_read(A)
    getattr(rig.checker, hook)(rig.file, A, B)
    assert rig.checker.on_open(rig.file, B, rig.clock)
    assert not rig.has_page


def test_an_own_name_change_keeps_the_pages(rig: Rig) -> None:
    rig.open_and_read(A)
    as_of = rig.clock
    rig.checker.after_name_change(rig.file, A, Fingerprint(100, 1, 5, racy=True))
    assert rig.has_page
    assert rig.file.fingerprint == Fingerprint(100, 1, 5, racy=True)
    assert rig.file.version > as_of


def test_a_name_change_already_seen_changes_nothing(rig: Rig) -> None:
    rig.open_and_read(B)
    rig.checker.after_name_change(rig.file, A, B)
    assert rig.has_page
    assert rig.file.fingerprint == B


def test_a_name_change_in_doubt_makes_the_file_distrusted(rig: Rig) -> None:
    rig.open_and_read(A)
    rig.checker.after_name_change(rig.file, B, C)
    rig.assert_distrusted()
    rig.open_and_read(A)
    rig.file.mutations = 1
    rig.checker.after_name_change(rig.file, A, B)
    rig.assert_distrusted()


def test_a_name_change_gives_an_unknown_file_no_fingerprint(rig: Rig) -> None:
    rig.checker.after_name_change(rig.file, A, B)
    assert rig.file.fingerprint is None
    assert rig.flushed == (0, 0)


# -- mode none ------------------------------------------------------------------------------------


def test_with_mode_none_the_first_fingerprint_is_kept() -> None:
    rig = Rig(Coherency.NONE)
    assert not rig.checker.on_open(rig.file, A_RACY, rig.clock)
    rig.cache_a_page()
    for now in (A_RACY, A, B):
        assert not rig.checker.on_open(rig.file, now, rig.clock)
        assert not rig.checker.on_refresh(rig.file, now, rig.clock)
    assert rig.has_page
    assert rig.file.fingerprint == A
    assert rig.flushed == (0, 0)


def test_with_mode_none_own_changes_still_update_the_size() -> None:
    rig = Rig(Coherency.NONE)
    rig.open_and_read(A)
    assert not rig.checker.after_own_change(rig.file, B, C)
    assert rig.has_page
    assert (rig.file.fingerprint, rig.file.size) == (C, 300)


def test_a_size_not_explained_by_an_own_change_is_a_change_by_others(rig: Rig) -> None:
    rig.open_and_read(A)
    assert rig.checker.after_own_change(rig.file, A, B, size=A.size, moves_mtime=False)
    assert not rig.has_page
    assert rig.file.size == B.size


def test_an_mtime_not_explained_by_an_own_change_is_a_change_by_others(rig: Rig) -> None:
    rig.open_and_read(A)
    after = Fingerprint(A.size, A.mtime_ns + 1, A.ctime_ns + 1, racy=True)
    assert rig.checker.after_own_change(rig.file, A, after, size=A.size, moves_mtime=False)
    assert not rig.has_page


def test_a_fingerprint_accepted_after_distrust_does_not_keep_the_kernels_pages(rig: Rig) -> None:
    rig.open_and_read(A)
    rig.checker.distrust(rig.file)
    rig.checker.on_refresh(rig.file, B, rig.clock)
    assert rig.checker.on_open(rig.file, B, rig.clock)
    assert not rig.checker.on_open(rig.file, B, rig.clock)
