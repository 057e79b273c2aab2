"""Watch the source by fanotify (``--coherency watch``), so that changes are seen without an open.

fanotify reports each change of a file and the process that made it. The daemon's own changes are
skipped. After any other change the object is flushed here, and the kernel is notified to drop what it
has cached. Everything that ``open`` checks is still checked: an event is one more reason to flush.

Where possible, a file system is *watched as a whole*: one mark reports changes of all its files by any
process and any path. That takes CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH (events name files by their
handles), and a file system with handles and an id of its own. Otherwise *each held inode* is marked.
The kernel drops such a mark with its inode, so the mark lasts while the daemon has an fd. An inode
without either is checked at ``open`` only, and is counted as unwatched.

Some changes have no event: those by io_submit(2), by a loop device, by a store into a mapping (see
``docs/coherency.md``). They move mtime, and open files are checked once a second (``open_files``).

Order: an event comes after its change. The flush gives the file a new version before the kernel is
notified. So a read that the change overtook inserts nothing here, and the notification drops the pages
that it brought to the kernel.

Everything runs on the main thread, except the calls that open files by their handles.
"""

import errno
import logging
import os
import stat as stat_module
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Final

import trio

from cleanfs.backends.ops import FileKey
from cleanfs.linux import fanotify, syscalls
from cleanfs.linux.fanotify import Event, Place
from cleanfs.linux.mounts import LOCAL_FILE_SYSTEMS
from cleanfs.source import file_handles
from cleanfs.vfs.handles import Services
from cleanfs.vfs.inode import Inode
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.open_files import drop_in_kernel, look

log = logging.getLogger(__name__)

FILE_MASK: Final = fanotify.OBJECT_CHANGED
DIRECTORY_MASK: Final = fanotify.NAMES_CHANGED | fanotify.OBJECT_CHANGED | fanotify.FAN_ONDIR

COALESCE_SECONDS: Final = 0.1
"""How long events gather before the next batch is applied. A file that is written all the time is
flushed once in that time."""

DRAIN_SECONDS: Final = 0.02
"""How often events are fetched meanwhile, as the kernel's queue is bounded."""

MAX_RESOLVED: Final = 1 << 14
"""The number of remembered file handles and the files that they identify, 0.5 KiB each."""

UNKNOWN: Final = "a file system of unknown type"

FLUSH_BATCH: Final = 256
"""How many files are flushed, and inodes notified, between two checkpoints."""


class Reach(Enum):
    """Says how much of a file system is watched."""

    WHOLE = auto()
    INODES = auto()
    """The held inodes, one by one."""
    NOTHING = auto()


class UnwatchableError(Exception):
    """Says why the source cannot be watched."""


@dataclass(frozen=True, slots=True)
class WatchStats:
    """Holds a snapshot."""

    watcher: str = "none"
    """How the root of the source is watched: fanotify-filesystem, fanotify-inode, none."""
    watch_file_systems: int = 0
    """File systems that are watched as a whole."""
    watch_inodes: int = 0
    """Inodes that have a mark of their own."""
    watch_unwatched: int = 0
    """Held inodes whose changes are not announced."""
    watch_events: int = 0
    watch_events_own: int = 0
    """Events of changes that the daemon made."""
    watch_invalidations: int = 0
    """Files, directories and names that were invalidated after an event."""
    watch_overflows: int = 0
    """How often the kernel lost events, and everything was flushed."""


class Batch:
    """Gathers events since the last look: all events of an object, or of a name, as one mask."""

    def __init__(self) -> None:
        """Start empty."""
        self.objects: dict[Place, int] = {}
        self.names: dict[tuple[Place, bytes], int] = {}
        self.lost = False
        """Whether the kernel lost events."""

    @property
    def is_empty(self) -> bool:
        """Tell whether there is nothing to do."""
        return not (self.objects or self.names or self.lost)


