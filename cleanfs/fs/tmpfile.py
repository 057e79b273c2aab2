"""Handle TMPFILE: create a file without a name (O_TMPFILE, Linux 6.1). pyfuse3 has no handler.

The file is the requester's from the first moment, as a created one is. linkat(2) can give it a name.
"""

import errno
import os
import stat as stat_module
from collections.abc import Mapping

from pyfuse3 import FUSEError

from cleanfs.fs.control import Control
from cleanfs.fs.entries import Entries, entry_out, open_out
from cleanfs.fs.handler import handler
from cleanfs.fs.opening import Opener
from cleanfs.fs.rollback import ReplyRollback
from cleanfs.fuse.channel import AsyncHandler
from cleanfs.fuse.protocol import FUSE_CREATE_IN, FUSE_TMPFILE
from cleanfs.fuse.request import Request, context_of
from cleanfs.vfs.handles import IO_FLAGS
from cleanfs.vfs.tree import Tree


class Tmpfile:
    """Handles the request of one mount."""

    def __init__(
        self,
        tree: Tree,
        control: Control,
        entries: Entries,
        opener: Opener,
        rollback: ReplyRollback,
    ) -> None:
        """Take the parts that CREATE uses."""
        self._tree = tree
        self._control = control
        self._entries = entries
        self._opener = opener
        self._rollback = rollback

    def handlers(self) -> Mapping[int, AsyncHandler]:
        """Return the handler, by opcode."""
        return {FUSE_TMPFILE: self.tmpfile}

    @handler
    async def tmpfile(self, request: Request, body: bytes) -> bytes:
        """Create and open a file without a name in a directory."""
        flags, mode, umask, _ = FUSE_CREATE_IN.unpack_from(body)
        if self._control.node(request.nodeid) is not None:
            raise FUSEError(errno.EOPNOTSUPP)
        inodes, before = self._tree.inodes, self._tree.services.before()
        inodes.check_may_open()
        async with self._tree.using(request.nodeid) as parent:
            actor = self._tree.actor(parent, context_of(request, umask))
            # With O_EXCL it can be given no name, here nor in the source.
            opened, inode = await self._tree.create_nameless(
                parent, stat_module.S_IMODE(mode), flags & (IO_FLAGS | os.O_EXCL), actor
            )
            with inodes.using(inode):
                told = inode.kernel.told
                entry = self._entries.attributes(inode, opened.stat)
                flags &= ~os.O_TMPFILE
                info = await self._opener.make_handle(inode, opened, flags, before, new=True)
                self._rollback.created(info.fh, inode, told)
        return entry_out(entry) + open_out(info)
