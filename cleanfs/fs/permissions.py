"""Refuse what the requester may not do, where the kernel's own check does not suffice.

The kernel checks permissions by the mode, owners and ACL that it was told, which may be stale. ESTALE
makes it request them, and check again.
"""

import errno
import os
from dataclasses import replace
from typing import Final

import pyfuse3
from pyfuse3 import EntryAttributes, RequestContext

from cleanfs.fuse.channel import Channel
from cleanfs.fuse.protocol import FUSE_HANDLE_KILLPRIV_V2
from cleanfs.source import attributes
from cleanfs.source.attributes import NO_ATTRIBUTES, NewAttributes, without_set_id
from cleanfs.source.caller import Caller
from cleanfs.source.errors import StaleError
from cleanfs.source.self_copy import forbid_self_copy, open_to_read
from cleanfs.vfs.handles import Services
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.root import ACL_NAMES
from cleanfs.vfs.stale_names import StaleNames
from cleanfs.vfs.tree import Tree
from cleanfs.vfs.write_request import truncation_clears_set_id

NOBODY_ELSE: Final = -1
"""The id for chown that keeps the owner. Such a chown moves ctime, and clears set-id bits."""


class Permissions:
    """Makes the checks of one mount. Each raises StaleError or another OSError."""

    def __init__(
        self, services: Services, tree: Tree, stale_names: StaleNames, channel: Channel
    ) -> None:
        """Check calls by name with ``stale_names``. ``channel`` knows the flags of FUSE_INIT."""
        self._services = services
        self._tree = tree
        self._stale_names = stale_names
        self._channel = channel

    async def check_opened(
        self,
        inode: Inode,
        fd: int,
        st: os.stat_result,
        ctx: RequestContext,
        *,
        truncates: int = 0,
    ) -> None:
        """Check that the requester named the opened file, and may open it; otherwise close ``fd``."""
        try:
            await self._stale_names.check(inode, ctx)
            await self._check_access(inode, fd, st, ctx)
            if truncates and st.st_size and (readers := open_to_read(ctx.pid, st.st_ino)):
                await self._tree.in_thread_with_retry(forbid_self_copy, readers, st)
        except BaseException:
            await self._tree.close(inode, fd)
            raise

    async def _check_access(
        self, inode: Inode, fd: int, st: os.stat_result, ctx: RequestContext
    ) -> None:
        """Check that mode, owners and ACL are still those by which the kernel admitted the requester.

        ctime moves with each of them. Root is admitted anyway, and should not fail because somebody
        changes them all the time: the kernel retries only once.
        """
        if ctx.uid == 0:
            return
        kernel = inode.kernel
        same = kernel.has_access_of(st)
        if same and kernel.may_have_other_acl(st):
            same = await self._services.inline_if_local(inode, attributes.access_acl, fd) == kernel.acl
        if not same:
            await self._services.notifier.attributes_changed(inode.node)
            raise StaleError
        kernel.access_ctime = st.st_ctime_ns

    async def check_removed(self, inode: Inode, ctx: RequestContext) -> None:
        """Check whether to give attributes of an inode without a link.

        fstat and stat send the same request. It may be an fstat if the file is open here, or if it was
        removed here, which made the kernel forget the name. Then it gets a reply, and the kernel is
        made to look up the name that it may still have.
        """
        if self._services.space_retry.is_removed(inode.node):
            return
        if not inode.open_fds:
            await self._stale_names.check(inode, ctx, is_stat=True)
        elif inode.parent is not None:
            self._services.notifier.expire(inode.parent.node, inode.name)

    async def check_owner(self, inode: Inode, ctx: RequestContext) -> os.stat_result:
        """Check a change that only the owner may make. Return the attributes now.

        It fails if the kernel used other owners, unless the requester is the owner all the same.
        """
        st = await self._tree.inline_if_local(inode, os.fstat, inode.fd)
        if ctx.uid not in (0, st.st_uid) and not inode.kernel.has_access_of(st):
            await self._services.notifier.attributes_changed(inode.node)
            raise StaleError
        return st

    async def check_flags_change(self, inode: Inode, ctx: RequestContext) -> None:
        """Check a change of flags (chattr), for which the kernel does not retry."""
        try:
            await self.check_owner(inode, ctx)
        except StaleError as exc:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM)) from exc

    async def check_setattr(
        self, inode: Inode, io_fd: int, new: NewAttributes, ctx: RequestContext
    ) -> tuple[NewAttributes, os.stat_result | None]:
        """Check a setattr. Return what to set; or nothing to set, and the attributes to reply with.

        ``io_fd`` is the fd of the requester's file open for writing, or -1.
        """
        if io_fd < 0 and _may_be_by_name(inode, new):
            await self._stale_names.check(inode, ctx)
        if new == NO_ATTRIBUTES:
            st = await self.check_owner(inode, ctx)
            lost_capability, inode.lost_capability = inode.lost_capability, False
            if _is_before_a_write(st, Caller.of(ctx), lost_capability):
                return new, st
            return NewAttributes(uid=NOBODY_ELSE), None
        caller = Caller.of(ctx)
        clears = new.size is not None and new.mode is None and self.truncation_clears_set_id(caller)
        if ctx.uid != 0 or clears:
            if io_fd < 0:
                st = await self.check_owner(inode, ctx)
            else:  # an open file may be changed, even if its permissions have changed since
                st = await self._tree.inline_if_local(inode, os.fstat, inode.fd)
            if clears:
                new = replace(new, mode=without_set_id(st, caller))
        return new, None

    def truncation_clears_set_id(self, caller: Caller) -> bool:
        """Tell whether the present OPEN or SETATTR, which truncates, must clear set-id bits.

        They go unless the requester has CAP_FSETID. The kernel says so since Linux 5.11; before that
        root is taken to have it.
        """
        if self._channel.init_flags & FUSE_HANDLE_KILLPRIV_V2:
            return truncation_clears_set_id()
        return not caller.privileged

    async def check_xattr_change(self, inode: Inode, name: bytes, ctx: RequestContext) -> None:
        """Check a change of an extended attribute. Raises PermissionError, too.

        The kernel checks ``user``, ``trusted``, ``security`` and POSIX ACLs. It leaves the rest of
        ``system`` to file systems, such as the ACLs of NFS, CIFS and NTFS. The source would check the
        daemon's permissions.
        """
        if not inode.open_fds:  # otherwise it may be by an fd
            await self._stale_names.check(inode, ctx)
        st = await self.check_owner(inode, ctx)
        if name.startswith(b"system.") and name not in ACL_NAMES and ctx.uid not in (0, st.st_uid):
            try:
                await self._tree.inline_if_local(inode, os.getxattr, inode.path(), name)
            except OSError as exc:
                if exc.errno == errno.EOPNOTSUPP:  # a source without them reports that first
                    raise
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))


