"""Test the names that the channel removes, beside what Python does, over two equal sources."""

import contextlib
import errno
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from pyfuse3 import FileNameT, FlagT, InodeT

from cleanfs.fs.control import CONTROL_NAME
from cleanfs.vfs import handles
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.node_ids import ROOT
from tests.fs.metadata_rig import O_LARGEFILE, THREAD, Side, context, errors
from tests.fs.twins import needs_native
from tests.harness.kernel import Device

pytestmark = needs_native

UNLINK = 10


class NameTwins:
    """Makes each request to both file systems, and compares replies and what is known afterwards."""

    def __init__(self, path: Path, mode: Coherency) -> None:
        self.device = Device()
        self.sides: list[Side] = []
        for name, device in (("natively", self.device), ("by python", None)):
            source = path / name
            (source / "dir").mkdir(parents=True)
            for file in ("a", "b", "dir/x"):
                (source / file).write_text(file)
            self.sides.append(Side(source, mode, device))

    @property
    def natively(self) -> int:
        """Count the requests that the channel served."""
        return self.sides[0].natively

    def trust(self) -> None:
        """Have calls on names made inline, as after some fast ones."""
        for side in self.sides:
            fs = side.services.source_fs(side.table.root)
            fs.names.inline = True
            fs.names.returned()

    async def found(self, name: bytes, parent: bytes = b"") -> None:
        for side in self.sides:
            await side.fs.lookup(InodeT(node_of(side, parent)), FileNameT(name), context(THREAD))

    async def opened(self, name: bytes, flags: int = os.O_RDONLY) -> None:
        for side in self.sides:
            await side.open(node_of(side, name), flags)

    async def released(self) -> None:
        for side in self.sides:
            await side.release()

    async def unlink(self, name: bytes, parent: bytes = b"", uid: int = 0) -> int:
        """Remove a name. Return 0 or the negative errno, which both must have."""
        self.trust()
        first, second = [await unlink(side, node_of(side, parent), name, uid) for side in self.sides]
        assert first == second
        self.compare()
        return first

    async def is_unlinked(self, name: bytes, parent: bytes = b"", uid: int = 0) -> bool:
        """Remove a name. Return whether the channel did it."""
        before = self.natively
        assert await self.unlink(name, parent, uid) == 0
        return self.natively > before

    def compare(self) -> None:
        first, second = map(state_of, self.sides)
        assert first == second

    async def close(self) -> None:
        for side in self.sides:
            await side.close()
        self.device.close()


def node_of(side: Side, name: bytes) -> int:
    """Return the node of a file by its name in the source's root, which is that of b""."""
    return os.lstat(name, dir_fd=side.table.root.fd).st_ino if name else ROOT


async def unlink(side: Side, parent: int, name: bytes, uid: int) -> int:
    if side.served(UNLINK, parent, name + b"\0", THREAD, uid):
        assert side.device is not None
        [(_, error, _)] = side.device.replies()
        return error
    with errors() as error_of:
        requester = context(THREAD, uid)
        requester.gid = os.getegid()  # type: ignore[misc]  # it is no pyfuse3's
        await side.fs.unlink(InodeT(parent), FileNameT(name), requester)
        return 0
    return error_of[0]


def state_of(side: Side) -> object:
    """Return what is known of all files, without their numbers."""
    inodes = []
    for inode in side.table.all():
        record, file_key = inode.record, inode.file_key
        now = os.fstat(inode.fd) if inode.fd >= 0 else None
        stamps = None if now is None else (now.st_size, now.st_mtime_ns, now.st_ctime_ns)
        known = None if file_key is None else side.services.pagecache.known(file_key)
        inodes.append(
            (
                *(inode.nlookup, inode.name, inode.parent is None, inode.opens, inode.kernel.doubts),
                *(inode.kernel.sent == stamps, inode.kernel.size),
                *(side.services.space_retry.is_removed(inode.node), known is None),
                record is None
                or (record.forgotten, record.racy, record.stamps == stamps, record.handles),
            )
        )
    coherency = side.services.coherency
    queued = side.notifier._queued  # noqa: SLF001  # no public access
    return (
        sorted(map(repr, inodes)),
        len(queued),
        sorted(item[1] for item in queued if isinstance(item, tuple)),
        (coherency.changes_found, coherency.doubtful_flushes),
        sorted(os.listdir(side.source)),
        len(side.services.pagecache.files()),
        side.table.states.open_fds,
    )


@contextlib.asynccontextmanager
async def twins_in(path: Path, mode: Coherency) -> AsyncIterator[NameTwins]:
    twins = NameTwins(path, mode)
    try:
        yield twins
    finally:
        await twins.close()


@pytest.fixture(params=[Coherency.OPEN, Coherency.NONE])
async def twins(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[NameTwins]:
    async with twins_in(tmp_path, request.param) as made:
        yield made


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="the tests' kernel sends root's requests")


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

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(handles, "time", SimpleNamespace(time_ns=lambda: 10**20))  # nothing is racy
        check()
    assert served > 30


async def run_sequence(sequence: list[tuple[str, bytes, bytes]], mode: Coherency) -> int:
    """Run the steps, and return how many requests the channel served."""
    with tempfile.TemporaryDirectory() as path:
        async with twins_in(Path(path), mode) as twins:
            for step, name, other in [("find", b"a", b""), ("find", b"b", b""), *sequence]:
                await run_step(twins, step, name, other)
                twins.compare()
            return twins.natively


async def run_step(twins: NameTwins, step: str, name: bytes, other: bytes) -> None:
    twins.trust()
    if step in ("unlink", "other"):
        await twins.unlink(name, uid=0 if step == "unlink" else 1)
        return
    outcomes = []
    for side in twins.sides:
        with contextlib.suppress(OSError):
            outcomes.append(await change(side, step, name, other))
    assert len(outcomes) in (0, 2)
    assert outcomes[:1] == outcomes[1:]


async def change(side: Side, step: str, name: bytes, other: bytes) -> object:
    path, root = side.source / os.fsdecode(name), InodeT(ROOT)
    if step == "find":
        return await side.lookup(ROOT, name) == -errno.ENOENT
    if step == "create":
        with errors() as error_of:
            requester = context(THREAD)
            flags = FlagT(os.O_WRONLY | O_LARGEFILE)
            info, _ = await side.fs.create(root, FileNameT(name), 0o100644, flags, requester)
            side.fhs.append((node_of(side, name), info.fh))
        return error_of
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
