"""Resolve, probe and unmount mount points."""

import errno
import logging
import os
import pwd
import subprocess

from cleanfs.fs.control import CONTROL_NAME
from cleanfs.linux.forked_call import REPLY_SECONDS, forked_call
from cleanfs.linux.mount_holders import in_use_by
from cleanfs.linux.mounts import FS_TYPE, mounted_at
from cleanfs.mount.config import MountError

log = logging.getLogger(__name__)


def resolved(path: str) -> str:
    """Return the absolute path of a mount point, without symlinks, and without a request to the mount.

    ``os.path.realpath`` would send one, to learn whether the mount point is a link.
    """
    if ".." not in path.split(os.sep):
        parent, name = os.path.split(os.path.abspath(path))
        absolute = os.path.join(os.path.realpath(parent), name)
        if mounted_at(absolute) is not None:
            return absolute
    return os.path.realpath(path)


def is_dead(mountpoint: str, seconds: float = REPLY_SECONDS) -> bool:
    """Return whether a FUSE mount has lost its daemon.

    The kernel may reply from cached attributes, so the probe uses a name that it never caches. A mount
    that does not reply is not dead.
    """
    try:
        forked_call(lambda: _exists(mountpoint), mountpoint, seconds)
    except OSError as exc:
        return exc.errno == errno.ENOTCONN
    return False


def _exists(mountpoint: str) -> bytes:
    os.stat(os.path.join(os.fsencode(mountpoint), CONTROL_NAME))
    return b""


def reuse_dead_mountpoint(mountpoint: str) -> None:
    """Unmount a cleanfs mount whose daemon was killed ("Transport endpoint is not connected")."""
    mounted = mounted_at(mountpoint)
    if mounted is not None and mounted.fs_type == FS_TYPE and is_dead(mountpoint):
        unmount(mountpoint, lazy=True)
        log.info("cleaned up the dead mount on %s", mountpoint)


def unmount(mountpoint: str, *, lazy: bool = False) -> None:
    """Unmount a ``resolved`` path, as root or as the user who mounted it. Raises MountError."""
    root = os.geteuid() == 0
    point = mounted_at(mountpoint)
    if point is not None and not root and point.owner != os.getuid():
        owner = _user_name(point.owner)
        raise MountError(f"{mountpoint} was mounted by {owner}: only {_and_root(owner)} can unmount it")
    # Without -c, umount looks for a symlink, which sends a request to a mount that may hang.
    command = ["umount", "-c"] if root else ["fusermount3", "-u"]
    if lazy:
        command.append("-l" if root else "-z")
    done = subprocess.run(
        [*command, "--", mountpoint],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
        env={**os.environ, "LC_ALL": "C"},
    )
    if done.returncode:
        complaint = done.stderr.strip().partition("\n")[0].removesuffix(".")
        if point is not None and complaint.endswith("busy"):
            complaint = f"it is busy, in use by {in_use_by(point)}; --lazy detaches it"
        raise MountError(f"cannot unmount {mountpoint}: {complaint or 'the kernel refused'}")


def _user_name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _and_root(owner: str) -> str:
    return owner if owner == "root" else f"{owner} and root"
