"""Test what the channel serves of names and attributes, beside what Python replies."""

import contextlib
import errno
import os
import stat as stat_module
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from cleanfs.fs.control import CONTROL_NAME
from cleanfs.fs.entries import UNANNOUNCED_SECONDS
from cleanfs.fs.forget import forgets_in
from cleanfs.vfs import handles
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.node_ids import ROOT
from tests.fs.metadata_rig import LOOKUP, NO_ATTRIBUTE, THREAD, TIMEOUT, Entry, Watch
from tests.fs.twins import Twins, needs_native, twins_over

CAPABILITY = b"security.capability"
ACL = b"system.posix_acl_access"


@pytest.fixture
async def twins(tmp_path: Path) -> AsyncIterator[Twins]:
    async with twins_over(tmp_path, Coherency.OPEN) as made:
        yield made


# -- each is served, and each condition holds it back ------------------------------------------------


@needs_native
async def test_a_name_is_served_when_it_is_new_and_when_it_was_found_before(twins: Twins) -> None:
    assert await twins.is_served("lookup", ROOT, b"a")
    assert await twins.is_served("lookup", ROOT, b"a")
    directory = await twins.found(b"dir")
    assert await twins.is_served("lookup", directory, b"x")
    assert await twins.is_served("lookup", directory, b"x")
    assert len(twins.sides[0].table) == 4


@needs_native
async def test_a_new_inode_gets_its_file_handle_where_handles_last(tmp_path: Path) -> None:
    async with twins_over(tmp_path, Coherency.OPEN, exports=True) as twins:
        assert await twins.is_served("lookup", ROOT, b"a")
        native, python = twins.inodes((tmp_path / "a").stat().st_ino)
        assert native.handle == python.handle
        assert native.handle


@needs_native
async def test_a_new_inode_whose_number_is_being_invalidated_is_left_to_python(twins: Twins) -> None:
    node = (twins.source / "a").stat().st_ino
    for side in twins.sides:
        side.notifier.inode(node)  # another file that had this number
    assert not await twins.is_served("lookup", ROOT, b"a")


@needs_native
async def test_a_number_that_another_node_has_is_left_to_python(twins: Twins) -> None:
    st = (twins.source / "a").stat()
    for side in twins.sides:  # as after two files had that number, one after the other
        inode = Inode(st.st_dev, st.st_ino, 0, side.table.next_dynamic(), 0)
        side.table._nodes[inode.node] = inode  # noqa: SLF001  # as a lookup does
        side.table._index.add(inode)  # noqa: SLF001
    assert not await twins.is_served("lookup", ROOT, b"a")


@needs_native
async def test_new_names_on_a_further_file_system_are_left_to_python(twins: Twins) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    mountpoint = twins.source / "dir"
    await trio.run_process(["mount", "-t", "tmpfs", "tmpfs", str(mountpoint)])
    try:
        (mountpoint / "y").write_text("y")
        directory = await twins.found(b"dir")
        assert not await twins.is_served("lookup", directory, b"y")
    finally:
        await trio.run_process(["umount", "-l", str(mountpoint)])


@needs_native
async def test_attributes_of_an_inode_that_was_found_are_served(twins: Twins) -> None:
    assert await twins.is_served("getattr", ROOT)
    node = await twins.found(b"a")
    assert await twins.is_served("getattr", node)


@needs_native
async def test_attributes_of_a_file_without_a_record_are_served_when_they_change(twins: Twins) -> None:
    node = await twins.found(b"a")
    (twins.source / "a").write_text("longer")
    assert await twins.is_served("getattr", node)
    (twins.source / "a").chmod(0o600)
    assert await twins.is_served("lookup", ROOT, b"a")


@needs_native
async def test_a_change_of_a_file_that_has_pages_is_left_to_python(twins: Twins) -> None:
    node = await twins.found(b"a")
    await twins.both("open", node)
    await twins.both("release")
    assert await twins.is_served("lookup", ROOT, b"a")
    (twins.source / "a").write_text("longer")
    assert not await twins.is_served("lookup", ROOT, b"a")
    twins.deliver()
    (twins.source / "a").write_text("longer still")
    assert not await twins.is_served("getattr", node)


