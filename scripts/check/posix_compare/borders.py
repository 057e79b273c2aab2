"""Compare what goes across to a file system that is mounted below, and what does not."""

import os

from .calls import renameat2, statx
from .case import ROOT_AND_MEMBER, Case, Cases, attempt
from .objects import make, then

SECOND = "../../second"
"""From a case's directory to the one of the other file system."""


def _furnish() -> None:
    make("file", "full", "dir")()
    for name in os.listdir(SECOND):
        path = f"{SECOND}/{name}"
        os.rmdir(path) if os.path.isdir(path) else os.unlink(path)
    with open(f"{SECOND}/there", "wb") as file:
        file.write(b"there")
    os.chmod(f"{SECOND}/there", 0o666)
    os.mkdir(f"{SECOND}/dir")
    os.chmod(f"{SECOND}/dir", 0o777)


THERE = f"{SECOND}/there"


def _copied() -> list[object]:
    fds = os.open("file", os.O_RDONLY), os.open(THERE, os.O_RDWR)
    return [attempt(os.copy_file_range, *fds, 100), os.fstat(fds[1]).st_size, os.pread(fds[1], 5, 0)]


def _moved() -> list[object]:
    """Do what mv does after EXDEV."""
    with open("file", "rb") as old, open(f"{SECOND}/new", "wb") as new:
        new.write(old.read())
    os.unlink("file")
    st = os.stat(f"{SECOND}/new")
    return [st.st_size, oct(st.st_mode), st.st_uid, st.st_gid, st.st_nlink]


CALLS = {
    "rename there": lambda: os.rename("file", f"{SECOND}/new"),
    "rename over": lambda: os.rename("file", THERE),
    "rename here": lambda: os.rename(THERE, "new"),
    "rename directory": lambda: os.rename("full", f"{SECOND}/full"),
    "rename over directory": lambda: os.rename("dir", f"{SECOND}/dir"),
    "rename missing": lambda: os.rename("missing", f"{SECOND}/new"),
    "rename file over directory": lambda: os.rename("file", f"{SECOND}/dir"),
    "exchange": lambda: renameat2("file", THERE, 2),
    "no replace": lambda: renameat2("file", THERE, 1),
    "rename within": lambda: os.rename(THERE, f"{SECOND}/elsewhere"),
    "link there": lambda: os.link("file", f"{SECOND}/new"),
    "link over": lambda: os.link("file", THERE),
    "link here": lambda: os.link(THERE, "new"),
    "link within": lambda: [os.link(THERE, f"{SECOND}/new"), os.stat(THERE).st_nlink],
    "symlink across": lambda: [os.symlink(THERE, "new"), os.stat("new").st_size],
    "copy_file_range": _copied,
    "move": _moved,
    "rmdir of the mount point": lambda: os.rmdir(SECOND),
    "unlink of the mount point": lambda: os.unlink(SECOND),
    "rename of the mount point": lambda: os.rename(SECOND, "new"),
    "rename over the mount point": lambda: os.rename("dir", SECOND),
    "exchange with the mount point": lambda: renameat2("dir", SECOND, 2),
    "listing": lambda: sorted(os.listdir(SECOND)),
    "dot dot": lambda: os.path.samefile(f"{SECOND}/..", "../.."),
    "other device": lambda: os.stat(SECOND).st_dev != os.stat(".").st_dev,
    "statvfs": lambda: os.statvfs(SECOND).f_blocks == os.statvfs(".").f_blocks,
    "mount point": lambda: os.path.ismount(SECOND),
    "mount id": lambda: statx(SECOND, mask=0x1000)["mask"] & 0x1000,
    "create": lambda: os.write(os.open(f"{SECOND}/new", os.O_CREAT | os.O_RDWR, 0o640), b"x"),
    "mkdir": lambda: os.mkdir(f"{SECOND}/new"),
    "unlink": lambda: os.unlink(THERE),
}


def cases() -> Cases:
    for name, action in CALLS.items():
        yield Case(f"borders/{name}", then(_furnish), action, ROOT_AND_MEMBER)
