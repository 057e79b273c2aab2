"""Test the calls of a thread after a name that it had looked up led to another file."""

from types import SimpleNamespace
from typing import cast

import pytest
from pyfuse3 import RequestContext
from trio.testing import MockClock

from cleanfs.source.errors import StaleError
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inode_state import InodeStates
from cleanfs.vfs.stale_names import AGAIN_SECONDS, MAX_REFUSED, StaleNames
from cleanfs.vfs.tree import Tree


class Replaced:
    """Simulates a tree in which each name leads to another file when it is compared with the source."""

    services = SimpleNamespace(coherency=SimpleNamespace(mode=Coherency.OPEN))
    inodes = SimpleNamespace(states=InodeStates())

    async def is_named(self, inode: Inode) -> bool:
        return False


A, B, C = (cast(Inode, SimpleNamespace(node=node)) for node in (2, 3, 4))
SELF, OTHER = (cast(RequestContext, SimpleNamespace(pid=pid)) for pid in (10, 11))


@pytest.fixture
def names() -> StaleNames:
    return StaleNames(cast(Tree, Replaced()))


async def refused(names: StaleNames, inode: Inode, *, is_stat: bool = False) -> None:
    with pytest.raises(StaleError):
        await names.check(inode, SELF, is_stat=is_stat)


def looks_up(names: StaleNames, inode: Inode | None) -> None:
    names.looking_up(SELF)
    if inode is not None:
        names.found(inode, SELF)


async def test_the_inode_that_was_found_is_served_once(names: StaleNames) -> None:
    await refused(names, A)
    looks_up(names, B)
    await names.check(B, SELF)
    await refused(names, B)


async def test_a_call_without_a_lookup_uses_an_fd(names: StaleNames) -> None:
    await refused(names, A)
    await names.check(A, SELF)
    await refused(names, A)


async def test_a_call_after_a_lookup_does_not_use_an_fd(names: StaleNames) -> None:
    await refused(names, A)
    looks_up(names, None)
    await refused(names, A)


async def test_a_getattr_within_an_open_can_be_the_refused_call(names: StaleNames) -> None:
    await refused(names, A, is_stat=True)
    looks_up(names, B)
    await names.check(B, SELF, is_stat=True)
    await names.check(B, SELF)


async def test_the_lookup_of_a_second_name_keeps_the_found_inode(names: StaleNames) -> None:
    await refused(names, A)
    looks_up(names, B)
    looks_up(names, None)
    await names.check(B, SELF)


async def test_only_the_last_inode_found_counts(names: StaleNames) -> None:
    await refused(names, A)
    looks_up(names, B)
    looks_up(names, C)
    await refused(names, B)


async def test_an_inode_found_by_another_thread_does_not_count(names: StaleNames) -> None:
    await refused(names, A)
    names.looking_up(OTHER)
    names.found(B, OTHER)
    await refused(names, B)


async def test_a_late_lookup_belongs_to_another_call(names: StaleNames, mock_clock: MockClock) -> None:
    await refused(names, A)
    mock_clock.jump(AGAIN_SECONDS)
    looks_up(names, B)
    await refused(names, B)


async def test_threads_that_do_not_retry_are_forgotten(names: StaleNames) -> None:
    await refused(names, A)
    for pid in range(1000, 1000 + MAX_REFUSED):
        with pytest.raises(StaleError):
            await names.check(A, cast(RequestContext, SimpleNamespace(pid=pid)))
    await refused(names, A)
