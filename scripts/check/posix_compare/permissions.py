"""Compare who may do what to whose files."""

import os

from .calls import AT_EACCESS, AT_FDCWD, UTIME_NOW, faccessat2, utimensat
from .case import OWNER, TEAM, USERS, Case, Cases, attempt
from .objects import make, then

FILE_MODES = (
    0,
    0o400,
    0o200,
    0o100,
    0o040,
    0o020,
    0o010,
    0o004,
    0o002,
    0o001,
    0o640,
    0o604,
    0o046,
    0o755,
)
OWNERSHIPS = {"owner": (OWNER, TEAM), "stranger": (54321, TEAM), "outsider": (54321, 54321)}


def _use(path: str) -> list[object]:
    """Do everything that depends on a file's mode."""
    said: list[object] = [os.access(path, mode) for mode in (os.R_OK, os.W_OK, os.X_OK, os.F_OK)]
    said.append(attempt(faccessat2, AT_FDCWD, path, os.R_OK | os.W_OK, AT_EACCESS))
    for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR, os.O_PATH, os.O_RDONLY | os.O_NOATIME):
        said.append(attempt(lambda flags=flags: os.close(os.open(path, flags))))
    said.append(attempt(os.execv, path, ["x"]) if os.getuid() else None)
    said.append(attempt(utimensat, AT_FDCWD, path, (0, UTIME_NOW, 0, UTIME_NOW)))
    said.append(attempt(utimensat, AT_FDCWD, path, None))
    said.append(attempt(os.getxattr, path, "user.a"))
    return said


FILE_CHANGES = {
    "truncate": lambda path: os.truncate(path, 10),
    "open to truncate": lambda path: os.close(os.open(path, os.O_TRUNC)),
    "open to append": lambda path: os.write(os.open(path, os.O_WRONLY | os.O_APPEND), b"x"),
    "chmod": lambda path: os.chmod(path, 0o6777),
    "chown to self": lambda path: os.chown(path, os.getuid(), -1),
    "chown to other": lambda path: os.chown(path, USERS["other"].uid, -1),
    "chgrp to own": lambda path: os.chown(path, -1, os.getgid()),
    "chgrp to team": lambda path: os.chown(path, -1, TEAM),
    "chgrp to foreign": lambda path: os.chown(path, -1, 7),
    "utime": lambda path: utimensat(AT_FDCWD, path, (5, 0, 5, 0)),
    "touch atime": lambda path: utimensat(AT_FDCWD, path, (0, UTIME_NOW, 0, (1 << 30) - 2)),
    "setxattr": lambda path: os.setxattr(path, "user.a", b"b"),
    "removexattr": lambda path: os.removexattr(path, "user.a"),
    "link": lambda path: os.link(path, "linked"),
    "unlink": os.unlink,
    "rename": lambda path: os.rename(path, "renamed"),
    "copy over": lambda path: os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)),
}

DIRECTORY_CALLS = {
    "list": lambda: sorted(os.listdir("full")),
    "scan": lambda: sorted(e.name for e in os.scandir("full") if e.is_file(follow_symlinks=False)),
    "stat inside": lambda: os.stat("full/inside").st_size,
    "stat missing": lambda: os.stat("full/missing"),
    "read inside": lambda: os.read(os.open("full/inside", os.O_RDONLY), 9),
    "chdir": lambda: os.chdir("full"),
    "create": lambda: os.close(os.open("full/new", os.O_CREAT | os.O_WRONLY, 0o644)),
    "open or create": lambda: os.close(os.open("full/inside", os.O_CREAT | os.O_WRONLY, 0o644)),
    "mkdir": lambda: os.mkdir("full/new"),
    "mkdir over": lambda: os.mkdir("full/inside"),
    "symlink": lambda: os.symlink("x", "full/new"),
    "mkfifo": lambda: os.mkfifo("full/new"),
    "link into": lambda: os.link("file", "full/new"),
    "link out of": lambda: os.link("full/inside", "new"),
    "unlink": lambda: os.unlink("full/inside"),
    "unlink missing": lambda: os.unlink("full/missing"),
    "rmdir": lambda: os.rmdir("full/sub"),
    "rename into": lambda: os.rename("file", "full/new"),
    "rename out of": lambda: os.rename("full/inside", "new"),
    "rename within": lambda: os.rename("full/inside", "full/new"),
    "by descriptor": lambda: os.stat("inside", dir_fd=os.open("full", os.O_PATH)).st_size,
    "open to list": lambda: os.close(os.open("full", os.O_RDONLY)),
    "access": lambda: [os.access("full", mode) for mode in range(8)],
    "chmod": lambda: os.chmod("full", 0o2777),
    "touch": lambda: os.utime("full"),
    "statvfs": lambda: os.statvfs("full/inside").f_namemax,
}
DIRECTORY_MODES = (0, 0o700, 0o555, 0o444, 0o333, 0o111, 0o070, 0o050, 0o007, 0o770, 0o707, 0o077)


def _sub(mode: int, ownership: tuple[int, int]) -> None:
    make("full", "file")()
    os.mkdir("full/sub")
    os.chown("full/sub", *ownership)
    os.chown("full", *ownership)
    os.chmod("full", mode)


def _xattr() -> None:
    os.setxattr("file", "user.a", b"b")


def cases() -> Cases:
    for ownership, (uid, gid) in OWNERSHIPS.items():
        for mode in FILE_MODES:
            setup = then(make("file", mode=mode, uid=uid, gid=gid), _xattr)
            yield Case(f"permissions/file {mode:03o} of {ownership}/use", setup, lambda: _use("file"))
        for mode in (0o400, 0o600, 0o620, 0o602, 0o777):
            setup = then(make("file", mode=mode, uid=uid, gid=gid), _xattr)
            for name, change in FILE_CHANGES.items():
                yield Case(
                    f"permissions/file {mode:03o} of {ownership}/{name}",
                    setup,
                    lambda change=change: change("file"),
                )
        for mode in DIRECTORY_MODES:
            for name, action in DIRECTORY_CALLS.items():
                yield Case(
                    f"permissions/directory {mode:03o} of {ownership}/{name}",
                    lambda mode=mode, who=(uid, gid): _sub(mode, who),
                    action,
                    ("root", "owner", "member", "other") if mode in (0o700, 0o070) else ("member",),
                )
