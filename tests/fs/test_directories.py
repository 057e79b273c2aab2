"""Test the directories that the channel opens, lists and closes, beside what Python does."""

import contextlib
import errno
import fcntl
import os
import shutil
import stat as stat_module
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cleanfs.fs.control import CONTROL_NAME
from cleanfs.linux.mounts import FileSystemTypes
from cleanfs.vfs import handles
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.node_ids import ROOT
from tests.fs.directory_rig import DirectoryTwins, Listed, pyfuse3_replies
from tests.fs.metadata_rig import THREAD
from tests.fs.test_metadata import change_source, node_at
from tests.fs.twins import make_source, needs_native

pytestmark = needs_native

USER = 1000


@pytest.fixture(autouse=True)
def _replies() -> Iterator[None]:
    with pyfuse3_replies():
        yield


@contextlib.asynccontextmanager
async def twins_over(
    path: Path, mode: Coherency = Coherency.OPEN, *, exports: bool = False
) -> AsyncIterator[DirectoryTwins]:
    twins = DirectoryTwins(make_source(path), mode, exports=exports)
    try:
        yield twins
    finally:
        await twins.close()


@pytest.fixture
async def twins(tmp_path: Path) -> AsyncIterator[DirectoryTwins]:
    async with twins_over(tmp_path) as made:
        yield made


@pytest.fixture
async def listing(twins: DirectoryTwins) -> DirectoryTwins:
    """Return twins whose root is open."""
    await twins.opened(ROOT)
    return twins


# -- each is served ----------------------------------------------------------------------------------
async def test_a_directory_is_opened_listed_and_closed(twins: DirectoryTwins) -> None:
    assert await twins.is_served("opendir", ROOT)
    assert await twins.is_served("readdir", 0)
    entries = await twins.listed()
    assert [entry.name for entry in entries[:2]] == [b".", b".."]
    assert {entry.name for entry in entries[2:]} == {b"a", b"b", b"link", b"dir"}
    assert await twins.listed(offset=entries[-1].next) == []
    assert await twins.is_served("releasedir")


async def test_a_directory_below_is_listed(twins: DirectoryTwins) -> None:
    directory = await twins.found(b"dir")
    assert await twins.is_served("opendir", directory)
    assert await twins.is_served("readdir", 0)
    assert [entry.name for entry in await twins.listed()] == [b".", b"..", b"x"]


async def test_a_listing_continues_where_any_reply_ended(listing: DirectoryTwins) -> None:
    entries = await listing.listed()
    for entry in entries:
        assert await listing.is_served("readdir", 0, entry.next)
    one_at_a_time: list[Listed] = []
    while more := await listing.listed(0, one_at_a_time[-1].next if one_at_a_time else 0, 176):
        assert len(more) == 1
        one_at_a_time += more
    assert [entry.name for entry in one_at_a_time] == [entry.name for entry in entries]


async def test_a_listing_keeps_to_its_snapshot(listing: DirectoryTwins) -> None:
    first = await listing.listed(size=400)
    (listing.source / "a").unlink()
    (listing.source / "new").touch()
    rest = await listing.listed(offset=first[-1].next)
    assert {entry.name for entry in first[2:] + rest} <= {b"a", b"b", b"link", b"dir"}
    assert {entry.name for entry in (await listing.listed())[2:]} == {b"b", b"link", b"dir", b"new"}


async def test_both_continue_from_a_snapshot_of_the_other(listing: DirectoryTwins) -> None:
    native = listing.directory_sides[0]
    native.may_list = False
    first = await listing.listed(size=400)
    native.may_list = True
    (listing.source / "new").touch()
    assert await listing.is_served("readdir", 0, first[-1].next)
    assert await listing.is_served("readdir", 0)
    (listing.source / "newer").touch()
    native.may_list = False
    rest = await listing.listed(offset=first[-1].next)
    assert b"new" in {entry.name for entry in first + rest}
    assert b"newer" not in {entry.name for entry in rest}
    assert b"newer" in {entry.name for entry in await listing.listed()}


async def test_new_inodes_get_their_file_handles_where_handles_last(tmp_path: Path) -> None:
    async with twins_over(tmp_path, exports=True) as twins:
        await twins.opened(ROOT)
        assert await twins.is_served("readdir", 0)
        for inode in twins.inodes((tmp_path / "a").stat().st_ino):
            assert inode.handle


