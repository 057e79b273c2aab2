"""Compare extended attributes: names, sizes, flags, objects; and access control lists."""

import os
import stat
import struct

from .calls import getxattr, listxattr, setxattr
from .case import EVERYBODY, OWNER, ROOT_AND_MEMBER, TEAM, USERS, Case, Cases, attempt
from .objects import make
from .opens import create_all, use

NAMES = {
    "user": b"user.a",
    "user, none": b"user.none",
    "trusted": b"trusted.a",
    "security": b"security.a",
    "capability": b"security.capability",
    "system": b"system.a",
    "access list": b"system.posix_acl_access",
    "default list": b"system.posix_acl_default",
    "no namespace": b"a",
    "unknown namespace": b"other.a",
    "prefix alone": b"user.",
    "empty": b"",
    "255 bytes": b"user." + b"n" * 250,
    "256 bytes": b"user." + b"n" * 251,
    "not UTF-8": b"user.\xff",
}
FLAGS = {"": 0, "create": 1, "replace": 2, "create, replace": 3, "unknown": 4}
SIZES = (0, 1, 100, 3000, 4000, 5000, 65536, 65537)
KINDS = ("file", "dir", "to-file", "dangling", "fifo", "socket", "null")


def _have(kind: str) -> None:
    make(kind)()
    for name in ("user.a", "trusted.a", "security.a"):
        if kind in ("file", "dir") or not name.startswith("user"):
            os.setxattr(kind, name, b"value", follow_symlinks=False)


def _all(kind: str, name: bytes, follow: bool) -> list[object]:
    said = [attempt(os.getxattr, kind, name, follow_symlinks=follow)]
    said.append(attempt(os.setxattr, kind, name, b"new", follow_symlinks=follow))
    said.append(attempt(os.listxattr, kind, follow_symlinks=follow))
    said.append(attempt(os.removexattr, kind, name, follow_symlinks=follow))
    said.append(attempt(os.removexattr, kind, name, follow_symlinks=follow))
    return [sorted(each) if isinstance(each, list) else each for each in said]


def _sizes() -> list[object]:
    said: list[object] = [
        attempt(getxattr, "file", b"user.a", size) for size in (0, 1, 4, 5, 6, 100, 70_000)
    ]
    said += [attempt(listxattr, "file", size) for size in (0, 1, 6, 100, 70_000)]
    return said


def _many(count: int, size: int) -> list[object]:
    said = [attempt(os.setxattr, "file", f"user.{n:03}", bytes(size)) for n in range(count)]
    return [*said, sorted(os.listxattr("file"))]


def acl(*entries: tuple[int, int, int]) -> bytes:
    """Make a list in the form of the system calls: tag, permissions, id."""
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHERS = 1, 2, 4, 8, 16, 32
NO_ID = 0xFFFFFFFF
MEMBER_UID, MEMBER_GID = USERS["member"].uid, USERS["member"].gid
OTHER_UID = USERS["other"].uid

LISTS = {
    "minimal": acl((USER_OBJ, 6, NO_ID), (GROUP_OBJ, 4, NO_ID), (OTHERS, 0, NO_ID)),
    "for a user": acl(
        (USER_OBJ, 6, NO_ID),
        (USER, 7, OTHER_UID),
        (GROUP_OBJ, 4, NO_ID),
        (MASK, 7, NO_ID),
        (OTHERS, 0, NO_ID),
    ),
    "against a user": acl(
        (USER_OBJ, 7, NO_ID),
        (USER, 0, MEMBER_UID),
        (GROUP_OBJ, 7, NO_ID),
        (MASK, 7, NO_ID),
        (OTHERS, 7, NO_ID),
    ),
    "for a group": acl(
        (USER_OBJ, 6, NO_ID),
        (GROUP_OBJ, 0, NO_ID),
        (GROUP, 6, MEMBER_GID),
        (MASK, 7, NO_ID),
        (OTHERS, 0, NO_ID),
    ),
    "masked": acl(
        (USER_OBJ, 6, NO_ID),
        (USER, 7, OTHER_UID),
        (GROUP_OBJ, 6, NO_ID),
        (MASK, 4, NO_ID),
        (OTHERS, 4, NO_ID),
    ),
    "without a mask": acl(
        (USER_OBJ, 6, NO_ID), (USER, 7, OTHER_UID), (GROUP_OBJ, 4, NO_ID), (OTHERS, 0, NO_ID)
    ),
    "without others": acl((USER_OBJ, 6, NO_ID), (GROUP_OBJ, 4, NO_ID)),
    "disorder": acl((OTHERS, 6, NO_ID), (GROUP_OBJ, 4, NO_ID), (USER_OBJ, 0, NO_ID)),
    "bad tag": acl((USER_OBJ, 6, NO_ID), (GROUP_OBJ, 4, NO_ID), (64, 0, NO_ID)),
    "bad permissions": acl((USER_OBJ, 9, NO_ID), (GROUP_OBJ, 4, NO_ID), (OTHERS, 0, NO_ID)),
    "no entries": acl(),
    "nothing": b"",
    "bad version": b"\x01\0\0\0",
    "cut": acl((USER_OBJ, 6, NO_ID))[:-1],
}
VALID = ("minimal", "for a user", "against a user", "for a group", "masked")