@needs_native
async def test_a_file_whose_record_was_forgotten_is_served(twins: Twins) -> None:
    node = await twins.found(b"a")
    await twins.both("open", node)
    await twins.both("release")
    for side, inode in zip(twins.sides, twins.inodes(node), strict=True):
        assert inode.record is not None
        side.services.pagecache.forget(inode.record)
    (twins.source / "a").write_text("longer")
    assert await twins.is_served("getattr", node)


@needs_native
async def test_an_open_file_whose_size_is_in_doubt_is_left_to_python(twins: Twins) -> None:
    node = await twins.found(b"a")
    (twins.source / "a").write_text("longer")
    await twins.both("getattr", node)
    await twins.both("open", node)
    twins.deliver()
    assert await twins.is_served("getattr", node)
    for inode in twins.inodes(node):
        inode.kernel.read_ended(2)
    assert not await twins.is_served("getattr", node)
    assert await twins.is_served("getattr", node)


@needs_native
async def test_attributes_that_an_open_file_was_not_told_are_left_to_python(twins: Twins) -> None:
    node = await twins.found(b"a")
    await twins.both("open", node)
    twins.deliver()
    for inode in twins.inodes(node):
        inode.kernel.sent = (1, 2, 3)
    assert not await twins.is_served("getattr", node)


@needs_native
async def test_a_file_that_was_removed_is_left_to_python(twins: Twins) -> None:
    node = await twins.found(b"a")
    (twins.source / "a").unlink()
    assert not await twins.is_served("getattr", node)


@needs_native
async def test_an_inode_that_is_being_invalidated_is_left_to_python(twins: Twins) -> None:
    node = await twins.found(b"a")
    twins.on_both("invalidate", node)
    assert not await twins.is_served("lookup", ROOT, b"a")
    twins.on_both("invalidate", node)
    assert not await twins.is_served("getattr", node)
    twins.on_both("invalidate", node)
    twins.deliver()
    assert await twins.is_served("lookup", ROOT, b"a")
    assert await twins.is_served("getattr", node)


@needs_native
async def test_others_are_served_while_an_inode_or_a_name_is_being_invalidated(twins: Twins) -> None:
    node, other = await twins.found(b"a"), await twins.found(b"b")
    twins.on_both("invalidate", other)
    twins.on_both("invalidate", ROOT)
    twins.on_both("expire", b"a")
    assert await twins.is_served("lookup", ROOT, b"a")
    assert await twins.is_served("getattr", node)


@needs_native
@pytest.mark.parametrize("announces_all", [True, False])
async def test_a_watched_source_has_the_long_timeout_if_all_changes_are_announced(
    tmp_path: Path, announces_all: bool
) -> None:
    async with twins_over(tmp_path, Coherency.WATCH, Watch(announces_all)) as twins:
        node = await twins.found(b"a")
        before = twins.natively
        found = await twins.both("lookup", ROOT, b"a")
        got = await twins.both("getattr", node)
        assert twins.natively == before + 2
        assert isinstance(found, Entry)
        assert isinstance(got, Entry)
        timeout = TIMEOUT if announces_all else UNANNOUNCED_SECONDS
        assert found.entry_timeout == found.attr_timeout == got.attr_timeout == timeout


@needs_native
async def test_a_thread_that_was_refused_is_left_to_python(twins: Twins) -> None:
    node = await twins.found(b"a")
    other = await twins.found(b"b")
    (twins.source / "a").rename(twins.source / "gone")
    assert await twins.both("open", node) == -errno.ESTALE
    twins.deliver()
    assert not await twins.is_served("lookup", ROOT, b"b")
    assert await twins.is_served("lookup", ROOT, b"b", THREAD + 1)
    await twins.both("open", other)  # it has come again
    assert await twins.is_served("lookup", ROOT, b"b")