class SourceWatch:
    """Holds the marks of one mount, and handles their events. An ``inodes.Watcher``."""

    def __init__(self, services: Services, inodes: InodeTable) -> None:
        """Watch the root, and every inode that is held from now on. Raises UnwatchableError."""
        self._services = services
        self._inodes = inodes
        self._pid = os.getpid()
        try:
            self._group = fanotify.init()
        except OSError as exc:
            raise UnwatchableError(f"fanotify_init: {exc.strerror}") from exc
        self._reach: dict[int, Reach] = {}  # by device
        self._fsids: dict[int, int] = {}  # by device
        self._anchors: dict[int, list[int]] = {}  # by fsid: fds that handles are opened by
        # The files at a place: several if file systems share an id (a clone of a disk).
        self._resolved: dict[Place, list[FileKey]] = {}
        self._marked: dict[Place, list[Inode]] = {}
        self._places: dict[int, Place] = {}  # of the marked inodes, by node
        self._unwatched: set[int] = set()  # nodes
        self._complained: set[int] = set()  # devices
        self._events = self._own = self._invalidations = self._overflows = 0
        try:
            self._watch_root()
        except UnwatchableError:
            os.close(self._group)
            raise

    def _watch_root(self) -> None:
        root = self._inodes.root
        fs_type = self._services.types[root.device]
        why = self._mark_whole(root)
        if why is not None:
            if not self._can_mark_inodes(root.device, why):
                raise UnwatchableError(
                    f"no changes of {fs_type or UNKNOWN} are announced: {why.strerror}"
                )
            try:
                self._mark_inode(root)
            except OSError as exc:
                raise UnwatchableError(f"fanotify_mark: {exc.strerror}") from exc
            self._reach[root.device] = Reach.INODES
            log.info("watching inodes one by one, not the file system: %s", why.strerror)
        elif fs_type and not self._is_local(root.device):
            log.warning("the source is on %s: only changes made on this machine are announced", fs_type)
        self._inodes.watch(self)

    def close(self) -> None:
        """Close the group, and with it its marks."""
        os.close(self._group)

    def announces(self, inode: Inode) -> bool:
        """Tell whether any change of the inode will have an event for as long as we run."""
        return self._reach.get(inode.device) is Reach.WHOLE and self._is_local(inode.device)

    def stats(self) -> WatchStats:
        """Return a snapshot."""
        whole = self._reach[self._inodes.root.device] is Reach.WHOLE
        return WatchStats(
            "fanotify-filesystem" if whole else "fanotify-inode",
            list(self._reach.values()).count(Reach.WHOLE),
            len(self._marked),
            len(self._unwatched),
            self._events,
            self._own,
            self._invalidations,
            self._overflows,
        )

    # -- marks --------------------------------------------------------------------------------

    def held(self, inode: Inode) -> None:
        """Watch the inode, unless its file system is watched."""
        reach = self._reach.get(inode.device)
        if reach is None and inode.is_dir:
            reach = self._reach[inode.device] = self._watch_file_system(inode)
        if reach is Reach.WHOLE:
            return
        if reach is Reach.INODES or (reach is None and self._is_local(inode.device)):
            try:
                self._mark_inode(inode)
            except OSError as exc:
                self._give_up(inode, str(exc.strerror))
        else:
            self._give_up(inode, self._services.types[inode.device] or UNKNOWN)

    def dropped(self, inode: Inode) -> None:
        """Stop watching the inode."""
        self._unwatched.discard(inode.node)
        place = self._places.pop(inode.node, None)
        if place is None or inode not in self._marked.get(place, ()):
            return
        self._marked[place].remove(inode)
        if not self._marked[place]:
            del self._marked[place]
        if inode.fd >= 0:  # otherwise the mark goes with the source's inode
            mask = DIRECTORY_MASK if inode.is_dir else FILE_MASK
            try:
                fanotify.mark(self._group, fanotify.FAN_MARK_REMOVE, mask, inode.path())
            except OSError as exc:
                log.debug("a mark is gone already: %s", exc)

    def _watch_file_system(self, directory: Inode) -> Reach:
        """Watch a file system that was found below the source."""
        device = directory.device
        if self._is_part_of_a_watched_one(directory):
            self._inodes.states.watch(device)
            return Reach.WHOLE
        if self._services.types[device] and not self._is_local(device):
            return Reach.NOTHING  # a mark may send a request to a server, which may hang
        why = self._mark_whole(directory)
        if why is None:
            return Reach.WHOLE
        return Reach.INODES if self._can_mark_inodes(device, why) else Reach.NOTHING

    def _is_part_of_a_watched_one(self, directory: Inode) -> bool:
        """Tell whether it is a btrfs subvolume: a device of its own, with the events of the whole."""
        handle = syscalls.event_handle(directory.fd)
        for anchor in {anchor for anchors in self._anchors.values() for anchor in anchors}:
            found = _open_one(anchor, handle)
            if found is not None and (found.device, found.inode) == directory.id:
                return True
        return False

    def _can_mark_inodes(self, device: int, why: OSError) -> bool:
        """Tell whether to try that: not where it would send requests to a server. EXDEV means btrfs."""
        return self._is_local(device) or why.errno == errno.EXDEV

    def _mark_whole(self, directory: Inode) -> OSError | None:
        """Watch the file system of a directory. Return the error if that cannot be done."""
        flags, mask, path = fanotify.FAN_MARK_FILESYSTEM, DIRECTORY_MASK, directory.path()
        try:
            fanotify.mark(self._group, flags | fanotify.FAN_MARK_ADD, mask, path)
        except OSError as exc:
            return exc
        device = directory.device
        anchor = self._inodes.mount_fd(device)
        try:
            os.close(syscalls.open_by_handle(anchor, syscalls.event_handle(directory.fd), os.O_PATH))
        except OSError as exc:
            fanotify.mark(self._group, flags | fanotify.FAN_MARK_REMOVE, mask, path)
            return exc
        self._reach[device] = Reach.WHOLE
        self._inodes.states.watch(device)
        self._anchors.setdefault(self._fsid(directory), []).append(anchor)
        log.info("watching the file system of device %d:%d", os.major(device), os.minor(device))
        return None

    def _mark_inode(self, inode: Inode) -> None:
        """Watch one inode. Raises OSError."""
        mask = DIRECTORY_MASK if inode.is_dir else FILE_MASK
        flags = fanotify.FAN_MARK_ADD | fanotify.FAN_MARK_EVICTABLE
        fanotify.mark(self._group, flags, mask, inode.path())
        place = Place(self._fsid(inode), syscalls.event_handle(inode.fd))
        marked = self._marked.setdefault(place, [])
        if inode not in marked:
            marked.append(inode)
        self._places[inode.node] = place
        self._unwatched.discard(inode.node)

    def _give_up(self, inode: Inode, why: str) -> None:
        self._unwatched.add(inode.node)
        if inode.device not in self._complained:
            self._complained.add(inode.device)
            log.warning(
                "not all changes of device %d:%d are announced (%s): they are found when a file is "
                "opened or its attributes are refreshed",
                os.major(inode.device),
                os.minor(inode.device),
                why,
            )

    def _fsid(self, inode: Inode) -> int:
        known = self._fsids.get(inode.device)
        if known is None:
            known = self._fsids[inode.device] = os.fstatvfs(inode.fd).f_fsid
        return known

    def _is_local(self, device: int) -> bool:
        return self._services.types[device] in LOCAL_FILE_SYSTEMS

    # -- events -------------------------------------------------------------------------------

    async def run(self) -> None:
        """Take events, and invalidate what they name, until cancelled."""
        batch, due = Batch(), 0.0
        while True:
            if batch.is_empty:
                await trio.lowlevel.wait_readable(self._group)
            else:
                await trio.sleep(min(DRAIN_SECONDS, max(due - trio.current_time(), 0)))
            await self._drain(batch)
            if trio.current_time() >= due:
                await self._apply(batch)
                batch, due = Batch(), trio.current_time() + COALESCE_SECONDS

    async def _drain(self, batch: Batch) -> None:
        """Fetch all pending events."""
        while buffer := self._read():
            try:
                self._sort(fanotify.parse(buffer), batch)
            except ValueError:
                log.exception("events that cannot be read")
                batch.lost = True
            await trio.lowlevel.checkpoint()

    async def _apply(self, batch: Batch) -> None:
        if batch.lost:
            self._overflows += 1
            if self._overflows == 1:
                log.warning("events were lost: everything is flushed (fs.fanotify.max_queued_events)")
            await self.flush_everything()
            return
        await self._resolve({*batch.objects, *(directory for directory, _ in batch.names)})
        for place, mask in batch.objects.items():
            self._object_changed(place, mask)
        for (place, name), mask in batch.names.items():
            self._name_changed(place, name, mask)

    def _read(self) -> bytes:
        try:
            return os.read(self._group, fanotify.MAX_EVENTS_BYTES)
        except BlockingIOError:
            return b""

    def _sort(self, events: Iterable[Event], batch: Batch) -> None:
        """Add the events of other processes to a batch, each object and each name once."""
        for event in events:
            self._events += 1
            mask = event.mask
            if mask & fanotify.FAN_Q_OVERFLOW:
                batch.lost = True
            elif event.pid == self._pid:
                self._own += 1
            else:
                if mask & fanotify.OBJECT_CHANGED and event.subject is not None:
                    batch.objects[event.subject] = batch.objects.get(event.subject, 0) | mask
                if mask & fanotify.NAMES_CHANGED and event.directory is not None:
                    key = event.directory, event.name
                    batch.names[key] = batch.names.get(key, 0) | mask

    async def _resolve(self, places: set[Place]) -> None:
        """Find out which files unknown places identify. A handle identifies the same file for ever."""
        unknown = [
            (place, self._anchors[place.fsid])
            for place in places
            if place not in self._marked and place not in self._resolved and place.fsid in self._anchors
        ]
        if not unknown:
            return
        if len(self._resolved) > MAX_RESOLVED:
            self._resolved.clear()
        found = await self._services.backing.in_thread(_open_all, unknown)
        self._resolved.update(found)

    def _find(self, place: Place) -> list[tuple[Inode | None, FileKey | None]]:
        """Return the inode and key of each file at a place that the kernel or a cache may know."""
        marked = self._marked.get(place)
        if marked is not None:
            return [(inode, inode.file_key) for inode in marked]
        keys = self._resolved.get(place, ())
        found = [(self._inodes.known_as(key), key) for key in keys]
        return [(inode, inode.file_key if inode and inode.dentry else key) for inode, key in found]

    def _object_changed(self, place: Place, mask: int) -> None:
        services = self._services
        for inode, key in self._find(place):
            file = None if key is None else services.pagecache.known(key)
            if inode is None and file is None:
                continue
            self._invalidations += 1
            if file is not None:
                services.coherency.distrust(file)
                if mask & fanotify.FAN_DELETE_SELF:
                    services.pagecache.forget(file)
            if inode is not None:
                drop_in_kernel(self._services, inode)
                look(self._services, inode)

    def _name_changed(self, place: Place, name: bytes, mask: int) -> None:
        notifier = self._services.notifier
        for directory, _ in self._find(place):
            if directory is None:
                continue
            self._invalidations += 1
            notifier.inode(directory.node)  # its times and link count
            if mask & fanotify.NAMES_CHANGED == fanotify.FAN_CREATE:
                continue  # there was no such name, and with this mode absence is not cached
            if self._is_gone(directory, name):
                notifier.entry(directory.node, name)  # and with it, if idle, the inode
            else:
                notifier.expire(directory.node, name)

    def _is_gone(self, directory: Inode, name: bytes) -> bool:
        """Tell whether the name is gone by now; False if that cannot be told at once."""
        if directory.fd < 0 or not self._services.is_local(directory):
            return False
        try:  # the directory has just changed: it is in memory
            os.stat(name, dir_fd=directory.fd, follow_symlinks=False)
        except OSError as exc:
            return exc.errno == errno.ENOENT
        return False

    async def flush_everything(self) -> None:
        """Flush all files, here and in the kernel, as anything may have changed."""
        services = self._services
        for number, file in enumerate(services.pagecache.files()):
            services.coherency.distrust(file)
            if number % FLUSH_BATCH == 0:
                await trio.lowlevel.checkpoint()
        for number, inode in enumerate(self._inodes.all()):
            drop_in_kernel(self._services, inode)
            if inode.parent is not None:
                services.notifier.expire(inode.parent.node, inode.name)
            look(self._services, inode)
            if number % FLUSH_BATCH == 0:
                await trio.lowlevel.checkpoint()


def _open_all(places: list[tuple[Place, list[int]]]) -> dict[Place, list[FileKey]]:
    """Identify files by their handles, in a thread; those that are gone are left out."""
    found: dict[Place, list[FileKey]] = {}
    for place, anchors in places:
        keys = [_open_one(anchor, place.handle) for anchor in anchors]
        known = [key for key in keys if key is not None]
        if known:
            found[place] = known
    return found


def _open_one(anchor: int, handle: bytes) -> FileKey | None:
    """Return the key of the file with that handle on the file system of ``anchor``."""
    try:
        fd = syscalls.open_by_handle(anchor, handle, os.O_PATH | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        st = os.fstat(fd)
        generation = file_handles.name_to_handle(fd) if stat_module.S_ISREG(st.st_mode) else b""
        return FileKey(st.st_dev, st.st_ino, generation)
    except OSError:
        return None
    finally:
        os.close(fd)
