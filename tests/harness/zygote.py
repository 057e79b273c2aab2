"""Start cleanfs, and sources for it, without loading Python anew: a process that has loaded all forks.

Loading is 0.2 to 0.3 s of processor time, and nearly all that a short command or an idle daemon takes;
a run of the tests starts a thousand of them. What a fork can not stand for (a command in front, another
locale) is started as a user would, and so is all of ``test_smoke.py``.
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

MAINS = {
    "cleanfs": commands.main,
    "helper": commands.mount_helper,
    "tests.harness.faulty_server": faulty_server.main,
    "tests.harness.renumbering_server": renumbering_server.main,
}
"""What a module does when it is run; and the helper of mount(8)."""

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

    def __init__(self, *prefix: str) -> None:
        """Start it, by a command that has this one at its end; it ends with this process."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._address = f"cleanfs-zygote-{os.getpid()}-{time.monotonic_ns()}"
        self._lock = threading.Lock()
        self._statuses: dict[int, int] = {}
        os.set_inheritable(theirs.fileno(), True)
        self._process = subprocess.Popen(
            [
                *(*prefix, sys.executable, "-m", "tests.harness.zygote"),
                *(self._address, str(theirs.fileno())),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env=ENVIRONMENT | {"PYTHONPATH": str(CHECKOUT)},
        )
        theirs.close()
        self._receive()  # it listens
        atexit.register(self.end)

    def command(self, *arguments: str | Path, module: str = "cleanfs") -> list[str]:
        """A command that runs a module of ``MAINS`` as a fork, which has the command's streams."""
        program = [sys.executable, "-I", "-S", str(CHECKOUT / "tests/harness/zygote_call.py")]
        return [*program, self._address, below, module, *map(str, arguments)]

    def start(
        self, module: str, arguments: list[str], output: int, error: int, patch: str = ""
    ) -> Started:
        """Run a module of ``MAINS`` after some code, in this directory, with this stdout and stderr."""
        what = {
            "module": module,
            "patch": patch,
            "arguments": arguments,
            "environment": dict(os.environ),
            "below": below,
            "streams": [1, 2],
            "closed": [],
        }
        message = json.dumps(what).encode()
        assert len(message) < MAX_MESSAGE
        directory = os.open(".", os.O_PATH)
        try:
            with self._lock:
                socket.send_fds(self._socket, [message], [output, error, directory])
                while True:
                    answer = self._receive()
                    if "started" in answer:
                        return Started(self, answer["started"])
        finally:
            os.close(directory)

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

    def end(self) -> None:
        """It is done."""
        atexit.unregister(self.end)
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


def serve(address: str, owner: socket.socket) -> None:
    """Fork for each message, tell of each end, until the owner has gone."""
    _warm_up()
    news, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("\0" + address)
    listener.listen()
    owner.send(json.dumps({"listens": 1}).encode())
    callers: dict[int, socket.socket] = {}
    while True:
        sources: list[socket.socket | int] = [owner, news, listener, *callers.values()]
        for ready in select.select(sources, [], [])[0]:
            if ready is news:
                os.read(news, MAX_MESSAGE)
                _tell_of_ends(owner, callers)
            elif ready is owner:
                pid = _fork(owner)
                if not pid:
                    return
                owner.send(json.dumps({"started": pid}).encode())
            elif ready is listener:
                caller, _ = listener.accept()
                callers[_fork(caller)] = caller
            else:  # this caller is gone
                for pid, caller in list(callers.items()):
                    if caller is ready:
                        os.kill(pid, signal.SIGKILL)


def _fork(caller: socket.socket) -> int:
    """The process that does what a caller asks for; 0 if it asks no more."""
    message, fds, _, _ = socket.recv_fds(caller, MAX_MESSAGE, 4)
    if not message:
        return 0
    pid = os.fork()
    if pid == 0:
        _become(json.loads(message), fds)
    for fd in fds:
        os.close(fd)
    return pid


def _warm_up() -> None:
    """Load and look up now, once, what a mount would; the collector leaves that in peace."""
    with contextlib.suppress(MountError):
        commands.cli.main(["mount", "/nowhere", "/nowhere"], standalone_mode=False)
    gc.collect()
    gc.freeze()


def _tell_of_ends(owner: socket.socket, callers: dict[int, socket.socket]) -> None:
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


def _become(what: dict[str, Any], fds: list[int]) -> NoReturn:
    """The child: cleanfs."""
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for fd, to in zip(fds, what["streams"], strict=False):
            os.dup2(fd, to)
        os.fchdir(fds[-1])
        for fd in what["closed"]:
            os.close(fd)
        os.closerange(3, os.sysconf("SC_OPEN_MAX"))
        sys.stdin, sys.stdout, sys.stderr = (
            None  # as Python does
            if fd in what["closed"]
            else open(fd, mode, encoding=old.encoding, errors=old.errors, closefd=False)  # noqa: SIM115  # to stay
            for fd, mode, old in zip(range(3), "rww", (sys.stdin, sys.stdout, sys.stderr), strict=True)
        )
        os.environ.clear()
        os.environ.update(what["environment"])
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
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(sys.argv[1], socket.socket(fileno=int(sys.argv[2])))
