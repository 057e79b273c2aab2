"""What a thread is served whose call went by a name that led elsewhere."""

from types import SimpleNamespace
from typing import cast

import pytest
from pyfuse3 import RequestContext
from trio.testing import MockClock

from cleanfs.source.errors import StaleError
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.stale_names import AGAIN_SECONDS, MAX_REFUSED, StaleNames
from cleanfs.vfs.tree import Tree


class Replaced:
    """A tree in which each name leads elsewhere by the time that it is held against the source."""

    services = SimpleNamespace(coherency=SimpleNamespace(mode=Coherency.OPEN))

    async def is_named(self, inode: Inode) -> bool:
        return False


A, B, C = (cast(Inode, SimpleNamespace(node=node)) for node in (2, 3, 4))
ME, OTHER = (cast(RequestContext, SimpleNamespace(pid=pid)) for pid in (10, 11))


@pytest.fixture
def names() -> StaleNames:
    return StaleNames(cast(Tree, Replaced()))


async def refused(names: StaleNames, inode: Inode, *, is_stat: bool = False) -> None:
    with pytest.raises(StaleError):
        await names.check(inode, ME, is_stat=is_stat)


def looks_up(names: StaleNames, inode: Inode | None) -> None:
    names.looking_up(ME)
    if inode is not None:
        names.found(inode, ME)


async def test_what_was_found_is_served_once(names: StaleNames) -> None:
    await refused(names, A)
    looks_up(names, B)
    await names.check(B, ME)
    await refused(names, B)


async def test_a_call_without_a_lookup_is_by_a_descriptor(names: StaleNames) -> None:
    await refused(names, A)
    await names.check(A, ME)
    await refused(names, A)


async def test_a_call_after_a_lookup_is_not(names: StaleNames) -> None:
    await refused(names, A)
    looks_up(names, None)
    await refused(names, A)


async def test_a_getattr_within_an_open_may_be_what_is_refused(names: StaleNames) -> None:
    await refused(names, A, is_stat=True)
    looks_up(names, B)
    await names.check(B, ME, is_stat=True)
    await names.check(B, ME)


async def test_the_lookup_of_a_second_name_takes_nothing_away(names: StaleNames) -> None:
    await refused(names, A)
    looks_up(names, B)
    looks_up(names, None)
    await names.check(B, ME)


async def test_only_the_last_find_counts(names: StaleNames) -> None:
    await refused(names, A)
    looks_up(names, B)
    looks_up(names, C)
    await refused(names, B)


async def test_what_others_find_does_not(names: StaleNames) -> None:
    await refused(names, A)
    names.looking_up(OTHER)
    names.found(B, OTHER)
    await refused(names, B)


async def test_a_late_lookup_is_another_calls(names: StaleNames, mock_clock: MockClock) -> None:
    await refused(names, A)
    mock_clock.jump(AGAIN_SECONDS)
    looks_up(names, B)
    await refused(names, B)


async def test_threads_that_do_not_come_again_are_forgotten(names: StaleNames) -> None:
    await refused(names, A)
    for pid in range(1000, 1000 + MAX_REFUSED):
        with pytest.raises(StaleError):
            await names.check(A, cast(RequestContext, SimpleNamespace(pid=pid)))
    await refused(names, A)