async def test_all_names_of_a_file_are_listed(listing: DirectoryTwins) -> None:
    for name in ("z", "y"):
        (listing.source / name).hardlink_to(listing.source / "a")
    for _ in range(2):
        assert await listing.is_served("readdir", 0)
    node = (listing.source / "a").stat().st_ino
    await listing.both("forget_one", node, 5)
    assert [inode.nlookup for inode in listing.inodes(node)] == [1, 1]


async def test_a_file_that_was_found_by_a_lookup_is_listed(listing: DirectoryTwins) -> None:
    node = await listing.found(b"a")
    assert await listing.is_served("readdir", 0)
    assert [inode.nlookup for inode in listing.inodes(node)] == [2, 2]


async def test_a_name_that_is_gone_is_left_out(listing: DirectoryTwins) -> None:
    first = await listing.listed(size=350)
    for name in ("a", "b", "link"):
        (listing.source / name).unlink()
    assert await listing.is_served("readdir", 0, first[-1].next)
    assert [entry.name for entry in await listing.listed(offset=2)] == [b"dir"]


async def test_the_name_of_the_control_directory_is_left_out(listing: DirectoryTwins) -> None:
    (listing.source / os.fsdecode(CONTROL_NAME)).mkdir()
    assert await listing.is_served("readdir", 0)
    assert CONTROL_NAME not in {entry.name for entry in await listing.listed()}
    node = await listing.found(b"dir")
    (listing.source / "dir" / os.fsdecode(CONTROL_NAME)).touch()
    await listing.opened(node)
    assert CONTROL_NAME in {entry.name for entry in await listing.listed(1)}


async def test_free_space_is_reported(twins: DirectoryTwins) -> None:
    assert await twins.is_served("statfs")


# -- OPENDIR that is left to Python ------------------------------------------------------------------
async def test_a_user_whose_access_is_as_the_kernel_was_told_may_open(twins: DirectoryTwins) -> None:
    directory = await twins.found(b"dir")
    assert await twins.is_served("opendir", directory, USER)


async def test_a_user_may_open_what_the_kernel_was_told_nothing_of(twins: DirectoryTwins) -> None:
    assert await twins.is_served("opendir", ROOT, USER)
    (twins.source / "new").touch()  # its ctime moves
    assert await twins.is_served("opendir", ROOT, USER)


async def test_a_user_opens_by_python_if_mode_or_acl_may_have_changed(twins: DirectoryTwins) -> None:
    directory = await twins.found(b"dir")
    (twins.source / "dir").chmod(0o700)
    assert await twins.both("opendir", directory, USER) == -errno.ESTALE
    (twins.source / "dir").chmod(0o755)  # as before, but ctime has moved: there may be an ACL
    for inode in twins.inodes(directory):
        inode.suspect = False  # as after a lookup, which would tell the kernel of the new ctime
    assert not await twins.is_served("opendir", directory, USER)
    assert await twins.is_served("opendir", directory, USER)


async def test_root_opens_whatever_the_mode(twins: DirectoryTwins) -> None:
    directory = await twins.found(b"dir")
    (twins.source / "dir").chmod(0o700)
    assert await twins.is_served("opendir", directory)


@pytest.mark.parametrize("mode", [Coherency.OPEN, Coherency.NONE])
async def test_a_stale_name_of_a_directory_is_refused_by_python(
    tmp_path: Path, mode: Coherency
) -> None:
    async with twins_over(tmp_path, mode) as twins:
        directory = await twins.found(b"dir")
        (twins.source / "dir").rename(twins.source / "moved")
        (twins.source / "dir").mkdir()
        served = mode is Coherency.NONE  # nothing is checked
        assert await twins.is_served("opendir", directory) == served
        assert len(twins.directory_sides[0].directories) == served


async def test_a_directory_whose_own_directory_is_parked_is_opened_by_python(
    twins: DirectoryTwins,
) -> None:
    directory = await twins.found(b"dir")
    (twins.source / "dir" / "below").mkdir()
    below = await twins.found(b"below", directory)
    park_all_but(twins, below)
    assert not await twins.is_served("opendir", below)
    assert await twins.is_served("opendir", below)


def park_all_but(twins: DirectoryTwins, node: int) -> None:
    for side in twins.sides:
        with side.table.using(side.table[node]):
            side.park()


async def test_a_directory_whose_parent_was_forgotten_is_opened_by_python(
    twins: DirectoryTwins,
) -> None:
    directory = await twins.found(b"dir")
    (twins.source / "dir" / "below").mkdir()
    below = await twins.found(b"below", directory)
    await twins.both("forget_one", directory, 1)
    assert not await twins.is_served("opendir", below)


