"""What can be known to fail before a mount is tried, and why one failed that was."""

import os
import stat as stat_module

from cleanfs.config import MountConfig, MountError
from cleanfs.control import CONTROL_NAME
from cleanfs.mountpoint import reuse_dead_mountpoint
from cleanfs.mounts import FS_TYPE, mounted_at


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
    mounted = mounted_at(mountpoint)
    # On the source itself is fine: what we hold is below the mount, and nothing leads back into it.
    if mounted is not None and (mountpoint != source or mounted.fs_type == FS_TYPE):
        raise MountError(f"mount point {mountpoint} is already a mount ({mounted.fs_type})")
    _check_directory("mount point", mountpoint)  # what is mounted there may not answer
    if mountpoint.startswith(source.rstrip("/") + "/"):
        raise MountError(f"mount point {mountpoint} is inside the source {source}: it would recurse")
    if not os.path.exists("/dev/fuse"):
        raise MountError("/dev/fuse is missing: is the fuse kernel module loaded?")
    if os.geteuid() != 0 and config.allow_other and not user_allow_other():
        raise MountError("allow_other is not permitted: set user_allow_other in /etc/fuse.conf")


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


def _check_directory(what: str, path: str) -> None:
    try:
        st = os.stat(path)
    except FileNotFoundError:
        raise MountError(f"{what} {path} does not exist") from None
    except OSError as exc:
        raise MountError(f"{what} {path} is not readable: {exc.strerror}") from None
    if not stat_module.S_ISDIR(st.st_mode):
        raise MountError(f"{what} {path} is not a directory")
