"""Build a mount from its parts, mount it, serve it, unmount it."""

import contextlib
import gc
import logging
import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping

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
from cleanfs.fuse.channel import MAX_REQUESTS, Channel
from cleanfs.fuse.interrupts import Interrupts
from cleanfs.fuse.isolated_threads import IsolatedThreads
from cleanfs.fuse.notify import Notifier
from cleanfs.fuse.protocol import FUSE_EXPLICIT_INVAL_DATA, FUSE_FLOCK_LOCKS, FUSE_POSIX_LOCKS
from cleanfs.fuse.request_limits import RequestLimits, set_limits
from cleanfs.fuse.size_sync import MountedAt
from cleanfs.latency import Latencies
from cleanfs.linux import syscalls
from cleanfs.linux.fusectl import connection_of
from cleanfs.linux.mounts import FileSystemTypes, all_local, mounted_at
from cleanfs.memory.available import MemoryWatch
from cleanfs.memory.cache_limits import CacheLimits
from cleanfs.memory.malloc import rss_bytes, trim_periodically
from cleanfs.memory.policy import Sizes
from cleanfs.mount.abort_watchdog import AbortWatchdog
from cleanfs.mount.config import LOG_LEVELS, MountConfig, MountError, OptionError
from cleanfs.mount.final_write_back import MMAP_SECONDS, WRITEBACK_SECONDS, FinalWriteBack
from cleanfs.mount.flags import flags_of, set_flags, with_names
from cleanfs.mount.libfuse import mount_with_libfuse
from cleanfs.mount.mountpoint import reuse_dead_mountpoint
from cleanfs.mount.systemd import notify_ready
from cleanfs.source.identity import Rule, Rules
from cleanfs.source.io import Backing, SourceCache
from cleanfs.vfs.coherency import Coherency, CoherencyChecker
from cleanfs.vfs.eviction_trial import make_content
from cleanfs.vfs.evictions import Evictions, EvictionSource, UnavailableError
from cleanfs.vfs.export import can_export
from cleanfs.vfs.handles import Services
from cleanfs.vfs.inodes import InodeTable
from cleanfs.vfs.open_files import LOOK_SECONDS
from cleanfs.vfs.source_locks import Locks
from cleanfs.vfs.source_watch import SourceWatch, UnwatchableError, WatchStats

log = logging.getLogger(__name__)

TRIAL_NAME = "evictions"
"""The file in the control directory with which the kernel's evictions are tried out."""

MAX_INODES = 1 << 16
"""Inodes that the kernel may hold before it is made to forget some. Each takes 1 KiB here."""

RESERVED_FDS = 128
"""The fds for everything but inodes and open files."""

STOP_GRACE_SECONDS = 5.0
"""How long requests may wait for a hung source, after a signal, before they are abandoned."""

REPLY_TIMEOUT_SECONDS = 30.0
"""How long a new mount may take to reply to the first stat."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""On these the daemon unmounts. Otherwise a hangup would kill it and leave a dead mount."""


