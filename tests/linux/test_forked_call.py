"""Test calls that may never return."""

import errno
import os
import subprocess
import sys
import time

import pytest

from cleanfs.linux.forked_call import forked_call
from tests.harness.machine import Deadline


def test_a_result_is_returned_whole() -> None:
    data = os.urandom(300_000)
    assert forked_call(lambda: data, "/x") == data
    assert forked_call(lambda: b"", "/x") == b""


def test_an_error_keeps_its_message_and_gets_the_path() -> None:
    def fail() -> bytes:
        raise OSError(errno.ENOTCONN, "no such thing")

    with pytest.raises(OSError, match="no such thing: '/x'") as raised:
        forked_call(fail, "/x")
    assert raised.value.errno == errno.ENOTCONN


def test_any_other_exception_becomes_an_oserror() -> None:
    with pytest.raises(OSError, match="/x"):
        forked_call(lambda: bytes(1 // 0), "/x")


def test_a_call_that_does_not_return_times_out() -> None:
    before = len(os.listdir("/proc/self/fd"))
    deadline = Deadline(5)
    with pytest.raises(TimeoutError, match="does not reply: '/x'"):
        forked_call(lambda: bytes(time.sleep(600) or 0), "/x", 0.2)
    assert not deadline.over()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_child_closes_inherited_fds() -> None:
    """``x=$(cleanfs list)`` waits for the end of the pipe, not of the command."""
    reader, writer = os.pipe()
    try:
        still_open = forked_call(lambda: " ".join(os.listdir("/proc/self/fd")).encode(), "/x")
    finally:
        os.close(reader)
        os.close(writer)
    assert len(still_open.split()) == 2  # the pipe to its parent, and the fd of listdir


INTERRUPTED = """
import os, signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent may have set it to be ignored
from cleanfs.linux.forked_call import forked_call
from tests.harness.machine import Deadline
def interrupt():
    os.kill(os.getpid(), signal.SIGINT)
    for _ in range(1000):
        pass
os.register_at_fork(after_in_parent=interrupt)
try:
    forked_call(lambda: b"", "/x")
    print("not heard")
except KeyboardInterrupt:
    print("heard")
"""


def test_an_interrupt_at_the_fork_is_delivered() -> None:
    """Python prints an exception in a hook at a fork and drops it; its own logging has such a hook."""
    ran = subprocess.run(
        [sys.executable, "-c", INTERRUPTED], capture_output=True, text=True, timeout=30, check=True
    )
    assert (ran.stdout, ran.stderr) == ("heard\n", "")