def is_granted(attr: EntryAttributes, mode: int, ctx: RequestContext) -> bool:
    """Tell whether mode and owners give the requester the access ``mode`` (``access(2)``)."""
    if ctx.uid == 0:
        return not mode & os.X_OK or bool(attr.st_mode & 0o111)
    if ctx.uid == attr.st_uid:
        granted = attr.st_mode >> 6
    elif attr.st_gid == ctx.gid or attr.st_gid in pyfuse3.get_sup_groups(ctx.pid):
        granted = attr.st_mode >> 3
    else:
        granted = attr.st_mode
    return not mode & ~granted & 0o7


def _may_be_by_name(inode: Inode, new: NewAttributes) -> bool:
    """Tell whether a setattr that names no open file is by a path, so that the kernel can retry it.

    ftruncate names its file. fchmod and its like do not, so they can only be told apart where no file
    is open. Times alone may be the kernel's own, which sets them late (``--writeback``).
    """
    if new.size is not None:
        return True
    return not inode.open_fds and (new.mode, new.uid, new.gid) != (None, None, None)


def _is_before_a_write(st: os.stat_result, caller: Caller, lost_capability: bool) -> bool:
    """Tell whether a setattr of no attribute only announces a write, which will clear set-id bits.

    The kernel also sends one for a chown that changes neither id. A user can chown such a file only as
    its owner, and it does no harm to clear an owner's bits a moment before the write. Root's write
    leaves set-id bits alone: it is announced only after it has removed a capability.
    """
    if caller.privileged:
        return lost_capability
    return caller.uid != st.st_uid and without_set_id(st, caller) is not None
