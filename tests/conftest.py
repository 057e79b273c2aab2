"""Settings of all tests."""

import atexit
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from _pytest.runner import runtestprotocol  # what pytest-rerunfailures uses, too
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

from cleanfs.linux.mounts import mount_points
from tests.harness import machine

# A test run leaves nothing behind, whoever it runs as: no examples, no directory in the checkout.
# And none fails because the machine had other things to do.
settings.register_profile(
    "cleanfs", database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("cleanfs")
home = tempfile.mkdtemp(prefix="cleanfs-hypothesis-")
atexit.register(shutil.rmtree, home, ignore_errors=True)
set_hypothesis_home_dir(home)

PREFIX = "cleanfs-tests-"
KEPT_SECONDS = 86400.0
"""How long the files of a run stay in which a test failed."""

if "PYTEST_XDIST_WORKER" not in os.environ:
    # A directory of this run's own: pytest closes the one that all runs of a user share to other users,
    # whenever one of them starts, and some tests let others in.
    os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.mkdtemp(prefix=PREFIX)
    os.chmod(os.environ["PYTEST_DEBUG_TEMPROOT"], 0o711)  # pytest keeps its own below closed

CHECK_SECONDS = 30.0
"""How often a test that takes long is looked at."""

MOST_ATTEMPTS = 3

STATUS = pytest.StashKey[int]()

BUSY = "cleanfs: what a busy machine did"


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


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """A test that failed while somebody dropped the kernel's caches is run again.

    No test of ours drops all of them. What the kernel keeps is what some tests are about.
    """
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for attempts_left in range(MOST_ATTEMPTS - 1, -1, -1):
        before = machine.cache_drops()
        reports = runtestprotocol(item, log=False, nextitem=nextitem)
        failed = any(report.failed for report in reports)
        if not (failed and attempts_left and machine.cache_drops() != before):
            break
        machine.disturbed.append(item.nodeid)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A worker of pytest-xdist hands on what its tests met."""
    session.config.stash[STATUS] = exitstatus
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[BUSY] = (machine.ran_out, machine.disturbed)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:  # noqa: ANN401  # pytest-xdist's
    """A worker has ended, perhaps before it could hand on anything."""
    ran_out, disturbed = getattr(node, "workeroutput", {}).get(BUSY, ([], []))
    machine.ran_out.extend(ran_out)
    machine.disturbed.extend(disturbed)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Nothing stays of a run, but what may say why a test failed."""
    if hasattr(config, "workerinput"):
        return
    root = Path(os.environ["PYTEST_DEBUG_TEMPROOT"])
    if config.stash.get(STATUS, 0) or not _remove(root):
        print(f"the tests' files are in {root}, for a day at least")
    for other in root.parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(FileNotFoundError):
            st = other.lstat()
            if st.st_uid == os.getuid() and time.time() - st.st_mtime > KEPT_SECONDS:
                _remove(other)


def _remove(root: Path) -> bool:
    """Remove a run's files, unless something is mounted there. Whether they are gone."""
    if any(point.path.startswith(f"{root}/") for point in mount_points()):
        return False
    shutil.rmtree(root, ignore_errors=True)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say so if the machine was too busy for the tests' time limits, or not theirs alone."""
    if machine.ran_out:
        terminalreporter.write_line(
            f"machine busy: {len(machine.ran_out)} waits ran out and were given more time, "
            f"up to {max(machine.ran_out):.0f} times as much (load {os.getloadavg()[0]:.0f})"
        )
    if machine.disturbed:
        terminalreporter.write_line(
            "machine busy: somebody dropped the kernel's caches, so these ran again: "
            + ", ".join(machine.disturbed)
        )
