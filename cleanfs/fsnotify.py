"""The source's kernel tells of changes (``--coherency watch``), so that they are seen without an open.

fanotify reports what happens to files, with the process that did it. What we did ourselves is known,
and left out; after anything else the object is flushed here, and the kernel is told to drop what it
has. Nothing that ``open`` checks is left out for it: an event is one more reason to flush.

A file system is *watched as a whole* where that can be: one mark, and events of all its files, whoever
changes them by whatever path. It takes CAP_SYS_ADMIN and CAP_DAC_READ_SEARCH (events name files by
their handles), and a file system that has handles and an id of its own. Otherwise *each inode that is
held* is marked. The kernel forgets such a mark with its inode, so it is there while we have a
descriptor. Without either an inode has what ``open`` gives it, and is counted.

Order: an event comes after its change. The flush moves the file's version on before the kernel is
told, so a read that the change overtook inserts nothing here, and what it brings to the kernel is
dropped there.

Runs on the main thread, but for the calls that open files by their handles.
"""

import logging
import os
import stat as stat_module
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import trio

from cleanfs import fanotify, syscalls
from cleanfs.coherency import fingerprint
from cleanfs.fanotify import Event, Place
from cleanfs.handles import Services
from cleanfs.inodes import Inode, InodeTable
from cleanfs.mounts import LOCAL_FILE_SYSTEMS
from cleanfs.ops import FileKey

log = logging.getLogger(__name__)

FILE_MASK: Final = fanotify.OBJECT_CHANGED
DIRECTORY_MASK: Final = fanotify.NAMES_CHANGED | fanotify.OBJECT_CHANGED | fanotify.FAN_ONDIR

COALESCE_SECONDS: Final = 0.03
"""How long events gather before the next look: a busy writer costs so many flushes, and no more."""

MAX_RESOLVED: Final = 1 << 14
"""File handles of which is remembered what they stand for, 0.5 KiB each."""

FLUSH_BATCH: Final = 256
"""Files flushed, and inodes told of, before others get to run."""


class UnwatchableError(Exception):
    """The source can not be watched; the message says why."""


@dataclass(frozen=True, slots=True)
class WatchStats:
    """A snapshot."""

    watcher: str = "none"
    """What watches the root of the source: fanotify-filesystem, fanotify-inode, none."""
    watch_file_systems: int = 0
    """Watched as a whole."""
    watch_inodes: int = 0
    """Inodes that have a mark each."""
    watch_unwatched: int = 0
    """Inodes of which no change is announced, although we hold them."""
    watch_events: int = 0
    watch_events_own: int = 0
    """Of these, our own doing."""
    watch_invalidations: int = 0
    """Files, directories and names that were invalidated upon an event."""
    watch_overflows: int = 0
    """How often the kernel lost events, and everything was flushed."""


