"""Run the command line as an unprivileged user, even from a checkout that others cannot reach.

Another user cannot enter a checkout in a home of mode 0700. So the command runs in a mount namespace of
its own. There, an empty accessible directory replaces that home, and the checkout is bind-mounted below
it at its own path.
"""

import os
import stat
import sys
from pathlib import Path

from tests.harness.mounting import mount_namespace

CHECKOUT = Path(__file__).resolve().parents[2]

NOBODY = 65534

NO_DAC_READ_SEARCH = ("setpriv", "--bounding-set=-dac_read_search", "--inh-caps=-dac_read_search")
"""The prefix of a daemon that may neither watch whole file systems nor open files by handle."""

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
    """Return a command that runs cleanfs as NOBODY, with ``device`` in place of ``/dev/fuse`` if set.

    Its mounts are visible below /proc/PID/root.
    """
    closed = _closed_parent()
    namespace = mount_namespace() if closed or device else []
    enter = ["sh", "-c", ENTER, "sh", closed or "", CHECKOUT, device or ""]
    return [*namespace, *enter, sys.executable, "-m", "cleanfs", *args]


def make_fuse_device(path: Path, mode: int) -> Path:
    """Make a device node for FUSE."""
    os.mknod(path, stat.S_IFCHR | mode, os.makedev(10, 229))
    path.chmod(mode)
    return path


def open_to_all(path: Path) -> Path:
    """Let every user traverse the directories above a path (pytest's own are closed to others)."""
    for parent in (path, *path.parents):
        if not parent.stat().st_mode & 0o005:
            parent.chmod(parent.stat().st_mode | 0o011)
    return path


def _closed_parent() -> Path | None:
    """Return the topmost directory, down to the checkout, that others cannot traverse, if any."""
    for directory in (*reversed(CHECKOUT.parents), CHECKOUT):
        if not directory.stat().st_mode & stat.S_IXOTH:
            return directory
    return None