class Mount:
    """Owns all parts of a running mount, and gives the operator access (``control.Operator``)."""

    def __init__(self, config: MountConfig) -> None:
        """Build everything but do not mount yet. Raises MountError, OSError."""
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
        self._fs.state.shared = config.coherency is not Coherency.NONE
        self._coherency = CoherencyChecker(self._pagecache, config.coherency)
        self._notifier = Notifier()
        self._isolated = IsolatedThreads(1)
        self._watchdog = AbortWatchdog()
        self._backing = Backing()
        self._latencies = Latencies()
        self._request_limits = RequestLimits()
        self._all_local = all_local(config.source)
        self._sends_locks = False
        self._channel = Channel(
            config.busy_poll_us,
            self._wanted_init_flags(),
            self._init_flags_granted,
            config.transport,
        )
        # A request whose requester is gone goes on, but the kernel's locks for it are released.
        self._interrupts = Interrupts(self._channel, self._backing, self._notifier.may_drop_any)
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
        self._rules = Rules(services.types)
        self._inodes = self._open_inodes(services)
        self._evictions = Evictions(self._fs.state, self._inodes.states)
        self._notifier.use_evictions(self._evictions)
        self._inodes.on_drop(self._evictions.forget)
        self._failure: MountError | None = None
        self._load_evictions()
        self._update_drop_behind()
        self._watch = self._make_watch(services) if config.coherency is Coherency.WATCH else None
        self._control = Control(self)
        self._filesystem = CleanFS(
            services,
            self._inodes,
            self._control,
            self._channel,
            attr_timeout=config.attr_timeout,
            watch=self._watch,
            locks=config.locks,
        )

    def _load_evictions(self) -> None:
        """Load the program that hands over what the kernel evicts, if that is asked for.

        Raises MountError if it must be used and cannot.
        """
        config = self.config
        if config.evictions is EvictionSource.OWN:
            return
        try:
            self._evictions.load(config.pool_limit, self._cleancache.fast_ops)
        except UnavailableError as exc:
            self._no_evictions(exc)

    async def _start_evictions(self, device: int) -> None:
        if not self._evictions.loaded:
            return
        path = os.path.join(self.config.mountpoint, os.fsdecode(CONTROL_NAME), TRIAL_NAME)
        content = make_content()
        run, invalidate = self._isolated.run_sync, self._notifier.pages_dropped
        try:
            with self._control.unlisted_file(TRIAL_NAME.encode(), content):
                await self._evictions.start(path, content.encode(), device, run, invalidate)
        except UnavailableError as exc:
            self._no_evictions(exc)
            return
        self._cache_limits.leave_pages_to_kernel(self._evictions.ring_bytes)
        self._update_drop_behind()
        log.info("the kernel's evictions fill the pool")

    def _no_evictions(self, reason: UnavailableError) -> None:
        if self.config.evictions is EvictionSource.KERNEL:
            raise MountError(f"--evictions kernel is not possible: {reason}") from reason
        self._evictions.reason = str(reason)
        log.info("evictions of the kernel are not used: %s", reason)

    def _open_inodes(self, services: Services) -> InodeTable:
        """Open the root of the source. Raises OSError."""
        source = self.config.source
        root_fd = os.open(source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            device = os.fstat(root_fd).st_dev
            services.types.learn(device, syscalls.file_system_magic(root_fd))
            return InodeTable(
                root_fd,
                raise_fd_limit(),
                MAX_INODES,
                services.space_retry,
                self._rules,
                self._pagecache.lost,
                exports=self._rules[device] is Rule.INODE and can_export(source),
            )
        finally:
            os.close(root_fd)

    async def run(self, ready: Callable[[], None], stop_signals: Iterable[int]) -> None:
        """Mount, call ``ready`` once the mount replies, and serve until unmounted or signalled."""
        with trio.open_signal_receiver(*stop_signals) as signals:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # from now on they are received
            self._isolated.start()
            self._notifier.start()
            self._watchdog.start()
            self._mount()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._isolated.run)
                    nursery.start_soon(self._notifier.run)
                    nursery.start_soon(self._channel.run)
                    nursery.start_soon(self._filesystem.run_background_tasks)
                    nursery.start_soon(self._interrupts.run)
                    if self._watch is not None:
                        nursery.start_soon(self._watch.run)
                    nursery.start_soon(self._cache_limits.run)
                    nursery.start_soon(trim_periodically)
                    nursery.start_soon(self._stop_on_signal, signals, nursery.cancel_scope)
                    nursery.start_soon(self._announce, ready, nursery.cancel_scope)
                    await serve_until_the_end()
                    await self._channel.drained()
                    nursery.cancel_scope.cancel()
            finally:
                self._evictions.close()
                self._fs.flush_fs()
                if self._watch is not None:
                    self._watch.close()
                # A call that hangs still uses the fds of inodes by number.
                if not self._backing.thread_limiter.oldest_seconds:
                    self._inodes.close()
                self._notifier.close()
                self._isolated.close()
                self._channel.close()
                pyfuse3.close(unmount=True)
                # pyfuse3 does not unmount after an abort (umount -f, fusectl's abort).
                with contextlib.suppress(MountError):
                    reuse_dead_mountpoint(self.config.mountpoint)
                self._watchdog.close()
                log.info("unmounted %s", self.config.mountpoint)
        if self._failure is not None:
            raise self._failure

    async def _stop_on_signal(self, signals: AsyncIterator[int], everything: trio.CancelScope) -> None:
        """Leave the main loop at the first signal; abandon requests that do not end in time."""
        number = await anext(signals)
        log.info("stopping on %s", signal.Signals(number).name)
        seconds = WRITEBACK_SECONDS if self.config.writeback else MMAP_SECONDS
        await FinalWriteBack(
            self.config.mountpoint, seconds, self._filesystem, self._notifier, self._isolated
        ).run()
        pyfuse3.terminate()
        await trio.sleep(STOP_GRACE_SECONDS)
        log.warning("the source does not reply; open requests are abandoned")
        everything.cancel()

    def _mount(self) -> None:
        mount_with_libfuse(self._filesystem, self.config)
        self._channel.begin()
        self._channel.serve_from(self._fs.state)
        self._notifier.use_device(self._channel.device)
        self._watchdog.set_connection(connection_of(self._channel.device, self.config.mountpoint))

    def _wanted_init_flags(self) -> int:
        """Choose whether the kernel sends us locks, and whether it drops pages only when told to.

        In that case it sends no GETATTR before it reads from its pages. Instead ``open_files`` looks
        for changes of open files once a second, which would be many requests to a remote source. With
        ``--writeback`` the kernel never drops pages for a change of attributes.
        """
        config = self.config
        looks = config.coherency is Coherency.NONE or config.attr_timeout >= LOOK_SECONDS
        flags = FUSE_POSIX_LOCKS | FUSE_FLOCK_LOCKS if config.locks is Locks.SOURCE else 0
        if looks and self._all_local and not config.writeback:
            flags |= FUSE_EXPLICIT_INVAL_DATA
        return flags

    def _init_flags_granted(self, flags: int) -> None:
        self._notifier.explicit = bool(flags & FUSE_EXPLICIT_INVAL_DATA)
        self._sends_locks = bool(flags & FUSE_POSIX_LOCKS)

    # -- the operator's view ------------------------------------------------------------------

    def stats(self) -> MountStats:
        """Return a snapshot of all statistics."""
        backend = self._cleancache.backend
        served = self._channel.latencies()
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
            requests=self._request_limits,
            changes_found=self._coherency.changes_found,
            doubtful_flushes=self._coherency.doubtful_flushes,
            watch=WatchStats() if self._watch is None else self._watch.stats(),
            evictions=self._evictions.stats(),
            open_files=self._filesystem.open_files,
            cleancache=self._cleancache.stats(),
            pagecache=self._pagecache.stats(),
            backing=self._backing.stats(
                self._channel.source_reads(), (served.write.total, served.write_bytes)
            ),
            inodes=self._inodes.stats(),
            limits=self._cache_limits.stats(),
            channel=self._channel.stats(),
            latencies=self._latencies.stats() + served,
            counters=counters,
        )

    @property
    def pool_limit(self) -> int:
        """Return the configured limit of the backend, or of the next one, in bytes."""
        return self._cache_limits.configured.pool

    @property
    def page_cache(self) -> int:
        """Return the configured limit of the page cache, in bytes."""
        return self._cache_limits.configured.page_cache

    def set_backend(self, name: str) -> None:
        """Register a backend, or unregister with ``none``.

        Raises ValueError, BackendBusyError, LookupError.
        """
        if name == NO_BACKEND:
            self._cleancache.unregister()
            syscalls.trim_malloc()
        else:
            factory = backends.load(name)
            self._cleancache.check_free()
            self._cleancache.register(factory(self.config.backend_options(self.pool_limit)))
        self._cache_limits.backend_changed()
        self._update_drop_behind()

    def set_pool_limit(self, limit: int) -> None:
        """Resize the pool at once. Raises ValueError for less than any backend can work with."""
        self._cache_limits.set_pool_limit(limit)

    def set_page_cache(self, limit: int) -> None:
        """Resize the page cache at once. Raises ValueError for less than a page, except 0."""
        self._cache_limits.set_page_cache(limit)
        self._update_drop_behind()

    @property
    def log_level(self) -> str:
        """Return the least severe level that is logged."""
        return logging.getLevelName(logging.getLogger().level).lower()

    def set_log_level(self, level: str) -> None:
        """Log messages from this level on. Raises ValueError for an unknown level."""
        if level not in LOG_LEVELS:
            raise ValueError(level)
        logging.getLogger().setLevel(level.upper())

    def options(self) -> dict[str, object]:
        """Return the options in force."""
        backend = self._cleancache.backend
        return {
            **self.config.options(),
            "backend": NO_BACKEND if backend is None else backend.name,
            "pool_limit": self.pool_limit,
            "page_cache": self.page_cache,
            "log_level": self.log_level,
        }

    def drop(self, what: int) -> None:
        """Drop the page cache, then cleancache, so that pages evicted by the first go, too."""
        if what & DROP_PAGE_CACHE:
            self._pagecache.drop()
        if what & DROP_CLEANCACHE:
            self._fs.drop_pool()
        syscalls.trim_malloc()

    # -- pieces -----------------------------------------------------------------------------

    def _update_drop_behind(self) -> None:
        """Drop behind only while we cache pages: else the source's page cache has the only copy."""
        keeps = self._pagecache.limit > 0 or self._fs.pool_id >= 0
        choice = self.config.source_cache
        drops = keeps if choice is SourceCache.AUTO else choice is SourceCache.DROP
        self._backing.drop_behind = self._fs.state.drop_behind = drops

    def _make_watch(self, services: Services) -> SourceWatch:
        try:
            return SourceWatch(services, self._inodes)
        except UnwatchableError as exc:
            source = self.config.source
            raise MountError(f"cannot watch {source}: {exc}; use --coherency open") from exc

    def _make_backend(self, name: str, pool_limit: int) -> Backend:
        try:
            return backends.load(name)(self.config.backend_options(pool_limit))
        except (ValueError, backends.UnknownBackendError) as exc:
            raise OptionError(str(exc)) from exc

    async def _announce(self, ready: Callable[[], None], everything: trio.CancelScope) -> None:
        with trio.fail_after(REPLY_TIMEOUT_SECONDS):
            # This name, so that the kernel caches it: a later lookup would have to wait for a process
            # that creates or removes a name in the root.
            path = os.path.join(self.config.mountpoint, os.fsdecode(CONTROL_NAME))
            await self._isolated.run_sync(os.stat, path)
        self._channel.confirm()
        if self.config.locks is Locks.SOURCE and not self._sends_locks:
            log.warning(
                "the kernel keeps locks itself: without the FUSE channel --locks source is lost"
            )
        if (point := mounted_at(self.config.mountpoint)) is not None:
            if os.geteuid() == 0:  # flags that libfuse does not know
                flags = with_names(flags_of(point), self.config.flags)
                await self._isolated.run_sync(set_flags, point, flags)
            self._request_limits = set_limits(point.device, self.config.read_ahead)
            where = MountedAt(self.config.mountpoint, point.device)
            self._notifier.use_mount(where)
            try:
                await self._start_evictions(point.device)
            except MountError as exc:
                self._failure = exc
                everything.cancel()
                return
        await self._watchdog.ready()
        log.info("mounted %s on %s", self.config.source, self.config.mountpoint)
        ready()
        notify_ready()
        await self._evictions.run()


