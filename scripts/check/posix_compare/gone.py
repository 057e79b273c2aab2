"""Use files and directories after their last name is gone, and O_PATH descriptors."""

import contextlib
import ctypes
import fcntl
import os
from collections.abc import Callable

from .calls import (
    AT_EMPTY_PATH,
    AT_FDCWD,
    AT_SYMLINK_FOLLOW,
    check,
    faccessat2,
    fallocate,
    fchmodat2,
    fchownat,
    libc,
    linkat,
    openat2,
    renameat2,
    utimensat,
)
from .case import EVERYBODY, Case, Cases, attempt
from .objects import make

Use = Callable[[int], object]

USES: dict[str, Use] = {
    "fstat": lambda fd: [os.fstat(fd).st_nlink, os.fstat(fd).st_size],
    "read": lambda fd: os.pread(fd, 9, 5),
    "write": lambda fd: [os.pwrite(fd, b"new", 7000), os.fstat(fd).st_size, os.pread(fd, 3, 7000)],
    "ftruncate": lambda fd: [os.ftruncate(fd, 100), os.fstat(fd).st_size],
    "fchmod": lambda fd: [os.fchmod(fd, 0o4711), oct(os.fstat(fd).st_mode)],
    "fchown": lambda fd: [os.fchown(fd, -1, os.getgid()), os.fstat(fd).st_gid],
    "futimens": lambda fd: [utimensat(fd, None, (5, 0, 6, 7)), os.fstat(fd).st_mtime_ns],
    "fsync": os.fsync,
    "fsetxattr": lambda fd: [
        os.setxattr(fd, "user.a", b"b"),
        os.getxattr(fd, "user.a"),
        os.listxattr(fd),
    ],
    "flock": lambda fd: fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB),
    "getfl": lambda fd: fcntl.fcntl(fd, fcntl.F_GETFL) & 3,
    "dup": lambda fd: os.pread(os.dup(fd), 3, 0),
    "fallocate": lambda fd: fallocate(fd, 0, 0, 10),
    "statvfs": lambda fd: os.fstatvfs(fd).f_namemax,
    "fchdir": os.fchdir,
    "listdir": os.listdir,
    "link again": lambda fd: linkat(AT_FDCWD, f"/proc/self/fd/{fd}", "again", AT_SYMLINK_FOLLOW),
    "link by descriptor": lambda fd: linkat(fd, "", "again", AT_EMPTY_PATH),
    "open again": lambda fd: os.pread(os.open(f"/proc/self/fd/{fd}", os.O_RDWR), 3, 0),
    "open again to read": lambda fd: os.pread(os.open(f"/proc/self/fd/{fd}", os.O_RDONLY), 3, 0),
    "chmod by proc": lambda fd: os.chmod(f"/proc/self/fd/{fd}", 0o711),
    "truncate by proc": lambda fd: os.truncate(f"/proc/self/fd/{fd}", 3),
    "utime by proc": lambda fd: os.utime(f"/proc/self/fd/{fd}", (5, 6)),
    "getxattr by proc": lambda fd: os.listxattr(f"/proc/self/fd/{fd}"),
    "chown by descriptor": lambda fd: fchownat(fd, "", -1, -1, AT_EMPTY_PATH),
    "chmod by descriptor": lambda fd: fchmodat2(fd, "", 0o700, AT_EMPTY_PATH),
    "utime by descriptor": lambda fd: utimensat(fd, "", (5, 0, 6, 0), AT_EMPTY_PATH),
    "access by descriptor": lambda fd: faccessat2(fd, "", os.R_OK, AT_EMPTY_PATH),
    "execve": lambda fd: os.execve(fd, ["x"], {}),
    "stat at": lambda fd: os.stat("inside", dir_fd=fd).st_size,
    "open at": lambda fd: os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=fd)),
    "mkdir at": lambda fd: os.mkdir("new", dir_fd=fd),
    "symlink at": lambda fd: os.symlink("x", "new", dir_fd=fd),
    "link at": lambda fd: os.link("keep", "new", dst_dir_fd=fd),
    "rename at": lambda fd: os.rename("keep", "new", dst_dir_fd=fd),
    "unlink at": lambda fd: os.unlink("inside", dir_fd=fd),
    "dot dot at": lambda fd: sorted(os.listdir(os.open("..", os.O_RDONLY, dir_fd=fd))),
    "path": lambda fd: os.path.basename(os.readlink(f"/proc/self/fd/{fd}")),
}


def _handle(fd: int) -> object:
    """Open by the handle that it has."""
    handle = ctypes.create_string_buffer(136)
    ctypes.memmove(handle, (128).to_bytes(4, "little"), 4)
    mount = ctypes.c_int()
    check(libc.name_to_handle_at(fd, b"", handle, ctypes.byref(mount), AT_EMPTY_PATH))
    top = os.open(".", os.O_RDONLY)
    return os.fstat(check(libc.open_by_handle_at(top, handle, os.O_RDONLY))).st_size


