"""Test attacks: by other users on a mount, by the source on the daemon, and by users who may mount."""

import ctypes
import os
import re
import shutil
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import SMALL_CACHES, Mounter, Place
from tests.harness.mounting import (
    MountedFs,
    as_user,
    killed_after,
    mounted,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="acting as other users needs root")

UID, GID, EXTRA = 12345, 23456, 34567
"""A user; fusermount3 needs the user name."""

REFUSED = ("EACCES", "EPERM")


@pytest.fixture(scope="module")
def open_fs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedFs]:
    """Provide a mount for all users with an attribute timeout of an hour."""
    top = tmp_path_factory.mktemp("open")
    for parent in top.parents[:2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    for name in ("source", "mnt"):
        (top / name).mkdir()
    with mounted(
        top / "source", top / "mnt", *SMALL_CACHES, "-o", "allow_other,attr_timeout=3600"
    ) as fs:
        yield fs


@pytest.fixture(scope="module")
def alone_fs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedFs]:
    """Provide a mount for all users with ``--coherency none``, where absent names are cached too."""
    top = tmp_path_factory.mktemp("alone")
    for parent in top.parents[:2]:
        parent.chmod(parent.stat().st_mode | 0o011)
    for name in ("source", "mnt"):
        (top / name).mkdir()
        (top / name).chmod(0o777)
    with mounted(top / "source", top / "mnt", *SMALL_CACHES, "-o", "allow_other,coherency=none") as fs:
        yield fs


@contextmanager
def directory(fs: MountedFs, mode: int = 0o777) -> Iterator[tuple[Path, Path]]:
    """Make a directory for a test, and yield its paths in the source and in the mount."""
    name = f"d{time.monotonic_ns()}"
    (fs.source / name).mkdir()
    (fs.source / name).chmod(mode)
    yield fs.source / name, fs.path / name


@contextmanager
def acting(path: Path, code: str) -> Iterator[Callable[[], str]]:
    """Run Python code as a user in a directory. It stops at each ``step()`` until the yielded call.

    The call returns the line that the next step prints.
    """
    script = (
        "import os, sys\n"
        f"os.setgroups([]); os.setresgid({GID}, {GID}, {GID}); os.setresuid({UID}, {UID}, {UID})\n"
        "def step(text=''):\n    print(text, flush=True); sys.stdin.readline()\n"
        "def attempt(call, *args):\n"
        "    try: return str(call(*args))\n"
        "    except OSError as exc: return __import__('errno').errorcode[exc.errno]\n"
        f"step()\n{code}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", script],
        cwd=path,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None

    def next_step() -> str:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    with process, killed_after(30, process.pid):
        try:
            assert process.stdout.readline() == "\n"
            yield next_step
        finally:
            process.stdin.close()
            process.kill()


# -- the kernel's cached names and attributes, and the source -----------------------------------------


@pytest.mark.parametrize("flags", ["os.O_RDWR", "os.O_WRONLY | os.O_TRUNC"])
def test_a_private_file_that_appeared_is_not_opened_by_a_create(
    alone_fs: MountedFs, flags: str
) -> None:
    with directory(alone_fs) as (source, path):
        code = (
            "step(attempt(os.stat, 'f'))\n"
            f"step(attempt(lambda: os.read(os.open('f', os.O_CREAT | {flags}, 0o666), 99)))"
        )
        with acting(path, code) as next_step:
            assert next_step() == "ENOENT"  # the kernel caches the absence
            (source / "f").write_text("secret")
            (source / "f").chmod(0o600)
            assert next_step() == "EACCES"
        assert (source / "f").read_text() == "secret"


def test_a_public_file_that_appeared_is_opened_by_a_create(alone_fs: MountedFs) -> None:
    with directory(alone_fs) as (source, path):
        code = (
            "step(attempt(os.stat, 'f'))\n"
            "step(attempt(lambda: os.read(os.open('f', os.O_CREAT | os.O_RDWR), 99)))\n"
            "step(attempt(os.open, 'f', os.O_CREAT | os.O_EXCL))"
        )
        with acting(path, code) as next_step:
            assert next_step() == "ENOENT"
            (source / "f").write_text("public")
            (source / "f").chmod(0o666)
            assert next_step() == "b'public'"
            assert next_step() == "EEXIST"