@needs_native
async def test_a_name_that_leads_elsewhere_is_left_to_python(twins: Twins) -> None:
    await twins.found(b"a")
    await twins.found(b"b")
    (twins.source / "a").replace(twins.source / "b")
    assert not await twins.is_served("lookup", ROOT, b"b")


@needs_native
async def test_a_name_that_another_file_of_that_number_has_is_left_to_python(twins: Twins) -> None:
    await twins.found(b"a")
    (twins.source / "b").unlink()
    (twins.source / "b").hardlink_to(twins.source / "a")
    assert not await twins.is_served("lookup", ROOT, b"b")
    assert not await twins.is_served("lookup", ROOT, b"a")
    assert await twins.is_served("lookup", ROOT, b"a")


@needs_native
async def test_a_name_in_another_directory_is_left_to_python(twins: Twins) -> None:
    directory = await twins.found(b"dir")
    await twins.found(b"a")
    (twins.source / "a").rename(twins.source / "dir" / "a")
    assert not await twins.is_served("lookup", directory, b"a")
    twins.deliver()
    assert await twins.is_served("lookup", directory, b"a")


@needs_native
@pytest.mark.parametrize("mode", [Coherency.OPEN, Coherency.NONE])
async def test_a_name_that_is_not_there_is_served(tmp_path: Path, mode: Coherency) -> None:
    async with twins_over(tmp_path, mode) as twins:
        await twins.both("lookup", ROOT, b"none")
        assert await twins.is_served("lookup", ROOT, b"none")  # the source's dentry cache has it now


@needs_native
async def test_a_name_that_is_not_cached_is_served_where_calls_do_not_wait(twins: Twins) -> None:
    policies = [side.services.source_fs(side.table.root).lookups for side in twins.sides]
    for policy in policies:
        policy.inline = False
        policy.returned()
    assert not await twins.is_served("lookup", ROOT, b"absent")
    for policy in policies:
        policy.inline, policy.returned_at = True, 0.0
    assert not twins.sides[0].served(LOOKUP, ROOT, b"no such name\0")
    for policy in policies:
        policy.inline = True
        policy.returned()
    assert await twins.is_served("lookup", ROOT, b"nor this")
    assert policies[0].returned_at > 0


@needs_native
async def test_names_that_lead_out_of_a_directory_are_left_to_python(twins: Twins) -> None:
    directory = await twins.found(b"dir")
    await twins.found(b"a")
    assert not (twins.source / "dir" / "none").exists()  # the source's dentry cache knows that now
    for name in (b".", b"..", b"../a", b"/", b"dir/x", b"dir/none"):
        assert not await twins.is_served("lookup", directory, name)
        assert not await twins.is_served("lookup", ROOT, name)


@needs_native
async def test_the_control_directory_is_left_to_python(twins: Twins) -> None:
    assert not (twins.source / os.fsdecode(CONTROL_NAME)).exists()
    before = twins.natively
    entry = await twins.sides[0].lookup(ROOT, CONTROL_NAME)
    assert isinstance(entry, Entry)
    assert entry.node
    await twins.sides[0].getattr(entry.node)
    assert twins.natively == before


@needs_native
async def test_a_mount_point_is_left_to_python(twins: Twins) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    await twins.found(b"dir")
    mountpoint = str(twins.source / "dir")
    await trio.run_process(["mount", "-t", "tmpfs", "tmpfs", mountpoint])
    try:
        assert not await twins.is_served("lookup", ROOT, b"dir")
    finally:
        await trio.run_process(["umount", "-l", mountpoint])


@needs_native
async def test_a_file_system_that_is_not_local_is_left_to_python(twins: Twins) -> None:
    node = await twins.found(b"a")
    for inode in twins.inodes(node):
        inode.local = False
    for side in twins.sides:
        side.fs._entries._is_local = lambda _: False  # noqa: SLF001  # of another file system
    assert not await twins.is_served("lookup", ROOT, b"a")
    assert not await twins.is_served("getattr", node)


