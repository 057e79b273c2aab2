"""Open many directories at once and list them in part: what they hold is given back at their close."""

import ctypes
import os
import time

from cleanfs.memory.malloc import TRIM_SECONDS

from .directory import fill
from .lab import Daemon, Lab

NAME_BYTES = 32
"""What a name of 11 bytes takes in the daemon while a directory is open and listed."""


def run(lab: Lab) -> None:
    """See the module."""
    source = lab.directory("source")
    names, streams = lab.pick(20_000, 5000), lab.pick(300, 50)
    fill(source / "large", names)
    for i in range(lab.pick(5000, 500)):
        (source / f"d{i}").mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
    libc.readdir.argtypes = libc.closedir.argtypes = [ctypes.c_void_p]
    with lab.mount(source, "--attr-timeout", "60") as fs:
        daemon = Daemon(fs)
        os.listdir(fs.path / "large")  # the inodes come first
        first = daemon.settled()
        opened = []
        for _ in range(streams):
            stream = libc.opendir(os.fsencode(fs.path / "large"))
            libc.readdir(stream)
            opened.append(stream)
        full = daemon.sample()
        each = (full.pss - first.pss) * (1 << 20) / streams / names
        lab.at_most(f"{streams} open listings of {names:,} names: bytes a name", each, NAME_BYTES)
        for stream in opened:
            libc.closedir(stream)
        time.sleep(2 * TRIM_SECONDS)
        last = daemon.settled()
        lab.at_most("PSS that is not given back", last.pss - first.pss, 16, "MiB")
        lab.same("open directories afterwards", daemon.open_files(), 0)
        fds = [os.open(entry, os.O_RDONLY) for entry in fs.path.glob("d*")]
        lab.inform("open directories", len(fds))
        for fd in fds:
            os.listdir(fd)
        lab.at_most("PSS for each", (daemon.sample().pss - last.pss) * 1024 / len(fds), 4, "KiB")
        for fd in fds:
            os.close(fd)
        end = daemon.settled()
        lab.same("afterwards", daemon.open_files(), 0)
        lab.at_most(
            "growth in descriptors beyond inodes", end.fds - last.fds, end.inodes - last.inodes + 2
        )