@pytest.mark.parametrize(
    "kind", [stat.S_IFIFO, stat.S_IFCHR, stat.S_IFLNK], ids=["fifo", "device", "link"]
)
def test_the_daemon_does_not_open_a_special_file_that_appeared(alone_fs: MountedFs, kind: int) -> None:
    with directory(alone_fs) as (source, path):
        code = (
            "step(attempt(os.stat, 'f'))\n"
            "step(attempt(os.open, 'f', os.O_CREAT | os.O_WRONLY | os.O_NONBLOCK, 0o666))"
        )
        with acting(path, code) as next_step:
            assert next_step() == "ENOENT"
            if kind == stat.S_IFLNK:
                (source / "f").symlink_to("/proc/self/attr/nothing")
            else:
                os.mknod(source / "f", kind | 0o666, os.makedev(1, 5))
                (source / "f").chmod(0o666)
            expected = {stat.S_IFIFO: "ENXIO", stat.S_IFCHR: "EACCES", stat.S_IFLNK: "ENOENT"}
            assert next_step() in (expected[kind], "EACCES")
        assert alone_fs.stats()["open_files"] == 0


RESTRICT: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "chmod": (lambda path: path.chmod(0o755), lambda path: path.chmod(0o700)),
    "chown": (
        lambda path: (path.chmod(0o700), os.chown(path, UID, GID)),
        lambda path: os.chown(path, 0, 0),
    ),
    "chgrp": (
        lambda path: (path.chmod(0o750), os.chown(path, 0, GID)),
        lambda path: os.chown(path, 0, 0),
    ),
    "an ACL that excludes the user": (
        lambda path: (remove_acl(path), path.chmod(0o755)),
        lambda path: acl(path, f"u:{UID}:-"),
    ),
    "an ACL that no longer includes the user": (
        lambda path: (path.chmod(0o750), acl(path, f"u:{UID}:r-x")),
        lambda path: acl(path, f"u:{UID}:-,m::r-x"),
    ),
}


def remove_acl(path: Path) -> None:
    subprocess.run(["setfacl", "-b", path], check=True, timeout=10)


def acl(path: Path, entry: str) -> None:
    subprocess.run(["setfacl", "-m", entry, path], check=True, timeout=10)


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.parametrize("change", RESTRICT)
def test_a_user_without_access_in_the_source_opens_nothing_any_more(
    open_fs: MountedFs, kind: str, change: str
) -> None:
    if "ACL" in change and not shutil.which("setfacl"):
        pytest.skip("setfacl is not installed")
    permit, forbid = RESTRICT[change]
    with directory(open_fs) as (source, path):
        if kind == "file":
            (source / "x").write_text("secret")
        else:
            (source / "x").mkdir()
        permit(source / "x")
        read = "os.read(os.open('x', 0), 9)" if kind == "file" else "os.listdir('x')"
        again = "os.open(f'/proc/self/fd/{held}', os.O_RDONLY)"
        code = (
            "held = os.open('x', os.O_PATH)\n"
            "for _ in range(2): step(attempt(lambda: " + read + "))\n"
            "step(attempt(lambda: " + again + "))\n"
            "step(attempt(lambda: " + read + "))\n"
        )
        with acting(path, code) as next_step:
            assert next_step() in ("b'secret'", "[]")
            forbid(source / "x")
            assert next_step() == "EACCES"
            assert next_step() == "EACCES"
            permit(source / "x")
            os.stat(path / "x")
            open_fs.path.joinpath(path.name, "x").chmod(0o755)  # makes the kernel get the attributes
            assert next_step() in ("b'secret'", "[]")


