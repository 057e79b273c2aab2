"""Test the attributes that the channel sets, beside what Python does."""

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from cleanfs.fuse.protocol import FUSE_SETATTR_IN as SETATTR_IN
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.kernel_view import UNSURE
from tests.fs.name_rig import (
    SETATTR,
    VALID,
    NameTwins,
    as_root,
    node_of,
    set_attributes,
    twins_in,
)
from tests.fs.twins import needs_native

pytestmark = [needs_native, as_root]

NOW = 128 | 256
"""FATTR_ATIME_NOW and FATTR_MTIME_NOW, in ``valid``."""
KILL_SUIDGID = 1 << 11


@pytest.fixture(params=[Coherency.OPEN, Coherency.NONE])
async def twins(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[NameTwins]:
    """Serve sources whose file ``a`` was opened once."""
    async with twins_in(tmp_path, request.param) as made:
        await made.found(b"a")
        await made.opened(b"a")
        await made.released()
        for side in made.sides:
            side.notifier.deliver()
        yield made


only_open = pytest.mark.parametrize("twins", [Coherency.OPEN], indirect=True)
"""For rules that do not hold with ``--coherency none``."""


@pytest.mark.parametrize(
    "new",
    [
        {"mode": 0o100600},
        {"mode": 0o104755},
        {"owner": 1, "group": 2},
        {"owner": 0, "valid": KILL_SUIDGID},
        {"group": 3, "mode": 0o100640},
        {"atime": 10**17 + 1, "mtime": 10**17 + 2},
        {"mtime": 10**17},
        {"atime": 0, "mtime": 0, "valid": NOW},
    ],
)
async def test_attributes_are_set(twins: NameTwins, new: dict[str, int]) -> None:
    assert await twins.is_set(b"a", **new)
    assert await twins.is_set(b"a", **new)


async def test_attributes_of_a_directory_are_set(twins: NameTwins) -> None:
    await twins.found(b"dir")
    assert await twins.is_set(b"dir", mode=0o40700, mtime=10**17)


async def test_attributes_of_an_open_file_are_set(twins: NameTwins) -> None:
    await twins.opened(b"a", os.O_RDWR)
    for side in twins.sides:
        side.notifier.deliver()
    assert await twins.is_set(b"a", mode=0o100600)


async def is_left(twins: NameTwins, name: bytes = b"a", **new: int) -> bool:
    """Tell whether the channel leaves a SETATTR to Python, and does nothing."""
    twins.trust()
    side = twins.sides[0]
    natively, before = side.natively, os.lstat(name, dir_fd=side.table.root.fd)
    served = []
    send = side.served

    def note(*arguments: object) -> bool:
        served.append(send(*arguments))  # type: ignore[arg-type]  # it passes them on
        raise LookupError

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(side, "served", note)
        with pytest.raises(LookupError):
            await set_attributes(side, node_of(side, name), **new)
    after = os.lstat(name, dir_fd=side.table.root.fd)
    return served == [False] and side.natively == natively and before.st_ctime_ns == after.st_ctime_ns


@pytest.mark.parametrize(
    "new",
    [
        {"size": 0},
        {"size": 0, "mode": 0o100600},
        {},
        {"valid": KILL_SUIDGID},
        {"mode": 0o100600, "uid": 1},
        {"mode": 0o100600, "valid": 1 << 20},
    ],
)
async def test_what_python_must_decide_is_left_to_it(twins: NameTwins, new: dict[str, int]) -> None:
    assert await is_left(twins, b"a", **new)


async def test_a_file_without_a_record_is_left_to_python(twins: NameTwins) -> None:
    await twins.found(b"b")
    assert await is_left(twins, b"b", mode=0o100600)


async def test_a_file_that_is_distrusted_or_being_changed_is_left_to_python(twins: NameTwins) -> None:
    side = twins.sides[0]
    record = side.table[node_of(side, b"a")].record
    assert record is not None
    record.mutations = 1
    assert await is_left(twins, mode=0o100600)
    record.mutations = 0
    side.services.coherency.distrust(record)
    assert await is_left(twins, mode=0o100600)


@only_open
async def test_a_file_that_others_changed_is_left_to_python(twins: NameTwins) -> None:
    for side in twins.sides:
        (side.source / "a").write_text("longer")
    assert await is_left(twins, mode=0o100600)
    assert not await twins.is_set(b"a", mode=0o100600)


@only_open
async def test_a_stale_name_is_left_to_python(twins: NameTwins) -> None:
    for side in twins.sides:
        (side.source / "a").rename(side.source / "moved")
        record = side.table[node_of(side, b"moved")].record
        assert record is not None
        now = (side.source / "moved").stat()
        record.stamps = now.st_size, now.st_mtime_ns, now.st_ctime_ns
    assert await is_left(twins, b"moved", mode=0o100600)
    assert await twins.is_set(b"moved", mtime=10**17)


@only_open
async def test_an_open_file_is_not_named_by_its_name(twins: NameTwins) -> None:
    await twins.opened(b"a")
    for side in twins.sides:
        side.notifier.deliver()
        (side.source / "a").rename(side.source / "moved")
        record = side.table[node_of(side, b"moved")].record
        assert record is not None
        now = (side.source / "moved").stat()
        record.stamps = now.st_size, now.st_mtime_ns, now.st_ctime_ns
    assert await twins.is_set(b"moved", mode=0o100600)


@only_open
async def test_a_thread_that_was_refused_is_left_to_python(twins: NameTwins) -> None:
    twins.sides[0].table.states.refuse(77)
    assert await is_left(twins, mode=0o100600)


async def test_calls_that_wait_are_left_to_python(
    twins: NameTwins, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twins, "trust", lambda: None)
    twins.sides[0].services.source_fs(twins.sides[0].table.root).names.inline = False
    assert await is_left(twins, mode=0o100600)


async def test_a_call_that_fails_is_left_to_python(twins: NameTwins) -> None:
    twins.trust()
    side = twins.sides[0]
    body = SETATTR_IN.pack(VALID["mtime"], *[0] * 8, 2 * 10**9, *[0] * 6)  # ns
    assert not side.served(SETATTR, node_of(side, b"a"), body)


async def test_a_refused_reply_makes_the_kernel_look_again(twins: NameTwins) -> None:
    side = twins.sides[0]
    inode = side.table[node_of(side, b"a")]
    doubts = inode.kernel.doubts
    side.fs._change_refused(inode.node, 5, 7, 9)  # noqa: SLF001  # what the channel calls
    assert side.notifier.is_pending(inode.node)
    assert (inode.kernel.size, inode.kernel.access) == (5, UNSURE)
    assert inode.kernel.doubts == doubts + 1


new_values = st.fixed_dictionaries(
    {},
    optional={
        "mode": st.sampled_from([0o100600, 0o100644, 0o104755]),
        "owner": st.sampled_from([0, 1]),
        "group": st.sampled_from([0, 1]),
        "mtime": st.sampled_from([0, 10**17]),
        "atime": st.just(10**16),
    },
)
steps = st.one_of(
    *[st.tuples(st.just("set"), st.sampled_from([b"a", b"b", b"dir"]), new_values)] * 3,
    st.tuples(
        st.sampled_from(["open", "release", "write", "deliver"]),
        st.sampled_from([b"a", b"b"]),
        st.just({}),
    ),
)


@pytest.mark.parametrize("mode", [Coherency.OPEN, Coherency.NONE])
def test_any_sequence_has_the_replies_and_the_state_of_python(
    tmp_path_factory: pytest.TempPathFactory, mode: Coherency
) -> None:
    served = 0

    @settings(max_examples=60, deadline=None)
    @given(st.lists(steps, min_size=5, max_size=25))
    def check(sequence: list[tuple[str, bytes, dict[str, int]]]) -> None:
        nonlocal served
        served += trio.run(run_sequence, tmp_path_factory.mktemp("twins"), sequence, mode)

    check()
    assert served > 50


async def run_sequence(
    path: Path, sequence: list[tuple[str, bytes, dict[str, int]]], mode: Coherency
) -> int:
    """Run the steps, and return how many requests the channel served."""
    async with twins_in(path, mode) as twins:
        for name in (b"a", b"b", b"dir"):
            await twins.found(name)
        for step, name, new in sequence:
            if step in ("set", "write"):
                twins.pass_tick()
            if step == "set":
                await twins.set(name, **new)
            elif step == "open":
                await twins.opened(name)
            elif step == "release":
                await twins.released()
            for side in twins.sides:
                if step == "write":
                    with (side.source / os.fsdecode(name)).open("ab") as file:
                        file.write(b"more")
                elif step == "deliver":
                    side.notifier.deliver()
            twins.compare()
        return twins.natively
