"""Find, open and change the objects of the source, as a tree of inodes.

The tree lies between the handlers, which speak FUSE, and ``namespace``, which makes the system calls.
It keeps inodes open across an await, makes calls that may wait in threads, and passes each stat on to
the coherency checker.
"""

import contextlib
import errno
import functools
import os
import stat as stat_module
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TypeVar, TypeVarTuple

import trio
from pyfuse3 import RequestContext

from cleanfs.backends.ops import FileKey
from cleanfs.cache.files import CachedFile
from cleanfs.cache.fingerprint import Fingerprint, fingerprint, own_fingerprint
from cleanfs.linux import syscalls
from cleanfs.source import attributes, namespace
from cleanfs.source.attributes import NO_ATTRIBUTES, NewAttributes
from cleanfs.source.errors import HalfDoneError, StaleError
from cleanfs.source.inline_policy import InlinePolicy
from cleanfs.source.namespace import Actor, Changed, OpenedFile
from cleanfs.vfs.coherency import Coherency
from cleanfs.vfs.handles import IO_FLAGS, Before, Services
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.parking import is_parked, open_parked

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

MAX_DEPTH = 128
"""How many parked parents are opened by their places, at most, to reach a parked inode."""

FORGET_BATCH = 1024
"""How many names one request makes the kernel forget."""

FORGET_SECONDS = 0.01
"""How many seconds the kernel has to send its FORGETs after that."""


SMALL_BYTES = 1 << 20
"""The most bytes on the disk that a file may have whose size is changed on the main thread."""


SUSPICIOUS = (errno.ESTALE, errno.EIO, errno.ENOTCONN, errno.EBADF)
"""Errors of a descriptor whose file a server has forgotten. Its name may still lead to the file."""