class SourceWatch:
    """The marks of one mount and what follows from events. An ``inodes.Watcher``."""

    def __init__(self, services: Services, inodes: InodeTable) -> None:
        """Watch the root, and every inode that is held from now on. Raises UnwatchableError."""
        self._services = services
        self._inodes = inodes
        self._pid = os.getpid()
        try:
            self._group = fanotify.init()
        except OSError as exc:
            raise UnwatchableError(f"fanotify_init: {exc.strerror}") from exc
        self._whole: dict[int, bool] = {}  # by device: watched as a whole, or by its inodes
        self._fsids: dict[int, int] = {}  # by device
        self._anchors: dict[int, list[int]] = {}  # by fsid: descriptors to open handles by
        self._resolved: dict[Place, FileKey] = {}
        self._marked: dict[Place, Inode] = {}
        self._places: dict[int, Place] = {}  # of the marked, by node
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
        why = self._mark_whole(root)
        if why is not None:
            if not self._is_local(root.device):
                fs_type = self._services.types[root.device] or "its type"
                raise UnwatchableError(f"the kernel announces no changes of {fs_type}: {why.strerror}")
            try:
                self._mark_inode(root)
            except OSError as exc:
                raise UnwatchableError(f"fanotify_mark: {exc.strerror}") from exc
            log.info("watching inodes one by one, not the file system: %s", why.strerror)
        elif not self._is_local(root.device):
            fs_type = self._services.types[root.device]
            log.warning("the source is on %s: only changes made on this machine are announced", fs_type)
        self._inodes.watch(self)

    def close(self) -> None:
        """The marks go with the group."""
        os.close(self._group)

    def announces(self, inode: Inode) -> bool:
        """Whether any change of the inode will have an event for as long as we run."""
        return self._whole.get(inode.device, False) and self._is_local(inode.device)

    def stats(self) -> WatchStats:
        """A snapshot."""
        whole = self._whole.get(self._inodes.root.device, False)
        return WatchStats(
            "fanotify-filesystem" if whole else "fanotify-inode",
            sum(self._whole.values()),
            len(self._marked),
            len(self._unwatched),
            self._events,
            self._own,
            self._invalidations,
            self._overflows,
        )

    # -- marks --------------------------------------------------------------------------------

    def held(self, inode: Inode) -> None:
        """Watch it, unless its file system is watched."""
        whole = self._whole.get(inode.device)
        if whole:
            return
        if not self._is_local(inode.device):
            self._give_up(inode, "a file system that may wait for a server")
        elif whole is None and inode.is_dir and self._mark_whole(inode) is None:
            return
        else:
            try:
                self._mark_inode(inode)
            except OSError as exc:
                self._give_up(inode, str(exc.strerror))

    def dropped(self, inode: Inode) -> None:
        """Watch it no more."""
        self._unwatched.discard(inode.node)
        place = self._places.pop(inode.node, None)
        if place is None or self._marked.get(place) is not inode:
            return
        del self._marked[place]
        if inode.fd >= 0:  # else the mark goes when the kernel of the source forgets the inode
            mask = DIRECTORY_MASK if inode.is_dir else FILE_MASK
            try:
                fanotify.mark(self._group, fanotify.FAN_MARK_REMOVE, mask, inode.path())
            except OSError as exc:
                log.debug("a mark is gone already: %s", exc)

    def _mark_whole(self, directory: Inode) -> OSError | None:
        """Watch the file system of a directory. Why that can not be, if it can not."""
        device = directory.device
        flags = fanotify.FAN_MARK_FILESYSTEM
        try:
            path = directory.path()
            fanotify.mark(self._group, flags | fanotify.FAN_MARK_ADD, DIRECTORY_MASK, path)
        except OSError as exc:
            self._whole[device] = False
            return exc
        try:
            anchor = self._inodes.mount_fd(device)
            os.close(syscalls.open_by_handle(anchor, syscalls.event_handle(directory.fd), os.O_PATH))
        except OSError as exc:
            fanotify.mark(self._group, flags | fanotify.FAN_MARK_REMOVE, DIRECTORY_MASK, path)
            self._whole[device] = False
            return exc
        self._whole[device] = True
        self._anchors.setdefault(self._fsid(directory), []).append(anchor)
        log.info("watching the file system of device %d:%d", os.major(device), os.minor(device))
        return None

    def _mark_inode(self, inode: Inode) -> None:
        """Raises OSError."""
        mask = DIRECTORY_MASK if inode.is_dir else FILE_MASK
        flags = fanotify.FAN_MARK_ADD | fanotify.FAN_MARK_EVICTABLE
        fanotify.mark(self._group, flags, mask, inode.path())
        place = Place(self._fsid(inode), syscalls.event_handle(inode.fd))
        self._marked[place] = inode
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
        """Take events until cancelled."""
        while True:
            await trio.lowlevel.wait_readable(self._group)
            await self._take()
            await trio.sleep(COALESCE_SECONDS)

    async def _take(self) -> None:
        """All events that are there, as one batch."""
        objects: dict[Place, int] = {}
        names: dict[tuple[Place, bytes], int] = {}
        lost = False
        while buffer := self._read():
            try:
                events = fanotify.parse(buffer)
            except ValueError:
                log.exception("events that can not be read")
                lost = True
                continue
            lost = self._sort(events, objects, names) or lost
            await trio.lowlevel.checkpoint()
        if lost:
            self._overflows += 1
            if self._overflows == 1:
                log.warning("events were lost: everything is flushed (fs.fanotify.max_queued_events)")
            await self.flush_everything()
            return
        await self._resolve({*objects, *(directory for directory, _ in names)})
        for place in objects:
            self._object_changed(place, objects[place])
        for (place, name), mask in names.items():
            self._name_changed(place, name, mask)

    def _read(self) -> bytes:
        try:
            return os.read(self._group, fanotify.MAX_EVENTS_BYTES)
        except BlockingIOError:
            return b""

    def _sort(
        self,
        events: Iterable[Event],
        objects: dict[Place, int],
        names: dict[tuple[Place, bytes], int],
    ) -> bool:
        """What others did, each object and each name once. Whether events were lost."""
        lost = False
        for event in events:
            self._events += 1
            mask = event.mask
            if mask & fanotify.FAN_Q_OVERFLOW:
                lost = True
            elif event.pid == self._pid:
                self._own += 1
            else:
                if mask & fanotify.OBJECT_CHANGED and event.subject is not None:
                    objects[event.subject] = objects.get(event.subject, 0) | mask
                if mask & fanotify.NAMES_CHANGED and event.directory is not None:
                    key = event.directory, event.name
                    names[key] = names.get(key, 0) | mask
        return lost

    async def _resolve(self, places: set[Place]) -> None:
        """Find out what handles stand for, of which that is not known. One never stands for another."""
        unknown = [
            (place, self._anchors[place.fsid])
            for place in places
            if place not in self._marked and place not in self._resolved and place.fsid in self._anchors
        ]
        if not unknown:
            return
        if len(self._resolved) > MAX_RESOLVED:
            self._resolved.clear()
        found = await self._services.backing.run(_open_all, unknown)
        self._resolved.update(found)

    def _find(self, place: Place) -> tuple[Inode | None, FileKey | None]:
        inode = self._marked.get(place)
        if inode is not None:
            return inode, inode.file_key
        key = self._resolved.get(place)
        if key is None:
            return None, None
        return self._inodes.by_id(key.device, key.inode), key

    def _object_changed(self, place: Place, mask: int) -> None:
        inode, key = self._find(place)
        services = self._services
        file = None if key is None else services.pagecache.known(key)
        if inode is None and file is None:
            return
        self._invalidations += 1
        if file is not None:
            services.coherency.distrust(file)
            if mask & fanotify.FAN_DELETE_SELF:
                services.pagecache.forget(file)
        if inode is not None:
            self._look_again(inode)
            services.notifier.inode(inode.node)

    def _look_again(self, inode: Inode) -> None:
        """Know the size of an open file again, so that reads need not all go to the source."""
        services = self._services
        if inode.file_key is None or not inode.open_fds or not services.is_local(inode):
            return
        file = services.pagecache.known(inode.file_key)
        if file is not None:
            before = services.before()
            st = os.fstat(inode.open_fds[-1])
            now = fingerprint(st, services.types[st.st_dev], before.now_ns)
            services.coherency.on_refresh(file, now, before.clock)

    def _name_changed(self, place: Place, name: bytes, mask: int) -> None:
        directory, _ = self._find(place)
        if directory is None:
            return
        self._invalidations += 1
        services = self._services
        services.notifier.inode(directory.node)  # its times and link count
        if mask & fanotify.NAMES_GONE:  # that there is no such name is never believed
            services.notifier.expire(directory.node, name)

    async def flush_everything(self) -> None:
        """Whatever is known may have changed."""
        services = self._services
        for number, file in enumerate(services.pagecache.files()):
            services.coherency.distrust(file)
            if number % FLUSH_BATCH == 0:
                await trio.lowlevel.checkpoint()
        for number, inode in enumerate(self._inodes.all()):
            services.notifier.inode(inode.node)
            if inode.parent is not None:
                services.notifier.expire(inode.parent.node, inode.name)
            if number % FLUSH_BATCH == 0:
                await trio.lowlevel.checkpoint()
        for inode in self._inodes.all():
            self._look_again(inode)


def _open_all(places: list[tuple[Place, list[int]]]) -> dict[Place, FileKey]:
    """In a thread: what handles stand for; none for files that are gone."""
    found = {}
    for place, anchors in places:
        for anchor in anchors:
            try:
                fd = syscalls.open_by_handle(anchor, place.handle, os.O_PATH | os.O_NOFOLLOW)
            except OSError:
                continue
            try:
                st = os.fstat(fd)
                generation = syscalls.name_to_handle(fd) if stat_module.S_ISREG(st.st_mode) else b""
                found[place] = FileKey(st.st_dev, st.st_ino, generation)
            except OSError:
                pass
            finally:
                os.close(fd)
    return found
