"""Access the control files of a mount from the command line, without trusting them.

A mount that claims to be cleanfs need not be: any FUSE file system can claim the type, a directory can
be bind-mounted elsewhere, and the daemon may have another version or be stopped. So nothing here
follows links, waits or reads without a limit, creates or truncates. Statistics are validated before
use.
"""

import errno
import json
import math
import os
import stat as stat_module
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from cleanfs.cli.watch import Stats
from cleanfs.fs.control import CONTROL_NAME
from cleanfs.latency import KINDS, HistogramSnapshot
from cleanfs.linux.forked_call import forked_call
from cleanfs.mount.config import MountError

MAX_TEXT = 1 << 20
"""The largest control file, in bytes. The statistics take some KiB."""

MAX_NUMBER = 1 << 64

STRINGS = ("source", "mountpoint", "backend", "watcher", "identity", "evictions")

NUMBERS = (
    "uptime_seconds", "rss_bytes", "hit_ratio", "compression_ratio", "succ_gets", "failed_gets", "puts",
    "flushes", "pagecache_hits", "pagecache_misses", "pagecache_used", "pagecache_limit",
    "pagecache_lost_files", "pagecache_lost_pages",
    "source_reads", "source_read_bytes", "source_write_bytes", "changes_found", "doubtful_flushes",
    "reads", "read_bytes", "watch_invalidations", "watch_unwatched", "watch_overflows",
    "memory_withheld_bytes",
    "evictions_ring_bytes", "evictions_seen", "evictions_put", "evictions_lost",
    *(f"latency_{kind}_{value}" for kind in KINDS for value in ("count", "p50_us", "p99_us")),
)  # fmt: skip
"""The numbers that tables and lines use."""


def read_control(mountpoint: str, name: bytes) -> bytes:
    """Read a control file. Raises OSError, MountError."""
    content = forked_call(lambda: _read(mountpoint, name), _path(mountpoint, name))
    if len(content) > MAX_TEXT:
        raise MountError(f"{_path(mountpoint, name)} is too long for a control file")
    return content


def _read(mountpoint: str, name: bytes) -> bytes:
    """Read a control file, but not much more than MAX_TEXT bytes."""
    content = b""
    with _opened(mountpoint, name, os.O_RDONLY) as fd:
        while len(content) <= MAX_TEXT and (piece := os.read(fd, MAX_TEXT)):
            content += piece
    return content


def write_control(mountpoint: str, name: bytes, text: str) -> None:
    """Write to an existing control file. Raises OSError, MountError."""
    forked_call(lambda: _write(mountpoint, name, text), _path(mountpoint, name))


def _write(mountpoint: str, name: bytes, text: str) -> bytes:
    with _opened(mountpoint, name, os.O_WRONLY) as fd:
        os.write(fd, text.encode())
    return b""


def read_json(mountpoint: str) -> Stats:
    """Read ``stats.json`` without validating its values. Raises OSError, MountError."""
    return _read_object(mountpoint, b"stats.json", "statistics")


def read_options(mountpoint: str) -> dict[str, Any]:
    """Read ``options.json`` without validating its values. Raises OSError, MountError."""
    return _read_object(mountpoint, b"options.json", "options")


def _read_object(mountpoint: str, name: bytes, what: str) -> dict[str, Any]:
    try:
        parsed = json.loads(
            read_control(mountpoint, name), parse_constant=_no_number, parse_float=_finite
        )
    except (ValueError, RecursionError):
        raise MountError(f"the {what} of {mountpoint} are not JSON") from None
    if not isinstance(parsed, dict):
        raise MountError(f"the {what} of {mountpoint} are not a JSON object")
    return parsed


def read_stats(mountpoint: str) -> Stats:
    """Read the statistics and validate the members that this version uses.

    Raises OSError, MountError.
    """
    stats = read_json(mountpoint)
    if wrong := wrong_member(stats):
        raise MountError(f"the statistics of {mountpoint} are not this version's: {wrong!r}")
    return stats


def read_pid(mountpoint: str) -> int | None:
    """Return the daemon's process id, if its statistics can be read."""
    try:
        pid = read_json(mountpoint).get("pid")
    except (OSError, MountError):
        return None
    return pid if _is_number(pid) and isinstance(pid, int) and pid > 0 else None


def wrong_member(stats: Stats) -> str | None:
    """Return the name of a member that is missing or has the wrong type."""
    for name in STRINGS:
        if not isinstance(stats.get(name), str):
            return name
    pid = stats.get("pid")
    if not _is_number(pid) or not isinstance(pid, int):
        return "pid"
    for name in NUMBERS:
        if not _is_number(stats.get(name)):
            return name
    counters = stats.get("backend_counters")
    if not isinstance(counters, dict) or not all(map(_is_number, counters.values())):
        return "backend_counters"
    return None if _are_latencies(stats.get("latencies")) else "latencies"


def _are_latencies(member: object) -> bool:
    try:
        for kind in KINDS:
            histogram = HistogramSnapshot.from_json(member[kind])  # type: ignore[index]  # or TypeError
            if not all(map(_is_number, (histogram.sum_ns, *histogram.counts))):
                return False
    except (KeyError, TypeError, ValueError, IndexError, AttributeError):
        return False
    return True


def _is_number(value: object) -> bool:
    return (
        isinstance(value, int | float)
        and value is not True
        and value is not False
        and (-MAX_NUMBER <= value <= MAX_NUMBER)
    )


def _no_number(name: str) -> NoReturn:
    raise ValueError(name)


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(text)
    return value


def _path(mountpoint: str, name: bytes) -> str:
    return os.path.join(mountpoint, os.fsdecode(CONTROL_NAME), os.fsdecode(name))


@contextmanager
def _opened(mountpoint: str, name: bytes, flags: int) -> Iterator[int]:
    """Open a control file, which must be a regular file in a directory, without symlinks."""
    path = _path(mountpoint, name)
    flags |= os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    try:
        directory = os.open(
            os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        )
        try:
            fd = os.open(name, flags, dir_fd=directory)
        finally:
            os.close(directory)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, path) from exc
    try:
        if not stat_module.S_ISREG(os.fstat(fd).st_mode):
            raise OSError(errno.EINVAL, "not a control file", path)
        yield fd
    finally:
        os.close(fd)
