"""Test the requester of a request and its groups."""

import os

import pyfuse3
import pytest

from cleanfs.source.caller import Caller


def test_the_primary_and_supplementary_groups_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyfuse3, "get_sup_groups", lambda pid: {7, 8} if pid == 99 else set())
    caller = Caller(1, 2, 99)
    assert caller.in_group(2)
    assert caller.in_group(7)
    assert not caller.in_group(3)


@pytest.mark.parametrize("pid", [0, -1, (1 << 31) - 1])
def test_a_process_that_has_ended_has_no_supplementary_groups(pid: int) -> None:
    assert not Caller(1, 2, pid).in_group(3)
    assert Caller(1, 2, pid).in_group(2)


def test_the_groups_of_a_live_process_are_found() -> None:
    for group in os.getgroups():
        assert Caller(1, -2, os.getpid()).in_group(group)