async def test_a_thread_that_was_refused_opens_by_python(twins: DirectoryTwins) -> None:
    directory = await twins.found(b"dir")
    (twins.source / "dir").rename(twins.source / "moved")
    assert await twins.both("opendir", directory) == -errno.ESTALE
    (twins.source / "moved").rename(twins.source / "dir")
    await twins.both("lookup", ROOT, b"dir", THREAD + 1)
    assert await twins.is_served("opendir", directory, 0, 0, THREAD + 1)
    assert not await twins.is_served("opendir", directory, 0, 0, THREAD)
    assert await twins.is_served("opendir", directory, 0, 0, THREAD)


async def test_a_directory_that_is_one_too_many_is_refused_by_python(twins: DirectoryTwins) -> None:
    for side in twins.sides:
        side.table.fd_budget = 1
    assert await twins.is_served("opendir", ROOT)
    assert await twins.is_served("opendir", ROOT)
    assert await twins.both("opendir", ROOT) == -errno.EMFILE


async def test_access_times_stay_if_the_program_says_so(twins: DirectoryTwins) -> None:
    assert await twins.is_served("opendir", ROOT, 0, os.O_NOATIME)
    for inode in twins.inodes(ROOT):
        assert fcntl.fcntl(inode.open_fds[-1], fcntl.F_GETFL) & os.O_NOATIME


# -- READDIRPLUS that is left to Python --------------------------------------------------------------
async def test_listings_that_may_wait_are_left_to_python(listing: DirectoryTwins) -> None:
    listing.directory_sides[0].may_list = False
    assert not await listing.is_served("readdir", 0)


@pytest.fixture
def cold_source(tmp_path: Path) -> Iterator[Path]:
    """Make a source on an ext4 that was just mounted: its names are not in the dentry cache."""
    maker = shutil.which("mkfs.ext4")
    if os.geteuid() != 0 or maker is None:
        pytest.skip("needs root and mkfs.ext4")
    image, source = tmp_path / "image", tmp_path / "source"
    image.touch()
    os.truncate(image, 16 << 20)
    source.mkdir()
    subprocess.run([maker, "-q", "-m", "0", image], check=True, timeout=60)
    if subprocess.run(["mount", "-o", "loop", image, source], check=False, timeout=60).returncode:
        pytest.skip("no loop device")
    try:
        make_source(source)
        subprocess.run(["umount", source], check=True, timeout=60)
        subprocess.run(["mount", "-o", "loop", image, source], check=True, timeout=60)
        yield source
    finally:
        subprocess.run(["umount", "-l", source], check=False, timeout=60)


async def test_names_that_the_source_does_not_have_in_memory_are_left_to_python(
    cold_source: Path,
) -> None:
    twins = DirectoryTwins(cold_source, Coherency.OPEN)
    try:
        await twins.opened(ROOT)
        assert not await twins.is_served("readdir", 0)
        assert await twins.is_served("readdir", 0)
    finally:
        await twins.close()


async def test_fast_listings_in_threads_let_the_channel_list(listing: DirectoryTwins) -> None:
    side = listing.directory_sides[0]
    side.may_list = None
    for _ in range(100):
        await listing.listed()
        if side.listings.inline:
            break
    assert await listing.is_served("readdir", 0)


async def test_a_directory_whose_names_a_thread_reads_is_left_to_python(
    listing: DirectoryTwins,
) -> None:
    [(_, fh)] = listing.directory_sides[0].directories
    directory = listing.sides[0].fs._handles.directory(fh)  # noqa: SLF001  # no public access
    directory.state.rewinding += 1  # type: ignore[union-attr]  # it is no control directory
    assert not await listing.is_served("readdir", 0)
    directory.state.rewinding -= 1  # type: ignore[union-attr]
    assert await listing.is_served("readdir", 0)


async def test_a_directory_of_a_server_is_left_to_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FileSystemTypes, "__getitem__", lambda *_: "nfs")
    async with twins_over(tmp_path) as twins:
        assert not await twins.is_served("opendir", ROOT)
        assert not await twins.is_served("readdir", 0)
        assert not await twins.is_served("statfs")


async def test_a_listing_waits_in_python_for_the_invalidation_of_a_file(
    listing: DirectoryTwins,
) -> None:
    node = (listing.source / "a").stat().st_ino
    for side in listing.sides:
        side.notifier.inode(node)  # another file that had this number
    assert not await listing.is_served("readdir", 0)
    assert await listing.is_served("readdir", 0)
    for side in listing.sides:
        side.notifier.inode(node)
    assert not await listing.is_served("readdir", 0)