def _with_list(kind: str, name: str, value: bytes) -> None:
    make(kind, mode=0o770 if kind == "dir" else 0o660)()
    os.setxattr(kind, f"system.posix_acl_{name}", value)


def _with_default(value: bytes, parent: int) -> None:
    os.chmod(".", parent)
    os.setxattr(".", "system.posix_acl_default", value)


def _use(kind: str) -> list[object]:
    said: list[object] = [os.access(kind, mode) for mode in (os.R_OK, os.W_OK, os.X_OK)]
    if kind == "file":
        said += [attempt(lambda f=f: os.close(os.open(kind, f))) for f in (os.O_RDONLY, os.O_WRONLY)]
        said.append(attempt(os.utime, kind))
    else:
        said += [
            attempt(os.listdir, kind),
            attempt(os.mkdir, f"{kind}/new"),
            attempt(os.stat, f"{kind}/none"),
        ]
    return said


def _with_lists(umask: int) -> list[object]:
    """Make something where there is a default list, and something below that."""
    said = create_all(0o666, umask)
    said += [attempt(os.mkdir, "d2", 0o777), attempt(use, "d2/f", os.O_RDWR | os.O_CREAT, 0o666)]
    said += [attempt(os.listxattr, "d2"), attempt(use, "g", os.O_RDWR | os.O_CREAT, 0o6755)]
    said.append(attempt(os.mkdir, "d3", 0o2711))
    return said


def _attributes() -> Cases:
    for kind in KINDS:
        for name, raw in NAMES.items():
            for follow in (True, False) if kind in ("to-file", "dangling") else (True,):
                yield Case(
                    f"xattrs/{name}/{kind}{'' if follow else ', no follow'}",
                    lambda kind=kind: _have(kind),
                    lambda k=kind, n=raw, f=follow: _all(k, n, f),
                    ("root", "owner", "member") if kind in ("file", "dir") else ROOT_AND_MEMBER,
                )
    for flag, number in FLAGS.items():
        for name in ("user", "user, none", "trusted", "access list"):
            yield Case(
                f"xattrs/set, {flag or 'plain'}/{name}",
                lambda: _have("file"),
                lambda n=NAMES[name], f=number: setxattr(
                    "file", n, LISTS["minimal"] if b"acl" in n else b"x", f
                ),
                ("root", "owner", "other"),
            )
    for size in SIZES:
        yield Case(
            f"xattrs/value of {size} bytes",
            make("file"),
            lambda s=size: [
                os.setxattr("file", "user.a", bytes(s)),
                len(os.getxattr("file", "user.a")),
            ],
            ROOT_AND_MEMBER,
        )
    yield Case("xattrs/buffers", lambda: _have("file"), _sizes)
    yield Case("xattrs/many", make("file"), lambda: _many(30, 50))
    yield Case("xattrs/more than fit", make("file"), lambda: _many(60, 100))
    for mode in (0o1777, 0o777, 0o700):
        yield Case(
            f"xattrs/on a directory {mode:o} of others",
            make("dir", mode=mode),
            lambda: _all("dir", b"user.b", True),
        )


def _access_lists() -> Cases:
    for name, value in LISTS.items():
        for which in ("access", "default"):
            for kind in ("file", "dir", "fifo"):
                yield Case(
                    f"xattrs/set {which} list/{name}/{kind}",
                    make(kind),
                    lambda k=kind, w=which, v=value: os.setxattr(k, f"system.posix_acl_{w}", v),
                    ("root", "owner", "member"),
                )
    for name in VALID:
        for kind in ("file", "dir"):
            setup = lambda k=kind, v=LISTS[name]: _with_list(k, "access", v)  # noqa: E731  # used by several cases
            yield Case(f"xattrs/under a list/{name}/{kind}", setup, lambda k=kind: _use(k))
            for mode in (0o600, 0o640, 0o777, 0o2750):
                yield Case(
                    f"xattrs/chmod {mode:o} under a list/{name}/{kind}",
                    setup,
                    lambda k=kind, m=mode: [os.chmod(k, m), stat.filemode(os.stat(k).st_mode)],
                    ("root", "owner"),
                )
            yield Case(
                f"xattrs/remove a list/{name}/{kind}",
                setup,
                lambda k=kind: os.removexattr(k, "system.posix_acl_access"),
                ("root", "owner", "member"),
            )
            yield Case(
                f"xattrs/chgrp under a list/{name}/{kind}",
                setup,
                lambda k=kind: os.chown(k, -1, USERS["other"].gid),
                ("root",),
            )
        for umask in (0, 0o022, 0o077):
            for parent in (0o777, 0o2777):
                yield Case(
                    f"xattrs/made under a default list/{name}/umask {umask:o} in {parent:o}",
                    lambda v=LISTS[name], p=parent: _with_default(v, p),
                    lambda u=umask: _with_lists(u),
                    EVERYBODY,
                )
    yield Case(
        "xattrs/set-gid and a list, not in the group",
        make("file", mode=0o2775, uid=OWNER, gid=TEAM + 500),
        lambda: os.setxattr("file", "system.posix_acl_access", LISTS["for a user"]),
        ("root", "owner"),
    )


def cases() -> Cases:
    yield from _attributes()
    yield from _access_lists()
