"""Test other users on a mount: they own the files that they make, and calls are checked for them."""

import os
import stat
import struct
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter, Place
from tests.harness.mounting import as_user

UID, GID, EXTRA = 12345, 23456, 34567
NO_ID = 0xFFFFFFFF
"""The id in entries of an access control list for the owner, the group and others."""

MAKE = {
    "file": "os.close(os.open('new', os.O_CREAT | os.O_WRONLY, 0o640))",
    "set-id file": "os.close(os.open('new', os.O_CREAT | os.O_WRONLY, 0o6711))",
    "directory": "os.mkdir('new', 0o750)",
    "sticky directory": "os.mkdir('new', 0o1777)",
    "symlink": "os.symlink('x', 'new')",
    "fifo": "os.mkfifo('new', 0o620)",
    "socket": "socket.socket(socket.AF_UNIX).bind('new')",
    "plain node": "os.mknod('new', stat.S_IFREG | 0o604)",
    "character device": "os.mknod('new', stat.S_IFCHR | 0o600, os.makedev(1, 3))",
}


def identity(path: Path) -> tuple[int, int, str]:
    st = path.lstat()
    return st.st_uid, st.st_gid, stat.filemode(st.st_mode)


@pytest.mark.parametrize("umask", [0, 0o027], ids=oct)
@pytest.mark.parametrize("parent", [0o777, 0o2777, 0o1777], ids=oct)
@pytest.mark.parametrize("kind", MAKE)
def test_files_made_by_a_user_match_those_on_a_plain_file_system(
    place: Place, kind: str, parent: int, umask: int
) -> None:
    outcomes = []
    for directory, seen in (place.path, place.source), (place.plain, place.plain):
        os.chown(directory, 77, 88)
        directory.chmod(parent)
        error = as_user(directory, MAKE[kind], uid=UID, gid=GID, umask=umask)
        outcomes.append((error, identity(seen / "new") if os.path.lexists(seen / "new") else None))
        if error == "":
            assert identity(directory / "new") == identity(seen / "new")
    assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("parent", [0o777, 0o2777], ids=oct)
def test_the_whiteout_of_a_rename_belongs_to_the_user(place: Place, parent: int) -> None:
    outcomes = []
    for directory, seen in (place.path, place.source), (place.plain, place.plain):
        (seen / "old").touch()
        directory.chmod(parent)
        code = "libc = ctypes.CDLL(None)\nassert libc.renameat2(-100, b'old', -100, b'new', 4) == 0"
        assert as_user(directory, code, uid=UID, gid=GID) == ""
        outcomes.append(identity(seen / "old"))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0] == UID


@pytest.mark.parametrize("umask", [0, 0o027, 0o077], ids=oct)
@pytest.mark.parametrize("kind", MAKE)
def test_files_made_under_a_default_list_match_those_on_a_plain_file_system(
    place: Place, kind: str, umask: int
) -> None:
    entries = ((1, 7, NO_ID), (2, 6, 4321), (4, 5, NO_ID), (16, 7, NO_ID), (32, 1, NO_ID))
    inherited = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    outcomes = []
    for directory, seen in (place.path, place.source), (place.plain, place.plain):
        directory.chmod(0o777)
        os.setxattr(directory, "system.posix_acl_default", inherited)
        error = as_user(directory, MAKE[kind], uid=UID, gid=GID, umask=umask)
        made = os.path.lexists(seen / "new")
        outcomes.append(
            (error, identity(seen / "new"), access_list(seen / "new")) if made else (error,)
        )
    assert outcomes[0] == outcomes[1]


def access_list(path: Path) -> bytes | None:
    if "system.posix_acl_access" not in os.listxattr(path, follow_symlinks=False):
        return None
    return os.getxattr(path, "system.posix_acl_access")


def test_a_user_owns_the_files_that_it_makes(place: Place) -> None:
    place.path.chmod(0o777)
    for name, code in MAKE.items():
        if name != "character device":
            assert as_user(place.path, code, uid=UID, gid=GID) == ""
            assert (place.source / "new").lstat()[4:6] == (UID, GID)
            (place.path / "new").rmdir() if name.endswith("directory") else (
                place.path / "new"
            ).unlink()


def test_a_member_of_the_group_keeps_the_set_gid_bit(place: Place) -> None:
    outcomes = []
    for directory, seen in (place.path, place.source), (place.plain, place.plain):
        os.chown(directory, 0, EXTRA)
        directory.chmod(0o2777)
        code = "os.close(os.open('f', os.O_CREAT | os.O_WRONLY, 0o2755)); os.mkdir('d')"
        assert as_user(directory, code, groups=(EXTRA,)) == ""
        outcomes.append((identity(seen / "f"), identity(seen / "d")))
    assert outcomes[0] == outcomes[1]
    assert outcomes[0][0][1] == outcomes[0][1][1] == EXTRA