USES["handle"] = _handle


HOW: dict[str, Callable[[str], None]] = {
    "kept": lambda kind: None,
    "unlinked": lambda kind: os.rmdir(kind) if kind == "dir" else os.unlink(kind),
    "replaced": lambda kind: os.rename("other-dir" if kind == "dir" else "other", kind),
}


def _furnish() -> None:
    make("file", "dir")()
    for name in ("other", "keep"):
        with open(name, "wb") as file:
            file.write(name.encode())
        os.chmod(name, 0o666)
    os.mkdir("other-dir")
    os.chmod("other-dir", 0o777)


def _gone(kind: str, flags: int, how: str, use: Use) -> object:
    fd = os.open(kind, flags)
    HOW[how](kind)
    return attempt(use, fd)


def _open_resolved(path: str, resolve: int) -> bool:
    """EAGAIN says that somebody on this machine renamed something meanwhile."""
    for _ in range(1000):
        with contextlib.suppress(BlockingIOError):
            return openat2(path, os.O_RDONLY, 0, resolve) > 0
    return False


def _working_directory() -> list[object]:
    """The working directory is removed."""
    os.chdir("dir")
    os.rmdir("../dir")
    calls: list[Callable[[], object]] = [
        os.getcwd,
        lambda: os.listdir("."),
        lambda: os.stat(".").st_nlink,
        lambda: os.mkdir("new"),
        lambda: os.open("new", os.O_CREAT | os.O_WRONLY),
        lambda: sorted(os.listdir("..")),
        lambda: os.chdir("."),
        lambda: os.stat("missing"),
        lambda: os.rename("../file", "file"),
        lambda: os.rmdir("."),
        lambda: os.chmod(".", 0o700),
        lambda: os.utime("."),
    ]
    return [attempt(call) for call in calls]


def _recreated() -> list[object]:
    """A name is removed and made again, while what had it is open."""
    said: list[object] = []
    fds = []
    for n in range(4):
        fd = os.open("again", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        os.write(fd, b"%d" % n * (n + 1))
        fds.append(fd)
        os.unlink("again")
        os.mkdir("again")
        said.append(attempt(os.open, "again", os.O_RDWR))
        os.rmdir("again")
        said.append(attempt(os.stat, "again"))
    return [*said, *[os.pread(fd, 9, 0) for fd in fds], *[os.fstat(fd).st_nlink for fd in fds]]


def _links() -> list[object]:
    """Attributes are the file's, not the name's."""
    fd = os.open("hard", os.O_RDWR)
    os.unlink("hard")
    os.chmod("harder", 0o600)
    os.truncate("harder", 77)
    os.pwrite(fd, b"x", 100)
    said = [os.fstat(fd).st_nlink, oct(os.fstat(fd).st_mode), os.stat("harder").st_size]
    os.link("harder", "hard")
    return [*said, os.fstat(fd).st_nlink, os.stat("hard").st_ino == os.fstat(fd).st_ino]


FLAGS = {"reading": os.O_RDONLY, "both": os.O_RDWR, "path": os.O_PATH}


def cases() -> Cases:
    for kind, opened in ("file", FLAGS), ("dir", {"reading": os.O_RDONLY, "path": os.O_PATH}):
        for name, flags in opened.items():
            for how in HOW:
                for use_name, use in USES.items():
                    yield Case(
                        f"gone/{kind} {how}, open for {name}/{use_name}",
                        _furnish,
                        lambda k=kind, f=flags, h=how, u=use: _gone(k, f, h, u),
                        ("owner",) if how != "kept" else ("owner", "other"),
                    )
    for name, flags in (("symbolic link", os.O_PATH | os.O_NOFOLLOW),):
        for use_name, use in USES.items():
            yield Case(
                f"gone/{name}/{use_name}",
                make("to-file"),
                lambda f=flags, u=use: attempt(u, os.open("to-file", f)),
                ("root", "owner"),
            )
    yield Case("gone/working directory", make("dir", "file"), _working_directory)
    yield Case("gone/made again", make(), _recreated, EVERYBODY)
    yield Case("gone/other name", make("hard"), _links, ("root", "owner"))
    for flags in (1, 2):
        yield Case(
            f"gone/rename unlinked {flags}",
            make("file", "hard"),
            lambda f=flags: [os.unlink("hard"), renameat2("file", "hard", f)],
        )
    for name, resolve in (
        ("no magic links", 2),
        ("in root", 0x10),
        ("no crossing", 1),
        ("unknown", 1 << 20),
    ):
        for path in ("full/inside", "to-file", "full/../file", "/proc/self/exe", "missing"):
            yield Case(
                f"gone/openat2 {name}/{path}",
                make("full", "to-file"),
                lambda p=path, r=resolve: _open_resolved(p, r),
                ("member",),
            )