@needs_native
async def test_an_inode_whose_fd_failed_is_left_to_python(twins: Twins) -> None:
    node = await twins.found(b"a")
    for inode in twins.inodes(node):
        inode.suspect = True
    assert not await twins.is_served("getattr", node)
    assert not await twins.is_served("lookup", ROOT, b"a")
    assert await twins.is_served("lookup", ROOT, b"a")


@needs_native
async def test_with_too_many_inodes_a_lookup_has_some_forgotten(twins: Twins) -> None:
    def crowded() -> list[bool]:
        return [side.fs._tree._crowded.is_set() for side in twins.sides]  # noqa: SLF001  # no public access

    for side in twins.sides:
        side.table.max_inodes = 2
    await twins.found(b"a")
    assert crowded() == [False, False]
    assert await twins.is_served("lookup", ROOT, b"b")
    assert crowded() == [True, True]


@needs_native
async def test_a_parked_inode_is_found_at_its_place(twins: Twins) -> None:
    await twins.both("getattr", ROOT)
    twins.on_both("list", b"a")
    twins.on_both("list", b"b")
    node = (twins.source / "b").stat().st_ino
    assert await twins.is_served("lookup", ROOT, b"a")
    assert await twins.is_served("getattr", node)
    twins.on_both("park")
    assert await twins.is_served("getattr", node)


@needs_native
async def test_a_parked_inode_that_is_another_file_by_now_is_left_to_python(twins: Twins) -> None:
    await twins.both("getattr", ROOT)
    node = await twins.found(b"a")
    twins.on_both("park")
    for inode in twins.inodes(node):
        assert inode.fd == -1
        inode.handle = b"another generation"
    assert not await twins.is_served("lookup", ROOT, b"a")


@needs_native
async def test_a_parked_inode_of_another_kind_is_left_to_python(twins: Twins) -> None:
    await twins.both("getattr", ROOT)
    twins.on_both("list", b"a")
    node = (twins.source / "a").stat().st_ino
    for inode in twins.inodes(node):
        inode.kind = stat_module.S_IFDIR  # a directory had that number when it was listed
    assert not await twins.is_served("getattr", node)


@needs_native
async def test_a_symbolic_link_is_read(twins: Twins) -> None:
    node = await twins.found(b"link")
    assert await twins.is_served("readlink", node)
    assert await twins.both("readlink", node) == b"a"
    assert not await twins.is_served("readlink", await twins.found(b"a"))


@needs_native
@pytest.mark.parametrize("name", [CAPABILITY, ACL, b"system.posix_acl_default", b"user.none"])
async def test_the_absence_of_an_extended_attribute_is_served(twins: Twins, name: bytes) -> None:
    node = await twins.found(b"a")
    before = twins.natively
    assert await twins.both("getxattr", node, name) == NO_ATTRIBUTE
    assert twins.natively == before + 1


@needs_native
async def test_the_capabilities_of_an_open_file_need_no_other_fd(twins: Twins) -> None:
    await twins.both("getattr", ROOT)
    node = await twins.found(b"a")
    await twins.both("open", node)
    twins.on_both("park")
    assert await twins.is_served("getxattr", node, CAPABILITY)
    assert [inode.fd for inode in twins.inodes(node)] == [-1, -1]


@needs_native
async def test_an_extended_attribute_that_is_there_is_left_to_python(twins: Twins) -> None:
    node = await twins.found(b"a")
    os.setxattr(twins.source / "a", "user.some", b"value")
    assert not await twins.is_served("getxattr", node, b"user.some")


@needs_native
async def test_an_error_of_an_extended_attribute_is_left_to_python(twins: Twins) -> None:
    node = await twins.found(b"a")
    before = twins.natively
    assert await twins.both("getxattr", node, b"nonsense") == -errno.EOPNOTSUPP
    assert twins.natively == before


@needs_native
async def test_an_inode_of_another_number_is_left_to_python(twins: Twins) -> None:
    node = await twins.found(b"a")
    for inode in twins.inodes(node):
        inode.ino += 1
    assert not await twins.is_served("lookup", ROOT, b"a")


