"""Mount through libfuse: its options, and the reason if it fails."""

import contextlib
import os
from collections.abc import Iterator

import pyfuse3

from cleanfs.linux.mounts import FS_TYPE
from cleanfs.mount.checks import why_no_mount
from cleanfs.mount.config import MountConfig, MountError
from cleanfs.mount.flags import LIBFUSE
from cleanfs.mount.options import SELINUX


def mount_with_libfuse(operations: pyfuse3.Operations, config: MountConfig) -> None:
    """Mount. Raises MountError with the reason that libfuse or fusermount3 printed."""
    with _captured_stderr() as captured:
        try:
            pyfuse3.init(operations, config.mountpoint, _options(config))
        except RuntimeError as exc:
            why = why_no_mount(_last_line(captured))
            raise MountError(f"cannot mount on {config.mountpoint}: {why}") from exc


def _options(config: MountConfig) -> set[str]:
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


def option_text(path: str) -> str:
    """Write a path as a FUSE option value: printable ASCII, commas and backslashes escaped."""
    ascii_only = path.encode("ascii", "backslashreplace").decode()
    return ascii_only.replace("\\", "\\\\").replace(",", "\\,")


@contextlib.contextmanager
def _captured_stderr() -> Iterator[int]:
    """Redirect the stderr of C code (libfuse, fusermount3) to a file, and yield its fd."""
    before, captured = os.dup(2), os.memfd_create("stderr")
    os.dup2(captured, 2)
    try:
        yield captured
    finally:
        os.dup2(before, 2)
        os.close(before)
        os.close(captured)


def _last_line(fd: int) -> str:
    lines = os.pread(fd, 1 << 16, 0).decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
