"""Run the command line as a user without privileges, also from a checkout that others cannot reach.

A checkout in a home of mode 0700 is of no use to another user. There the command runs in a mount
namespace of its own, in which an empty directory that everybody may pass stands in place of that home,
and the checkout is bound into it at the path that it has.
"""

import os
import stat
import sys
from pathlib import Path

from tests.harness.mounting import mount_namespace

CHECKOUT = Path(__file__).resolve().parents[2]

NOBODY = 65534

ENTER = """
set -e
closed=$1 checkout=$2 device=$3
shift 3
umask 022
if [ -n "$closed" ]; then
    mount --bind "$checkout" /mnt
    mount -t tmpfs -o mode=755 none "$closed"
    mkdir -p "$checkout"
    mount --move /mnt "$checkout"
fi
[ -z "$device" ] || mount --bind "$device" /dev/fuse
cd /
exec setpriv --reuid 65534 --regid 65534 --clear-groups "$@"
"""


def as_nobody(*args: str | Path, device: Path | None = None) -> list[str | Path]:
    """A command that calls cleanfs as NOBODY, with another device in place of ``/dev/fuse`` if given.

    What it mounts is seen below /proc/PID/root.
    """
    closed = _closed_parent()
    namespace = mount_namespace() if closed or device else []
    enter = ["sh", "-c", ENTER, "sh", closed or "", CHECKOUT, device or ""]
    return [*namespace, *enter, sys.executable, "-m", "cleanfs", *args]


def make_fuse_device(path: Path, mode: int) -> Path:
    """A device node for FUSE."""
    os.mknod(path, stat.S_IFCHR | mode, os.makedev(10, 229))
    path.chmod(mode)
    return path


def open_to_all(path: Path) -> Path:
    """Let everybody pass through the directories above a path (pytest's own are root's alone)."""
    for parent in (path, *path.parents):
        if not parent.stat().st_mode & 0o005:
            parent.chmod(parent.stat().st_mode | 0o011)
    return path


def _closed_parent() -> Path | None:
    """The topmost directory above the checkout that others may not pass, or the checkout itself."""
    for directory in (*reversed(CHECKOUT.parents), CHECKOUT):
        if not directory.stat().st_mode & stat.S_IXOTH:
            return directory
    return None