@needs_native
async def test_an_acl_that_was_removed_is_left_to_python(twins: Twins) -> None:
    node = await twins.found(b"a")
    for inode in twins.inodes(node):
        inode.kernel.acl = b"some"
    assert not await twins.is_served("getxattr", node, ACL)
    assert await twins.is_served("getxattr", node, ACL)


# -- FORGET ------------------------------------------------------------------------------------------


@needs_native
async def test_references_are_taken_back(twins: Twins) -> None:
    a, b = await twins.found(b"a"), await twins.found(b"b")
    await twins.found(b"a")
    assert await twins.is_served("forget_one", a, 1)
    assert len(twins.sides[0].table) == 3
    assert await twins.is_served("forget", (a, 1), (b, 1), (12345, 1), (ROOT, 1))
    assert len(twins.sides[0].table) == 1


@needs_native
async def test_an_open_file_is_dropped_after_its_release(twins: Twins) -> None:
    node = await twins.found(b"a")
    await twins.both("open", node)
    await twins.both("forget_one", node, 1)
    assert len(twins.sides[0].table) == 2
    await twins.both("release")
    assert len(twins.sides[0].table) == 1


@needs_native
async def test_a_count_that_no_kernel_sends_does_no_harm(twins: Twins) -> None:
    node = await twins.found(b"a")
    await twins.sides[0].forget((node, 2**64 - 1), (node, 2**64 - 1), (node, 2**63))
    assert len(twins.sides[0].table) == 1


def test_a_batch_that_is_too_short_yields_what_it_has() -> None:
    assert list(forgets_in(b"\2\0\0\0\0\0\0\0" + b"\1".ljust(8, b"\0") * 2)) == [(1, 1)]


@needs_native
async def test_a_drop_that_wakes_a_task_ends_the_wait(twins: Twins, nursery: trio.Nursery) -> None:
    node = await twins.found(b"a")
    side = twins.sides[0]
    dropped = trio.Event()
    side.table.on_drop(lambda _: dropped.set())
    nursery.start_soon(dropped.wait)
    await trio.testing.wait_all_tasks_blocked()
    await side.forget_one(node, 1)
    began = time.perf_counter()
    assert side.native.receive(30) is None
    assert time.perf_counter() - began < 15


# -- the least recently used ------------------------------------------------------------------------


@needs_native
async def test_what_the_channel_used_is_not_parked_first(twins: Twins) -> None:
    a, b = await twins.found(b"a"), await twins.found(b"b")
    await twins.both("lookup", ROOT, b"a")
    for side in twins.sides:
        side.table.shrink(1)
    assert [inode.fd >= 0 for inode in twins.inodes(a)] == [True, True]
    assert [inode.fd >= 0 for inode in twins.inodes(b)] == [False, False]


@needs_native
async def test_all_may_have_been_used_when_some_must_be_parked(twins: Twins) -> None:
    a = await twins.found(b"a")
    await twins.both("lookup", ROOT, b"a")
    for side in twins.sides:
        side.table.shrink(0)
    assert [inode.fd for inode in twins.inodes(a)] == [-1, -1]


@needs_native
async def test_what_the_channel_used_is_not_forgotten_first(twins: Twins) -> None:
    await twins.found(b"a")
    await twins.found(b"b")
    await twins.both("lookup", ROOT, b"a")
    table = twins.sides[0].table
    table.max_inodes = 1
    assert table.forgettable(1000) == [(ROOT, b"b")]
    assert set(table.forgettable(1000)) == {(ROOT, b"a"), (ROOT, b"b")}


# -- any sequence ------------------------------------------------------------------------------------

NAMES = (b"a", b"b", b"link", b"dir", b"none")

names = st.sampled_from(NAMES)
steps = st.one_of(
    st.tuples(st.just("lookup"), names),
    st.tuples(st.just("lookup"), names),
    st.tuples(st.just("getattr"), names),
    st.tuples(st.just("getattr"), names),
    st.tuples(st.just("lookup_below"), st.sampled_from([b"x", b"a"])),
    st.tuples(st.just("readlink"), names),
    st.tuples(st.just("getxattr"), names),
    st.tuples(st.just("forget"), names),
    st.tuples(st.just("open"), names),
    st.tuples(st.sampled_from(["release", "park", "deliver", "wait"]), st.just(b"")),
    st.tuples(st.sampled_from(["list", "expire"]), names),
    st.tuples(st.just("invalidate"), names),
    st.tuples(st.sampled_from(["write", "chmod", "unlink", "replace", "link", "move"]), names),
)


