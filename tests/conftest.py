"""Configure all tests."""

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
from _pytest.runner import runtestprotocol  # pytest-rerunfailures uses it, too
from hypothesis import HealthCheck, settings
from hypothesis.configuration import set_hypothesis_home_dir

from cleanfs.linux.mounts import mount_points
from tests.harness import machine

# A test run of any user leaves no examples and no directory in the checkout.
# No test fails because the machine was busy.
settings.register_profile(
    "cleanfs", database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("cleanfs")
home = tempfile.mkdtemp(prefix="cleanfs-hypothesis-")
atexit.register(shutil.rmtree, home, ignore_errors=True)
set_hypothesis_home_dir(home)

PREFIX = "cleanfs-tests-"
KEPT_SECONDS = 86400.0
"""How long the files of a failed run are kept."""

if "PYTEST_XDIST_WORKER" not in os.environ:
    # Each run has a directory of its own. All runs of a user share pytest's default. Each start of
    # a run closes that to other users, but some tests need to let them in.
    os.environ["PYTEST_DEBUG_TEMPROOT"] = tempfile.mkdtemp(prefix=PREFIX)
    os.chmod(os.environ["PYTEST_DEBUG_TEMPROOT"], 0o711)  # pytest's directories below stay closed

CHECK_SECONDS = 30.0
"""The interval of the checks of a long test."""

MOST_ATTEMPTS = 3

STATUS = pytest.StashKey[int]()

BUSY = "cleanfs: effects of a busy machine"


@pytest.hookimpl(wrapper=True)
def pytest_timeout_set_timer(item: pytest.Item, settings: Any) -> Generator[None, Any, Any]:  # noqa: ANN401  # a type of the plugin
    """Extend a test's own time limit on a slow machine, as all others (``machine``).

    Python runs a signal handler only in the main thread. So a test that hangs in a system call gets no
    more time from its watchdogs.
    """
    result = yield
    if settings.method != "signal":
        return result
    ends = signal.getsignal(signal.SIGALRM)
    assert callable(ends)
    deadline = machine.Deadline(settings.timeout)

    def check(number: int, frame: Any) -> None:  # noqa: ANN401  # frames have no public type
        if deadline.over():
            ends(number, frame)
            return
        for inform in machine.more_time:
            inform()
        schedule_check()

    def schedule_check() -> None:
        signal.setitimer(signal.ITIMER_REAL, min(CHECK_SECONDS, max(deadline.left(), 0.1)))

    signal.signal(signal.SIGALRM, check)
    schedule_check()
    return result


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test again that failed while another process dropped the kernel's caches.

    No test here drops all of them, and some tests depend on the pages that the kernel keeps.
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
    """Pass on the effects of a busy machine from a worker of pytest-xdist."""
    session.config.stash[STATUS] = exitstatus
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput[BUSY] = (machine.ran_out, machine.disturbed)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:  # noqa: ANN401  # a type of pytest-xdist
    """Collect the effects from a worker that has ended, perhaps before it could pass on any."""
    ran_out, disturbed = getattr(node, "workeroutput", {}).get(BUSY, ([], []))
    machine.ran_out.extend(ran_out)
    machine.disturbed.extend(disturbed)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the files of the run, except those that may show why a test failed."""
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
    """Remove a run's files, unless something is mounted there. Return whether they were removed."""
    if any(point.path.startswith(f"{root}/") for point in mount_points()):
        return False
    shutil.rmtree(root, ignore_errors=True)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Report if the machine was too busy for time limits, or if other processes dropped its caches."""
    if machine.ran_out:
        terminalreporter.write_line(
            f"machine busy: {len(machine.ran_out)} waits ran out and were given more time, "
            f"up to {max(machine.ran_out):.0f} times as much (load {os.getloadavg()[0]:.0f})"
        )
    if machine.disturbed:
        terminalreporter.write_line(
            "machine busy: another process dropped the kernel's caches, so these ran again: "
            + ", ".join(machine.disturbed)
        )
