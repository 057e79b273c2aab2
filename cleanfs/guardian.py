"""Severing the connection of a daemon that was killed and can not end.

A killed process ends when all its threads have. One that waits for a page to be dropped that is being
read, or for a FUSE source that does not answer, has not; so the FUSE device stays open, and programs on
the mount wait for answers that nobody will give, among them the one that would let the thread go. Only
the connection's ``abort`` file (fusectl) ends that. So a child writes to it when our main thread is
gone, which is what PR_SET_PDEATHSIG tells of: a process's parent, there, is a thread (prctl(2)).

The child is a shell, as that is the smallest that we can have, and it keeps none of our memory.
"""

import contextlib
import logging
import os
import shutil
import subprocess
from typing import Final

from cleanfs.fusectl import open_connections

log = logging.getLogger(__name__)

SCRIPT: Final = """
trap '' HUP INT TERM
read -r number || exit
exec 3>"/proc/self/fd/$1/$number/abort" || exit
trap 'echo 1 >&3; exit' USR1
read -r end
"""
"""What it opens stays this connection's, also if another gets the number. If the pipe ends, we have
closed it, or all our threads are gone: then nothing is left to be done."""

END_SECONDS: Final = 5.0
"""What it gets to end; it has nothing to wait for."""


class Guardian:
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
        try:
            self._child = subprocess.Popen(
                [
                    setpriv,
                    "--pdeathsig",
                    "USR1",
                    shell,
                    "-c",
                    SCRIPT,
                    "cleanfs-guardian",
                    str(connections),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                pass_fds=(connections,),
                start_new_session=True,
            )
        except OSError as exc:
            self._lacks = str(exc)
        finally:
            os.close(connections)

    def watch_over(self, device: int) -> None:
        """From now on it severs the connection of the mount with this ``st_dev`` if we are killed."""
        if self._child is None:
            log.info(
                "if the daemon is killed, the mount may hang (umount -f ends that): %s", self._lacks
            )
            return
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):  # EPIPE: somebody has ended it
            self._child.stdin.write(f"{os.minor(device)}\n".encode())
            self._child.stdin.flush()

    def close(self) -> None:
        """The mount is gone, and nothing need be severed."""
        if self._child is None:
            return
        assert self._child.stdin is not None
        with contextlib.suppress(OSError):
            self._child.stdin.close()
        try:
            self._child.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()
        self._child = None