@needs_native
@pytest.mark.parametrize(
    ("mode", "watch"),
    [
        (Coherency.OPEN, None),
        (Coherency.NONE, None),
        (Coherency.WATCH, Watch(announces_all=True)),
        (Coherency.WATCH, Watch(announces_all=False)),
    ],
    ids=["open", "none", "watch", "watch some"],
)
def test_any_sequence_has_the_replies_and_the_state_of_python(
    mode: Coherency, watch: Watch | None
) -> None:
    served = 0

    @settings(max_examples=150, deadline=None)
    @given(st.lists(steps, min_size=5, max_size=40))
    def check(sequence: list[tuple[str, bytes]]) -> None:
        nonlocal served
        served += trio.run(run_sequence, sequence, mode, watch)

    with pytest.MonkeyPatch.context() as patched:
        clock = SimpleNamespace(now=10**18)
        clock.time_ns = lambda: clock.now
        patched.setattr(handles, "time", clock)
        CLOCKS.append(clock)
        try:
            check()
        finally:
            CLOCKS.pop()
    assert served > 200


CLOCKS: list[SimpleNamespace] = []


async def run_sequence(sequence: list[tuple[str, bytes]], mode: Coherency, watch: Watch | None) -> int:
    """Run the steps, and return how many requests the channel served."""
    with tempfile.TemporaryDirectory() as path:
        async with twins_over(Path(path), mode, watch) as twins:
            for step, name in sequence:
                await run_step(twins, step, name)
            return twins.natively


async def run_step(twins: Twins, step: str, name: bytes) -> None:
    path = twins.source / os.fsdecode(name)
    node = node_at(twins, name)
    if step == "lookup":
        await twins.both("lookup", ROOT, name)
    elif step == "lookup_below":
        if (directory := node_at(twins, b"dir")) and twins.inodes(directory)[0].is_dir:
            await twins.both("lookup", directory, name)
    elif step == "getattr":
        await twins.both("getattr", node or ROOT)
    elif step == "readlink" and node:
        await twins.both("readlink", node)
    elif step == "getxattr" and node:
        await twins.both("getxattr", node, ACL if len(name) == 1 else CAPABILITY)
    elif step == "forget" and node:
        await twins.both("forget_one", node, 1)
    elif step == "open" and node and twins.inodes(node)[0].kind == 0o100000:
        await twins.both("open", node)
    elif step == "release":
        await twins.both("release")
    elif step in ("park", "list", "expire"):
        twins.on_both(step, *([] if step == "park" else [name]))
    elif step == "invalidate":
        twins.on_both(step, node or ROOT)
    elif step == "deliver":
        twins.deliver()
    elif step == "wait":
        CLOCKS[-1].now += 10**12
    else:
        change_source(step, path)


def node_at(twins: Twins, name: bytes) -> int:
    """Return the node that was found last by a name in the root; 0 if none was."""
    nodes = [
        inode.node
        for inode in twins.sides[1].table.all()
        if inode.name == name and inode.nlookup > 0 and inode.node != ROOT
    ]
    return nodes[0] if nodes else 0


def change_source(change: str, path: Path) -> None:
    with contextlib.suppress(OSError):
        if change == "write":
            with path.open("a") as file:
                file.write("more")
        elif change == "chmod":
            path.chmod(0o600 if path.stat().st_mode & 0o77 else 0o644)
        elif change == "unlink":
            path.unlink()
        elif change == "replace":
            new = path.with_name("new")
            new.write_text("new")
            new.replace(path)
        elif change == "link":
            path.hardlink_to(path.parent / "b")
        elif change == "move":
            path.rename(path.parent / "dir" / "a")
