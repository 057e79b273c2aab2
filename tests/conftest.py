"""Settings of all tests."""

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

from tests import machine

# A test run leaves nothing behind, whoever it runs as: no examples, no directory in the checkout.
# And none fails because the machine had other things to do.
settings.register_profile(
    "cleanfs", database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("cleanfs")
home = tempfile.mkdtemp(prefix="cleanfs-hypothesis-")
atexit.register(shutil.rmtree, home, ignore_errors=True)
set_hypothesis_home_dir(home)

CHECK_SECONDS = 30.0
"""How often a test that takes long is looked at."""

WAITS = "waits that ran out"


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Generator[None, Any, Any]:  # noqa: ANN401  # the plugin's
    """A test's own time limit, which a slow machine stretches as any other (``machine``).

    A handler of Python's runs only where the main thread does: one that hangs in a system call does
    not get more time from those who watch it.
    """
    result = yield
    if settings.method != "signal":
        return result
    ends = signal.getsignal(signal.SIGALRM)
    assert callable(ends)
    deadline = machine.Deadline(settings.timeout)

    def look(number: int, frame: Any) -> None:  # noqa: ANN401  # a frame, of which Python has no public type
        if deadline.over():
            ends(number, frame)
            return
        for tell in machine.more_time:
            tell()
        look_again()

    def look_again() -> None:
        signal.setitimer(signal.ITIMER_REAL, min(CHECK_SECONDS, max(deadline.left(), 0.1)))

    signal.signal(signal.SIGALRM, look)
    look_again()
    return result


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of pytest-xdist hands on what its tests waited for."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[WAITS] = machine.ran_out


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:  # noqa: ANN401  # pytest-xdist's
    """A worker has ended, perhaps before it could hand on anything."""
    machine.ran_out.extend(getattr(node, "workeroutput", {}).get(WAITS, []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say so if the machine was too busy for the tests' time limits."""
    if machine.ran_out:
        terminalreporter.write_line(
            f"machine busy: {len(machine.ran_out)} waits ran out and were given more time, "
            f"up to {max(machine.ran_out):.0f} times as much (load {os.getloadavg()[0]:.0f})"
        )
