"""Test that time limits are extended on a slow machine and kept on an idle one."""

import time
from collections.abc import Iterator

import pytest

from tests.harness import machine
from tests.harness.machine import Deadline


class Machine:
    """Simulates a clock and the slowness of the machine."""

    now = 100.0
    slowness = 1.0


@pytest.fixture
def simulated(monkeypatch: pytest.MonkeyPatch) -> Iterator[Machine]:
    simulated = Machine()
    monkeypatch.setattr(time, "monotonic", lambda: simulated.now)
    monkeypatch.setattr(machine, "slowness", lambda: simulated.slowness)
    monkeypatch.setattr(machine, "ran_out", [])
    yield simulated
    monkeypatch.undo()


def test_an_idle_machine_gets_the_limit(simulated: Machine) -> None:
    deadline = Deadline(10)
    simulated.now += 9
    assert (deadline.left(), deadline.over()) == (1, False)
    simulated.now += 1
    assert (deadline.left(), deadline.over()) == (0, True)
    assert machine.ran_out == []


def test_a_slow_machine_gets_more_time_in_proportion_and_is_counted_once(
    simulated: Machine,
) -> None:
    deadline = Deadline(10)
    simulated.now, simulated.slowness = simulated.now + 10, 3
    assert not deadline.over()
    assert deadline.left() == 20
    simulated.now, simulated.slowness = simulated.now + 20, 4
    assert not deadline.over()
    assert deadline.left() == 10
    simulated.now, simulated.slowness = simulated.now + 10, 2
    assert deadline.over()
    assert machine.ran_out == [3]


def test_time_spent_while_the_machine_was_slow_counts(simulated: Machine) -> None:
    deadline = Deadline(10)
    simulated.now, simulated.slowness = simulated.now + 50, 3
    assert deadline.over()


def test_slowness_is_within_its_bounds() -> None:
    assert 1 <= machine.slowness() <= machine.MOST
