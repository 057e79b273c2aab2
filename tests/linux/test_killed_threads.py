"""Test what /proc tells of threads that were killed, or exit."""

import ctypes
import os
import signal
import subprocess
import sys
import threading

from cleanfs.linux.killed_threads import is_exiting, is_killed, process_of
from tests.harness.mounting import wait_until


def test_a_thread_s_process_is_known_until_it_ends() -> None:
    found = list[tuple[int, int]]()

    def look() -> None:
        thread = threading.get_native_id()
        found.append((thread, process_of(thread)))

    other = threading.Thread(target=look)
    other.start()
    other.join(10)
    [(thread, process)] = found
    assert process == os.getpid()
    wait_until(lambda: process_of(thread) == 0)


def test_neither_a_process_that_runs_nor_one_that_has_ended_exits() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        assert not is_exiting(process.pid)
        assert not is_killed(process.pid)
    finally:
        process.kill()
    wait_until(
        lambda: os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is not None
    )
    assert not is_exiting(process.pid), "it is a zombie, and waits for nothing"
    assert not is_killed(process.pid)
    assert process.wait(10) == -signal.SIGKILL
    assert not is_exiting(process.pid)


def test_a_name_with_brackets_is_no_state() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    name = ctypes.create_string_buffer(16)
    assert libc.prctl(16, name, 0, 0, 0) == 0  # PR_GET_NAME
    assert libc.prctl(15, b") D 1 2 3 4 5 4", 0, 0, 0) == 0  # PR_SET_NAME
    try:
        assert not is_exiting(os.getpid())
    finally:
        libc.prctl(15, name, 0, 0, 0)
