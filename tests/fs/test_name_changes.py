"""Test the files that the channel creates and removes, beside what Python does."""

import contextlib
import errno
import os
import stat as stat_module
import struct
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from pyfuse3 import InodeT

from cleanfs.fs.control import CONTROL_NAME
from cleanfs.fuse.protocol import FUSE_CREATE_IN as CREATE_IN
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.node_ids import ROOT
from tests.fs.metadata_rig import (
    THREAD,
    Side,
)
from tests.fs.name_rig import CREATE, UNLINK, NameTwins, as_root, node_of, twins_in
from tests.fs.twins import needs_native

pytestmark = needs_native


@pytest.fixture(params=[Coherency.OPEN, Coherency.NONE])
async def twins(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[NameTwins]:
    async with twins_in(tmp_path, request.param) as made:
        yield made


DEFAULT_ACL = struct.pack(
    "=I" + "HHI" * 3, 2, *(1, 6, 0xFFFFFFFF), *(4, 6, 0xFFFFFFFF), *(32, 4, 0xFFFFFFFF)
)
"""rw- for owner and group, r-- for others (linux/posix_acl_xattr.h)."""


@as_root
async def test_a_name_is_removed(twins: NameTwins) -> None:
    await twins.found(b"a")
    assert await twins.is_unlinked(b"a")
    assert not (twins.sides[0].source / "a").exists()


@as_root
async def test_the_record_of_a_file_goes_with_its_last_name(twins: NameTwins) -> None:
    await twins.found(b"a")
    await twins.opened(b"a")
    await twins.released()
    assert len(twins.sides[0].services.pagecache.files()) == 1
    assert await twins.is_unlinked(b"a")
    assert not twins.sides[0].services.pagecache.files()


@as_root
async def test_the_record_of_a_file_whose_inode_is_new_goes_too(twins: NameTwins) -> None:
    await twins.found(b"a")
    await twins.opened(b"a")
    await twins.released()
    for side in twins.sides:
        await side.fs.forget([(InodeT(node_of(side, b"a")), 1)])
        assert len(side.table) == 1
    await twins.found(b"a")
    assert await twins.is_unlinked(b"a")
    assert not twins.sides[0].services.pagecache.files()


@as_root
async def test_a_file_that_is_open_stays(twins: NameTwins) -> None:
    await twins.found(b"a")
    await twins.opened(b"a")
    assert await twins.is_unlinked(b"a")
    assert [await side.read() for side in twins.sides] == [b"a", b"a"]
    await twins.released()
    twins.compare()


@as_root
async def test_a_file_with_another_name_keeps_its_record(twins: NameTwins) -> None:
    for side in twins.sides:
        (side.source / "link").hardlink_to(side.source / "a")
    await twins.found(b"a")
    await twins.opened(b"a")
    await twins.released()
    assert await twins.is_unlinked(b"a")
    assert len(twins.sides[0].services.pagecache.files()) == 1


@as_root
async def test_a_name_in_a_directory_is_removed(twins: NameTwins) -> None:
    await twins.found(b"dir")
    await twins.found(b"x", b"dir")
    assert await twins.is_unlinked(b"x", b"dir")


async def is_left(twins: NameTwins, name: bytes, uid: int = 0) -> bool:
    """Tell whether the channel leaves an unlink to Python, and does nothing."""
    twins.trust()
    side = twins.sides[0]
    before = sorted(os.listdir(side.source))
    served = side.served(UNLINK, ROOT, name + b"\0", THREAD, uid)
    return not served and sorted(os.listdir(side.source)) == before


async def test_a_name_of_another_user_is_left_to_python(twins: NameTwins) -> None:
    await twins.found(b"a")
    assert await is_left(twins, b"a", uid=os.geteuid() + 1)


@as_root
@pytest.mark.parametrize("name", [b"none", b"dir", b".", b"..", b"", b"dir/x"])
async def test_a_name_that_is_none_of_a_file_is_left_to_python(twins: NameTwins, name: bytes) -> None:
    await twins.found(b"dir")
    assert await is_left(twins, name)


@as_root
async def test_a_name_that_the_kernel_does_not_know_is_left_to_python(twins: NameTwins) -> None:
    assert await is_left(twins, b"a")


@as_root
async def test_the_control_directory_s_name_is_left_to_python(twins: NameTwins) -> None:
    for side in twins.sides:
        (side.source / os.fsdecode(CONTROL_NAME)).write_text("hidden")
        st = os.lstat(CONTROL_NAME, dir_fd=side.table.root.fd)
        side.table.referenced(
            side.table.listed(st, side.table.root, CONTROL_NAME), st, side.table.root, CONTROL_NAME
        )
        inode = side.table[st.st_ino]
        fd = os.open(CONTROL_NAME, os.O_PATH, dir_fd=side.table.root.fd)
        side.table.unpark(inode, fd, st.st_ino)
    assert await is_left(twins, CONTROL_NAME)


@as_root
async def test_an_inode_that_is_parked_is_left_to_python(twins: NameTwins) -> None:
    await twins.found(b"a")
    for side in twins.sides:
        side.park()
        assert side.table[node_of(side, b"a")].fd == -1
    assert await is_left(twins, b"a")


@as_root
async def test_calls_that_wait_are_left_to_python(twins: NameTwins) -> None:
    await twins.found(b"a")
    side = twins.sides[0]
    twins.trust()
    side.services.source_fs(side.table.root).names.inline = False
    assert not side.served(UNLINK, ROOT, b"a\0")
    twins.trust()
    side.services.source_fs(side.table.root).names.returned_at = 0
    assert not side.served(UNLINK, ROOT, b"a\0")
    twins.trust()
    assert side.served(UNLINK, ROOT, b"a\0")


@as_root
async def test_a_refused_reply_makes_the_kernel_look_again(twins: NameTwins) -> None:
    await twins.found(b"a")
    side = twins.sides[0]
    inode = side.table[node_of(side, b"a")]
    doubts = inode.kernel.doubts
    side.fs._unlink_refused(ROOT, b"a", inode.node)  # noqa: SLF001  # what the channel calls
    assert side.notifier._queued == {inode.node, (ROOT, b"a"), ROOT}  # noqa: SLF001  # no public access
    assert inode.kernel.doubts == doubts + 1


@as_root
@pytest.mark.parametrize("flags", [os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_EXCL])
async def test_a_file_is_created(twins: NameTwins, flags: int) -> None:
    assert await twins.is_created(b"new", flags=flags)
    assert [side.fs.open_files for side in twins.sides] == [1, 1]
    await twins.released()
    twins.compare()
    assert await twins.is_unlinked(b"new")


@as_root
async def test_a_file_is_created_in_a_directory(twins: NameTwins) -> None:
    await twins.found(b"dir")
    assert await twins.is_created(b"new", b"dir")


@as_root
async def test_the_umask_applies_unless_there_is_a_default_acl(twins: NameTwins) -> None:
    assert await twins.is_created(b"new", mode=0o100666, umask=0o27)
    assert stat_module.S_IMODE((twins.sides[0].source / "new").stat().st_mode) == 0o640
    for side in twins.sides:
        os.setxattr(side.source, "system.posix_acl_default", DEFAULT_ACL)
    assert await twins.is_created(b"other", mode=0o100666, umask=0o27)
    assert stat_module.S_IMODE((twins.sides[0].source / "other").stat().st_mode) == 0o664


async def is_creation_left(twins: NameTwins, name: bytes = b"new", **arguments: int) -> bool:
    """Tell whether the channel leaves a creation to Python, and does nothing."""
    twins.trust()
    side = twins.sides[0]
    before, natively = sorted(os.listdir(side.source)), side.natively
    fields = {"flags": os.O_WRONLY, "mode": 0o100644, "umask": 0} | arguments
    uid = fields.pop("uid", 0)
    body = CREATE_IN.pack(fields["flags"], fields["mode"], fields["umask"], 0) + name + b"\0"
    served = side.served(CREATE, ROOT, body, THREAD, uid)
    assert side.natively == natively + served
    return not served and sorted(os.listdir(side.source)) == before


@as_root
@pytest.mark.parametrize("name", [b"a", b".", b"..", b"", b"dir/new", CONTROL_NAME])
async def test_a_creation_by_a_name_that_is_taken_is_left_to_python(
    twins: NameTwins, name: bytes
) -> None:
    assert await is_creation_left(twins, name)


async def test_a_creation_by_another_user_is_left_to_python(twins: NameTwins) -> None:
    assert await is_creation_left(twins, uid=os.geteuid() + 1)


@as_root
@pytest.mark.parametrize("bit", [stat_module.S_ISUID, stat_module.S_ISGID, stat_module.S_ISVTX])
async def test_a_creation_with_special_bits_is_left_to_python(twins: NameTwins, bit: int) -> None:
    assert await is_creation_left(twins, mode=0o100644 | bit)


@as_root
async def test_a_creation_is_left_to_python_where_a_rule_holds_it_back(twins: NameTwins) -> None:
    side = twins.sides[0]
    states = side.table.states
    for name, value in (("writeback", True), ("can_act", False), ("fd_budget", 0)):
        before = getattr(states, name)
        setattr(states, name, value)
        assert await is_creation_left(twins), name
        setattr(states, name, before)
    side.table.max_inodes = 0
    assert await is_creation_left(twins)
    side.table.max_inodes = 100
    assert await twins.is_created(b"new")


@as_root
async def test_a_refused_creation_is_undone(twins: NameTwins) -> None:
    assert await twins.is_created(b"new")
    side = twins.sides[0]
    node = side.fhs[0][0]
    side.fs._create_refused(node)  # noqa: SLF001  # what the channel calls
    queued = side.notifier._queued  # noqa: SLF001  # no public access
    assert {node, ROOT} < queued
    assert side.table[node].nlookup == 0


# -- any sequence ------------------------------------------------------------------------------------

NAMES = (b"a", b"b", b"c", b"dir")
names = st.sampled_from(NAMES)
STEPS = (
    *("find", "find", "create", "create", "unlink", "unlink", "unlink", "other", "open", "release"),
    *("write", "link", "replace", "forget", "park", "deliver"),
)
steps = st.tuples(
    st.sampled_from(
        [
            "find",
            "find",
            "create",
            "create",
            "unlink",
            "unlink",
            "unlink",
            "other",
            "open",
            "release",
            "write",
            "link",
            "replace",
            "forget",
            "park",
            "deliver",
        ]
    ),
    names,
    names,
)


@as_root
@pytest.mark.parametrize("mode", [Coherency.OPEN, Coherency.NONE])
def test_any_sequence_has_the_replies_and_the_state_of_python(mode: Coherency) -> None:
    served = 0

    @settings(max_examples=100, deadline=None)
    @given(st.lists(steps, min_size=5, max_size=30))
    def check(sequence: list[tuple[str, bytes, bytes]]) -> None:
        nonlocal served
        served += trio.run(run_sequence, sequence, mode)

    check()
    assert served > 30


async def run_sequence(sequence: list[tuple[str, bytes, bytes]], mode: Coherency) -> int:
    """Run the steps, and return how many requests the channel served."""
    with tempfile.TemporaryDirectory() as path:
        async with twins_in(Path(path), mode) as twins:
            for step, name, other in [("find", b"a", b""), ("find", b"b", b""), *sequence]:
                twins.keep_numbers()
                await run_step(twins, step, name, other)
                twins.compare()
            return twins.natively


async def run_step(twins: NameTwins, step: str, name: bytes, other: bytes) -> None:
    if step in ("unlink", "other", "create", "write", "link", "replace"):
        twins.pass_tick()
    twins.trust()
    if step in ("unlink", "other"):
        await twins.unlink(name, uid=0 if step == "unlink" else 1)
        return
    if step == "create":
        await twins.create(name, umask=0o22, mode=0o100666)
        return
    outcomes = []
    for side in twins.sides:
        with contextlib.suppress(OSError):
            outcomes.append(await change(side, step, name, other))
    assert len(outcomes) in (0, 2)
    assert outcomes[:1] == outcomes[1:]


async def change(side: Side, step: str, name: bytes, other: bytes) -> object:
    path = side.source / os.fsdecode(name)
    if step == "find":
        return await side.lookup(ROOT, name) == -errno.ENOENT
    if step == "open" and path.is_file() and side.table.get(node_of(side, name)) is not None:
        return await side.open(node_of(side, name))
    if step == "release":
        await side.release()
    elif step == "write":
        with path.open("ab") as file:
            file.write(b"more")
    elif step == "link":
        path.hardlink_to(side.source / os.fsdecode(other))
    elif step == "replace":
        path.replace(side.source / os.fsdecode(other))
    elif step == "forget" and path.exists() and side.table.get(node_of(side, name)) is not None:
        await side.forget_one(node_of(side, name), 1)
    elif step == "park":
        side.park()
    elif step == "deliver":
        side.notifier.deliver()
    return None
