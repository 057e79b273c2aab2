"""Poll open files for changes of the source that no request would find.

sendfile(2), splice(2) and mappings use the cached pages, however old (Linux 6.18). So does read(2),
unless the kernel drops pages by itself (FUSE_AUTO_INVAL_DATA): then it sends GETATTR once attributes
have expired. And with ``--coherency watch`` some changes have no event (``docs/coherency.md``). All of
these changes move mtime, or at least ctime. So each open file is checked once a second, by an fstat of
its fd. Files of a server are not checked, as each fstat is a request to it, unless nothing else would
find a change; then a thread makes the fstat. While no file is open, nothing is done.
"""

import contextlib
import os
from typing import Final

import trio

from cleanfs.cache.fingerprint import Fingerprint, fingerprint
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.handles import Before, Services, fstat_and_close
from cleanfs.vfs.inode import Inode

LOOK_SECONDS: Final = 1.0
"""The shortest time between two checks of an open file."""

MAX_LOOKS: Final = 2048
"""How many files one round checks. If more are open, the others follow next time. A check takes some 4
us."""

LOOKS_AT_ONCE: Final = 64
"""How many files are checked between two checkpoints."""


class OpenFiles:
    """Checks the open files of one mount."""

    def __init__(self, services: Services, seconds: float) -> None:
        """Check each file every so many ``seconds``."""
        self._services = services
        self._seconds = max(seconds, LOOK_SECONDS)
        self._inodes: dict[Inode, None] = {}  # the polled ones, the next to be checked first
        self._some = trio.Event()
        self._ctimes: Ctimes = {}
        self._requested: set[Inode] = set()  # those with an fstat under way to a server

    def opened(self, inode: Inode) -> None:
        """Note that a file was opened."""
        services = self._services
        if not inode.polled and (services.is_local(inode) or services.notifier.explicit):
            inode.polled = True
            self._inodes[inode] = None
            self._some.set()

    def closed(self, inode: Inode) -> None:
        """Note that a file was closed, perhaps not for the last time."""
        if inode.polled and not inode.opens:
            inode.polled = False
            self._inodes.pop(inode, None)
            self._ctimes.pop(inode, None)

    @property
    def count(self) -> int:
        """Count the open inodes."""
        return len(self._inodes)

    async def run(self) -> None:
        """Check open files, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                if not self._inodes:
                    self._some = trio.Event()
                    await self._some.wait()
                await trio.sleep(self._seconds)
                for inode in list(self._inodes):
                    self.closed(inode)  # the channel may have closed it
                for number, inode in enumerate(list(self._inodes)[:MAX_LOOKS], 1):
                    if inode not in self._inodes:  # closed meanwhile
                        continue
                    del self._inodes[inode]
                    self._inodes[inode] = None  # behind the others
                    if self._services.is_local(inode):
                        with contextlib.suppress(OSError):  # a read will report it
                            look(self._services, inode, unannounced=True, ctimes=self._told_by_ctime())
                    elif inode not in self._requested:
                        nursery.start_soon(self._check_on_server, inode)
                    if number % LOOKS_AT_ONCE == 0:
                        await trio.lowlevel.checkpoint()

    def _told_by_ctime(self) -> "Ctimes | None":
        """Return the record of ctimes if nothing else finds a change that moves only ctime."""
        services = self._services
        explicit = services.notifier.explicit and services.coherency.mode is Coherency.OPEN
        return self._ctimes if explicit else None

    async def _check_on_server(self, inode: Inode) -> None:
        """Check a file of a server, which may hang."""
        services = self._services
        if not inode.open_fds:  # it was closed before this began
            return
        self._requested.add(inode)
        try:
            before = services.before()
            fd = os.open(f"/proc/self/fd/{inode.open_fds[-1]}", os.O_PATH | os.O_CLOEXEC)
            st = await services.backing.in_thread(fstat_and_close, fd)
        except OSError:
            return  # a read will report it
        finally:
            self._requested.discard(inode)
        if inode.open_fds:
            _judge(services, inode, st, before, unannounced=True, ctimes=self._told_by_ctime())


Ctimes = dict[Inode, Fingerprint]
"""Files of which the last check found only ctime moved, with the fingerprint that it found."""


def look(
    services: Services, inode: Inode, *, unannounced: bool = False, ctimes: Ctimes | None = None
) -> None:
    """Compare an open file with what is known: flush what changed, and take the new fingerprint.

    A flushed file has no fingerprint, and all its reads go to the source, until it is checked.

    ``unannounced`` limits the check to changes without an event, which move mtime. A change of ours
    that is under way must not be taken for one: a change of data makes the comparison itself; a change
    of names moves ctime alone. With ``ctimes`` a change of ctime alone counts, too, if the next check
    still finds it.
    """
    if inode.open_fds and services.is_local(inode):
        before = services.before()
        st = os.fstat(inode.open_fds[-1])
        _judge(services, inode, st, before, unannounced=unannounced, ctimes=ctimes)


def _judge(
    services: Services,
    inode: Inode,
    st: os.stat_result,
    before: Before,
    *,
    unannounced: bool,
    ctimes: Ctimes | None,
) -> None:
    file = None if inode.file_key is None else services.pagecache.known(inode.file_key)
    if file is None or (unannounced and (file.mutations or file.version > before.clock)):
        return
    now = fingerprint(st, services.types[st.st_dev], before.now_ns)
    seen = None if ctimes is None else ctimes.pop(inode, None)
    if unannounced and file.fingerprint is not None and file.fingerprint.same_data(now):
        if ctimes is None or file.fingerprint == now:
            return
        if seen != now:
            ctimes[inode] = now
            return
    if services.coherency.on_refresh(file, now, before.clock):
        drop_in_kernel(services, inode)


def drop_in_kernel(services: Services, inode: Inode) -> None:
    """Have the kernel drop what it has cached. For an open file, refresh the size at once.

    While changes follow each other, so do notifications, which may overtake the replies to a reader.
    """
    services.notifier.inode(inode.node)
    if inode.open_fds:
        services.notifier.refresh(inode.node, inode.generation, inode.mount_path())
