"""One mount's life: build, mount, run, unmount."""

import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping

import pyfuse3
import trio

from cleanfs import __version__, backends
from cleanfs.backends.ops import Backend
from cleanfs.cache.cleancache import Cleancache
from cleanfs.cache.files import max_files
from cleanfs.cache.pagecache import PageCache
from cleanfs.cache.resident import Resident, make_resident
from cleanfs.fs.control import CONTROL_NAME, DROP_CLEANCACHE, DROP_PAGE_CACHE, NO_BACKEND, Control
from cleanfs.fs.operations import CleanFS
from cleanfs.fs.stats import MountStats
from cleanfs.fuse.busypoll import BusyPoll
from cleanfs.fuse.init_flags import EXPLICIT_INVAL_DATA, InitFlags
from cleanfs.fuse.interrupts import Interrupts
from cleanfs.fuse.isolated_threads import IsolatedThreads
from cleanfs.fuse.notify import Notifier
from cleanfs.fuse.refused_replies import RefusedReplies
from cleanfs.fuse.request_limits import RequestLimits, set_limits
from cleanfs.fuse.size_sync import MountedAt
from cleanfs.latency import Latencies
from cleanfs.linux import syscalls
from cleanfs.linux.fusectl import connection_of
from cleanfs.linux.mounts import FS_TYPE, FileSystemTypes, all_local, mounted_at
from cleanfs.memory.available import MemoryWatch
from cleanfs.memory.cache_limits import CacheLimits
from cleanfs.memory.malloc import rss_bytes, trim_periodically
from cleanfs.memory.policy import Sizes
from cleanfs.mount.abort_watchdog import AbortWatchdog
from cleanfs.mount.checks import why_no_mount
from cleanfs.mount.config import LOG_LEVELS, MountConfig, MountError, OptionError
from cleanfs.mount.flags import LIBFUSE, flags_of, set_flags, with_words
from cleanfs.mount.mountpoint import reuse_dead_mountpoint
from cleanfs.mount.options import SELINUX
from cleanfs.source.identity import Rule, Rules
from cleanfs.source.io import Backing, SourceCache
from cleanfs.vfs.coherency import Coherency, CoherencyChecker
from cleanfs.vfs.export import can_export
from cleanfs.vfs.handles import Services
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.open_files import LOOK_SECONDS
from cleanfs.vfs.source_watch import SourceWatch, UnwatchableError, WatchStats

log = logging.getLogger(__name__)

MAX_INODES = 1 << 16
"""Inodes that the kernel may remember before it is asked to forget. They take 1 KiB each here."""

RESERVED_FDS = 128
"""Descriptors for everything that is not an inode or an open file."""

MAX_REQUESTS = 10_000
"""Requests in hand at a time. Beyond, none would be read any more, not even for the control files."""

STOP_GRACE_SECONDS = 5.0
"""What requests that wait for a hung source get, after a signal, before they are abandoned."""

WRITE_BACK_SECONDS = 60.0
"""What the kernel gets, after a signal, to write what it kept (``--writeback``), if it goes on."""

QUIET_SECONDS = 0.02
"""How long no write may come, after a signal, for there to be none left."""

ANSWER_TIMEOUT_SECONDS = 30.0
"""How long a new mount may take to answer the first stat."""


STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""After these the daemon unmounts. Of a hangup it would die otherwise, and leave a dead mount."""


class Mount:
    """The running mount: all parts, and the operator's view of them (``control.Operator``)."""

    def __init__(self, config: MountConfig) -> None:
        """Build everything short of mounting. Raises MountError, OSError."""
        self.config = config
        self._started = time.monotonic()
        self._cleancache = Cleancache()
        if config.backend != NO_BACKEND:
            self._cleancache.register(self._make_backend(config.backend, config.pool_limit))
        self._fs = self._cleancache.init_fs(config.page_size, config.shared_pool)
        self._pagecache = PageCache(
            config.page_cache,
            self._fs,
            _make_resident(config.page_size),
            max_files(config.pool_limit),
        )
        self._cache_limits = CacheLimits(
            self._cleancache,
            self._pagecache,
            Sizes(config.pool_limit, config.page_cache),
            MemoryWatch() if config.memory_pressure else None,
        )
        self._coherency = CoherencyChecker(self._pagecache, config.coherency)
        self._notifier = Notifier()
        self._isolated = IsolatedThreads(1)
        self._guardian = AbortWatchdog()
        self._backing = Backing()
        self._busy_poll = BusyPoll(config.busy_poll_us)
        self._latencies = Latencies()
        self._limits = RequestLimits()
        given = RefusedReplies()
        # What it had asked for goes on, without the locks that it had in the kernel.
        self._interrupts = Interrupts(self._backing, given, self._notifier.may_drop_any)
        self._all_local = all_local(config.source)
        services = Services(
            self._backing,
            self._pagecache,
            self._coherency,
            FileSystemTypes(),
            self._notifier,
            self._latencies,
            flushless=config.read_only or self._all_local,
            writeback=config.writeback,
        )
        root_fd = os.open(config.source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            device = os.fstat(root_fd).st_dev
            services.types.learn(device, syscalls.file_system_magic(root_fd))
            self._rules = Rules(services.types)
            self._inodes = InodeTable(
                root_fd,
                raise_fd_limit(),
                MAX_INODES,
                services.space_retry,
                self._rules,
                self._pagecache.lost,
                exports=self._rules[device] is Rule.INODE and can_export(config.source),
            )
        finally:
            os.close(root_fd)
        self._copies_changed()
        self._watch = self._make_watch(services) if config.coherency is Coherency.WATCH else None
        self._filesystem = CleanFS(
            services,
            self._inodes,
            Control(self),
            given,
            attr_timeout=config.attr_timeout,
            watch=self._watch,
        )

    async def run(self, ready: Callable[[], None], stop_signals: Iterable[int]) -> None:
        """Mount, call ``ready`` when the mount answers, serve until unmounted or told to stop."""
        with trio.open_signal_receiver(*stop_signals) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # from now on they are heard
            self._busy_poll.install()
            self._interrupts.install()  # what the handshake then stands in front of
            self._isolated.start()
            self._notifier.start()
            self._guardian.start()
            handshake = InitFlags(self._flags_to_ask_for(), self._agreed)
            self._mount(handshake)
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._isolated.run)
                    nursery.start_soon(self._notifier.run)
                    nursery.start_soon(self._filesystem.keep_bounded)
                    nursery.start_soon(self._interrupts.run)
                    if self._watch is not None:
                        nursery.start_soon(self._watch.run)
                    nursery.start_soon(self._cache_limits.run)
                    nursery.start_soon(trim_periodically)
                    nursery.start_soon(self._stop_on_signal, signals, nursery.cancel_scope)
                    nursery.start_soon(self._announce, ready)
                    await serve_until_the_end()
                    nursery.cancel_scope.cancel()
            finally:
                self._fs.flush_fs()
                if self._watch is not None:
                    self._watch.close()
                if (
                    not self._backing.thread_limiter.oldest_seconds
                ):  # what hangs goes on, by their numbers
                    self._inodes.close()
                handshake.unhook()
                self._interrupts.uninstall()
                self._notifier.close()
                self._isolated.close()
                self._busy_poll.uninstall()
                pyfuse3.close(unmount=True)
                # It leaves a mount alone whose connection was severed (umount -f, fusectl's abort).
                with contextlib.suppress(MountError):
                    reuse_dead_mountpoint(self.config.mountpoint)
                self._guardian.close()
                log.info("unmounted %s", self.config.mountpoint)

    async def _stop_on_signal(self, signals: AsyncIterator[int], everything: trio.CancelScope) -> None:
        """Leave the main loop at the first signal; abandon what does not end in time."""
        number = await anext(signals)
        log.info("stopping on %s", signal.Signals(number).name)
        # What programs have dirty in mappings, and, with --writeback, all that they wrote lately. If
        # the source refuses it, they could not help it.
        await self._write_back_while_it_goes_on()
        pyfuse3.terminate()
        await trio.sleep(STOP_GRACE_SECONDS)
        log.warning("the source does not answer; open requests are abandoned")
        everything.cancel()

    async def _write_back_while_it_goes_on(self) -> None:
        """Give up on a source that hangs, and on programs that never end to write."""
        self._notifier.hurry()
        most = WRITE_BACK_SECONDS if self.config.writeback else STOP_GRACE_SECONDS
        with trio.move_on_after(most) as limit:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._give_up_without_progress, limit)
                with contextlib.suppress(OSError):
                    await self._write_back()
                nursery.cancel_scope.cancel()
        if limit.cancelled_caught:
            log.warning("not all that programs wrote may have reached the source")

    async def _give_up_without_progress(self, scope: trio.CancelScope) -> None:
        ended = -1
        while ended != self._filesystem.writes_ended:
            ended = self._filesystem.writes_ended
            await trio.sleep(STOP_GRACE_SECONDS)
        scope.cancel()

    async def _write_back(self) -> None:
        """Let the kernel write what is dirty in mappings, until no write comes any more.

        ``syncfs`` begins that, but on a FUSE file system it was seen to return before the writes had
        come (Linux 6.18). What it has queued comes before the answer to a later question.
        """
        mountpoint = self.config.mountpoint
        await self._isolated.ask(syscalls.sync_file_system, mountpoint)
        begun = -1
        while begun != self._filesystem.writes_begun or begun != self._filesystem.writes_ended:
            begun = self._filesystem.writes_begun
            await self._isolated.ask(os.statvfs, mountpoint)
            await trio.sleep(QUIET_SECONDS)
        # Should anything be dirty yet, it is where a file is open for writing: a close writes back. To
        # drop a file's pages the kernel first writes them, and waits for that.
        for node in self._filesystem.open_for_writing():
            self._notifier.inode(node)
        await self._notifier.drained()

    def _mount(self, handshake: InitFlags) -> None:
        with _captured_stderr() as complaints:
            try:
                pyfuse3.init(self._filesystem, self.config.mountpoint, self._fuse_options())
            except RuntimeError as exc:
                why = why_no_mount(_last_line(complaints))
                raise MountError(f"can not mount on {self.config.mountpoint}: {why}") from exc
        handshake.begin()
        self._notifier.use_device(handshake.device)
        if handshake.device < 0:  # notifications go by libfuse's descriptor
            self._interrupts.unhook()
        self._guardian.tell(connection_of(handshake.device, self.config.mountpoint))

    def _flags_to_ask_for(self) -> int:
        """Whether the kernel is to drop pages only when it is told to.

        Then it asks for no attributes before it reads from its pages: we look for changes ourselves
        (``openfiles``), not more often than once a second, which would be many questions to a server.
        With ``--writeback`` it drops none anyway.
        """
        config = self.config
        looks = config.coherency is Coherency.NONE or config.attr_timeout >= LOOK_SECONDS
        return EXPLICIT_INVAL_DATA if looks and self._all_local and not config.writeback else 0

    def _agreed(self, flags: int) -> None:
        """With the kernel, on flags of FUSE_INIT."""
        self._notifier.explicit = bool(flags & EXPLICIT_INVAL_DATA)

    # -- the operator's view ------------------------------------------------------------------

    def stats(self) -> MountStats:
        """A snapshot of everything."""
        backend = self._cleancache.backend
        counters: Mapping[str, int] = self._cleancache.call(lambda ops: ops.counters(), {})
        return MountStats(
            version=__version__,
            source=self.config.source,
            mountpoint=self.config.mountpoint,
            pid=os.getpid(),
            uptime_seconds=time.monotonic() - self._started,
            rss_bytes=rss_bytes(),
            page_size=self.config.page_size,
            backend=NO_BACKEND if backend is None else backend.name,
            engine=NO_BACKEND if backend is None else backend.engine,
            pool_id=self._fs.pool_id,
            coherency=self.config.coherency.value,
            source_cache=self.config.source_cache.value,
            identity=self._rules[self._inodes.root.device].value,
            requests=self._limits,
            changes_found=self._coherency.changes_found,
            doubtful_flushes=self._coherency.doubtful_flushes,
            watch=WatchStats() if self._watch is None else self._watch.stats(),
            open_files=self._filesystem.open_files,
            cleancache=self._cleancache.stats(),
            pagecache=self._pagecache.stats(),
            backing=self._backing.stats(),
            inodes=self._inodes.stats(),
            limits=self._cache_limits.stats(),
            busy_poll=self._busy_poll.stats(),
            latencies=self._latencies.stats(),
            counters=counters,
        )

    @property
    def pool_limit(self) -> int:
        """Bytes that the backend was promised, or the next one."""
        return self._cache_limits.configured.pool

    @property
    def page_cache(self) -> int:
        """Bytes that the page cache was promised."""
        return self._cache_limits.configured.page_cache

    def set_backend(self, name: str) -> None:
        """Register, or unregister with ``none``. Raises ValueError, BackendBusyError, LookupError."""
        if name == NO_BACKEND:
            self._cleancache.unregister()
            syscalls.trim_malloc()
        else:
            factory = backends.load(name)
            self._cleancache.check_free()
            self._cleancache.register(factory(self.config.backend_options(self.pool_limit)))
        self._cache_limits.backend_changed()
        self._copies_changed()

    def set_pool_limit(self, limit: int) -> None:
        """Resize, at once. Raises ValueError for what no backend could work with."""
        self._cache_limits.set_pool_limit(limit)

    def set_page_cache(self, limit: int) -> None:
        """Resize, at once. Raises ValueError for less than a page, except 0."""
        self._cache_limits.set_page_cache(limit)
        self._copies_changed()

    @property
    def log_level(self) -> str:
        """The least severe level that is logged."""
        return logging.getLevelName(logging.getLogger().level).lower()

    def set_log_level(self, level: str) -> None:
        """Log from this level on. Raises ValueError if it is none."""
        if level not in LOG_LEVELS:
            raise ValueError(level)
        logging.getLogger().setLevel(level.upper())

    def options(self) -> dict[str, object]:
        """The options that hold now."""
        backend = self._cleancache.backend
        return {
            **self.config.options(),
            "backend": NO_BACKEND if backend is None else backend.name,
            "pool_limit": self.pool_limit,
            "page_cache": self.page_cache,
            "log_level": self.log_level,
        }

    def drop(self, what: int) -> None:
        """Drop the page cache first, so that what it evicts goes too if cleancache is dropped."""
        if what & DROP_PAGE_CACHE:
            self._pagecache.drop()
        if what & DROP_CLEANCACHE:
            self._fs.drop_pool()
        syscalls.trim_malloc()

    # -- pieces -----------------------------------------------------------------------------

    def _copies_changed(self) -> None:
        """Whether we keep pages at all: only then is the source's page cache a second copy."""
        keeps = self._pagecache.limit > 0 or self._fs.pool_id >= 0
        choice = self.config.source_cache
        self._backing.drop_behind = keeps if choice is SourceCache.AUTO else choice is SourceCache.DROP

    def _make_watch(self, services: Services) -> SourceWatch:
        try:
            return SourceWatch(services, self._inodes)
        except UnwatchableError as exc:
            source = self.config.source
            raise MountError(f"can not watch {source}: {exc}; use --coherency open") from exc

    def _make_backend(self, name: str, pool_limit: int) -> Backend:
        try:
            return backends.load(name)(self.config.backend_options(pool_limit))
        except (ValueError, backends.UnknownBackendError) as exc:
            raise OptionError(str(exc)) from exc

    def _fuse_options(self) -> set[str]:
        config = self.config
        options = set(pyfuse3.default_options)  # default_permissions
        options.add(f"subtype={FS_TYPE.partition('.')[2]}")
        selinux = os.path.isdir("/sys/fs/selinux")
        options |= {
            option_text(option)
            for option in config.fuse_options
            if selinux or option.partition("=")[0] not in SELINUX
        }
        if not any(option.startswith("fsname=") for option in config.fuse_options):
            options.add(f"fsname={option_text(config.source)}")
        options |= LIBFUSE.intersection(config.flags)
        if config.allow_other:
            options.add("allow_other")
        if config.read_only:
            options.add("ro")
        return options

    async def _announce(self, ready: Callable[[], None]) -> None:
        with trio.fail_after(ANSWER_TIMEOUT_SECONDS):
            # By this name, which the kernel then knows: to look it up later, it would have to wait for
            # whoever makes or removes a name in the root.
            path = os.path.join(self.config.mountpoint, os.fsdecode(CONTROL_NAME))
            await self._isolated.ask(os.stat, path)
        self._busy_poll.confirm()
        if (point := mounted_at(self.config.mountpoint)) is not None:
            if os.geteuid() == 0:  # those that libfuse does not know
                flags = with_words(flags_of(point), self.config.flags)
                await self._isolated.ask(set_flags, point, flags)
            self._limits = set_limits(point.device, self.config.read_ahead)
            where = MountedAt(self.config.mountpoint, point.device)
            self._notifier.use_mount(where)
        await self._guardian.ready()
        log.info("mounted %s on %s", self.config.source, self.config.mountpoint)
        ready()
        notify_systemd()


