"""Time limits give a slow machine more time, and a quiet one none."""

import time
from collections.abc import Iterator

import pytest

from tests.harness import machine
from tests.harness.machine import Deadline


class Machine:
    """A clock, and how slow everything is."""

    now = 100.0
    slowness = 1.0


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    made_up = Machine()
    monkeypatch.setattr(time, "monotonic", lambda: made_up.now)
    monkeypatch.setattr(machine, "slowness", lambda: made_up.slowness)
    monkeypatch.setattr(machine, "ran_out", [])
    yield made_up
    monkeypatch.undo()


def test_a_quiet_machine_gets_what_was_said(made_up: Machine) -> None:
    deadline = Deadline(10)
    made_up.now += 9
    assert (deadline.left(), deadline.over()) == (1, False)
    made_up.now += 1
    assert (deadline.left(), deadline.over()) == (0, True)
    assert machine.ran_out == []


def test_a_slow_machine_gets_as_much_longer_as_it_is_slower_and_is_counted_once(
    made_up: Machine,
) -> None:
    deadline = Deadline(10)
    made_up.now, made_up.slowness = made_up.now + 10, 3
    assert not deadline.over()
    assert deadline.left() == 20
    made_up.now, made_up.slowness = made_up.now + 20, 4
    assert not deadline.over()
    assert deadline.left() == 10
    made_up.now, made_up.slowness = made_up.now + 10, 2
    assert deadline.over()
    assert machine.ran_out == [3]


def test_a_machine_that_was_slow_when_it_is_quiet_again_has_had_its_time(made_up: Machine) -> None:
    deadline = Deadline(10)
    made_up.now, made_up.slowness = made_up.now + 50, 3
    assert deadline.over()


def test_this_machine_is_as_slow_as_it_is() -> None:
    assert 1 <= machine.slowness() <= machine.MOST
