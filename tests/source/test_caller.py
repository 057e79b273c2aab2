"""Who a request is from."""

import os

import pyfuse3
import pytest

from cleanfs.source.caller import Caller


def test_the_own_group_and_further_ones_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pyfuse3, "get_sup_groups", lambda pid: {7, 8} if pid == 99 else set())
    someone = Caller(1, 2, 99)
    assert someone.in_group(2)
    assert someone.in_group(7)
    assert not someone.in_group(3)


@pytest.mark.parametrize("pid", [0, -1, (1 << 31) - 1])
def test_who_is_gone_is_in_no_further_group(pid: int) -> None:
    assert not Caller(1, 2, pid).in_group(3)
    assert Caller(1, 2, pid).in_group(2)


def test_the_groups_of_a_process_that_lives_are_found() -> None:
    for group in os.getgroups():
        assert Caller(1, -2, os.getpid()).in_group(group)