def serve(config: MountConfig, ready: Callable[[], None]) -> None:
    """Make the mount and serve it in this process until it ends. Raises MountError, OSError."""
    syscalls.tune_malloc()
    syscalls.keep_memory_private()
    os.umask(0)  # the kernel has applied the caller's
    mount = Mount(config)
    # Pages are bytes and ints, which the cycle collector need not look at; what it would look at
    # are the tables that hold them, ever larger, while requests wait.
    gc.freeze()
    # One that comes now waits until it can be heard. Ignoring is what trio restores when it ends: a
    # second signal must not kill us before we have unmounted.
    stop_signals = _heeded_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for number in stop_signals:
        signal.signal(number, signal.SIG_IGN)
    try:
        trio.run(mount.run, ready, stop_signals)
    finally:
        gc.unfreeze()  # for a process that goes on, perhaps with another mount


async def serve_until_the_end() -> None:
    """Answer requests. How the kernel says that the mount has gone depends on when we ask."""
    try:
        await pyfuse3.main(max_tasks=MAX_REQUESTS)
    except* ConnectionAbortedError:
        log.info("the connection to the kernel has ended")


def _heeded_signals() -> list[signal.Signals]:
    """STOP_SIGNALS; but who was started to ignore a hangup (nohup) goes on ignoring it."""
    return [
        number
        for number in STOP_SIGNALS
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN
    ]


