"""Start cleanfs, and sources for it, without loading Python anew: a process that has loaded all forks.

Loading is 0.2 to 0.3 s of processor time, and nearly all that a short command or an idle daemon takes;
a run of the tests starts a thousand of them. What a fork can not stand for (a command in front, another
locale) is started as a user would, and so is all of ``test_smoke.py``.
"""

import array
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
import traceback
from pathlib import Path
from typing import Any, NoReturn

from cleanfs.cli import commands
from cleanfs.linux.mounts import mount_points
from cleanfs.mount.config import MountError
from tests.harness import faulty_server, renumbering_server
from tests.harness.machine import Deadline

MAX_MESSAGE = 1 << 16

MAINS = {
    "cleanfs": commands.main,
    "tests.harness.faulty_server": faulty_server.main,
    "tests.harness.renumbering_server": renumbering_server.main,
}
"""What a module does when it is run."""

PATCH_IMPORTS = """
import os, signal, sys, trio
from cleanfs.cli import commands as cli
from cleanfs.mount import mount
"""
"""What code that changes a ``cleanfs`` need not import."""

CHECKOUT = Path(__file__).resolve().parents[2]
ENVIRONMENT = dict(os.environ)
"""Not that of the test that happens to come first."""


class Started:
    """A process that the zygote started: of ``subprocess.Popen`` what tests use."""

    def __init__(self, zygote: "Zygote", pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._zygote = zygote
        try:
            self._pidfd = os.pidfd_open(pid)
        except ProcessLookupError:  # it has ended, and was waited for
            self._pidfd = -1

    def poll(self) -> int | None:
        """Its status, if it has ended."""
        if self.returncode is None and self._ended(0):
            self.returncode = self._zygote.status(self.pid)
            if self._pidfd >= 0:
                os.close(self._pidfd)
                self._pidfd = -1
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its status. Raises TimeoutExpired."""
        if self.returncode is None and not self._ended(timeout):
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0)
        status = self.poll()
        assert status is not None
        return status

    def send_signal(self, number: int) -> None:
        """If it has not ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def _ended(self, timeout: float | None) -> bool:
        return self._pidfd < 0 or bool(select.select([self._pidfd], [], [], timeout)[0])


class Zygote:
    """The process, as its owner sees it."""

    def __init__(self) -> None:
        """Start it; it ends with this process."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._lock = threading.Lock()
        self._statuses: dict[int, int] = {}
        os.set_inheritable(theirs.fileno(), True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.harness.zygote", str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            cwd=CHECKOUT,
            env=ENVIRONMENT,
        )
        theirs.close()
        atexit.register(self._end)

    def start(
        self, module: str, arguments: list[str], output: int, error: int, patch: str = ""
    ) -> Started:
        """Run a module of ``MAINS`` after some code, in this directory, with this stdout and stderr."""
        what = {
            "module": module,
            "patch": patch,
            "arguments": arguments,
            "directory": os.getcwd(),
            "environment": dict(os.environ),
            "below": below,
        }
        message = json.dumps(what).encode()
        assert len(message) < MAX_MESSAGE
        with self._lock:
            ancillary = array.array("i", [output, error])
            self._socket.sendmsg([message], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, ancillary)])
            while True:
                answer = self._receive()
                if "started" in answer:
                    return Started(self, answer["started"])

    def status(self, pid: int) -> int:
        """Of a process that has ended."""
        with self._lock:
            while pid not in self._statuses:
                self._receive()
            return self._statuses.pop(pid)

    def _receive(self) -> dict[str, int]:
        answer: dict[str, int] = json.loads(self._socket.recv(MAX_MESSAGE))
        if "ended" in answer:
            self._statuses[answer["ended"]] = answer["status"]
        return answer

    def _end(self) -> None:
        self._socket.close()
        self._process.wait(10)


below = "/"
"""Mounts elsewhere are not listed: other tests' are kept busy by who asks them, and hang for some."""

in_use = False
"""Set for the tests; what scripts measure is started as a user would."""

_zygotes: dict[int, Zygote] = {}


def zygote() -> Zygote:
    """This process' own."""
    if os.getpid() not in _zygotes:
        _zygotes[os.getpid()] = Zygote()
    return _zygotes[os.getpid()]


def run(arguments: list[str], timeout: float) -> subprocess.CompletedProcess[str]:
    """What ``subprocess.run`` would give, with its output. Raises TimeoutExpired."""
    ends = [os.pipe(), os.pipe()]
    try:
        process = zygote().start("cleanfs", arguments, ends[0][1], ends[1][1])
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


def serve(owner: socket.socket) -> None:
    """Fork for each message, tell of each end, until the owner has gone."""
    _warm_up()
    news, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    sources: list[socket.socket | int] = [owner, news]
    while True:
        ready = select.select(sources, [], [])[0]
        if news in ready:
            os.read(news, MAX_MESSAGE)
            _tell_of_ends(owner)
        if owner in ready:
            message, ancillary, _, _ = owner.recvmsg(MAX_MESSAGE, socket.CMSG_SPACE(8))
            if not message:
                return
            fds = array.array("i", ancillary[0][2]).tolist()
            pid = os.fork()
            if pid == 0:
                _become(json.loads(message), fds)
            for fd in fds:
                os.close(fd)
            owner.send(json.dumps({"started": pid}).encode())


def _warm_up() -> None:
    """Load and look up now, once, what a mount would; the collector leaves that in peace."""
    with contextlib.suppress(MountError):
        commands.cli.main(["mount", "/nowhere", "/nowhere"], standalone_mode=False)
    gc.collect()
    gc.freeze()


def _tell_of_ends(owner: socket.socket) -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            ended = {"ended": pid, "status": os.waitstatus_to_exitcode(status)}
            owner.send(json.dumps(ended).encode())


def _become(what: dict[str, Any], fds: list[int]) -> NoReturn:
    """The child: cleanfs."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for to, fd in enumerate(fds, 1):
            os.dup2(fd, to)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        sys.stdin, sys.stdout, sys.stderr = (
            open(fd, mode, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115  # to stay
            for fd, mode, old in zip(range(3), "rww", (sys.stdin, sys.stdout, sys.stderr), strict=True)
        )
        os.environ.clear()
        os.environ.update(what["environment"])
        os.chdir(what["directory"])
        commands.mount_points = lambda: [  # type: ignore[attr-defined]  # what it imported
            point for point in mount_points() if point.path.startswith(what["below"])
        ]
        sys.argv = [what["module"], *what["arguments"]]
        if what["patch"]:
            exec(PATCH_IMPORTS + what["patch"], {"__name__": "__main__"})  # a test's own code
        MAINS[what["module"]]()
        status = 0
    except SystemExit as exc:
        status = exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
