"""Define the configuration of a mount, and its errors."""

from dataclasses import dataclass, fields
from enum import Enum
from uuid import UUID

from cleanfs.backends.options import Admission, Allocator, BackendOptions, Poor
from cleanfs.fuse.transport import Transport
from cleanfs.source.io import SourceCache
from cleanfs.vfs.coherency import ATTR_TIMEOUTS, Coherency
from cleanfs.vfs.evictions import EvictionSource
from cleanfs.vfs.source_locks import Locks

LOG_LEVELS = ("debug", "info", "warning", "error")


class MountError(Exception):
    """Says why the mount fails; the message is for the user."""


class OptionError(MountError):
    """Says that options contradict each other, or that the backend cannot honour them."""


@dataclass(frozen=True, slots=True)
class MountConfig:
    """Holds the options of ``cleanfs mount``. Sizes are in bytes, paths absolute and resolved."""

    source: str
    mountpoint: str
    backend: str = "zcache"
    pool_limit: int = 512 << 20
    page_cache: int = 64 << 20
    page_size: int = 4096
    compression: str = "lz4"
    allocator: Allocator = "log"
    poor: Poor | None = None
    admission: Admission = "all"
    checksum: bool = False
    shared_pool: UUID | None = None
    allow_other: bool = False
    read_only: bool = False
    attr_timeout: float = ATTR_TIMEOUTS[Coherency.OPEN]
    coherency: Coherency = Coherency.OPEN
    writeback: bool = False
    locks: Locks = Locks.LOCAL
    transport: Transport = Transport.AUTO
    evictions: EvictionSource = EvictionSource.AUTO
    busy_poll_us: float = 50.0
    source_cache: SourceCache = SourceCache.AUTO
    read_ahead: int = 1 << 20
    memory_pressure: bool = True
    """Whether the caches shrink while memory is short."""
    log_file: str | None = None
    log_level: str = "info"
    flags: tuple[str, ...] = ()
    """Names in ``flags.FLAGS``: noexec, dev, suid..."""
    fuse_options: tuple[str, ...] = ()
    """Further options for libfuse and the kernel, unchanged."""

    def options(self) -> dict[str, object]:
        """Return all options but the mount point and the kernel's flags, by name, for JSON."""
        skipped = {"mountpoint", "read_only", "flags"}
        return {
            field.name.removesuffix("_us"): _plain(getattr(self, field.name))
            for field in fields(self)
            if field.name not in skipped
        }

    def backend_options(self, pool_limit: int) -> BackendOptions:
        """Return the options for a backend with a limit that may have changed since."""
        return BackendOptions(
            pool_limit, self.compression, self.allocator, self.poor, self.admission, self.checksum
        )


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, UUID):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
