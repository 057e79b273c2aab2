"""Test files without a name (O_TMPFILE) on a real mount."""

import errno
import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter, Place
from tests.harness.mounting import MountedFs, as_user, wait_until
from tests.harness.ranges import link_fd

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="acting as another user needs root")

COHERENCIES = (("--coherency", "open"), ("--coherency", "none", "--writeback"))


@pytest.fixture(params=COHERENCIES, ids=["open", "writeback"])
def fs(request: pytest.FixtureRequest, share: Mounter) -> MountedFs:
    return share(*request.param)


def test_it_has_data_but_no_name(fs: MountedFs) -> None:
    fd = os.open(fs.path, os.O_TMPFILE | os.O_RDWR, 0o600)
    os.write(fd, b"hello")
    assert os.pread(fd, 10, 0) == b"hello"
    assert (os.fstat(fd).st_nlink, os.fstat(fd).st_size) == (0, 5)
    assert os.listdir(fs.source) == os.listdir(fs.path) == []
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)
    assert os.read(again, 10) == b"hello"
    os.close(again)
    os.close(fd)
    wait_until(lambda: fs.stats()["open_files"] == 0)


def test_a_link_gives_it_a_name(fs: MountedFs) -> None:
    fd = os.open(fs.path, os.O_TMPFILE | os.O_WRONLY, 0o644)
    os.write(fd, b"hello")
    os.fsync(fd)
    link_fd(fd, fs.path / "named")
    os.write(fd, b" again")
    os.close(fd)
    assert (fs.path / "named").read_bytes() == (fs.source / "named").read_bytes() == b"hello again"
    assert (fs.path / "named").stat().st_nlink == 1
    (fs.path / "named").unlink()
    assert os.listdir(fs.source) == []


def test_with_o_excl_it_can_be_given_none(fs: MountedFs) -> None:
    fd = os.open(fs.path, os.O_TMPFILE | os.O_EXCL | os.O_RDWR, 0o644)
    with pytest.raises(FileNotFoundError):
        link_fd(fd, fs.path / "named")
    os.close(fd)


@needs_root
@pytest.mark.parametrize("default_acl", [False, True])
@pytest.mark.parametrize("set_gid", [False, True])
def test_it_is_the_requesters_with_the_usual_permissions(
    place: Place, set_gid: bool, default_acl: bool
) -> None:
    code = (
        "st = os.fstat(os.open('.', os.O_TMPFILE | os.O_RDWR, 0o666))\n"
        "print(oct(st.st_mode), st.st_uid, st.st_gid)"
    )
    found = []
    for top, at in ((place.source, place.path), (place.plain, place.plain)):
        top.chmod(0o2777 if set_gid else 0o777)
        if default_acl:
            subprocess.run(["setfacl", "-d", "-m", "u::rwx,g::rwx,o::r", top], check=True, timeout=30)
        found.append(as_user(at, code, umask=0o027))
    assert found[0] == found[1]
    assert str(12345) in found[0]


@needs_root
def test_a_directory_that_may_not_be_written_refuses_it(place: Place) -> None:
    place.source.chmod(0o755)
    made = as_user(place.path, "os.open('.', os.O_TMPFILE | os.O_RDWR, 0o666)")
    assert made == errno.errorcode[errno.EACCES]


def test_the_control_directory_has_none(fs: MountedFs) -> None:
    top = Path(fs.stats()["mountpoint"])
    with pytest.raises(OSError, match=r"not supported|Permission|not permitted"):
        os.open(top / ".cleancache", os.O_TMPFILE | os.O_RDWR, 0o600)
