"""Severing the connection of a daemon that can not end.

A process ends when all its threads have. One that waits for a page to be dropped that is being
read, or for a FUSE source that does not answer, has not; so the FUSE device stays open, and programs on
the mount wait for answers that nobody will give, among them the one that would let the thread go. Only
the connection's ``abort`` file (fusectl) ends that. So a child writes to it when our main thread is
gone, which is what PR_SET_PDEATHSIG tells of: a process's parent, there, is a thread (prctl(2)). And it
does when we have unmounted, as a thread may be in such a wait then, too.

The child is a shell, as that is the smallest that we can have, and it keeps none of our memory.
"""

import contextlib
import logging
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from typing import Final

import trio

from cleanfs.linux.fusectl import Connection, open_connections

log = logging.getLogger(__name__)

SCRIPT: Final = """
trap '' HUP INT TERM PIPE
killed=
trap killed=1 USR1
read -r number inode || exit
exec 3>"/proc/self/fd/$1/$number/abort" || exit
while read -r key value; do [ "$key" != ino: ] || opened=$value; done </proc/self/fdinfo/3
[ "$opened" = "$inode" ] || exit
trap 'echo 1 >&3; exit' USR1
[ -n "$killed" ] || { echo; read -r end; }
echo 1 >&3
"""
"""Another connection may have the number when the child opens the file: so it compares the file's inode
(fdinfo has it since Linux 5.14). Once open, the file does nothing when its connection is gone."""

READY_SECONDS: Final = 5.0
END_SECONDS: Final = 5.0
"""What it gets to begin, and to end. It has nothing to wait for."""


class AbortWatchdog:
    """The child of one mount. Main thread only: it is that thread's end which the child is told of."""

    def __init__(self) -> None:
        """None yet."""
        self._child: subprocess.Popen[bytes] | None = None
        self._lacks = ""

    def start(self) -> None:
        """Start it, before there is a mount in whose way it could come."""
        setpriv, shell = shutil.which("setpriv"), shutil.which("sh")
        if setpriv is None or shell is None:
            self._lacks = "there is no setpriv (util-linux)"
            return
        try:
            connections = open_connections()
        except OSError as exc:
            self._lacks = f"the directory of FUSE connections can not be opened: {exc}"
            return
        command = [setpriv, "--pdeathsig", "USR1", shell, "-c", SCRIPT]
        try:
            with _default_signal(signal.SIGUSR1):
                self._child = subprocess.Popen(
                    [*command, "cleanfs-abort-watchdog", str(connections)],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    bufsize=0,
                    cwd="/",
                    env={},
                    pass_fds=(connections,),
                    start_new_session=True,
                )
        except OSError as exc:
            self._lacks = str(exc)
        finally:
            os.close(connections)

    def tell(self, connection: Connection | None) -> None:
        """Which connection it is. From here on, or a moment later, it is severed if we are killed."""
        if self._child is None:
            return
        assert self._child.stdin is not None
        if connection is None:
            self._lacks = "the number of the connection is not known"
        else:
            with contextlib.suppress(OSError):  # EPIPE: it has ended
                told = f"{connection.number} {connection.abort_inode}\n"
                self._child.stdin.write(told.encode())

    async def ready(self) -> None:
        """Return when it is, or say why there is none."""
        if self._child is not None and not self._lacks:
            assert self._child.stdout is not None
            with trio.move_on_after(READY_SECONDS):
                await trio.lowlevel.wait_readable(self._child.stdout)
                if self._child.stdout.read(1):
                    return
            self._lacks = "it can not open the connection, or setpriv is another one"
        log.info("if the daemon is killed, the mount may hang (umount -f ends that): %s", self._lacks)

    def close(self) -> None:
        """The mount is gone. Whoever still waits for an answer gets ECONNABORTED."""
        if self._child is None:
            return
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the guardian does not end")
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        self._child = None


@contextlib.contextmanager
def _default_signal(number: int) -> Iterator[None]:
    """A child that is started here can be told by this signal, whatever we were told to do with it."""
    before = signal.signal(number, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is not None:  # else it is nobody's who would speak Python
            signal.signal(number, before)
