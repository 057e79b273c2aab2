"""Calls that may never return."""

import errno
import os
import subprocess
import sys
import time

import pytest

from cleanfs.linux.forked_call import answer
from tests.harness.machine import Deadline


def test_what_a_call_returns_comes_back_whole() -> None:
    data = os.urandom(300_000)
    assert answer(lambda: data, "/x") == data
    assert answer(lambda: b"", "/x") == b""


def test_an_error_of_a_call_is_the_callers_with_the_path_and_its_words() -> None:
    def fail() -> bytes:
        raise OSError(errno.ENOTCONN, "no such thing")

    with pytest.raises(OSError, match="no such thing: '/x'") as raised:
        answer(fail, "/x")
    assert raised.value.errno == errno.ENOTCONN


def test_a_bug_in_a_call_is_an_error() -> None:
    with pytest.raises(OSError, match="/x"):
        answer(lambda: bytes(1 // 0), "/x")


def test_a_call_that_does_not_return_is_left_alone() -> None:
    before = len(os.listdir("/proc/self/fd"))
    deadline = Deadline(5)
    with pytest.raises(TimeoutError, match="does not answer: '/x'"):
        answer(lambda: bytes(time.sleep(600) or 0), "/x", 0.2)
    assert not deadline.over()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_child_keeps_nothing_of_its_callers_open() -> None:
    """``x=$(cleanfs list)`` waits for the end of the pipe, not of the command."""
    reader, writer = os.pipe()
    try:
        still_open = answer(lambda: " ".join(os.listdir("/proc/self/fd")).encode(), "/x")
    finally:
        os.close(reader)
        os.close(writer)
    assert len(still_open.split()) == 2  # the way back, and what it lists by


INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored from birth
from cleanfs.linux.forked_call import answer
from tests.harness.machine import Deadline
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
os.register_at_fork(after_in_parent=interrupt)
try:
    answer(lambda: b"", "/x")
    print("not heard")
except KeyboardInterrupt:
    print("heard")
"""


def test_an_interrupt_at_the_fork_is_heard() -> None:
    """An exception in a hook is printed, and forgotten. Python's own logging has one."""
    ran = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=30, check=True
    )
    assert (ran.stdout, ran.stderr) == ("heard\n", "")
