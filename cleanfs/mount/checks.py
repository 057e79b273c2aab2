"""Find the reasons why a mount would fail, or has failed."""

import errno
import os
import stat as stat_module

from cleanfs.fs.control import CONTROL_NAME
from cleanfs.fuse.transport import Transport, obstacle
from cleanfs.linux.mounts import FS_TYPE, mounted_at
from cleanfs.mount.config import MountConfig, MountError
from cleanfs.mount.mountpoint import reuse_dead_mountpoint

DEVICE = "/dev/fuse"

NO_MODULE = "load the kernel's module (modprobe fuse), or give it to the container (--device /dev/fuse)"

DEVICE_REMEDIES = {
    errno.ENOENT: NO_MODULE,
    errno.ENODEV: NO_MODULE,
    errno.ENXIO: NO_MODULE,
    errno.EACCES: "its mode keeps you out: mount as root, or have root run chmod 666 /dev/fuse",
    errno.EPERM: "a container must be given it (--device /dev/fuse --cap-add SYS_ADMIN)",
}
"""What the user can do if the device cannot be opened, by errno."""

CAP_SYS_ADMIN = 21
"""A bit number in the sets of capabilities(7)."""

PRIVILEGED = frozenset({"suid", "dev", "nosymfollow"})
"""Mount options that fusermount3 refuses to an ordinary user."""


def check(config: MountConfig) -> None:
    """Check all that can be known to fail before mounting. Raises MountError."""
    source, mountpoint = config.source, config.mountpoint
    _check_directory("source", source)
    if not os.access(source, os.R_OK | os.X_OK, effective_ids=True):
        raise MountError(f"source {source} is not readable")
    if os.path.lexists(os.path.join(os.fsencode(source), CONTROL_NAME)):
        name = CONTROL_NAME.decode()
        raise MountError(f"source {source} has an entry {name}, the name of the control directory")
    reuse_dead_mountpoint(mountpoint)
    mounted = mounted_at(mountpoint)
    # Mounting on the source itself is fine: we hold the directory below the mount.
    if mounted is not None and (mountpoint != source or mounted.fs_type == FS_TYPE):
        raise MountError(f"mount point {mountpoint} is already a mount ({mounted.fs_type})")
    if not os.path.lexists(mountpoint):
        raise MountError(f"mount point {mountpoint} does not exist: make the directory first")
    _check_directory("mount point", mountpoint)  # what is mounted there may not reply
    if mountpoint.startswith(source.rstrip("/") + "/"):
        raise MountError(f"mount point {mountpoint} is inside the source {source}: it would recurse")
    if os.geteuid() != 0 and (words := PRIVILEGED & set(config.flags)):
        raise MountError(f"{' and '.join(sorted(words))} not permitted: only root can mount with that")
    if os.geteuid() != 0 and config.allow_other and not user_allow_other():
        raise MountError(
            "only root may use allow_other here: have root put user_allow_other into /etc/fuse.conf"
        )
    check_device()
    if config.transport is Transport.URING and (why := obstacle()) is not None:
        raise MountError(f"--transport uring: {why}")


def why_no_mount(complaint: str) -> str:
    """Say why libfuse could not mount, and what to do; ``complaint`` is the last line it printed."""
    if os.geteuid() == 0:
        if not _capabilities() >> CAP_SYS_ADMIN & 1:
            return "root lacks CAP_SYS_ADMIN here (for a container: --cap-add SYS_ADMIN)"
    elif "exec" in complaint or "spawn" in complaint:  # libfuse 3.14, libfuse 3.17
        return f"{complaint}: users other than root need fusermount3 (package fuse3)"
    elif "not permitted" in complaint:
        if _status_line("NoNewPrivs") == "1":
            return "fusermount3 gets no rights of root where no_new_privs is set: mount as root"
        return f"{complaint}: is fusermount3 set-uid root (package fuse3)? Else mount as root"
    return complaint or "the kernel or fusermount3 refused"


def _capabilities() -> int:
    """Return this process's effective capabilities as a bit set."""
    return int(_status_line("CapEff"), 16)


def _status_line(name: str) -> str:
    """Return a value from ``/proc/self/status``."""
    with open("/proc/self/status", encoding="utf-8", errors="surrogateescape") as lines:
        return next(line.split()[1] for line in lines if line.startswith(f"{name}:"))


def check_device() -> None:
    """Raise MountError, with advice, if /dev/fuse cannot be opened."""
    try:
        os.close(os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC))
    except OSError as exc:
        remedy = DEVICE_REMEDIES.get(exc.errno or 0)
        why = f"{DEVICE}: {exc.strerror}"
        raise MountError(f"{why}: {remedy}" if remedy else why) from exc


def user_allow_other() -> bool:
    """Return whether /etc/fuse.conf lets users other than root use allow_other."""
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