class Tree:
    """Finds, opens and changes the objects of the source (see the module)."""

    def __init__(self, services: Services, inodes: InodeTable) -> None:
        """Start below the root of ``inodes``."""
        self.services = services
        self.inodes = inodes
        self.inline_if_local = services.inline_if_local
        self._crowded = trio.Event()
        # The kernel may also have the name that the file had before, and would still open it by that.
        inodes.on_leave(services.notifier.expire)

    def using(self, node: int) -> "Using":
        """Hold an inode's descriptor for the length of the block."""
        return Using(self, self.inodes[node])

    def actor(self, inode: Inode, ctx: RequestContext) -> Actor:
        """Return the requester of a change of an inode, or of names in a directory."""
        return Actor(ctx.uid, ctx.gid, ctx.umask, local=self.services.is_local(inode))

    async def in_thread_with_retry(self, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Run a call that may wait for the source in a thread (``Backing.in_thread``).

        The call may open fds and take space. If it runs out of either, it must undo what it did, so
        that it can be repeated; otherwise it raises HalfDoneError.
        """
        return await self.services.space_retry.retrying(
            self._retry_emfile, self.services.backing.in_thread, call, *args
        )

    async def run_on_names(self, directory: Inode, call: Callable[[*Ts], T], *args: *Ts) -> T:
        """Change names in a directory; without a thread where that does not wait."""
        policy = self.services.source_fs(directory).names
        return await self._run_here(directory, policy, call, *args)

    async def _run_here(
        self, directory: Inode, policy: InlinePolicy, call: Callable[[*Ts], T], *args: *Ts
    ) -> T:
        """Run a call on names in a directory; without a thread where its policy allows it.

        It must not touch a file system that is mounted on a name: a server may never reply.
        """
        if not (self.services.is_local(directory) and syscalls.can_open_here()):
            return await self.in_thread_with_retry(call, *args)
        return await self._run_by(policy, call, *args)

    async def _run_by(self, policy: InlinePolicy, call: Callable[[*Ts], T], *args: *Ts) -> T:
        async def run(call: Callable[[*Ts], T], *args: *Ts) -> T:
            return await self.services.backing.run_by(policy, call, *args)

        return await self.services.space_retry.retrying(self._retry_emfile, run, call, *args)

    async def change_names(
        self, directory: Inode, actor: Actor, call: Callable[[*Ts, Actor], T], *args: *Ts
    ) -> T:
        """Run a change of names by an actor. The main thread can only act as the daemon."""
        if actor.is_daemon():
            return await self.run_on_names(directory, call, *args, actor)
        return await self.in_thread_with_retry(call, *args, actor)

    async def unpark(self, inode: Inode, depth: int = 0) -> None:
        """Give a parked inode an fd again. Raises StaleError, OSError."""
        parent = inode.parent
        if parent is None or parent.nlookup <= 0 or depth == MAX_DEPTH:
            await self._open_parked(inode, -1)
            return
        with self.inodes.using(parent):
            if parent.fd >= 0 and self._unpark_at_place(inode, parent):
                return
            if inode.open_fds or (inode.handle and inode.dentry is None):
                with contextlib.suppress(StaleError):
                    await self._open_parked(inode, -1)
                    return
            if parent.fd < 0:
                await self.unpark(parent, depth + 1)
            await self._open_parked(inode, parent.fd)

    def _unpark_at_place(self, inode: Inode, parent: Inode) -> bool:
        """Find a parked inode where it was last, without waiting. Return whether it was there."""
        if not self.services.is_local(parent):
            return False
        try:
            found = namespace.lookup_cached(parent.fd, inode.name)
        except FileNotFoundError:
            return False
        if found is None:
            return False
        if not is_parked(inode, found.fd, found.stat):
            os.close(found.fd)
            return False
        self.inodes.unpark(inode, found.fd, found.stat.st_ino)
        return True

    async def _open_parked(self, inode: Inode, parent_fd: int) -> None:
        mount_fd = self.inodes.mount_fd(inode.device)
        self.inodes.unpark(
            inode, *await self.in_thread_with_retry(open_parked, inode, mount_fd, parent_fd)
        )
        await self._have_mount_fd(inode)

    async def _have_mount_fd(self, inode: Inode) -> None:
        """Open the first directory found on a file system, by which handles there are opened."""
        if not self.inodes.wants_mount_fd(inode):
            return
        self.inodes.expect_mount_fd(inode.device)
        fd = -1
        try:
            with self.inodes.using(inode), contextlib.suppress(OSError):  # it may not be readable
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
                fd = await self.inline_if_local(inode, os.open, inode.path(), flags)
                if not self.services.types[inode.device]:
                    magic = await self.in_thread_with_retry(syscalls.file_system_magic, fd)
                    self.services.types.learn(inode.device, magic)
        finally:
            self.inodes.add_mount_fd(inode.device, fd)

    async def look_up(self, parent: Inode, name: bytes) -> tuple[Inode, os.stat_result]:
        """Find a name: its inode, with one more kernel reference, and its attributes."""
        before = self.services.before()
        local = self.services.is_local(parent)
        opened = namespace.lookup_cached(parent.fd, name) if local else None
        if opened is None:
            try:
                lookups, call = self.services.source_fs(parent).lookups, namespace.lookup_here
                opened = await self._run_here(parent, lookups, call, parent.fd, name)
            except FileNotFoundError:
                self.inodes.name_gone(parent.device, parent, name)
                raise
            except OSError as exc:
                if exc.errno != errno.EXDEV:
                    raise
                opened = await self.in_thread_with_retry(namespace.lookup, parent.fd, name)
        inode = self.inodes.looked_up(opened.fd, opened.stat, parent, name)
        self.observe(inode, opened.stat, before)
        self.ask_to_forget()
        await self._have_mount_fd(inode)
        await self.nothing_to_drop(inode)
        return inode, opened.stat

    async def make(
        self, parent: Inode, name: bytes, mode: int, rdev: int, target: bytes, actor: Actor
    ) -> tuple[Inode, os.stat_result]:
        """Make a directory, symbolic link or special file: its inode, with a kernel reference."""
        made = await self.change_names(
            parent, actor, namespace.make_node, parent.fd, name, mode, rdev, target
        )
        self.inodes.name_gone(parent.device, parent, name)
        return self.inodes.looked_up(made.fd, made.stat, parent, name), made.stat

    async def create(
        self, parent: Inode, name: bytes, mode: int, flags: int, actor: Actor
    ) -> tuple[OpenedFile, Inode, os.stat_result]:
        """Create and open a file; its inode has a kernel reference.

        Raises StaleError if it was there already, or was replaced in the source at once; the kernel
        then tries again.
        """
        flags = self._readable(flags)
        opened = await self.change_names(
            parent, actor, namespace.create_file, parent.fd, name, mode, flags
        )
        self.inodes.name_gone(parent.device, parent, name)
        try:
            inode, st = await self.look_up(parent, name)
        except BaseException:
            await self.close(parent, opened.fd)
            raise
        if not self.inodes.is_inode_of(inode, opened.key):
            self.inodes.forget(inode.node, 1)
            await self.close(parent, opened.fd)
            raise StaleError
        return replace(opened, key=inode.file_key or opened.key), inode, st

    async def create_nameless(
        self, parent: Inode, mode: int, flags: int, actor: Actor
    ) -> tuple[OpenedFile, Inode]:
        """Create and open a file without a name; its inode has a kernel reference."""
        flags = self._readable(flags)
        opened, fd = await self.change_names(
            parent, actor, namespace.create_nameless, parent.fd, mode, flags
        )
        try:
            inode = self.inodes.made_nameless(fd, opened.stat)
        except BaseException:
            await self.close(parent, opened.fd)
            raise
        self.services.space_retry.removed(inode.node)  # it is as if its last name had been removed
        return opened, inode

    def _readable(self, flags: int) -> int:
        """Have a new file opened for reading, too, if the kernel needs it (``open_for_writeback``)."""
        if self.services.writeback and flags & os.O_ACCMODE == os.O_WRONLY:
            return flags & ~os.O_ACCMODE | os.O_RDWR
        return flags

    async def close(self, inode: Inode, fd: int) -> None:
        """Close a file on the same file system, which a server may have to be told."""
        with contextlib.suppress(OSError):
            await self.inline_if_local(inode, os.close, fd)

    async def stat(self, inode: Inode, *, settles_size: bool = False) -> os.stat_result:
        """Return the attributes now, and compare them with what is known.

        ``settles_size`` is for a reply that a read may go by (``_settle_size``).
        """
        before = self.services.before()
        st = await self.inline_if_local(inode, os.fstat, inode.fd)
        self.observe(inode, st, before)
        if settles_size and inode.open_fds:
            await self._settle_size(inode, st)
        await self.nothing_to_drop(inode)
        return st

    async def _settle_size(self, inode: Inode, st: os.stat_result) -> None:
        """Have the kernel take the size of an open file before a reply tells it.

        A read that finds attributes expired sends one GETATTR. If a notification or a write overtakes
        the reply, the kernel drops that, and the read goes by the size from before: it comes short.
        """
        notifier, kernel = self.services.notifier, inode.kernel
        if self.services.coherency.mode is Coherency.NONE or not notifier.can_refresh_sizes:
            return  # the kernel knows all changes; or the notification itself would overtake the reply
        kernel.changed(st)

        async def refresh() -> None:
            pages = notifier.explicit and notifier.is_pending(inode.node)
            await notifier.refreshed(inode.node, inode.generation, inode.mount_path(), pages=pages)

        await kernel.settle(refresh, size=True)

    async def is_named(self, inode: Inode) -> bool:
        """Tell whether the name by which the kernel last found an inode leads to it. Raises OSError."""
        parent = inode.parent
        if inode is self.inodes.root:
            return True
        if parent is None or parent.nlookup <= 0:
            st = await self.inline_if_local(inode, os.fstat, inode.fd)
            return st.st_nlink > 0 or self.services.space_retry.is_removed(inode.node)
        try:
            async with Using(self, parent):
                where = parent.fd, inode.name
                if self.services.is_local(parent) and inode.device == parent.device:
                    found = namespace.identify(*where)
                else:
                    found = await self.in_thread_with_retry(namespace.identify, *where)
        except (FileNotFoundError, StaleError):
            return False
        if found != inode.id and inode.dentry is not None:  # its number may be another by now
            st = await self.inline_if_local(inode, os.fstat, inode.fd)
            return found == (st.st_dev, st.st_ino)
        return found == inode.id

    async def nothing_to_drop(self, inode: Inode) -> None:
        """Wait until the kernel has no stale pages, before a reply sends attributes of the inode.

        The kernel may keep its pages when it learns another size. Then it would show zeros in the page
        at the old end, which the file never held.
        """
        notifier = self.services.notifier
        if notifier.explicit and notifier.is_pending(inode.node):
            await notifier.pages_dropped(inode.node)

    def observe(self, inode: Inode, st: os.stat_result, before: Before) -> None:
        """Compare a stat taken since ``before``; if the source changed, flush and notify the kernel."""
        if inode.file_key is not None:
            file = self.services.pagecache.known(inode.file_key)
            if file is not None and self.services.coherency.on_refresh(
                file, self.fingerprint(st, before), before.clock
            ):
                self.services.notifier.inode(inode.node)

    def fingerprint(self, st: os.stat_result, before: Before) -> Fingerprint:
        """Return the fingerprint of a stat taken since ``before``."""
        return fingerprint(st, self.services.types[st.st_dev], before.now_ns)

    async def _known_file(self, inode: Inode, *, make: bool = False) -> CachedFile | None:
        """Return a regular file's record, if it has one; ``make`` says to make it if need be."""
        if inode.kind != stat_module.S_IFREG:
            return None
        key = inode.file_key
        if key is None:
            key = await self.inline_if_local(inode, _key_of, inode.fd)
        pagecache = self.services.pagecache
        file = pagecache.file(key, inode.dentry) if make else pagecache.known(key)
        inode.set_file(key, file)
        return file

    async def set_attributes(self, inode: Inode, io_fd: int, new: NewAttributes) -> os.stat_result:
        """Set attributes (``attributes.set_attributes``), and flush what a new size makes stale."""
        file = await self._known_file(inode, make=new.size is not None)
        if file is None:
            try:
                call = attributes.set_attributes
                policy = self._policy_of(inode, new)
                _, after = await self._run_change(inode, policy, call, inode.fd, io_fd, new)
            except OSError:
                self.services.notifier.inode(inode.node)  # a part may have been done
                raise
            return after
        pagecache, size = self.services.pagecache, new.size
        async with pagecache.changing(file) if size is None else pagecache.mutating(file, size):
            before, after = await self._change_or_distrust(
                inode,
                file,
                self._policy_of(inode, new),
                attributes.set_attributes,
                inode.fd,
                io_fd,
                new,
            )
            moves_mtime = size is not None or new.mtime_ns is not None
            self._check_own_change(inode, file, before, after, size=size, moves_mtime=moves_mtime)
        return after

    def _policy_of(self, inode: Inode, new: NewAttributes) -> InlinePolicy | None:
        """Return the policy for a change of attributes; None if it must be made in a thread.

        To cut a large file frees many blocks.
        """
        if not self.services.is_local(inode):
            return None
        fs = self.services.source_fs(inode)
        if new.size is None:
            return fs.names
        return fs.sizes if os.fstat(inode.fd).st_blocks * 512 <= SMALL_BYTES else None

    async def _run_change(
        self, inode: Inode, policy: InlinePolicy | None, call: Callable[[*Ts], T], *args: *Ts
    ) -> T:
        """Change attributes: inline if its policy allows it, or without one in a thread."""
        if policy is None:
            return await self.in_thread_with_retry(call, *args)
        return await self._run_by(policy, call, *args)

    async def _change_or_distrust(
        self,
        inode: Inode,
        file: CachedFile,
        policy: InlinePolicy | None,
        call: Callable[[*Ts], T],
        *args: *Ts,
    ) -> T:
        """Change attributes; distrust the file if that fails, because a part may have been done."""
        try:
            return await self._run_change(inode, policy, call, *args)
        except BaseException:
            self.services.coherency.distrust(file)
            self.services.notifier.inode(inode.node)
            raise

    def _check_own_change(
        self,
        inode: Inode,
        file: CachedFile,
        old: os.stat_result,
        new: os.stat_result,
        *,
        size: int | None,
        moves_mtime: bool,
    ) -> None:
        """Compare attributes from before and after a change of ours, under the file's lock.

        ``size`` is the size that the change set, if any.
        """
        expected = old.st_size if size is None else size
        before, after = own_fingerprint(old), own_fingerprint(new)
        coherency = self.services.coherency
        if coherency.after_own_change(file, before, after, size=expected, moves_mtime=moves_mtime):
            self.services.notifier.inode(inode.node)

    def name_changed(self, changed: Changed, parent: Inode, name: bytes) -> Inode | None:
        """Record that a change of ours moved a file's ctime, as the file lost or gained a name.

        A file without a name is gone. Returns the inode, if it is in the table.
        """
        inode, key = self.inodes.subject(changed.key, parent, name)
        after = None if changed.after is None else own_fingerprint(changed.after)
        self.note_name_change(inode, key, own_fingerprint(changed.before), after, gone=changed.gone)
        return inode

    def note_name_change(
        self,
        inode: Inode | None,
        key: FileKey,
        before: Fingerprint,
        after: Fingerprint | None,
        *,
        gone: bool,
    ) -> None:
        """Do so, given the inode, if it is in the table, and the key of its pages.

        ``after`` is None if it is not known; ``gone`` says that the file has no name any more.
        """
        if gone and inode is not None:
            self.services.space_retry.removed(inode.node)
        file = self.services.pagecache.known(key)
        if file is None:
            return
        if gone:
            self.services.pagecache.forget(file)
            return
        coherency = self.services.coherency
        distrusted = True
        if after is None:
            coherency.distrust(file)
        else:
            distrusted = coherency.after_name_change(file, before, after)
        if distrusted and inode is not None:
            self.services.notifier.inode(inode.node)

    async def open(self, inode: Inode, flags: int) -> OpenedFile:
        """Open a file for I/O, with those of the program's flags that apply to the source."""
        call: Callable[[str, int, FileKey | None], OpenedFile]
        call = namespace.open_for_writeback if self.services.writeback else namespace.open_file
        path, flags = inode.path(), flags & IO_FLAGS
        if self.services.is_local(inode):
            run = functools.partial(self.inline_if_local, inode)
            with contextlib.suppress(BlockingIOError):  # another process has a lease on it
                opened: OpenedFile = await self._retry_emfile(
                    run, call, path, flags | os.O_NONBLOCK, inode.file_key
                )
                os.set_blocking(opened.fd, not flags & os.O_NONBLOCK)
                return opened
        return await self._retry_emfile(self.in_thread_with_retry, call, path, flags, inode.file_key)

    async def open_directory(self, inode: Inode, flags: int = 0) -> int:
        """Open a directory to list it. O_NOATIME in ``flags`` is advice, as for files."""
        run = functools.partial(self.inline_if_local, inode)
        flags |= os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        return await self._retry_emfile(run, namespace.open_advised, inode.path(), flags)

    async def _retry_emfile(
        self,
        run: Callable[[Callable[[*Ts], T], *Ts], Awaitable[T]],
        call: Callable[[*Ts], T],
        *args: *Ts,
    ) -> T:
        """Run a call that opens something; when descriptors run out, park inodes and try again."""
        try:
            return await run(call, *args)
        except OSError as exc:
            if exc.errno not in (errno.EMFILE, errno.ENFILE) or isinstance(exc, HalfDoneError):
                raise
        self.inodes.shrink(self.inodes.stats().held // 2)
        return await run(call, *args)

    async def change_meta(
        self,
        inode: Inode,
        call: Callable[[*Ts], tuple[os.stat_result, os.stat_result]],
        *args: *Ts,
        in_thread: bool = False,
    ) -> None:
        """Change an inode in a way that moves its ctime alone, such as an extended attribute.

        ``call`` returns its attributes before and after. One that acts as the requester must run
        ``in_thread``.
        """
        file = await self._known_file(inode)
        if file is None:
            await self.in_thread_with_retry(call, *args)
            return
        async with self.services.pagecache.changing(file):
            policy = None if in_thread else self._policy_of(inode, NO_ATTRIBUTES)
            before, after = await self._change_or_distrust(inode, file, policy, call, *args)
            self._check_own_change(inode, file, before, after, size=None, moves_mtime=False)

    def ask_to_forget(self) -> None:
        """Have ``keep_bounded`` check whether there are too many inodes."""
        if len(self.inodes) > self.inodes.max_inodes:
            self._crowded.set()

    async def keep_bounded(self) -> None:
        """Have the kernel forget names while the table is larger than it should be; never ends."""
        while True:
            await self._crowded.wait()
            self._crowded = trio.Event()
            while places := self.inodes.forgettable(FORGET_BATCH):
                before = self.inodes.forgotten
                await self.services.notifier.drop_names(places)
                await trio.sleep(FORGET_SECONDS)
                if self.inodes.forgotten == before:
                    break  # all are in use; the next lookup tries again
            await trio.sleep(FORGET_SECONDS)  # do not search again after each lookup


class Using:
    """Implements ``Tree.using``.

    It is no ``asynccontextmanager``: trio enters each async generator in a weak set, which takes longer
    than the block usually does.
    """

    __slots__ = ("_inode", "_tree")

    def __init__(self, tree: Tree, inode: Inode) -> None:
        """Prepare the block."""
        self._tree = tree
        self._inode = inode

    async def __aenter__(self) -> Inode:
        inode = self._inode
        self._tree.inodes.pin(inode)
        if inode.fd < 0:
            try:
                await self._tree.unpark(inode)
            except BaseException:
                self._tree.inodes.unpin(inode)
                raise
        return inode

    async def __aexit__(self, *exc: object) -> None:
        if isinstance(exc[1], OSError) and exc[1].errno in SUSPICIOUS:
            self._inode.suspect = True
        self._tree.inodes.unpin(self._inode)


def _key_of(fd: int) -> FileKey:
    return namespace.file_key(fd, os.fstat(fd))
