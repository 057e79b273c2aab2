"""Rename every type over every type, with every flag, and where it gets difficult."""

import os

from .calls import RENAME_FLAGS, renameat2
from .case import MEMBER, OWNER, ROOT_AND_MEMBER, TEAM, USERS, Case, Cases, attempt
from .objects import make, then

KINDS = ("file", "empty", "dir", "full", "to-file", "to-dir", "dangling", "fifo", "socket", "missing")


def _two(old: str, new: str) -> None:
    """Make objects of two kinds, as ``old`` and ``there/new``, and ``beside`` as well."""
    os.mkdir("there")
    os.chmod("there", 0o777)
    for kind, places in (old, ("old",)), (new, ("there/new", "beside")):
        for place in places:
            make(kind)()
            if os.path.lexists(kind):
                os.rename(kind, place)
    if "to-file" in (old, new):
        make("file")()
    if "to-dir" in (old, new):
        make("dir")()


def _matrix() -> Cases:
    for old in KINDS:
        for new in KINDS:
            for flag, number in RENAME_FLAGS.items():
                if number >= 4 and "full" in (old, new):
                    continue
                for place in ("beside", "there/new"):
                    yield Case(
                        f"renames/{old} over {new}/{flag or 'plain'}/{place}",
                        lambda old=old, new=new: _two(old, new),
                        lambda place=place, number=number: renameat2("old", place, number),
                        ROOT_AND_MEMBER if number < 3 and place == "beside" else MEMBER,
                    )


def _deep() -> None:
    os.makedirs("a/b/c")
    for path in ("a", "a/b", "a/b/c"):
        os.chmod(path, 0o777)
    make("hard", "file", "dir")()
    os.link("file", "a/file")


TANGLED = {
    "into itself": lambda: os.rename("a", "a/x"),
    "into its descendant": lambda: os.rename("a", "a/b/c/x"),
    "over its child": lambda: os.rename("a", "a/b"),
    "over its descendant": lambda: os.rename("a", "a/b/c"),
    "over its parent": lambda: os.rename("a/b", "a"),
    "over its ancestor": lambda: os.rename("a/b/c", "a"),
    "exchange with its child": lambda: renameat2("a", "a/b", 2),
    "exchange with its descendant": lambda: renameat2("a/b/c", "a", 2),
    "exchange with itself": lambda: renameat2("a", "a", 2),
    "no replace over itself": lambda: renameat2("a", "a", 1),
    "over its other name": lambda: os.rename("hard", "harder"),
    "over its other name elsewhere": lambda: os.rename("file", "a/file"),
    "exchange with its other name": lambda: renameat2("hard", "harder", 2),
    "no replace over its other name": lambda: renameat2("hard", "harder", 1),
    "up": lambda: os.rename("a/b/c", "c"),
    "down": lambda: os.rename("dir", "a/b/c/dir"),
    "exchange of depths": lambda: renameat2("dir", "a/b/c", 2),
    "swap by three": lambda: [os.rename("a/b", "t"), os.rename("dir", "a/b"), os.rename("t", "dir")],
    "to dot": lambda: os.rename("dir", "a/."),
    "from dot dot": lambda: os.rename("a/b/..", "x"),
}


def _open_files(mode: int) -> list[object]:
    """A file that is open is renamed over, or renamed."""
    over, moved = os.open("hard", os.O_RDWR), os.open("file", os.O_RDWR | mode)
    os.rename("file", "hard")
    said: list[object] = [os.fstat(fd).st_nlink for fd in (over, moved)]
    said += [attempt(os.write, fd, b"new") for fd in (over, moved)]
    said += [attempt(os.ftruncate, fd, 4000) for fd in (over, moved)]
    said += [os.fstat(fd).st_size for fd in (over, moved)]
    said += [os.pread(fd, 9, 0) for fd in (over, moved)]
    said.append([os.path.exists("file"), os.stat("hard").st_size, os.stat("harder").st_nlink])
    return said


def _moved_directory() -> list[object]:
    """Use names below a directory that moves while it is open and the working directory."""
    fd = os.open("full", os.O_RDONLY)
    os.chdir("dir")
    os.rename("../full", "../dir/full")
    inside = os.open("inside", os.O_RDONLY, dir_fd=fd)
    os.rename("../dir", "../away")
    return [
        os.pread(inside, 9, 0),
        sorted(os.listdir(".")),
        os.path.basename(os.getcwd()),
        os.listdir(fd),
        os.stat("full/inside").st_size,
    ]


STICKY = ("file", "dir", "full", "to-file")


def _sticky(directory_owner: int, owner: int, kind: str) -> None:
    os.mkdir("sticky")
    os.chown("sticky", directory_owner, TEAM)
    make(kind, uid=owner)()
    os.rename(kind, "sticky/it")
    os.chmod("sticky", 0o1777)
    make("empty", uid=USERS["member"].uid)()
    if kind in ("dir", "full"):
        os.unlink("empty")
        os.mkdir("empty")
        os.chown("empty", USERS["member"].uid, TEAM)


STICKY_CALLS = {
    "unlink": lambda: os.unlink("sticky/it"),
    "rmdir": lambda: os.rmdir("sticky/it"),
    "rename out": lambda: os.rename("sticky/it", "out"),
    "rename within": lambda: os.rename("sticky/it", "sticky/other"),
    "rename over": lambda: os.rename("empty", "sticky/it"),
    "rename into": lambda: os.rename("empty", "sticky/new"),
    "exchange": lambda: renameat2("empty", "sticky/it", 2),
    "link out": lambda: os.link("sticky/it", "out", follow_symlinks=False),
}


def _closed(mode: int) -> None:
    make("full", "file", uid=OWNER)()
    os.mkdir("closed")
    os.chown("closed", OWNER, TEAM)
    os.mkdir("closed/dir")
    os.chown("closed/dir", USERS["member"].uid, TEAM)
    os.chmod("full", 0o555)
    os.chmod("closed", mode)


CLOSED_CALLS = {
    "a directory that is not writable": lambda: os.rename("full", "moved"),
    "a directory that is not writable elsewhere": lambda: os.rename("full", "closed/moved"),
    "into": lambda: os.rename("file", "closed/file"),
    "out of": lambda: os.rename("closed/dir", "out"),
    "within": lambda: os.rename("closed/dir", "closed/new"),
    "exchange": lambda: renameat2("file", "closed/dir", 2),
}


def cases() -> Cases:
    yield from _matrix()
    for name, action in TANGLED.items():
        yield Case(f"renames/tangled/{name}", _deep, action)
    for flags, mode in ("plain", 0), ("append", os.O_APPEND):
        setup = make("hard", "file")
        yield Case(f"renames/open files/{flags}", setup, lambda mode=mode: _open_files(mode))
    yield Case("renames/open directories", make("full", "dir"), _moved_directory)
    for kind in STICKY:
        for directory_owner in ("owner", "other"):
            for owner in ("owner", "other", "member"):
                for name, action in STICKY_CALLS.items():
                    uids = USERS[directory_owner].uid, USERS[owner].uid
                    yield Case(
                        f"renames/sticky of {directory_owner}/{kind} of {owner}/{name}",
                        lambda uids=uids, kind=kind: _sticky(uids[0], uids[1], kind),
                        action,
                        ("owner", "member"),
                    )
    for mode in (0o775, 0o755, 0o555, 0o333, 0o111, 0o1777):
        for name, action in CLOSED_CALLS.items():
            setup = then(lambda mode=mode: _closed(mode))
            yield Case(f"renames/closed {mode:o}/{name}", setup, action)
