"""Serve the root's attributes, ACLs and free space without waiting for a source that hangs.

On the way to the control files the kernel reads attributes and access control lists of the root.
umount(8) reads the free space. A hung source would block both just when they are needed. So a reply
waits for the source only briefly; then it repeats the last result, with an attribute timeout of 0. A
source that fails is treated alike, except that a failed statfs is reported: no path lookup needs it.
"""

import errno
import functools
import os
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from cleanfs.eager import before_wait
from cleanfs.vfs.inode import Inode

REFRESH_SECONDS: Final = 0.2
"""How long a reply waits for the source. While that call runs, other replies take the last result."""

Run = Callable[..., Awaitable[object]]

ACL_NAMES: Final = (b"system.posix_acl_access", b"system.posix_acl_default")

NONE_THERE: Final = (errno.ENODATA, errno.EOPNOTSUPP)
"""Errors that mean that there is no access control list."""


class _Refreshed:
    """Repeats a call on the source, and keeps its last result."""

    def __init__(self, call: Callable[[], object]) -> None:
        """Make the call for the first time, and wait for it. Raises OSError."""
        self._call = call
        self.result: object = call()
        self.fresh = True
        self.error: OSError | None = None
        self._running: trio.Event | None = None

    async def get(self, run: Run, nursery: trio.Nursery) -> object:
        """Repeat the call, unless it still runs. Return the result, which is current if ``fresh``."""
        if self._running is None:
            self._running = trio.Event()
            self.fresh, self.error = False, None
            await before_wait()
            nursery.start_soon(self._call_again, run, self._running)
            with trio.move_on_after(REFRESH_SECONDS):
                await self._running.wait()
        return self.result

    async def _call_again(self, run: Run, running: trio.Event) -> None:
        try:
            self.result = await run(self._call)
            self.fresh = True
        except OSError as exc:
            self.error = exc  # the last result stands
        finally:
            self._running = None
            running.set()


class Root:
    """Serves the root of a source that may hang or fail."""

    def __init__(self, inode: Inode) -> None:
        """Read everything once. Raises OSError."""
        self._stat = _Refreshed(lambda: os.fstat(inode.fd))
        self._acls = {name: _Refreshed(functools.partial(_acl, inode, name)) for name in ACL_NAMES}
        self._statfs = _Refreshed(lambda: os.statvfs(inode.path()))
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Run the calls on the source; never ends."""
        async with trio.open_nursery() as self._nursery:
            await trio.sleep_forever()

    async def stat(self, run: Run) -> tuple[os.stat_result, bool]:
        """Return the attributes, and whether they are current."""
        if self._nursery is not None:
            await self._stat.get(run, self._nursery)
        result = self._stat.result
        assert isinstance(result, os.stat_result)
        return result, self._stat.fresh

    async def statfs(self, run: Run) -> os.statvfs_result:
        """Return the free space. Raises OSError."""
        if self._nursery is not None:
            await self._statfs.get(run, self._nursery)
            if self._statfs.error is not None:
                raise OSError(*self._statfs.error.args)
        result = self._statfs.result
        assert isinstance(result, os.statvfs_result)
        return result

    async def acl(self, run: Run, name: bytes) -> bytes:
        """Return an access control list. Raises OSError (ENODATA) if there is none."""
        acl = self._acls[name]
        if self._nursery is not None:
            await acl.get(run, self._nursery)
        if not isinstance(acl.result, bytes):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return acl.result


def _acl(inode: Inode, name: bytes) -> bytes | None:
    try:
        return os.getxattr(inode.path(), name)
    except OSError as exc:
        if exc.errno in NONE_THERE:
            return None
        raise
