"""Handle the requests on inodes for which pyfuse3 has no handlers, or whose flags it drops.

They are STATX (birth times), SETXATTR (its flags), and IOCTL for what lsattr(1), chattr(1) and project
quotas use (``fuse_fileattr_get`` and ``fuse_fileattr_set`` of Linux, since 5.13).
"""

import errno
import fcntl
import functools
from collections.abc import Awaitable, Callable, Mapping
from typing import Final

from pyfuse3 import EntryAttributes, FUSEError, InodeT, RequestContext

from cleanfs.fs.control import Control
from cleanfs.fs.entries import seconds_and_ns, statx_out
from cleanfs.fs.handle_table import HandleTable
from cleanfs.fs.handler import handler
from cleanfs.fs.permissions import Permissions
from cleanfs.fs.rollback import ReplyRollback
from cleanfs.fs.xattrs import Xattrs
from cleanfs.fuse.channel import AsyncHandler, Channel
from cleanfs.fuse.protocol import (
    FUSE_COMPAT_SETXATTR_IN,
    FUSE_IOCTL,
    FUSE_IOCTL_DIR,
    FUSE_IOCTL_IN,
    FUSE_IOCTL_OUT,
    FUSE_SETXATTR,
    FUSE_SETXATTR_ACL_KILL_SGID,
    FUSE_SETXATTR_EXT,
    FUSE_SETXATTR_IN,
    FUSE_STATX,
    FUSE_STATX_OUT,
)
from cleanfs.fuse.request import Request, context_of
from cleanfs.linux import syscalls
from cleanfs.source import attributes
from cleanfs.source.attributes import ACCESS_ACL, FLAGS, FSXATTR, FlagsCommand
from cleanfs.vfs.handles import DirHandle, FileHandle
from cleanfs.vfs.tree import Tree

GETTERS: Final = {command.getter: command for command in (FLAGS, FSXATTR)}
SETTERS: Final = {command.setter: command for command in (FLAGS, FSXATTR)}

Getattr = Callable[[InodeT, RequestContext], Awaitable[EntryAttributes]]


class InodeOperations:
    """Handles the requests of one mount."""

    def __init__(
        self,
        tree: Tree,
        control: Control,
        handles: HandleTable,
        permissions: Permissions,
        rollback: ReplyRollback,
        xattrs: Xattrs,
        channel: Channel,
        getattr_handler: Getattr,
    ) -> None:
        """Take the parts that the other handlers use, and the handler of GETATTR."""
        self._tree = tree
        self._control = control
        self._handles = handles
        self._permissions = permissions
        self._rollback = rollback
        self._xattrs = xattrs
        self._channel = channel
        self._getattr = getattr_handler

    def handlers(self) -> Mapping[int, AsyncHandler]:
        """Return the handlers, by opcode."""
        return {FUSE_STATX: self.statx, FUSE_SETXATTR: self.setxattr, FUSE_IOCTL: self.ioctl}

    # -- attributes ---------------------------------------------------------------------------

    @handler
    async def statx(self, request: Request, _: bytes) -> bytes:
        """Reply as GETATTR does, and add when the file was made, where the source knows it.

        The kernel asks so for a statx(2) that wants birth times.
        """
        made_ns = await self._birth_time(request.nodeid)
        entry = await self._getattr(InodeT(request.nodeid), context_of(request))
        timeout = *seconds_and_ns(entry.attr_timeout), 0
        return FUSE_STATX_OUT.pack(*timeout) + statx_out(entry, made_ns)

    async def _birth_time(self, node: int) -> int | None:
        if self._control.node(node) is not None:
            return None
        async with self._tree.using(node) as inode:
            return await self._tree.inline_if_local(inode, syscalls.birth_time, inode.fd)

    @handler
    async def setxattr(self, request: Request, body: bytes) -> bytes:
        """Set an extended attribute."""
        if self._channel.init_flags & FUSE_SETXATTR_EXT:
            size, flags, setxattr_flags, _ = FUSE_SETXATTR_IN.unpack_from(body)
            rest = body[FUSE_SETXATTR_IN.size :]
            kills = bool(setxattr_flags & FUSE_SETXATTR_ACL_KILL_SGID)
        else:
            size, flags = FUSE_COMPAT_SETXATTR_IN.unpack_from(body)
            rest, kills = body[FUSE_COMPAT_SETXATTR_IN.size :], None
        name, _, value = rest.partition(b"\0")
        if len(value) != size:
            raise FUSEError(errno.EINVAL)
        if self._control.node(request.nodeid) is not None:
            raise FUSEError(errno.EPERM)
        async with self._tree.using(request.nodeid) as inode:
            ctx = context_of(request)
            clears = kills if name == ACCESS_ACL else False
            await self._xattrs.set(inode, name, value, ctx, flags, clears_set_gid=clears)
        return b""

    # -- flags of lsattr and chattr -----------------------------------------------------------

    @handler
    async def ioctl(self, request: Request, body: bytes) -> bytes:
        """Get or set a file's flags, as far as the source's kernel would let the requester.

        The kernel has checked the requester for its own requests. It passes on what a program sends as
        the same call if the source has no flags, with another size.
        """
        fh, flags, number, _, in_size, out_size = FUSE_IOCTL_IN.unpack_from(body)
        getter, setter = GETTERS.get(number), SETTERS.get(number)
        command = getter or setter
        if command is None or command.size != (out_size if getter else in_size):
            raise FUSEError(errno.ENOTTY)
        handle = self._handles.directory(fh) if flags & FUSE_IOCTL_DIR else self._handles[fh]
        if not isinstance(handle, FileHandle | DirHandle):
            raise FUSEError(errno.ENOTTY)
        found = b""
        try:
            with handle.use:
                if getter:
                    run = self._tree.services.backing.in_thread
                    found = await run(fcntl.ioctl, handle.fd, number, bytes(FSXATTR.size))
                else:
                    value = body[FUSE_IOCTL_IN.size : FUSE_IOCTL_IN.size + in_size]
                    await self._set_flags(request, handle, command, value)
        except OSError as exc:
            if exc.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
                raise FUSEError(errno.ENOTTY) from exc
            raise
        return FUSE_IOCTL_OUT.pack(0, 0, 0, 0) + found[:out_size]

    async def _set_flags(
        self, request: Request, handle: FileHandle | DirHandle, command: FlagsCommand, value: bytes
    ) -> None:
        ctx = context_of(request)
        async with self._tree.using(handle.inode.node) as inode:
            await self._permissions.check_flags_change(inode, ctx)
            call = functools.partial(attributes.set_flags, privileged=ctx.uid == 0)
            acting = self._tree.actor(inode, ctx).acting
            change = handle.fd, command, value, acting
            await self._tree.change_meta(inode, call, *change, in_thread=True)
            self._rollback.change(inode)
