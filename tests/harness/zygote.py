"""Start cleanfs, and sources for it, without loading Python each time: one loaded process forks.

Loading takes 0.2 to 0.3 s of CPU time, nearly all the time of a short command or an idle daemon. A run
of the tests starts a thousand of them. A fork cannot replace a call with a command in front or with
another locale: these, and all of ``test_smoke.py``, start as a user would.
"""

import atexit
import contextlib
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from cleanfs.cli import commands
from cleanfs.linux.mounts import mount_points
from cleanfs.mount.config import MountError
from tests.harness import faulty_server, renumbering_server
from tests.harness.machine import Deadline

MAX_MESSAGE = 1 << 16


def run_code() -> None:
    """Run the argument as Python code."""
    exec(sys.argv[1], {"__name__": "__main__"})  # code of a test


MAINS = {
    "cleanfs": commands.main,
    "code": run_code,
    "helper": commands.mount_helper,
    "tests.harness.faulty_server": faulty_server.main,
    "tests.harness.renumbering_server": renumbering_server.main,
}
"""The main function of each module, the helper of mount(8), and plain code."""

PATCH_IMPORTS = """
import os, signal, sys, trio
from cleanfs.cli import commands as cli
from cleanfs.mount import mount
"""
"""Imports that run before each patch."""

CODE_IMPORTS = "import ctypes, errno, mmap, os, socket, stat\n"
"""Imports before code for another user, who cannot read modules below /root."""

CHECKOUT = Path(__file__).resolve().parents[2]
ENVIRONMENT = dict(os.environ)
"""The environment at import, not that of the first test."""


