"""Extended attributes and ACLs."""

import errno
import os

import pyfuse3
from pyfuse3 import FUSEError, RequestContext

from cleanfs.fs.permissions import Permissions
from cleanfs.fs.rollback import ReplyRollback
from cleanfs.source import attributes
from cleanfs.source.attributes import ACCESS_ACL
from cleanfs.source.caller import Caller
from cleanfs.vfs.handles import Services
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.root import ACL_NAMES
from cleanfs.vfs.tree import Tree

CAPABILITY = b"security.capability"


class Xattrs:
    """Reads and changes the extended attributes of one mount."""

    def __init__(
        self,
        services: Services,
        inodes: InodeTable,
        tree: Tree,
        permissions: Permissions,
        rollback: ReplyRollback,
    ) -> None:
        """Check changes with ``permissions``."""
        self._services = services
        self._inodes = inodes
        self._tree = tree
        self._permissions = permissions
        self._rollback = rollback

    def capability(self, node: int, ctx: RequestContext) -> bytes | None:
        """Read CAPABILITY without waiting, or return None. Raises FUSEError (ENOATTR).

        The kernel requests it before a write (see ``init_flags``). An open file has an fd that gives it
        at once; other errors are left to ``get``.
        """
        inode = self._inodes.get(node)
        if inode is None:
            return None
        if not (inode.open_fds and self._services.is_local(inode)):
            return None
        try:
            return os.getxattr(inode.open_fds[-1], CAPABILITY)
        except OSError as exc:
            if exc.errno == errno.ENODATA:
                raise FUSEError(pyfuse3.ENOATTR) from None
        return None

    async def get(self, inode: Inode, name: bytes) -> bytes:
        """Read an extended attribute. Raises OSError (ENODATA)."""
        acl_before = inode.kernel.acl
        if name == ACCESS_ACL:
            inode.kernel.acl = b""
        try:
            value = await self._tree.inline_if_local(inode, os.getxattr, inode.path(), name)
        except OSError as exc:
            # A source without ACLs has none. The kernel reads the ACL before it admits a process, and
            # would pass any other error on.
            if exc.errno == errno.EOPNOTSUPP and name in ACL_NAMES:
                raise FUSEError(pyfuse3.ENOATTR) from exc
            raise
        if name == ACCESS_ACL:
            inode.kernel.acl = value
            if value != acl_before:
                self._rollback.acl(inode)
        return value

    async def set(
        self,
        inode: Inode,
        name: bytes,
        value: bytes,
        ctx: RequestContext,
        flags: int = 0,
        *,
        clears_set_gid: bool | None = None,
    ) -> None:
        """Set an extended attribute; ``flags`` are those of setxattr(2).

        An access ACL that a process outside the file's group sets clears the set-gid bit (the kernel's
        ``posix_acl_update_mode``). ``clears_set_gid`` says so if the kernel did; None if it did not.
        """
        await self._permissions.check_xattr_change(inode, name, ctx)
        caller = Caller.of(ctx)

        def clears(st: os.stat_result) -> bool:
            if clears_set_gid is not None:
                return clears_set_gid
            return name == ACCESS_ACL and not (caller.privileged or caller.in_group(st.st_gid))

        await self._tree.change_meta(
            inode, attributes.change_xattr, inode.fd, name, value, flags, clears
        )
        self._rollback.change(inode)

    async def remove(self, inode: Inode, name: bytes, ctx: RequestContext) -> None:
        """Remove an extended attribute."""
        await self._permissions.check_xattr_change(inode, name, ctx)
        await self._tree.change_meta(inode, attributes.change_xattr, inode.fd, name, None)
        inode.lost_capability = name == CAPABILITY
        self._rollback.change(inode)