NOT_ALLOWED = {
    "read a private file": "os.open('private', os.O_RDONLY)",
    "write a readable file": "os.open('readable', os.O_WRONLY)",
    "truncate a readable file": "os.truncate('readable', 0)",
    "open a readable file with O_TRUNC": "os.open('readable', os.O_RDONLY | os.O_TRUNC)",
    "create in a closed directory": "os.open('closed/new', os.O_CREAT | os.O_WRONLY)",
    "unlink in a closed directory": "os.unlink('closed/f')",
    "rename out of a closed directory": "os.rename('closed/f', 'f')",
    "rename into a closed directory": "os.rename('mine', 'closed/g')",
    "link into a closed directory": "os.link('mine', 'closed/g')",
    "list a dark directory": "os.listdir('dark')",
    "stat in a hidden directory": "os.stat('hidden/f')",
    "unlink another user's file in a sticky directory": "os.unlink('sticky/f')",
    "rename over another user's file in a sticky directory": "os.rename('mine', 'sticky/f')",
    "chmod of another user's file": "os.chmod('readable', 0o777)",
    "chown of an own file": "os.chown('mine', 0, -1)",
    "chgrp to a foreign group": "os.chown('mine', -1, 0)",
    "set times of another user's file": "os.utime('readable', (1, 1))",
    "touch another user's file": "os.utime('readable')",
    "set an xattr of another user's file": "os.setxattr('readable', 'user.x', b'')",
    "set a trusted xattr": "os.setxattr('mine', 'trusted.x', b'')",
    "get a trusted xattr": "os.getxattr('mine', 'trusted.t')",
    "set a security xattr": "os.setxattr('mine', 'security.x', b'')",
    "access for writing": "print(os.access('readable', os.W_OK))",
    "access for reading": "print(os.access('readable', os.R_OK))",
    "access for execution": "print(os.access('mine', os.X_OK))",
}


def furnish(top: Path) -> None:
    for name in ("readable", "private", "mine"):
        (top / name).write_text(name)
    (top / "private").chmod(0o600)
    os.chown(top / "mine", UID, GID)
    os.setxattr(top / "mine", "trusted.t", b"")
    for name, mode in ("closed", 0o755), ("dark", 0o711), ("hidden", 0o744), ("sticky", 0o1777):
        (top / name).mkdir()
        (top / name / "f").touch()
        (top / name).chmod(mode)
    top.chmod(0o777)


@pytest.mark.parametrize("call", NOT_ALLOWED)
def test_a_call_is_refused_as_on_a_plain_file_system(place: Place, call: str) -> None:
    furnish(place.source)
    furnish(place.plain)
    expected = as_user(place.plain, NOT_ALLOWED[call], uid=UID, gid=GID)
    assert expected in ("EACCES", "EPERM", "ENODATA", "EOPNOTSUPP", "True", "False")
    assert as_user(place.path, NOT_ALLOWED[call], uid=UID, gid=GID) == expected
    assert sorted(os.listdir(place.source)) == sorted(os.listdir(place.plain))


ALLOWED = {
    "read by a second group": "print(os.read(os.open('team', os.O_RDONLY), 9))",
    "write by a second group": "print(os.write(os.open('team', os.O_WRONLY), b'xy'))",
    "chgrp to a second group": f"os.chown('mine', -1, {EXTRA}); print(os.stat('mine').st_gid)",
    "write to a file made read-only after open": (
        "fd = os.open('mine', os.O_RDWR); os.chmod('mine', 0)\n"
        "print(os.write(fd, b'xy'), os.pread(fd, 9, 0))\n"
        "os.ftruncate(fd, 1); print(os.fstat(fd).st_size)"
    ),
    "create a file without permissions": (
        "fd = os.open('new', os.O_CREAT | os.O_RDWR, 0); print(os.write(fd, b'xy'), os.pread(fd, 9, 0))"
    ),
    "list a directory without search permission": "print(os.listdir('hidden'))",
    "list xattrs": "print(os.listxattr('mine'))",
    "stat a private file": "print(os.stat('private').st_size)",
    "touch a writable file of another user": "os.utime('team'); print('touched')",
}


@pytest.mark.parametrize("call", ALLOWED)
def test_a_call_is_allowed_as_on_a_plain_file_system(place: Place, call: str) -> None:
    outputs = []
    for top, through in (place.source, place.path), (place.plain, place.plain):
        furnish(top)
        (top / "team").write_text("team")
        os.chown(top / "team", 0, EXTRA)
        (top / "team").chmod(0o660)
        outputs.append(as_user(through, ALLOWED[call], uid=UID, gid=GID, groups=(EXTRA,)))
    assert outputs[0] == outputs[1]
    assert not outputs[0].startswith("E")


@pytest.mark.parametrize("code", ["os.listdir()", "os.stat('f')", "os.stat('.cleancache/puts')"])
def test_without_allow_other_other_users_are_refused(source: Path, mount: Mounter, code: str) -> None:
    (source / "f").touch()
    source.chmod(0o777)
    fs = mount()
    assert as_user(fs.path, code) == "EACCES"


def test_other_users_can_read_but_not_write_control_files(source: Path, mount: Mounter) -> None:
    source.chmod(0o777)
    fs = mount("--allow-other")
    read = "print(os.read(os.open('.cleancache/%s', os.O_RDONLY), 99))"
    for name in ("puts", "backend", "pool_limit", "stats.json", "metrics", "zcache/obj_count"):
        assert as_user(fs.path, read % name).startswith("b'"), name
    for name in ("backend", "pool_limit", "page_cache", "drop", "puts"):
        assert as_user(fs.path, f"os.open('.cleancache/{name}', os.O_WRONLY)") == "EACCES", name
        assert as_user(fs.path, f"os.truncate('.cleancache/{name}', 0)") == "EACCES", name
        assert as_user(fs.path, f"os.chmod('.cleancache/{name}', 0o666)") == "EPERM", name
    assert as_user(fs.path, "os.open('.cleancache/x', os.O_CREAT | os.O_WRONLY)") == "EACCES"
    assert fs.stats()["backend"] == "zcache"