class Started:
    """Controls a process that the zygote started, by the methods of ``subprocess.Popen``."""

    def __init__(self, zygote: "Zygote", pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._zygote = zygote
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # it has ended and been waited for
            self._pidfd = -1

    def poll(self) -> int | None:
        """Return its status, if it has ended."""
        if self.returncode is None and self._ended(0):
            self.returncode = self._zygote.status(self.pid)
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end and return its status. Raises TimeoutExpired."""
        if self.returncode is None and not self._ended(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> bool:
        return self._pidfd < 0 or bool(select.select([self._pidfd], [], [], timeout)[0])


class Zygote:
    """Controls the zygote process for its owner."""

    def __init__(self, *prefix: str) -> None:
        """Start it, by a command that executes its arguments. It ends with this process."""
        self._socket, child_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._address = f"cleanfs-zygote-{os.getpid()}-{time.monotonic_ns()}"
        self._lock = threading.Lock()
        self._statuses: dict[int, int] = {}
        os.set_inheritable(child_end.fileno(), True)
        self._process = subprocess.Popen(
            [
                *(*prefix, sys.executable, "-m", "tests.harness.zygote"),
                *(self._address, str(child_end.fileno())),
            ],
            pass_fds=[child_end.fileno()],
            stdin=subprocess.DEVNULL,
            env=ENVIRONMENT | {"PYTHONPATH": str(CHECKOUT)},
        )
        child_end.close()
        self._receive()  # until it listens
        atexit.register(self.end)

    def command(self, *arguments: str | Path, module: str = "cleanfs") -> list[str]:
        """Return a command that runs a module of ``MAINS`` as a fork with the command's streams."""
        program = [sys.executable, "-I", "-S", str(CHECKOUT / "tests/harness/zygote_call.py")]
        return [*program, self._address, below, module, *map(str, arguments)]

    def start(
        self,
        module: str,
        arguments: list[str],
        output: int,
        error: int,
        *,
        patch: str = "",
        directory: str | Path = ".",
    ) -> Started:
        """Run ``patch`` and a module of ``MAINS`` in a directory, with fds for stdout and stderr."""
        call = {
            "module": module,
            "patch": patch,
            "arguments": arguments,
            "environment": dict(os.environ),
            "below": below,
            "streams": [1, 2],
            "closed": [],
        }
        message = json.dumps(call).encode()
        assert len(message) < MAX_MESSAGE
        directory_fd = os.open(directory, os.O_PATH)
        try:
            with self._lock:
                socket.send_fds(self._socket, [message], [output, error, directory_fd])
                while True:
                    reply = self._receive()
                    if "started" in reply:
                        return Started(self, reply["started"])
        finally:
            os.close(directory_fd)

    def status(self, pid: int) -> int:
        """Return the status of a process that has ended."""
        with self._lock:
            while pid not in self._statuses:
                self._receive()
            return self._statuses.pop(pid)

    def _receive(self) -> dict[str, int]:
        reply: dict[str, int] = json.loads(self._socket.recv(MAX_MESSAGE))
        if "ended" in reply:
            self._statuses[reply["ended"]] = reply["status"]
        return reply

    def end(self) -> None:
        """End the zygote."""
        atexit.unregister(self.end)
        self._socket.close()
        self._process.wait(10)


below = "/"
"""Only mounts below are listed: calls on other tests' mounts would disturb them, or hang."""

in_use = False
"""Set for the tests. Scripts measure processes started as a user would."""

_zygotes: dict[int, Zygote] = {}


def zygote() -> Zygote:
    """Return the zygote of this process."""
    if os.getpid() not in _zygotes:
        _zygotes[os.getpid()] = Zygote()
    return _zygotes[os.getpid()]


def run(
    arguments: list[str], timeout: float, module: str = "cleanfs", directory: str | Path = "."
) -> subprocess.CompletedProcess[str]:
    """Run a module of ``MAINS`` as ``subprocess.run`` does, with its output. Raises TimeoutExpired."""
    ends = [os.pipe(), os.pipe()]
    try:
        process = zygote().start(module, arguments, ends[0][1], ends[1][1], directory=directory)
    finally:
        for _, writer in ends:
            os.close(writer)
    texts = {reader: b"" for reader, _ in ends}
    deadline = Deadline(timeout)
    try:
        open_ends = set(texts)
        while open_ends and not deadline.over():
            for reader in select.select(list(open_ends), [], [], deadline.left())[0]:
                piece = os.read(reader, MAX_MESSAGE)
                texts[reader] += piece
                if not piece:
                    open_ends.remove(reader)
        status = process.wait(deadline.left())
    except BaseException:
        process.kill()
        raise
    finally:
        for reader in texts:
            os.close(reader)
    output, error = (text.decode(errors="surrogateescape") for text in texts.values())
    return subprocess.CompletedProcess(arguments, status, output, error)


# -- in the zygote ------------------------------------------------------------------------------------


def serve(address: str, owner: socket.socket) -> None:
    """Fork for each message and report the end of each child, until the owner ends."""
    _warm_up()
    child_ended, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("\0" + address)
    listener.listen()
    owner.send(json.dumps({"listens": 1}).encode())
    callers: dict[int, socket.socket] = {}
    while True:
        sources: list[socket.socket | int] = [owner, child_ended, listener, *callers.values()]
        for ready in select.select(sources, [], [])[0]:
            if ready is child_ended:
                os.read(child_ended, MAX_MESSAGE)
                _report_ends(owner, callers)
            elif ready is owner:
                pid = _fork(owner)
                if not pid:
                    return
                owner.send(json.dumps({"started": pid}).encode())
            elif ready is listener:
                caller, _ = listener.accept()
                callers[_fork(caller)] = caller
            else:  # this caller has ended
                for pid, caller in list(callers.items()):
                    if caller is ready:
                        os.kill(pid, signal.SIGKILL)


def _fork(caller: socket.socket) -> int:
    """Fork a process for a request of a caller. Return its pid; 0 if the caller has ended."""
    message, fds, _, _ = socket.recv_fds(caller, MAX_MESSAGE, 4)
    if not message:
        return 0
    pid = os.fork()
    if pid == 0:
        _run_child(json.loads(message), fds)
    for fd in fds:
        os.close(fd)
    return pid


def _warm_up() -> None:
    """Load once the modules and backends that children need, and exempt them from collection."""
    with contextlib.suppress(MountError):
        commands.cli.main(["mount", "/nowhere", "/nowhere"], standalone_mode=False)
    exec(CODE_IMPORTS, {})
    gc.collect()
    gc.freeze()


def _report_ends(owner: socket.socket, callers: dict[int, socket.socket]) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            code = os.waitstatus_to_exitcode(status)
            if pid not in callers:
                owner.send(json.dumps({"ended": pid, "status": code}).encode())
                continue
            with callers.pop(pid) as caller, contextlib.suppress(BrokenPipeError):
                caller.send(b"%d" % (code if code >= 0 else 128 - code))


def _run_child(call: dict[str, Any], fds: list[int]) -> NoReturn:
    """Run the module in the child."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fd, to in zip(fds, call["streams"], strict=False):
            os.dup2(fd, to)
        os.fchdir(fds[-1])
        for fd in call["closed"]:
            os.close(fd)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        sys.stdin, sys.stdout, sys.stderr = (
            None  # as Python does
            if fd in call["closed"]
            else open(fd, mode, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115  # they stay open
            for fd, mode, old in zip(range(3), "rww", (sys.stdin, sys.stdout, sys.stderr), strict=True)
        )
        os.environ.clear()
        os.environ.update(call["environment"])
        commands.mount_points = lambda: [  # type: ignore[attr-defined]  # imported there, not exported
            point for point in mount_points() if point.path.startswith(call["below"])
        ]
        sys.argv = [call["module"], *call["arguments"]]
        if call["patch"]:
            exec(PATCH_IMPORTS + call["patch"], {"__name__": "__main__"})  # code of a test
        MAINS[call["module"]]()
        status = 0
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
