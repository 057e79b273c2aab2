"""What is asked of the root on the way to the control files, and by umount: it must not wait.

The kernel asks for attributes and access control lists, to see who may pass, and umount(8) for the free
space. A source that hangs would close the way just when somebody wants to know what is going on, or to
be rid of it. So it gets some time to answer; then the last answer that it gave is given again, to be
believed for no time at all. So it is when the source fails, except for the free space: nobody's way
leads through that.
"""

import errno
import os
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from cleanfs.vfs.inodes import Inode

PATIENCE_SECONDS: Final = 0.2
"""How long the source gets, once. While it still owes an answer, the last one is given at once."""

Run = Callable[..., Awaitable[object]]

ACL_NAMES: Final = (b"system.posix_acl_access", b"system.posix_acl_default")

NONE_THERE: Final = (errno.ENODATA, errno.EOPNOTSUPP)
"""Errors that are answers to the question for an access control list."""


class _Question:
    """Something asked of the source again and again; its last answer."""

    def __init__(self, call: Callable[[], object]) -> None:
        """Asks, and waits, once."""
        self._call = call
        self.answer: object = call()
        self.fresh = True
        self.error: OSError | None = None
        self._asking: trio.Event | None = None

    async def ask(self, run: Run, nursery: trio.Nursery) -> object:
        """The answer, in time if it is ``fresh``."""
        if self._asking is None:
            self._asking = trio.Event()
            self.fresh, self.error = False, None
            nursery.start_soon(self._ask, run, self._asking)
            with trio.move_on_after(PATIENCE_SECONDS):
                await self._asking.wait()
        return self.answer

    async def _ask(self, run: Run, asking: trio.Event) -> None:
        try:
            self.answer = await run(self._call)
            self.fresh = True
        except OSError as exc:
            self.error = exc  # the last answer stands
        finally:
            self._asking = None
            asking.set()


class Root:
    """The root of a source that may wait or fail."""

    def __init__(self, inode: Inode) -> None:
        """Asks for everything once. Raises OSError."""
        self._stat = _Question(lambda: os.fstat(inode.fd))
        self._acls = {name: _Question(lambda name=name: _acl(inode, name)) for name in ACL_NAMES}  # type: ignore[misc]
        self._statfs = _Question(lambda: os.statvfs(inode.path()))
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """What is asked lives here; never ends."""
        async with trio.open_nursery() as self._nursery:
            await trio.sleep_forever()

    async def stat(self, run: Run) -> tuple[os.stat_result, bool]:
        """Attributes, and whether they are those of now."""
        if self._nursery is not None:
            await self._stat.ask(run, self._nursery)
        answer = self._stat.answer
        assert isinstance(answer, os.stat_result)
        return answer, self._stat.fresh

    async def statfs(self, run: Run) -> os.statvfs_result:
        """Free space. Raises OSError."""
        if self._nursery is not None:
            await self._statfs.ask(run, self._nursery)
            if self._statfs.error is not None:
                raise OSError(*self._statfs.error.args)
        answer = self._statfs.answer
        assert isinstance(answer, os.statvfs_result)
        return answer

    async def acl(self, run: Run, name: bytes) -> bytes:
        """An access control list. Raises OSError (ENODATA) if there is none."""
        question = self._acls[name]
        if self._nursery is not None:
            await question.ask(run, self._nursery)
        if not isinstance(question.answer, bytes):
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
        return question.answer


def _acl(inode: Inode, name: bytes) -> bytes | None:
    try:
        return os.getxattr(inode.path(), name)
    except OSError as exc:
        if exc.errno in NONE_THERE:
            return None
        raise
