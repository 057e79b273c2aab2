"""Looking at open files, for changes of the source that the kernel does not ask about.

read(2) on the mount asks for attributes once they have expired, and drops what is out of date.
sendfile(2), splice(2) and mappings go by the pages that there are, however old (Linux 6.18). And with
``--coherency watch`` some changes have no event (``docs/coherency.md``). All of these move mtime. So
open files are looked at once a second, by an fstat of the descriptor that is held for them. Files of a
server are not, as it would be asked for each. While no file is open nothing is done.
"""

import contextlib
import os
from typing import Final

import trio

from cleanfs.coherency import fingerprint
from cleanfs.handles import Services
from cleanfs.inodes import Inode

LOOK_SECONDS: Final = 1.0
"""How often an open file is looked at, at most."""

MAX_LOOKS: Final = 2048
"""Files for each time. Where more are open, the others come next time. A look takes some 4 us."""

LOOKS_AT_ONCE: Final = 64
"""Files between two checkpoints."""


class OpenFiles:
    """The open files of one mount that are on local file systems."""

    def __init__(self, services: Services, seconds: float) -> None:
        """Look at each every so many ``seconds``."""
        self._services = services
        self._seconds = max(seconds, LOOK_SECONDS)
        self._inodes: dict[Inode, None] = {}  # in the order in which they are to be looked at
        self._some = trio.Event()

    def opened(self, inode: Inode) -> None:
        """A file was opened. That it is closed is found out."""
        if inode not in self._inodes and self._services.is_local(inode):
            self._inodes[inode] = None
            self._some.set()

    async def run(self) -> None:
        """Look, until cancelled."""
        while True:
            if not self._inodes:
                self._some = trio.Event()
                await self._some.wait()
            await trio.sleep(self._seconds)
            for number, inode in enumerate(list(self._inodes)[:MAX_LOOKS], 1):
                del self._inodes[inode]
                if inode.open_fds:
                    with contextlib.suppress(OSError):  # a read would meet it, and report it
                        look(self._services, inode, unannounced=True)
                    self._inodes[inode] = None
                if number % LOOKS_AT_ONCE == 0:
                    await trio.lowlevel.checkpoint()


def look(services: Services, inode: Inode, *, unannounced: bool = False) -> None:
    """Hold an open file against what is known: flush what changed, know what was flushed again.

    Of a flushed file nothing is known, and all reads go to the source, until it is looked at.

    ``unannounced`` says that it is for what nobody tells of, which moves mtime. A change of ours that
    is under way must not be taken for that: to the data, it holds what it finds against what is known
    itself; to the names, it moves ctime alone.
    """
    if inode.file_key is None or not inode.open_fds or not services.is_local(inode):
        return
    file = services.pagecache.known(inode.file_key)
    if file is None or (unannounced and file.mutations):
        return
    before = services.before()
    st = os.fstat(inode.open_fds[-1])
    now = fingerprint(st, services.types[st.st_dev], before.now_ns)
    if unannounced and file.fingerprint is not None and file.fingerprint.same_data(now):
        return
    if services.coherency.on_refresh(file, now, before.clock):
        drop_in_kernel(services, inode)


def drop_in_kernel(services: Services, inode: Inode) -> None:
    """The kernel is to drop what it has. Of an open file it is to know the size at once.

    While changes follow each other, so do notifications, which may overtake the answers to a reader.
    """
    services.notifier.inode(inode.node)
    if inode.open_fds:
        services.notifier.teach(inode.node, inode.generation)