def _make_resident(page_size: int) -> Resident:
    try:
        return make_resident(page_size)
    except ValueError as exc:
        raise MountError(str(exc)) from exc


def raise_fd_limit() -> int:
    """Raise the descriptor limit to the hard one; how many of them inodes may hold."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # Half for inodes; the other half is for open files, which nobody can park.
    return max((min(hard, 1 << 20) - RESERVED_FDS) // 2, 16)


def option_text(path: str) -> str:
    """A path as a FUSE option value: printable ASCII, commas and backslashes escaped."""
    ascii_only = path.encode("ascii", "backslashreplace").decode()
    return ascii_only.replace("\\", "\\\\").replace(",", "\\,")


def notify_systemd() -> None:
    """Tell a supervisor that started us with Type=notify that we are ready (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
                sock.connect("\0" + address[1:] if address.startswith("@") else address)
                sock.send(b"READY=1")
        except OSError as exc:  # it may be somebody else's, inherited: no reason not to serve
            log.warning("can not tell %r that the mount is ready: %s", address, exc)


@contextlib.contextmanager
def _captured_stderr() -> Iterator[int]:
    """Catch what C code writes to stderr (libfuse, fusermount3) in a file, whose descriptor this is."""
    before, caught = os.dup(2), os.memfd_create("stderr")
    os.dup2(caught, 2)
    try:
        yield caught
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(caught)


def _last_line(fd: int) -> str:
    lines = os.pread(fd, 1 << 16, 0).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