async def test_a_very_large_reply_is_left_to_python(listing: DirectoryTwins) -> None:
    assert await listing.is_served("readdir", 0, 0, 128 << 10)
    assert not await listing.is_served("readdir", 0, 0, (128 << 10) + 1)


async def test_a_very_large_directory_is_left_to_python(listing: DirectoryTwins) -> None:
    for i in range(10_000):
        (listing.source / f"{i:04}").touch()
    assert not await listing.is_served("readdir", 0, 0, 1000)
    assert await listing.is_served("readdir", 0, 5, 1000)  # it has the names now


async def test_a_file_that_has_changed_since_it_was_read_is_left_to_python(
    listing: DirectoryTwins,
) -> None:
    node = await listing.found(b"a")
    await listing.both("open", node)
    await listing.both("release")
    assert await listing.is_served("readdir", 0)
    (listing.source / "a").write_text("longer")
    assert not await listing.is_served("readdir", 0)


async def test_a_file_that_has_left_another_name_is_left_to_python(listing: DirectoryTwins) -> None:
    await listing.found(b"a")
    (listing.source / "a").rename(listing.source / "moved")
    assert not await listing.is_served("readdir", 0)


async def test_a_directory_that_has_left_another_name_is_moved(listing: DirectoryTwins) -> None:
    await listing.found(b"dir")
    (listing.source / "dir").rename(listing.source / "moved")
    assert await listing.is_served("readdir", 0)
    assert [inode.name for inode in listing.inodes(node_at(listing, b"moved"))] == [b"moved"] * 2


async def test_a_number_that_was_given_to_another_kind_is_left_to_python(
    listing: DirectoryTwins,
) -> None:
    await listing.listed()
    node = (listing.source / "a").stat().st_ino
    for inode in listing.inodes(node):
        inode.kind = stat_module.S_IFDIR  # a directory had that number when it was listed
    assert not await listing.is_served("readdir", 0)
    for inode in listing.inodes(node):
        inode.kind = stat_module.S_IFREG
    assert not await listing.is_served("readdir", 0)  # the kernel has two inodes of that number now


async def test_a_number_that_another_node_has_is_left_to_python(listing: DirectoryTwins) -> None:
    st = (listing.source / "a").stat()
    for side in listing.sides:  # as after two files had that number, one after the other
        inode = Inode(st.st_dev, st.st_ino, 0o100000, side.table.next_dynamic(), 0)
        side.table._nodes[inode.node] = inode  # noqa: SLF001  # as a lookup does
        side.table._index.add(inode)  # noqa: SLF001
    assert not await listing.is_served("readdir", 0)


async def test_a_directory_with_another_node_is_left_to_python(twins: DirectoryTwins) -> None:
    st = (twins.source / "dir").stat()
    for side in twins.sides:
        side.table.states.remove(side.table.root)
        inode = Inode(st.st_dev, st.st_ino, stat_module.S_IFDIR, side.table.next_dynamic(), 0)
        side.table.states.add(side.table.root)
        side.table._nodes[inode.node] = inode  # noqa: SLF001
        side.table.states.add(inode)
        side.table._index.add(inode)  # noqa: SLF001
        inode.local = True
    directory = await twins.found(b"dir")
    assert directory != st.st_ino
    await twins.opened(directory)
    assert not await twins.is_served("readdir", 0)
    below = twins.source / "dir" / "below"
    below.mkdir()
    node = await twins.found(b"below", directory)
    await twins.opened(node)
    assert not await twins.is_served("readdir", 1)  # ".." is shown with its node


async def test_a_mount_point_is_left_to_python(listing: DirectoryTwins) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    mountpoint = str(listing.source / "dir")
    await trio.run_process(["mount", "-t", "tmpfs", "tmpfs", mountpoint])
    try:
        assert not await listing.is_served("readdir", 0)
        directory = await listing.found(b"dir")
        assert not await listing.is_served("opendir", directory)
        assert not await listing.is_served("readdir", 1)
        await listing.both("releasedir", 1)
    finally:
        await trio.run_process(["umount", "-l", mountpoint])


async def test_with_too_many_inodes_a_listing_has_some_forgotten(listing: DirectoryTwins) -> None:
    for side in listing.sides:
        side.table.max_inodes = 5
    await listing.listed()
    assert not is_crowded(listing)
    for side in listing.sides:
        side.table.max_inodes = 4
    assert await listing.is_served("readdir", 0)
    assert is_crowded(listing)


