"""Test a mount in a chroot whose root is not a mount point: mountinfo lacks its file system."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness.mounting import mount_namespace

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("setpriv") is None, reason="needs root and setpriv"
)

MAKE_ROOT = """
set -e
mount -n -t tmpfs none "$1"
mkdir "$1/root"
for entry in /*; do
    if [ -L "$entry" ]; then
        cp -P "$entry" "$1/root"
    elif [ -d "$entry" ]; then
        mkdir "$1/root$entry"
        mount -n --bind "$entry" "$1/root$entry"
    fi
done
mount -n -t proc none "$1/root/proc"
mount -n --rbind /dev "$1/root/dev"
mkdir "$1/root/cleanfs-source" "$1/root/cleanfs-mnt"
echo text > "$1/root/cleanfs-source/f"
shift
"""
"""Makes a directory on a new file system the root, with bind mounts of the machine's directories. The
mounts below them are not bound: /tmp would bring the new file system itself."""

SESSION = """
set -e
cd /
trap 'umount -n -l /cleanfs-mnt' EXIT
"$@" mount --coherency watch --log-file /cleanfs-log /cleanfs-source /cleanfs-mnt
cat /cleanfs-mnt/f
tr -d '\\n' < /cleanfs-mnt/.cleancache/stats.json; echo
trap - EXIT
"$@" umount /cleanfs-mnt
cat /cleanfs-log
"""


@pytest.mark.parametrize("reach", ["filesystem", "inode"])
def test_the_source_is_recognised_as_local(tmp_path: Path, reach: str) -> None:
    top = tmp_path / "top"
    top.mkdir()
    drop_capability = ["setpriv", "--bounding-set=-dac_read_search", "--inh-caps=-dac_read_search"]
    change_root = ["chroot", str(top / "root"), *(drop_capability if reach == "inode" else [])]
    session = [*change_root, "sh", "-c", SESSION, "sh", sys.executable, "-m", "cleanfs"]
    done = subprocess.run(
        [*mount_namespace(), "sh", "-c", MAKE_ROOT + '"$@"', "sh", str(top), *session],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    content, stats, *log = done.stdout.splitlines()
    assert content == "text"
    assert json.loads(stats)["watcher"] == f"fanotify-{reach}"
    assert not [line for line in log if "WARNING" in line]
