"""Abort the FUSE connection of a daemon that cannot end.

A process ends once all its threads have. A thread may wait for the kernel to drop a page that is being
read, or for a FUSE source that does not reply. Then the FUSE device stays open, and programs on the
mount wait for replies that never come, among them the one that would release the thread. Only the
connection's ``abort`` file (fusectl) ends that.

So a child writes to it when our main thread is gone. PR_SET_PDEATHSIG reports that, as its "parent" is
a thread (prctl(2)). The child also writes after an unmount, since a thread may be in such a wait then,
too.

The child is a shell, because that is the smallest process available, and it shares none of our memory.
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
"""Another connection may have the number by the time the child opens the file. So the child compares
the inode number (in fdinfo since Linux 5.14). A write to the open file of an ended connection does
nothing."""

READY_SECONDS: Final = 5.0
END_SECONDS: Final = 5.0
"""How long the child may take to start, and to end. It waits for nothing."""


class AbortWatchdog:
    """Runs the child of one mount. Use it from the main thread only, whose end triggers the child."""

    def __init__(self) -> None:
        """Start without a child."""
        self._child: subprocess.Popen[bytes] | None = None
        self._lacks = ""

    def start(self) -> None:
        """Start the child, before the mount exists."""
        setpriv, shell = shutil.which("setpriv"), shutil.which("sh")
        if setpriv is None or shell is None:
            self._lacks = "there is no setpriv (util-linux)"
            return
        try:
            connections = open_connections()
        except OSError as exc:
            self._lacks = f"the directory of FUSE connections cannot be opened: {exc}"
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

    def set_connection(self, connection: Connection | None) -> None:
        """Tell the child the connection. Soon afterwards it will abort it if we are killed."""
        if self._child is None:
            return
        assert self._child.stdin is not None
        if connection is None:
            self._lacks = "the number of the connection is not known"
        else:
            with contextlib.suppress(OSError):  # EPIPE: the child has ended
                line = f"{connection.number} {connection.abort_inode}\n"
                self._child.stdin.write(line.encode())

    async def ready(self) -> None:
        """Return when the child is ready; log the reason if there is none."""
        if self._child is not None and not self._lacks:
            assert self._child.stdout is not None
            with trio.move_on_after(READY_SECONDS):
                await trio.lowlevel.wait_readable(self._child.stdout)
                if self._child.stdout.read(1):
                    return
            self._lacks = "it cannot open the connection, or this setpriv lacks --pdeathsig"
        log.info("if the daemon is killed, the mount may hang (umount -f ends that): %s", self._lacks)

    def close(self) -> None:
        """Abort the connection after the unmount: pending requests fail with ECONNABORTED."""
        if self._child is None:
            return
        assert self._child.stdin is not None
        assert self._child.stdout is not None
        self._child.stdin.close()
        try:
            self._child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            log.warning("the abort watchdog does not end")
            self._child.kill()
            self._child.wait()
        self._child.stdout.close()
        self._child = None


@contextlib.contextmanager
def _default_signal(number: int) -> Iterator[None]:
    """Let a child started in this block receive a signal, even if we ignore or block it."""
    before = signal.signal(number, signal.SIG_DFL)
    mask = signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if before is not None:  # else the handler was not set from Python
            signal.signal(number, before)
