"""One mount's life: check, build, daemonise, run, unmount."""

import errno
import gc
import logging
import os
import resource
import signal
import socket
import stat as stat_module
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from uuid import UUID

import pyfuse3
import trio

from cleanfs import __version__, backends, syscalls
from cleanfs.backing import Backing
from cleanfs.cleancache import Cleancache
from cleanfs.coherency import Coherency, CoherencyChecker
from cleanfs.control import CONTROL_NAME, DROP_CLEANCACHE, DROP_PAGE_CACHE, NO_BACKEND, Control
from cleanfs.filesystem import CleanFS
from cleanfs.handles import Services
from cleanfs.inodes import InodeTable
from cleanfs.mounts import FS_TYPE, FileSystemTypes, mounted_at
from cleanfs.notify import Notifier
from cleanfs.ops import Backend
from cleanfs.pagecache import PAGE_OVERHEAD, PageCache
from cleanfs.reclaim import TwoListReclaim
from cleanfs.stats import MountStats

log = logging.getLogger(__name__)

MAX_INODES = 1 << 16
"""Inodes that the kernel may remember before it is asked to forget: some 40 MiB here."""

RESERVED_FDS = 128
"""Descriptors for everything that is not an inode or an open file."""

STOP_GRACE_SECONDS = 5.0
"""What requests that wait for a hung source get, after a signal, before they are abandoned."""

ANSWER_TIMEOUT_SECONDS = 30.0
"""How long a new mount may take to answer the first stat."""


MIN_POOL_LIMIT = 1 << 20
"""Bytes; less is not worth a pool, whatever the backend."""

READY = "ready"
"""What the daemon tells the process that waits for it."""


class MountError(Exception):
    """The mount can not be made; the message is for the user."""


@dataclass(frozen=True, slots=True)
class MountConfig:
    """What ``cleanfs mount`` was asked for. Sizes in bytes, paths absolute and resolved."""

    source: str
    mountpoint: str
    backend: str = "zcache"
    pool_limit: int = 512 << 20
    page_cache: int = 64 << 20
    page_size: int = 4096
    compression: str = "lz4"
    shared_pool: UUID | None = None
    allow_other: bool = False
    read_only: bool = False
    attr_timeout: float = 1.0
    coherency: Coherency = Coherency.OPEN
    fuse_options: tuple[str, ...] = field(default=())
    """Options for the kernel that have no name of ours: noexec, dev, suid..."""