def serve(config: MountConfig, ready: Callable[[], None]) -> None:
    """Mount, and serve in this process until the mount ends. Raises MountError, OSError."""
    syscalls.tune_malloc()
    syscalls.keep_memory_private()
    os.umask(0)  # ours must not apply: ``Actor.mode`` applies the requester's, or the kernel has
    mount = Mount(config)
    # Pages are bytes and ints, which the cycle collector need not visit. It would only traverse the
    # growing tables that hold them, while requests wait.
    gc.freeze()
    # A signal that comes now stays pending until trio can receive it. When trio ends, it restores
    # SIG_IGN: a second signal must not kill us before we have unmounted.
    stop_signals = _stop_signals()
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    for number in stop_signals:
        signal.signal(number, signal.SIG_IGN)
    try:
        trio.run(mount.run, ready, stop_signals)
    finally:
        gc.unfreeze()  # this process may go on, perhaps with another mount


async def serve_until_the_end() -> None:
    """Serve requests. The kernel reports the end of the mount in one of two ways, by timing."""
    try:
        await pyfuse3.main(max_tasks=MAX_REQUESTS)
    except* ConnectionAbortedError:
        log.info("the connection to the kernel has ended")


def _stop_signals() -> list[signal.Signals]:
    """Return STOP_SIGNALS, without SIGHUP if it is ignored already (nohup)."""
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
    """Raise the fd limit to the hard one, and return how many fds inodes may hold."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # The other half is for open files, whose fds cannot be closed and reopened later.
    return max((min(hard, 1 << 20) - RESERVED_FDS) // 2, 16)
