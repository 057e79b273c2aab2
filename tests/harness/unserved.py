"""Make a FUSE mount that no process serves: its callers wait until it is unmounted."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def fuse_mount(path: Path) -> Iterator[int]:
    """Mount one as root, and yield the fd of its device."""
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        options = f"fd={device},rootmode=40000,user_id=0,group_id=0"
        command = ["mount", "-i", "-t", "fuse.nobody", "-o", options, "nobody", str(path)]
        subprocess.run(command, check=True, timeout=30, pass_fds=(device,))
        try:
            yield device
        finally:
            subprocess.run(["umount", "-l", str(path)], check=False, timeout=30, capture_output=True)
    finally:
        os.close(device)