CHANGES = [
    "os.chmod('f', 0o777)",
    f"os.chown('f', -1, {GID})",
    "os.setxattr('f', 'system.posix_acl_access', mine)",
    "os.setxattr('f', 'user.x', b'x')",
    "os.truncate('f', 0)",
    "os.utime('f', (1, 1))",
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_former_owner_changes_nothing(open_fs: MountedFs, change: str) -> None:
    if "acl" in change and not shutil.which("setfacl"):
        pytest.skip("setfacl is not installed")
    with directory(open_fs) as (source, path):
        (source / "f").write_text("secret")
        os.chown(source / "f", UID, GID)
        listed = os.getxattr(_with_acl(source), "system.posix_acl_access")
        code = f"mine = {listed!r}\nstep(os.stat('f').st_uid)\nstep(attempt(lambda: {change}))"
        with acting(path, code) as next_step:
            assert next_step() == str(UID)
            os.chown(source / "f", 0, 0)
            (source / "f").chmod(0o600)
            before = (source / "f").stat()
            assert next_step() in REFUSED
        assert (source / "f").stat() == before
        assert os.listxattr(source / "f") == []


def test_an_open_fd_keeps_its_access(open_fs: MountedFs) -> None:
    with directory(open_fs) as (source, path):
        (source / "f").write_text("content")
        code = "fd = os.open('f', os.O_RDONLY)\nstep()\nstep(attempt(os.pread, fd, 99, 0))"
        with acting(path, code) as next_step:
            next_step()
            (source / "f").chmod(0)
            open_fs.drop_kernel(path / "f")
            assert next_step() == "b'content'"


@pytest.mark.parametrize("call", ["unlink('f')", "rename('f', 'g')", "rename('mine', 'f')"])
def test_the_sticky_bit_protects_a_file_that_took_a_name_in_the_source(
    open_fs: MountedFs, call: str
) -> None:
    with directory(open_fs, 0o1777) as (source, path):
        for name in ("f", "mine"):
            (source / name).write_text("attacker's")
            os.chown(source / name, UID, GID)
        code = (
            "step(attempt(lambda: (os.stat('f').st_uid, os.stat('mine').st_uid)))\n"
            f"step(attempt(lambda: os.{call}))"
        )
        with acting(path, code) as next_step:
            assert next_step() == f"({UID}, {UID})"
            (source / "f").unlink()
            (source / "f").write_text("root's")
            assert next_step() in REFUSED
        assert (source / "f").read_text() == "root's"
        assert sorted(os.listdir(source)) == ["f", "mine"]


def test_a_user_may_remove_only_own_entries_of_a_sticky_directory(open_fs: MountedFs) -> None:
    with directory(open_fs, 0o1777) as (source, path):
        code = (
            "os.mkdir('d'); os.symlink('x', 'l'); os.mkdir('e')\n"
            "step(attempt(lambda: (os.rmdir('d'), os.unlink('l'), os.rename('e', 'r'))))\n"
            "step(attempt(os.rmdir, 'of_root'))"
        )
        (source / "of_root").mkdir()
        with acting(path, code) as next_step:
            assert next_step() == "(None, None, None)"
            assert next_step() in REFUSED
        assert sorted(os.listdir(source)) == ["of_root", "r"]


# -- the owners of new files ------------------------------------------------------------------------


def test_files_are_made_by_their_owner_and_not_chowned_afterwards(
    source: Path, mount: Mounter, tmp_path: Path
) -> None:
    """Between creation and chown, another file could take the name and would change its owner."""
    if not shutil.which("strace"):
        pytest.skip("strace is not installed")
    for parent in (*source.parents[:3], source):
        parent.chmod(parent.stat().st_mode | 0o011)
    source.chmod(0o777)
    fs = mount("--allow-other")
    trace = tmp_path / "trace"
    calls = "chown,fchown,fchownat,lchown,chmod,fchmod,fchmodat,mkdirat,symlinkat,mknodat"
    command = ["strace", "-f", "-e", f"trace={calls}", "-o", str(trace), "-p", str(fs.process.pid)]
    with subprocess.Popen(command, stderr=subprocess.PIPE) as st:
        assert st.stderr is not None
        assert b"attached" in st.stderr.readline()
        try:
            code = (
                "os.mkdir('d', 0o1770); os.symlink('x', 'l'); os.mkfifo('p')\n"
                "os.close(os.open('f', os.O_CREAT | os.O_WRONLY, 0o4755))"
            )
            assert as_user(fs.path, code, uid=UID, gid=GID, umask=0) == ""
        finally:
            st.terminate()
    traced = trace.read_text()
    for call in ("mkdirat(", "symlinkat(", "mknodat("):
        assert traced.count(call) == 1
    assert "chown" not in traced
    assert "chmod" not in traced
    modes = {name: stat.S_IMODE((source / name).lstat().st_mode) for name in "dpf"}
    assert modes == {"d": 0o1770, "p": 0o666, "f": 0o4755}
    assert {(source / name).lstat()[4:6] for name in "dlpf"} == {(UID, GID)}


def test_the_daemon_has_its_own_credentials_afterwards(open_fs: MountedFs) -> None:
    with directory(open_fs) as (_, path):
        code = "for i in range(50): os.mkdir(str(i)); os.rmdir(str(i))"
        assert as_user(path, code, uid=UID, gid=GID) == ""
    effective = set()
    for task in Path(f"/proc/{open_fs.process.pid}/task").iterdir():
        try:
            status = (task / "status").read_text()
        except (FileNotFoundError, ProcessLookupError):  # trio ends idle threads
            continue
        assert re.findall(r"^[UG]id:\s(.*)$", status, re.MULTILINE) == ["0\t0\t0\t0"] * 2
        effective.add(re.findall(r"^CapEff:\s(.*)$", status, re.MULTILINE)[0])
    assert len(effective) == 1


def test_setting_an_acl_clears_the_set_gid_bit_of_a_foreign_group(place: Place) -> None:
    if not shutil.which("setfacl"):
        pytest.skip("setfacl is not installed")
    modes = []
    for groups in ((), (EXTRA,)):
        for made, through in ((place.source, place.path), (place.plain, place.plain)):
            name = f"f{len(groups)}"
            (made / name).touch()
            os.chown(made / name, UID, EXTRA)
            (made / name).chmod(0o2755)
            entry = os.getxattr(_with_acl(made), "system.posix_acl_access")
            code = f"os.setxattr({name!r}, 'system.posix_acl_access', {entry!r})"
            assert as_user(through, code, uid=UID, gid=GID, groups=groups) == ""
            modes.append(stat.filemode((made / name).stat().st_mode))
            assert stat.filemode((through / name).stat().st_mode) == modes[-1]
    assert modes[0] == modes[1]
    assert modes[2] == modes[3]
    assert modes[0] != modes[2]


def _with_acl(made: Path) -> Path:
    (made / "list").touch()
    acl(made / "list", "u:1234:rwx,g::r-x,m::rwx")
    return made / "list"


def test_acls_unknown_to_the_source_are_not_supported(place: Place) -> None:
    (place.source / "f").touch()
    (place.source / "f").chmod(0o666)
    for name in ("system.nfs4_acl", "system.cifs_acl", "system.ntfs_security"):
        assert as_user(place.path, f"os.setxattr('f', '{name}', b'x')") == "ENOTSUP"
        assert as_user(place.path, f"os.removexattr('f', '{name}')") == "ENOTSUP"
    with pytest.raises(OSError, match="not supported"):
        os.setxattr(place.path / "f", "system.nfs4_acl", b"x")


# -- the control directory --------------------------------------------------------------------------

CONTROL_CHANGES = [
    "os.chmod('.cleancache/stats', 0o666)",
    "os.chmod('.cleancache', 0o777)",
    "os.chown('.cleancache/drop', 12345, -1)",
    "os.chown('.cleancache', 12345, 12345)",
    "os.unlink('.cleancache/stats')",
    "os.rmdir('.cleancache')",
    "os.rename('.cleancache', 'x')",
    "os.rename('d', '.cleancache')",
    "os.rename('.cleancache/stats', 'x')",
    "os.rename('f', '.cleancache/x')",
    "os.link('.cleancache/drop', 'x')",
    "os.link('f', '.cleancache/x')",
    "os.symlink('/', '.cleancache/x')",
    "os.mkdir('.cleancache/x')",
    "os.mkfifo('.cleancache/x')",
    "os.open('.cleancache/x', os.O_CREAT | os.O_WRONLY)",
    "os.open('.cleancache/stats', os.O_WRONLY)",
    "os.setxattr('.cleancache/stats', 'user.x', b'')",
    "os.setxattr('.cleancache', 'system.posix_acl_access', b'\\2\\0\\0\\0')",
]


@pytest.mark.parametrize("uid", [0, UID], ids=["owner", "other"])
def test_no_user_can_change_the_control_directory(open_fs: MountedFs, uid: int) -> None:
    open_fs.source.chmod(0o777)
    (open_fs.source / "f").touch()
    (open_fs.source / "d").mkdir(exist_ok=True)
    code = "".join(
        f"try: {change}; print({change!r})\nexcept OSError as exc: print(exc.errno)\n"
        for change in CONTROL_CHANGES
    )
    output = as_user(open_fs.path, code, uid=uid, gid=uid).splitlines()
    assert len(output) == len(CONTROL_CHANGES)
    # EPERM, EACCES, EINVAL (an invalid ACL), EXDEV, EBUSY, EISDIR, ENOTDIR, EOPNOTSUPP
    assert [line for line in output if not line.isdigit()] == []
    assert stat.S_IMODE(open_fs.control("drop").stat().st_mode) == 0o200
    assert stat.S_IMODE(open_fs.control("stats").stat().st_mode) == 0o444
    assert "x" not in os.listdir(open_fs.path)


def test_an_entry_of_that_name_in_the_source_stays_hidden(open_fs: MountedFs) -> None:
    own = open_fs.source / ".cleancache"
    own.mkdir()
    try:
        (own / "drop").write_text("the source's")
        assert ".cleancache" not in os.listdir(open_fs.path)
        open_fs.control("drop").write_text("3")
        assert (own / "drop").read_text() == "the source's"
        assert "puts" in os.listdir(open_fs.path / ".cleancache")
    finally:
        shutil.rmtree(own)


# -- no way out of the source -----------------------------------------------------------------------


def exchange(one: Path, other: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(-100, os.fsencode(one), -100, os.fsencode(other), 2):
        raise OSError(ctypes.get_errno(), "renameat2")


def test_a_directory_replaced_by_a_link_does_not_lead_outside(
    source: Path, mount: Mounter, tmp_path: Path
) -> None:
    """The daemon may read files that the user may not. It must follow no link for the user."""
    outside = tmp_path / "outside"
    outside.mkdir(mode=0o700)
    fs = mount("-o", "allow_other,attr_timeout=0")
    for parent in (*fs.path.parents[:3], fs.source):
        parent.chmod(parent.stat().st_mode | 0o011)
    with directory(fs) as (source, path):
        for top, text in ((source / "d", "inside"), (outside, "secret")):
            top.mkdir(exist_ok=True)
            for name in "abc":
                (top / name).write_text(text)
        (source / "l").symlink_to(outside)
        stop = threading.Event()

        def swap() -> None:
            while not stop.is_set():
                exchange(source / "d", source / "l")
                time.sleep(0.0002)

        swapper = threading.Thread(target=swap)
        swapper.start()
        try:
            code = (
                "import time\nseen = set(); begin = time.monotonic()\n"
                "while time.monotonic() < begin + (1 if 'inside' in seen else 15):\n"
                "    for name in ('d/a', 'l/b', 'd/c'):\n"
                "        try: seen.add(open(name).read())\n"
                "        except OSError: pass\n"
                "        try: seen.update(os.listdir('d'))\n"
                "        except OSError: pass\n"
                "        try: os.mkdir('d/new'); os.rmdir('d/new')\n"
                "        except OSError: pass\n"
                "print(sorted(seen))"
            )
            output = as_user(path, code, uid=UID, gid=GID)
        finally:
            stop.set()
            swapper.join()
    assert "secret" not in output
    assert "inside" in output
    assert sorted(os.listdir(outside)) == ["a", "b", "c"]


def test_a_moved_source_is_followed_and_a_removed_one_is_empty(source: Path, mount: Mounter) -> None:
    (source / "f").write_text("content")
    fs = mount("--attr-timeout", "0")
    moved = source.with_name("moved")
    source.rename(moved)
    source.mkdir()
    (source / "f").write_text("another's")
    assert (fs.path / "f").read_text() == "content"
    (fs.path / "g").write_text("new")
    assert (moved / "g").read_text() == "new"
    shutil.rmtree(moved)
    assert os.listdir(fs.path) == []
    with pytest.raises(FileNotFoundError):
        (fs.path / "h").write_text("nowhere")
    assert os.listdir(source) == ["f"]


def test_links_out_of_the_source_are_resolved_by_the_kernel_only(open_fs: MountedFs) -> None:
    with directory(open_fs) as (source, path):
        (source / "up").symlink_to("../../../../../../../../etc")
        (source / "absolute").symlink_to("/etc/hostname")
        assert os.readlink(path / "up") == "../../../../../../../../etc"
        assert os.readlink(path / "absolute") == "/etc/hostname"
        assert os.stat(path / "up").st_dev == os.stat("/etc").st_dev  # resolved by the kernel
        assert os.path.samefile(open_fs.path / "..", open_fs.path.parent)


def test_acting_as_other_users_keeps_the_coredump_filter(open_fs: MountedFs) -> None:
    with directory(open_fs) as (_, path):
        assert as_user(path, "os.mkdir('d')", uid=UID, gid=GID) == ""
    assert int(Path(f"/proc/{open_fs.process.pid}/coredump_filter").read_text(), 16) == 0
