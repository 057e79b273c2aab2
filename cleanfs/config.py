"""What a mount is asked to be."""

from dataclasses import dataclass, fields
from enum import Enum
from uuid import UUID

from cleanfs.backends.options import Admission, Allocator, BackendOptions, Poor
from cleanfs.backing import SourceCache
from cleanfs.coherency import ATTR_TIMEOUTS, Coherency
from cleanfs.resident import PythonResident
from cleanfs.sizes import format_size

MIN_POOL_LIMIT = 1 << 20
"""Bytes; less is not worth a pool, whatever the backend."""


LOG_LEVELS = ("debug", "info", "warning", "error")


class MountError(Exception):
    """The mount can not be made; the message is for the user."""


class OptionError(MountError):
    """It was asked for by options that contradict each other, or that the backend cannot follow."""


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
    busy_poll_us: float = 50.0
    source_cache: SourceCache = SourceCache.AUTO
    read_ahead: int = 1 << 20
    memory_pressure: bool = True
    """Whether the caches yield while memory is short."""
    log_file: str | None = None
    log_level: str = "info"
    flags: tuple[str, ...] = ()
    """Words of ``mountflags``: noexec, dev, suid..."""
    fuse_options: tuple[str, ...] = ()
    """Further options for libfuse and the kernel, as they were given."""

    def options(self) -> dict[str, object]:
        """All but the mount point and what the kernel keeps to, by the options' names, for JSON."""
        skipped = {"mountpoint", "read_only", "flags"}
        return {
            field.name.removesuffix("_us"): _plain(getattr(self, field.name))
            for field in fields(self)
            if field.name not in skipped
        }

    def backend_options(self, pool_limit: int) -> BackendOptions:
        """What a backend is made with, at a limit that may have changed since."""
        return BackendOptions(
            pool_limit, self.compression, self.allocator, self.poor, self.admission, self.checksum
        )


def _plain(value: object) -> object:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, UUID):
        return str(value)
    return list(value) if isinstance(value, tuple) else value


def least_sizes(page_size: int) -> tuple[int, int]:
    """Bytes that pool and page cache must have to hold anything, of any engine."""
    return max(MIN_POOL_LIMIT, 4 * page_size), page_size + PythonResident.overhead


def check_sizes(pool_limit: int, page_cache: int, page_size: int) -> None:
    """Raises ValueError, with a message for the user, for limits that nothing would fit into."""
    least_pool, least_page_cache = least_sizes(page_size)
    if pool_limit < least_pool:
        raise ValueError(
            f"--pool-limit {format_size(pool_limit)} is below {format_size(least_pool)}, "
            f"the least with pages of {format_size(page_size)}"
        )
    if 0 < page_cache < least_page_cache:
        raise ValueError(
            f"--page-cache {page_cache} is neither 0 nor at least {least_page_cache} bytes, "
            f"the least with pages of {format_size(page_size)}"
        )
