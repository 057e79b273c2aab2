"""Make every call that takes a path, with every kind of path."""

import os
import socket
import stat

from .calls import (
    AT_EACCESS,
    AT_FDCWD,
    AT_REMOVEDIR,
    AT_SYMLINK_FOLLOW,
    AT_SYMLINK_NOFOLLOW,
    faccessat2,
    fchmodat2,
    linkat,
    openat2,
    renameat2,
    statx,
    unlinkat,
    utimensat,
)
from .case import MEMBER, Case, Cases
from .objects import make

PATHS = {
    **{kind: kind for kind in ("file", "dir", "full", "to-file", "to-dir", "dangling", "loop")},
    **{kind: kind for kind in ("fifo", "socket", "missing")},
    **{f"{kind}, slash": f"{kind}/" for kind in ("file", "dir", "full", "to-file", "to-dir")},
    **{f"{kind}, slash": f"{kind}/" for kind in ("dangling", "loop", "missing", "fifo")},
    **{f"{kind}, below": f"{kind}/x" for kind in ("file", "to-file", "dangling", "loop", "missing")},
    "dir, dot": "dir/.",
    "dir, dot dot": "dir/..",
    "dir, dot slash": "dir/./",
    "file, dot": "file/.",
    "file, dot dot": "file/..",
    "to-dir, dot": "to-dir/.",
    "missing, dot dot": "missing/..",
    "full, dot dot": "full/../full/inside",
    "two slashes": "full//inside",
    "dot": ".",
    "dot dot": "..",
    "dot slash": "./",
    "empty": "",
    "255 bytes": "n" * 255,
    "256 bytes": "n" * 256,
    "256 bytes, slash": "n" * 256 + "/",
    "255 bytes below a file": "file/" + "n" * 255,
    "256 bytes below a file": "file/" + "n" * 256,
    "4095 bytes": "./" * 2045 + "file" + "x",
    "4096 bytes": "./" * 2046 + "file",
    "new line": "a\nb",
    "not UTF-8": os.fsdecode(b"\xff\xfe"),
    "absolute": "/",
}
MADE = ("file", "dir", "full", "to-file", "to-dir", "dangling", "loop", "fifo", "socket")


def _open(path: str, flags: int) -> list[object]:
    fd = os.open(path, flags | os.O_NONBLOCK, 0o640)
    st = os.fstat(fd)
    return [stat.filemode(st.st_mode), st.st_size if stat.S_ISREG(st.st_mode) else None]


def _bind(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        if len(path) < 100:
            made.bind(path or "./")


CALLS = {
    "stat": lambda path: stat.filemode(os.stat(path).st_mode),
    "lstat": lambda path: stat.filemode(os.lstat(path).st_mode),
    "statx": lambda path: statx(path)["mode"],
    "open": lambda path: _open(path, os.O_RDONLY),
    "open for writing": lambda path: _open(path, os.O_WRONLY),
    "open, truncate": lambda path: _open(path, os.O_WRONLY | os.O_TRUNC),
    "open, create": lambda path: _open(path, os.O_WRONLY | os.O_CREAT),
    "open, create, read only": lambda path: _open(path, os.O_RDONLY | os.O_CREAT),
    "open, create, exclusive": lambda path: _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL),
    "open, create, no follow": lambda path: _open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW),
    "open, directory": lambda path: _open(path, os.O_RDONLY | os.O_DIRECTORY),
    "open, no follow": lambda path: _open(path, os.O_RDONLY | os.O_NOFOLLOW),
    "open, path": lambda path: _open(path, os.O_PATH),
    "open, path, no follow": lambda path: _open(path, os.O_PATH | os.O_NOFOLLOW),
    "openat2, no links": lambda path: os.close(openat2(path, os.O_RDONLY | os.O_NONBLOCK, 0, 0x04)),
    "openat2, beneath": lambda path: os.close(openat2(path, os.O_RDONLY | os.O_NONBLOCK, 0, 0x08)),
    "mkdir": lambda path: os.mkdir(path, 0o751),
    "rmdir": os.rmdir,
    "unlink": os.unlink,
    "unlinkat, dir": lambda path: unlinkat(path, AT_REMOVEDIR),
    "mknod, file": lambda path: os.mknod(path, stat.S_IFREG | 0o640),
    "mkfifo": lambda path: os.mkfifo(path, 0o640),
    "bind": _bind,
    "symlink at": lambda path: os.symlink("target", path),
    "symlink to": lambda path: os.symlink(path, "new"),
    "link from": lambda path: os.link(path, "new", follow_symlinks=False),
    "link from, follow": lambda path: linkat(AT_FDCWD, path, "new", AT_SYMLINK_FOLLOW),
    "link to": lambda path: os.link("file", path, follow_symlinks=False),
    "rename file to": lambda path: os.rename("file", path),
    "rename dir to": lambda path: os.rename("dir", path),
    "rename from": lambda path: os.rename(path, "new"),
    "rename from to same": lambda path: os.rename(path, path),
    "exchange with file": lambda path: renameat2("file", path, 2),
    "rename file to, no replace": lambda path: renameat2("file", path, 1),
    "readlink": os.readlink,
    "truncate": lambda path: os.truncate(path, 100),
    "chmod": lambda path: os.chmod(path, 0o700),
    "fchmodat2, no follow": lambda path: fchmodat2(AT_FDCWD, path, 0o700, AT_SYMLINK_NOFOLLOW),
    "chown": lambda path: os.chown(path, -1, -1),
    "lchown": lambda path: os.lchown(path, -1, -1),
    "utimensat": lambda path: utimensat(AT_FDCWD, path, (5, 0, 6, 0)),
    "utimensat, no follow": lambda path: utimensat(AT_FDCWD, path, (5, 0, 6, 0), AT_SYMLINK_NOFOLLOW),
    "access": lambda path: os.access(path, os.R_OK | os.W_OK),
    "faccessat2": lambda path: faccessat2(AT_FDCWD, path, os.X_OK, AT_EACCESS | AT_SYMLINK_NOFOLLOW),
    "listxattr": os.listxattr,
    "setxattr": lambda path: os.setxattr(path, "user.a", b"b"),
    "lsetxattr": lambda path: os.setxattr(path, "user.a", b"b", follow_symlinks=False),
    "getxattr": lambda path: os.getxattr(path, "user.a"),
    "statvfs": lambda path: os.statvfs(path).f_namemax,
    "chdir": os.chdir,
    "listdir": lambda path: sorted(os.listdir(path)) if path not in ("/", "..", "dir/..") else "",
    "execve": lambda path: os.execv(path, ["x"]),
}

NO_ABSOLUTE = (
    "unlink",
    "rmdir",
    "rename from",
    "chmod",
    "chown",
    "lchown",
    "utimensat",
    "xattr",
    "fchmodat2",
)


def cases() -> Cases:
    for call, action in CALLS.items():
        for kind, path in PATHS.items():
            if path == "/" and any(word in call for word in NO_ABSOLUTE):
                continue  # that would be the machine's own root
            yield Case(
                f"paths/{call}/{kind}",
                make(*MADE),
                lambda action=action, path=path: action(path),
                MEMBER,
            )
