"""Change the options of a mount: ``mount -o remount``.

The kernel's flags are set as for any file system. The daemon's run-time options are written to its
control files. All other options need a new mount, so changing one is refused.
"""

import os
from collections.abc import Collection, Iterable, Mapping

from cleanfs.cli.client import read_options, write_control
from cleanfs.linux.mounts import FS_TYPE, MountPoint, mounted_at
from cleanfs.memory.least_sizes import check_sizes
from cleanfs.mount.config import MountConfig, MountError
from cleanfs.mount.flags import PRIVILEGES, RDONLY, flags_of, remounted, set_flags
from cleanfs.mount.mountpoint import resolved

AT_RUN_TIME = ("backend", "page_cache", "pool_limit", "log_level")
"""Options that have a control file."""


def remount(wanted: MountConfig, named: Collection[str], words: Iterable[str]) -> None:
    """Set the flags in ``words``, and the options in ``named`` to their wanted values.

    All or nothing. Raises MountError, OSError.
    """
    point = cleanfs_mount(wanted.mountpoint)
    current, options = read_options(point.path), wanted.options()
    _refuse_other_source(point, wanted.source, current)
    changed = [name for name in options if name in named and options[name] != current.get(name)]
    fixed = [name for name in changed if name not in AT_RUN_TIME]
    if fixed := fixed + _new_words(wanted, current):
        raise MountError(f"cannot change {', '.join(fixed)} while mounted: unmount first")
    before, after = flags_of(point), remounted(flags_of(point), words)
    if before & PRIVILEGES & ~after and point.owner != 0:
        raise MountError("suid and dev are refused for a mount that an ordinary user made")
    if changed and before & after & RDONLY:
        raise MountError(
            f"cannot change {', '.join(changed)} of a read-only mount: remount it rw first"
        )
    _check_sizes({**current, **{name: options[name] for name in changed}})
    if before & RDONLY:  # the control files are read-only until the flags are set
        set_flags(point, after)
        try:
            _write(point.path, changed, options, current)
        except OSError:
            set_flags(cleanfs_mount(point.path), before)
            raise
    else:
        _write(point.path, changed, options, current)
        try:
            set_flags(point, after)
        except MountError:
            _write(point.path, changed, current, current)
            raise


def cleanfs_mount(path: str) -> MountPoint:
    """Return the mount at a path. Raises MountError if it is not a cleanfs mount."""
    point = mounted_at(resolved(path))
    if point is None or point.fs_type != FS_TYPE:
        raise MountError(f"{path} is not a cleanfs mount point (cleanfs list shows them)")
    return point


def kernel_options(path: str) -> list[str]:
    """Return a mount's options in mountinfo, which mount(8) repeats. Raises MountError."""
    return cleanfs_mount(path).super_options.split(",")


def _refuse_other_source(point: MountPoint, source: str, current: Mapping[str, object]) -> None:
    """Refuse another source. mount(8) passes on that of fstab, or of mountinfo, with escapes."""
    if source not in (current.get("source"), os.path.realpath(point.source)):
        raise MountError(
            f"cannot change the source, {current.get('source')}, while mounted: unmount first"
        )


def _new_words(wanted: MountConfig, current: Mapping[str, object]) -> list[str]:
    """Return the names of changed options for libfuse and the kernel."""
    known = current.get("fuse_options")
    new = [word for word in wanted.fuse_options if not isinstance(known, list) or word not in known]
    return [word.partition("=")[0] for word in new]


def _check_sizes(options: Mapping[str, object]) -> None:
    sizes = [options.get(name) for name in ("pool_limit", "page_cache", "page_size")]
    try:
        check_sizes(*[size for size in sizes if isinstance(size, int)])
    except (ValueError, TypeError) as exc:
        raise MountError(str(exc)) from exc


def _write(
    path: str, names: Iterable[str], values: Mapping[str, object], before: Mapping[str, object]
) -> None:
    """Write to control files; if one fails, restore those before it."""
    done: list[str] = []
    try:
        for name in names:
            write_control(path, name.encode(), f"{values[name]}\n")
            done.append(name)
    except OSError:
        _write(path, done, before, before)
        raise