class Mount:
    """The running mount: all parts, and the operator's view of them (``control.Operator``)."""

    def __init__(self, config: MountConfig) -> None:
        """Build everything short of mounting. Raises MountError, OSError."""
        self.config = config
        self._started = time.monotonic()
        self._pool_limit = config.pool_limit
        self._cleancache = Cleancache()
        if config.backend != NO_BACKEND:
            self._cleancache.register(self._make_backend(config.backend))
        self._fs = self._cleancache.init_fs(config.page_size, config.shared_pool)
        self._pagecache = PageCache(config.page_cache, self._fs, TwoListReclaim())
        self._coherency = CoherencyChecker(self._pagecache, config.coherency)
        self._notifier = Notifier()
        self._backing = Backing()
        services = Services(
            self._backing, self._pagecache, self._coherency, FileSystemTypes(), self._notifier
        )
        root_fd = os.open(config.source, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._inodes = InodeTable(root_fd, raise_fd_limit(), MAX_INODES)
        finally:
            os.close(root_fd)
        self._filesystem = CleanFS(
            services, self._inodes, Control(self), attr_timeout=config.attr_timeout
        )

    async def run(self, ready: Callable[[], None]) -> None:
        """Mount, call ``ready`` when the mount answers, serve until unmounted or told to stop."""
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            self._mount()
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._notifier.run)
                    nursery.start_soon(_stop_on_signal, signals, nursery.cancel_scope)
                    nursery.start_soon(self._announce, ready)
                    await pyfuse3.main()
                    nursery.cancel_scope.cancel()
            finally:
                self._fs.flush_fs()
                self._inodes.close()
                pyfuse3.close(unmount=True)
                log.info("unmounted %s", self.config.mountpoint)

    def _mount(self) -> None:
        with _captured_stderr() as complaints:
            try:
                pyfuse3.init(self._filesystem, self.config.mountpoint, self._fuse_options())
            except RuntimeError as exc:
                why = _last_line(complaints) or why_no_mount(self.config)
                raise MountError(f"can not mount on {self.config.mountpoint}: {why}") from exc

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
            pool_id=self._fs.pool_id,
            coherency=self.config.coherency.value,
            changes_found=self._coherency.changes_found,
            open_files=self._filesystem.open_files,
            cleancache=self._cleancache.stats(),
            pagecache=self._pagecache.stats(),
            backing=self._backing.stats(),
            inodes=self._inodes.stats(),
            counters=counters,
        )

    @property
    def pool_limit(self) -> int:
        """Bytes that the backend may use, or the next one."""
        backend = self._cleancache.backend
        return self._pool_limit if backend is None else backend.pool_limit

    def set_backend(self, name: str) -> None:
        """Register, or unregister with ``none``. Raises ValueError, BackendBusyError, LookupError."""
        if name == NO_BACKEND:
            self._cleancache.unregister()
            syscalls.trim_malloc()
        else:
            factory = backends.load(name)
            self._cleancache.check_free()
            self._cleancache.register(factory(self._pool_limit, self.config.compression))

    def set_pool_limit(self, limit: int) -> None:
        """Resize, at once. Raises ValueError for what no backend could work with."""
        check_sizes(limit, 0, self.config.page_size)
        backend = self._cleancache.backend
        if backend is not None:
            backend.resize(limit)
            syscalls.trim_malloc()
        self._pool_limit = limit

    def set_page_cache(self, limit: int) -> None:
        """Resize, at once. Raises ValueError for less than a page, except 0."""
        check_sizes(self._pool_limit, limit, self.config.page_size)
        self._pagecache.resize(limit)
        syscalls.trim_malloc()

    def drop(self, what: int) -> None:
        """Drop the page cache first, so that what it evicts goes too if cleancache is dropped."""
        if what & DROP_PAGE_CACHE:
            self._pagecache.drop()
        if what & DROP_CLEANCACHE:
            self._fs.drop_pool()
        syscalls.trim_malloc()

    # -- pieces -----------------------------------------------------------------------------

    def _make_backend(self, name: str) -> Backend:
        try:
            return backends.load(name)(self._pool_limit, self.config.compression)
        except (ValueError, backends.UnknownBackendError) as exc:
            raise MountError(str(exc)) from exc

    def _fuse_options(self) -> set[str]:
        config = self.config
        options = set(pyfuse3.default_options)  # default_permissions
        options |= {f"fsname={option_text(config.source)}", f"subtype={FS_TYPE.partition('.')[2]}"}
        options |= set(config.fuse_options)
        if config.allow_other:
            options.add("allow_other")
        if config.read_only:
            options.add("ro")
        return options

    async def _announce(self, ready: Callable[[], None]) -> None:
        with trio.fail_after(ANSWER_TIMEOUT_SECONDS):
            await trio.to_thread.run_sync(os.stat, self.config.mountpoint, abandon_on_cancel=True)
        log.info("mounted %s on %s", self.config.source, self.config.mountpoint)
        ready()
        notify_systemd()


async def _stop_on_signal(signals: AsyncIterator[int], everything: trio.CancelScope) -> None:
    """Leave the main loop at the first signal; abandon what does not end in time."""
    number = await anext(signals)
    log.info("stopping on %s", signal.Signals(number).name)
    pyfuse3.terminate()
    await trio.sleep(STOP_GRACE_SECONDS)
    log.warning("the source does not answer; open requests are abandoned")
    everything.cancel()


def check(config: MountConfig) -> None:
    """Everything that can be known to fail before mounting. Raises MountError."""
    source, mountpoint = config.source, config.mountpoint
    _check_directory("source", source)
    if not os.access(source, os.R_OK | os.X_OK, effective_ids=True):
        raise MountError(f"source {source} is not readable")
    if os.path.lexists(os.path.join(os.fsencode(source), CONTROL_NAME)):
        name = CONTROL_NAME.decode()
        raise MountError(f"source {source} has an entry {name}, the name of the control directory")
    reuse_dead_mountpoint(mountpoint)
    _check_directory("mount point", mountpoint)
    mounted = mounted_at(mountpoint)
    if mounted is not None:
        raise MountError(f"mount point {mountpoint} is already a mount ({mounted.fs_type})")
    # On the source itself is fine: what we hold is below the mount, and nothing leads back into it.
    if mountpoint.startswith(source.rstrip("/") + "/"):
        raise MountError(f"mount point {mountpoint} is inside the source {source}: it would recurse")
    if not os.path.exists("/dev/fuse"):
        raise MountError("/dev/fuse is missing: is the fuse kernel module loaded?")
    if os.geteuid() != 0 and config.allow_other and not user_allow_other():
        raise MountError("allow_other is not permitted: set user_allow_other in /etc/fuse.conf")


def reuse_dead_mountpoint(mountpoint: str) -> None:
    """Unmount what a killed daemon left ("Transport endpoint is not connected"); ours only."""
    mounted = mounted_at(mountpoint)
    if mounted is not None and mounted.fs_type == FS_TYPE and is_dead(mountpoint):
        unmount(mountpoint, lazy=True)
        log.info("cleaned up the dead mount on %s", mountpoint)