def is_crowded(twins: DirectoryTwins) -> bool:
    """Tell whether the kernel is to be made to forget inodes; both say the same."""
    return bool(twins.sides[0].fs._tree._crowded.is_set())  # noqa: SLF001  # no public access


# -- RELEASEDIR and STATFS that are left to Python ---------------------------------------------------
async def test_a_directory_in_use_is_closed_by_python(listing: DirectoryTwins) -> None:
    [(_, fh)] = listing.directory_sides[0].directories
    directory = listing.sides[0].fs._handles.directory(fh)  # noqa: SLF001  # no public access
    with directory.use:  # type: ignore[union-attr]  # it is no control directory
        assert not listing.sides[0].fs._handles.close_directory(fh)  # noqa: SLF001
    assert await listing.is_served("releasedir")


async def test_the_space_of_a_source_that_may_wait_is_reported_by_python(twins: DirectoryTwins) -> None:
    for inode in twins.inodes(ROOT):
        inode.local = False
    assert not await twins.is_served("statfs")


# -- any sequence ------------------------------------------------------------------------------------
NAMES = (b"a", b"b", b"link", b"dir", b"none")

names = st.sampled_from(NAMES)
steps = st.one_of(
    st.tuples(st.sampled_from(["opendir", "opendir_below", "releasedir", "readdir"]), st.just(b"")),
    st.tuples(st.just("readdir"), st.just(b"")),
    st.tuples(st.just("continue"), names),
    st.tuples(st.sampled_from(["lookup", "getattr", "forget", "open"]), names),
    st.tuples(st.sampled_from(["release", "park", "deliver", "wait", "thread"]), st.just(b"")),
    st.tuples(st.sampled_from(["write", "chmod", "unlink", "replace", "link", "move"]), names),
)


@pytest.mark.parametrize("mode", [Coherency.OPEN, Coherency.NONE])
def test_any_sequence_has_the_replies_and_the_state_of_python(mode: Coherency) -> None:
    served = 0

    @settings(max_examples=150, deadline=None)
    @given(st.lists(steps, min_size=5, max_size=40))
    def check(sequence: list[tuple[str, bytes]]) -> None:
        nonlocal served
        served += trio.run(run_sequence, sequence, mode, clock)

    with pytest.MonkeyPatch.context() as patched:
        clock = SimpleNamespace(now=10**18)
        clock.time_ns = lambda: clock.now
        patched.setattr(handles, "time", clock)
        check()
    assert served > 100


async def run_sequence(
    sequence: list[tuple[str, bytes]], mode: Coherency, clock: SimpleNamespace
) -> int:
    """Run the steps, and return how many requests the channel served."""
    with tempfile.TemporaryDirectory() as path:
        async with twins_over(Path(path), mode) as twins:
            for step, name in sequence:
                await run_step(twins, step, name, clock)
            return twins.natively


async def run_step(twins: DirectoryTwins, step: str, name: bytes, clock: SimpleNamespace) -> None:
    node = node_at(twins, name)
    opened = len(twins.directory_sides[1].directories)
    if step == "opendir":
        await twins.both("opendir", ROOT)
    elif step == "opendir_below":
        if (directory := node_at(twins, b"dir")) and twins.inodes(directory)[0].is_dir:
            await twins.both("opendir", directory, USER if len(twins.source.name) % 2 else 0)
    elif step in ("readdir", "continue") and opened:
        await twins.both("readdir", opened - 1, 2 * NAMES.index(name or b"a"))
    elif step == "releasedir" and opened:
        await twins.both("releasedir")
    elif step == "lookup":
        await twins.both("lookup", ROOT, name)
    elif step == "getattr":
        await twins.both("getattr", node or ROOT)
    elif step == "forget" and node:
        await twins.both("forget_one", node, 1)
    elif step == "open" and node and twins.inodes(node)[0].kind == 0o100000:
        await twins.both("open", node)
    elif step == "release":
        await twins.both("release")
    elif step == "park":
        twins.on_both("park")
    elif step == "deliver":
        twins.deliver()
    elif step == "wait":
        clock.now += 10**12
    elif step == "thread":
        twins.directory_sides[0].may_list = not twins.directory_sides[0].may_list
    elif step in ("write", "chmod", "unlink", "replace", "link", "move"):
        change_source(step, twins.source / os.fsdecode(name))