def is_dead(mountpoint: str) -> bool:
    """Whether a FUSE mount has lost its daemon.

    The kernel's cached attributes do not tell; a name that it never caches does.
    """
    try:
        os.stat(os.path.join(os.fsencode(mountpoint), CONTROL_NAME))
    except OSError as exc:
        return exc.errno == errno.ENOTCONN
    return False


def check_sizes(pool_limit: int, page_cache: int, page_size: int) -> None:
    """Raises ValueError, with a message for the user, for limits that nothing would fit into."""
    least_pool = max(MIN_POOL_LIMIT, 4 * page_size)
    if pool_limit < least_pool:
        raise ValueError(f"pool limit {pool_limit} is below {least_pool} bytes")
    least_page_cache = page_size + PAGE_OVERHEAD
    if 0 < page_cache < least_page_cache:
        raise ValueError(f"page cache {page_cache} is neither 0 nor at least {least_page_cache} bytes")


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount as root or as the user who mounted. Raises MountError."""
    root = os.geteuid() == 0
    command = ["umount"] if root else ["fusermount3", "-u"]
    if lazy:
        command.append("-l" if root else "-z")
    done = subprocess.run([*command, "--", mountpoint], capture_output=True, text=True, check=False)
    if done.returncode:
        raise MountError(
            done.stderr.strip().splitlines()[-1]
            if done.stderr.strip()
            else f"can not unmount {mountpoint}"
        )


def serve(config: MountConfig, ready: Callable[[], None]) -> None:
    """Make the mount and serve it in this process until it ends. Raises MountError, OSError."""
    syscalls.tune_malloc()
    os.umask(0)  # the kernel has applied the caller's
    mount = Mount(config)
    # Pages are bytes and ints, which the cycle collector need not look at; what it would look at
    # are the tables that hold them, ever larger, while requests wait.
    gc.freeze()
    # What trio restores when it ends. A second signal must not kill us before we have unmounted.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    trio.run(mount.run, ready)


def daemonise(config: MountConfig, setup_logging: Callable[[], None]) -> None:
    """Serve from a background process; returns in the caller once the mount answers.

    Raises MountError with the daemon's reason if it does not come up.
    """
    reader, writer = os.pipe()
    if os.fork():
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            message = pipe.read().decode(errors="replace")
        if message != READY:
            raise MountError(message or "the daemon died before the mount was ready")
        return
    os.close(reader)
    os.setsid()
    if os.fork():
        os._exit(0)
    status = 1
    try:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.close(null)
        setup_logging()

        def ready() -> None:
            nonlocal writer
            os.write(writer, READY.encode())
            os.close(writer)
            writer = -1

        serve(config, ready)
        status = 0
    except (MountError, OSError) as exc:
        _report(writer, str(exc))
    except BaseException as exc:
        log.exception("the daemon failed")
        _report(writer, f"internal error: {exc!r}")
    finally:
        logging.shutdown()
        os._exit(status)


@contextmanager
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


def _report(writer: int, message: str) -> None:
    log.error("%s", message)
    if writer >= 0:
        os.write(writer, message.encode(errors="surrogateescape"))


def _check_directory(what: str, path: str) -> None:
    try:
        st = os.stat(path)
    except FileNotFoundError:
        raise MountError(f"{what} {path} does not exist") from None
    except OSError as exc:
        raise MountError(f"{what} {path} is not readable: {exc.strerror}") from None
    if not stat_module.S_ISDIR(st.st_mode):
        raise MountError(f"{what} {path} is not a directory")


def why_no_mount(config: MountConfig) -> str:
    """The likeliest reason why fuse_session_mount failed; libfuse has printed its own to stderr."""
    try:
        os.close(os.open("/dev/fuse", os.O_RDWR))
    except OSError as exc:
        return f"/dev/fuse: {exc.strerror}"
    if os.geteuid() and not os.access(config.mountpoint, os.W_OK):
        return "the mount point is not writable for you"
    return "the kernel or fusermount3 refused"


def user_allow_other() -> bool:
    """Whether /etc/fuse.conf lets users other than root use allow_other."""
    try:
        with open("/etc/fuse.conf", encoding="utf-8") as lines:
            return any(line.strip() == "user_allow_other" for line in lines)
    except OSError:
        return False


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


def rss_bytes() -> int:
    """Resident memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def notify_systemd() -> None:
    """Tell a supervisor that started us with Type=notify that we are ready (sd_notify(3))."""
    address = os.environ.get("NOTIFY_SOCKET")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.connect("\0" + address[1:] if address.startswith("@") else address)
            sock.send(b"READY=1")
