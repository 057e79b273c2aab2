"""Test names, directories, links, special files and extended attributes on a real mount."""

import ctypes
import errno
import os
import shutil
import socket
import stat
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter, Place
from tests.harness.mounting import mounted, wait_until

NOREPLACE, EXCHANGE = 1, 2
libc = ctypes.CDLL(None, use_errno=True)


def renameat2(old: Path, new: Path, flags: int) -> None:
    if libc.renameat2(-100, os.fsencode(old), -100, os.fsencode(new), flags):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def run(*command: str | Path, **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True, **options)  # type: ignore[call-overload]  # passed on
    return str(done.stdout)


@contextmanager
def tmpfs(path: Path) -> Iterator[None]:
    path.mkdir(exist_ok=True)
    run("mount", "-t", "tmpfs", "none", path)
    try:
        yield
    finally:
        run("umount", "-l", path)


@contextmanager
def stream_of(directory: Path) -> Iterator[ctypes.c_void_p]:
    """Open a directory with opendir(3) until the end of the block."""
    libc.opendir.restype = libc.readdir.restype = ctypes.c_void_p
    libc.telldir.restype = ctypes.c_long
    stream = ctypes.c_void_p(libc.opendir(os.fsencode(directory)))
    assert stream
    try:
        yield stream
    finally:
        libc.closedir(stream)


def next_entry(stream: ctypes.c_void_p) -> tuple[bytes, int] | None:
    """Return the name and d_ino of the next entry."""
    entry = libc.readdir(stream)
    return (ctypes.string_at(entry + 19), ctypes.c_ulong.from_address(entry).value) if entry else None


def populate(top: Path) -> None:
    (top / "file").write_bytes(b"text")
    (top / "other").write_bytes(b"more")
    (top / "full").mkdir()
    (top / "full" / "child").touch()
    (top / "empty").mkdir()
    (top / "loop").symlink_to("loop")
    (top / "dangling").symlink_to("nowhere")


Call = Callable[[Path], object]

REFUSED: dict[str, Call] = {
    "open a missing file": lambda d: os.open(d / "missing", os.O_RDONLY),
    "stat below a missing directory": lambda d: os.stat(d / "missing" / "x"),
    "stat below a file": lambda d: os.stat(d / "file" / "x"),
    "create below a file": lambda d: os.open(d / "file" / "x", os.O_CREAT),
    "list a file": lambda d: os.listdir(d / "file"),
    "write to a directory": lambda d: os.open(d / "empty", os.O_WRONLY),
    "stat a name of 256 bytes": lambda d: os.stat(d / ("n" * 256)),
    "create a name of 256 bytes": lambda d: os.open(d / ("n" * 256), os.O_CREAT),
    "mkdir a name of 256 bytes": lambda d: os.mkdir(d / ("n" * 256)),
    "rename to a name of 256 bytes": lambda d: os.rename(d / "file", d / ("n" * 256)),
    "follow a loop": lambda d: os.stat(d / "loop"),
    "open a link with O_NOFOLLOW": lambda d: os.open(d / "dangling", os.O_NOFOLLOW),
    "follow a dangling link": lambda d: os.stat(d / "dangling"),
    "mkdir over a file": lambda d: os.mkdir(d / "file"),
    "mkdir over a dangling link": lambda d: os.mkdir(d / "dangling"),
    "symlink over a file": lambda d: os.symlink("x", d / "file"),
    "symlink to nothing": lambda d: os.symlink("", d / "new"),
    "symlink of 4096 bytes": lambda d: os.symlink("x" * 4096, d / "new"),
    "mknod over a file": lambda d: os.mkfifo(d / "file"),
    "link over a file": lambda d: os.link(d / "file", d / "other"),
    "link a directory": lambda d: os.link(d / "empty", d / "new"),
    "O_EXCL over a file": lambda d: os.open(d / "file", os.O_CREAT | os.O_EXCL),
    "O_EXCL over a dangling link": lambda d: os.open(d / "dangling", os.O_CREAT | os.O_EXCL),
    "rmdir a full directory": lambda d: os.rmdir(d / "full"),
    "rmdir a file": lambda d: os.rmdir(d / "file"),
    "unlink a directory": lambda d: os.unlink(d / "empty"),
    "unlink a missing file": lambda d: os.unlink(d / "missing"),
    "rmdir dot": lambda d: os.rmdir(f"{d}/empty/."),
    "rename a missing file": lambda d: os.rename(d / "missing", d / "new"),
    "rename over a full directory": lambda d: os.rename(d / "empty", d / "full"),
    "rename a directory over a file": lambda d: os.rename(d / "empty", d / "file"),
    "rename a file over a directory": lambda d: os.rename(d / "file", d / "empty"),
    "rename a directory into itself": lambda d: os.rename(d / "full", d / "full" / "in"),
    "rename over a parent": lambda d: os.rename(d / "full" / "child", d / "full"),
    "rename over with NOREPLACE": lambda d: renameat2(d / "file", d / "other", NOREPLACE),
    "exchange with a missing file": lambda d: renameat2(d / "file", d / "missing", EXCHANGE),
    "exchange with the parent": lambda d: renameat2(d / "full" / "child", d / "full", EXCHANGE),
    "two rename flags": lambda d: renameat2(d / "file", d / "other", NOREPLACE | EXCHANGE),
    "an unknown rename flag": lambda d: renameat2(d / "file", d / "other", 1 << 20),
    "readlink of a file": lambda d: os.readlink(d / "file"),
    "truncate a directory": lambda d: os.truncate(d / "empty", 0),
    "truncate to a negative size": lambda d: os.truncate(d / "file", -1),
    "get a missing xattr": lambda d: os.getxattr(d / "file", "user.none"),
    "get an xattr without a namespace": lambda d: os.getxattr(d / "file", "none"),
    "set an xattr without a namespace": lambda d: os.setxattr(d / "file", "none", b""),
    "remove a missing xattr": lambda d: os.removexattr(d / "file", "user.none"),
    "set a user xattr on a symlink": lambda d: os.setxattr(
        d / "loop", "user.x", b"", follow_symlinks=False
    ),
    "replace a missing xattr": lambda d: os.setxattr(d / "file", "user.x", b"", os.XATTR_REPLACE),
    "set an xattr of 64 KiB": lambda d: os.setxattr(d / "file", "user.x", b"v" * 65536),
}


@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_a_refused_call_raises_the_error_of_a_plain_directory(place: Place, call: Call) -> None:
    populate(place.source)
    populate(place.plain)
    with pytest.raises(OSError) as plain:  # noqa: PT011  # the errno is compared
        call(place.plain)
    with pytest.raises(OSError) as through:  # noqa: PT011  # the errno is compared
        call(place.path)
    assert errno.errorcode[through.value.errno or 0] == errno.errorcode[plain.value.errno or 0]
    assert sorted(os.listdir(place.source)) == sorted(os.listdir(place.plain))


def test_2000_entries_created_quickly_are_all_listed(place: Place) -> None:
    names = [f"entry-{i}" for i in range(2000)]
    for i, name in enumerate(names):
        if i % 500:
            os.close(os.open(place.path / name, os.O_CREAT | os.O_WRONLY, 0o644))
        else:
            (place.path / name).mkdir()
    assert sorted(os.listdir(place.path)) == sorted(names)
    with os.scandir(place.path) as entries:
        kinds = {entry.name: entry.is_dir(follow_symlinks=False) for entry in entries}
    assert kinds == {name: i % 500 == 0 for i, name in enumerate(names)}
    assert sorted(os.listdir(place.source)) == sorted(names)


@pytest.mark.parametrize("where", ["mount", "source"])
def test_a_listing_is_stable_while_entries_are_made_and_removed(place: Place, where: str) -> None:
    changed = place.path if where == "mount" else place.source
    for i in range(1500):
        (place.source / f"stays-{i}").touch()
        (place.source / f"goes-{i}").touch()
    seen = []
    with os.scandir(place.path) as entries:
        for n, entry in enumerate(entries):
            seen.append(entry.name)
            if n == 50:
                for i in range(1500):
                    (changed / f"goes-{i}").unlink()
                    if i < 300:
                        (changed / f"comes-{i}").touch()
    assert len(seen) == len(set(seen))
    assert {name for name in seen if name.startswith("stays")} == {f"stays-{i}" for i in range(1500)}
    assert sorted(os.listdir(place.path)) == sorted(os.listdir(place.source))


def test_entries_deleted_while_they_are_listed_are_all_deleted(place: Place) -> None:
    for i in range(1000):
        (place.source / f"f{i}").touch()
        if i % 10 == 0:
            (place.source / f"d{i}").mkdir()
            (place.source / f"d{i}" / "x").touch()
    shutil.rmtree(place.path)
    assert not place.source.exists()


def test_an_open_directory_shows_new_entries_when_it_is_rewound(place: Place) -> None:
    fd = os.open(place.path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        assert os.listdir(fd) == []
        (place.path / "a").touch()
        assert os.listdir(fd) == ["a"]
        (place.source / "b").touch()
        assert sorted(os.listdir(fd)) == ["a", "b"]
        (place.source / "a").unlink()
        assert os.listdir(fd) == ["b"]
    finally:
        os.close(fd)


def test_seekdir_returns_to_the_position_of_telldir(place: Place) -> None:
    for i in range(1000):
        (place.source / f"f{i}").touch()
    with stream_of(place.path) as stream:
        before = [next_entry(stream) for _ in range(400)]
        position = libc.telldir(stream)
        rest = list(iter(lambda: next_entry(stream), None))
        libc.seekdir(stream, ctypes.c_long(position))
        assert list(iter(lambda: next_entry(stream), None)) == rest
    assert len({*before, *rest}) == 1002


def test_listings_and_stat_have_the_same_inode_numbers(place: Place) -> None:
    (place.source / "d").mkdir()
    (place.source / "d" / "f").touch()
    with tmpfs(place.source / "d" / "t"):
        (place.source / "d" / "t" / "f").touch()
        for directory in (place.path, place.path / "d", place.path / "d" / "t"):
            with stream_of(directory) as stream:
                listed = dict(iter(lambda: next_entry(stream), None))
            shown = {name: os.stat(os.fsencode(directory) + b"/" + name).st_ino for name in listed}
            assert listed == shown


NAMES = {
    "every byte": bytes(b for b in range(1, 128) if b != ord("/")),
    "every high byte": bytes(range(128, 256)),
    "newline": b"\n",
    "backslash": b"\\",
    "not utf-8": b"caf\xe9",
    "255 bytes": b"n" * 255,
    "255 bytes of utf-8": ("ü" * 127 + "x").encode(),
    "leading dash": b"-rf",
    "three dots": b"...",
    "control directory of a subdirectory": b".cleancache",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_a_name_can_be_any_bytes(place: Place, name: bytes) -> None:
    through, there = os.fsencode(place.path), os.fsencode(place.source)
    file = os.path.join(through, name)
    Path(os.fsdecode(file)).write_bytes(name)
    assert os.listdir(through) == os.listdir(there) == [name]
    os.rename(file, file[:-1] + b"_")
    assert os.listdir(through) == os.listdir(there) == [name[:-1] + b"_"]
    os.rename(file[:-1] + b"_", file)
    os.link(file, os.path.join(through, b"l"))
    assert os.stat(file).st_nlink == 2
    os.unlink(os.path.join(there, name))
    time.sleep(0.25)
    assert os.listdir(through) == [b"l"]
    os.symlink(name, file)
    assert os.readlink(file) == name
    os.unlink(file)
    os.mkdir(file)
    os.rmdir(file)


@pytest.mark.parametrize("target", [b"x", b"../..", b"/abs/olute", b"\xff\n", b"t" * 4095])
def test_a_symbolic_link_keeps_its_target(place: Place, target: bytes) -> None:
    os.symlink(target, os.fsencode(place.path / "made"))
    os.symlink(target, os.fsencode(place.source / "found"))
    for directory in (place.path, place.source):
        for name in ("made", "found"):
            link = os.fsencode(directory / name)
            assert os.readlink(link) == target
            assert os.lstat(link).st_size == len(target)


def test_links_lead_to_files_and_directories(place: Place) -> None:
    (place.path / "d").mkdir()
    (place.path / "d" / "f").write_text("text")
    (place.path / "to_d").symlink_to("d")
    (place.path / "to_f").symlink_to("to_d/f")
    assert (place.path / "to_f").read_text() == "text"
    assert (place.path / "to_d").resolve() == place.path / "d"


def test_hard_links_are_one_file(place: Place) -> None:
    (place.path / "a").write_bytes(b"one")
    os.link(place.path / "a", place.path / "b")
    os.link(place.source / "a", place.source / "c")
    inodes = {(place.path / name).stat().st_ino for name in "abc"}
    assert len(inodes) == 1
    time.sleep(0.25)
    assert [(place.path / name).stat().st_nlink for name in "abc"] == [3, 3, 3]
    (place.path / "b").write_bytes(b"two!")
    assert (place.path / "c").read_bytes() == b"two!"
    (place.path / "a").unlink()
    assert (place.path / "b").read_bytes() == b"two!"
    assert (place.path / "b").stat().st_nlink == 2
    found = run("find", place.path, "-samefile", place.path / "b").split()
    assert sorted(found) == [str(place.path / "b"), str(place.path / "c")]


def test_a_link_to_a_symbolic_link_links_the_link(place: Place) -> None:
    (place.path / "f").touch()
    (place.path / "s").symlink_to("f")
    os.link(place.path / "s", place.path / "t", follow_symlinks=False)
    assert os.readlink(place.source / "t") == "f"
    assert (place.source / "s").lstat().st_nlink == 2


def test_rename_replaces_a_file_and_an_empty_directory(place: Place) -> None:
    populate(place.source)
    assert (place.path / "other").read_bytes() == b"more"
    (place.path / "file").rename(place.path / "other")
    assert (place.path / "other").read_bytes() == (place.source / "other").read_bytes() == b"text"
    (place.path / "full").rename(place.path / "empty")
    assert os.listdir(place.path / "empty") == os.listdir(place.source / "empty") == ["child"]
    assert not (place.path / "full").exists()


def test_rename_of_one_name_to_another_of_the_same_file_does_nothing(place: Place) -> None:
    (place.path / "a").write_bytes(b"x" * 5000)
    os.link(place.path / "a", place.path / "b")
    (place.path / "a").rename(place.path / "b")
    (place.path / "a").rename(place.path / "a")
    assert sorted(os.listdir(place.path)) == sorted(os.listdir(place.source)) == ["a", "b"]
    assert (place.path / "b").read_bytes() == b"x" * 5000


def test_rename_with_noreplace_to_a_new_name(place: Place) -> None:
    (place.path / "d").mkdir()
    (place.path / "a").write_bytes(b"text")
    renameat2(place.path / "a", place.path / "d" / "b", NOREPLACE)
    assert os.listdir(place.source) == ["d"]
    assert (place.path / "d" / "b").read_bytes() == b"text"


def test_exchange_swaps_files_and_directories(place: Place) -> None:
    populate(place.source)
    kept = os.open(place.path / "file", os.O_RDWR)
    try:
        assert (place.path / "other").read_bytes() == b"more"
        renameat2(place.path / "file", place.path / "other", EXCHANGE)
        assert (place.path / "other").read_bytes() == b"text"
        assert (place.path / "file").read_bytes() == b"more"
        os.pwrite(kept, b"TEXT", 0)
        assert (place.source / "other").read_bytes() == b"TEXT"
        renameat2(place.path / "full", place.path / "other", EXCHANGE)
        assert (place.path / "full").read_bytes() == b"TEXT"
        assert os.listdir(place.path / "other") == ["child"]
        (place.path / "other" / "new").write_bytes(b"in the moved directory")
        assert (place.source / "other" / "new").read_bytes() == b"in the moved directory"
        assert (place.path / "other" / "..").samefile(place.path)
    finally:
        os.close(kept)


def test_an_open_directory_still_works_after_a_move_in_the_source(place: Place) -> None:
    (place.source / "a" / "deep").mkdir(parents=True)
    (place.source / "b").mkdir()
    fd = os.open(place.path / "a" / "deep", os.O_RDONLY | os.O_DIRECTORY)
    try:
        (place.source / "a" / "deep").rename(place.source / "b" / "moved")
        os.close(os.open("new", os.O_CREAT | os.O_WRONLY, 0o644, dir_fd=fd))
        assert os.listdir(place.source / "b" / "moved") == ["new"]
        assert os.listdir(fd) == ["new"]
    finally:
        os.close(fd)
    time.sleep(0.25)
    assert (place.path / "b" / "moved" / "new").exists()
    assert not (place.path / "a" / "deep").exists()


def test_a_directory_replaced_by_a_file_in_the_source_is_a_file(place: Place) -> None:
    (place.source / "x").mkdir()
    assert (place.path / "x").is_dir()
    (place.source / "x").rmdir()
    (place.source / "x").write_bytes(b"file")
    time.sleep(0.25)
    assert (place.path / "x").read_bytes() == b"file"


def test_a_name_of_a_new_file_in_the_source_leads_to_the_new_file(place: Place) -> None:
    for i in range(5):
        (place.source / "x").write_bytes(b"%d" % i * 1000)
        time.sleep(0.3)
        assert (place.path / "x").read_bytes() == b"%d" % i * 1000
        (place.source / "x").unlink()


def test_a_fifo_carries_data(place: Place) -> None:
    os.mkfifo(place.path / "fifo", 0o640)
    there = (place.source / "fifo").stat()
    assert stat.S_ISFIFO(there.st_mode)
    assert stat.S_IMODE(there.st_mode) == 0o640
    got = []
    reader = threading.Thread(target=lambda: got.append((place.path / "fifo").read_bytes()))
    reader.start()
    (place.path / "fifo").write_bytes(b"through the fifo")
    reader.join(10)
    assert got == [b"through the fifo"]


def test_a_socket_on_the_mount_accepts_connections(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place.path)
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as client:
        server.bind("socket")
        server.listen()
        client.settimeout(5)
        client.connect("socket")
        client.send(b"hello")
        accepted, _ = server.accept()
        with accepted:
            assert accepted.recv(10) == b"hello"
    assert stat.S_ISSOCK((place.source / "socket").stat().st_mode)


def test_devices_keep_their_numbers(place: Place) -> None:
    os.mknod(place.path / "char", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(place.path / "block", stat.S_IFBLK | 0o600, os.makedev(4095, 70_000))
    for name, kind, number in (("char", stat.S_ISCHR, (1, 3)), ("block", stat.S_ISBLK, (4095, 70_000))):
        for directory in (place.path, place.source):
            st = (directory / name).stat()
            assert kind(st.st_mode)
            assert (os.major(st.st_rdev), os.minor(st.st_rdev)) == number


def test_mknod_also_makes_a_regular_file(place: Place) -> None:
    os.mknod(place.path / "f", stat.S_IFREG | 0o640)
    (place.path / "f").write_bytes(b"text")
    assert (place.source / "f").read_bytes() == b"text"
    assert stat.S_IMODE((place.source / "f").stat().st_mode) == 0o640


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_extended_attributes(place: Place, kind: str) -> None:
    path = place.path / "x"
    path.mkdir() if kind == "directory" else path.touch()
    os.setxattr(path, "user.a", b"\x00\xff" * 500)
    os.setxattr(path, b"user.\xfc", b"")
    os.setxattr(path, "trusted.t", b"root only")
    assert os.getxattr(place.source / "x", "user.a") == os.getxattr(path, "user.a") == b"\x00\xff" * 500
    assert os.getxattr(path, b"user.\xfc") == b""
    assert sorted(os.listxattr(path)) == sorted(os.listxattr(place.source / "x"))
    with pytest.raises(FileExistsError):
        os.setxattr(path, "user.a", b"new", os.XATTR_CREATE)
    assert os.getxattr(path, "user.a") == b"\x00\xff" * 500
    os.setxattr(path, "user.a", b"new", os.XATTR_REPLACE)
    os.setxattr(path, "user.c", b"", os.XATTR_CREATE)
    assert os.getxattr(place.source / "x", "user.a") == b"new"
    os.removexattr(path, "user.a")
    assert sorted(os.listxattr(place.source / "x")) == sorted(["trusted.t", "user.c", "user.\udcfc"])


def test_a_symbolic_link_can_have_trusted_attributes(place: Place) -> None:
    (place.path / "link").symlink_to("nowhere")
    os.setxattr(place.path / "link", "trusted.t", b"v", follow_symlinks=False)
    assert os.getxattr(place.source / "link", "trusted.t", follow_symlinks=False) == b"v"
    assert os.listxattr(place.path / "link", follow_symlinks=False) == ["trusted.t"]


@pytest.mark.skipif(not shutil.which("setfacl"), reason="setfacl is not installed")
def test_access_control_lists_are_kept_and_inherited(place: Place) -> None:
    script = (
        "umask 027; mkdir -m 777 d; setfacl -d -m u:1234:rwx,g:2345:rx d; touch d/f; mkdir d/sub;"
        "touch f;"
        "setfacl -m u:1234:rw f; chmod g-w f; getfacl -n d d/f d/sub f; stat -c %a d/f d/sub f"
    )
    assert run("sh", "-c", script, cwd=place.path) == run("sh", "-c", script, cwd=place.plain)


def test_statvfs_returns_the_values_of_the_source(place: Place) -> None:
    shown, real = os.statvfs(place.path), os.statvfs(place.source)
    for name in ("f_bsize", "f_frsize", "f_blocks", "f_files", "f_namemax"):
        assert getattr(shown, name) == getattr(real, name), name
    assert abs(shown.f_bfree - real.f_bfree) * shown.f_frsize < 1 << 30


def test_file_systems_below_the_source_are_told_apart(source: Path, mount: Mounter) -> None:
    with tmpfs(source / "a"), tmpfs(source / "b"):
        for name in "ab":
            (source / name / "f").write_bytes(name.encode() * 10_000)
        fs = mount()
        # Two file systems of one type give their first files the same number.
        assert (source / "a" / "f").stat().st_ino == (source / "b" / "f").stat().st_ino
        assert (fs.path / "a" / "f").stat().st_ino != (fs.path / "b" / "f").stat().st_ino
        for _ in range(2):
            for name in "ab":
                assert (fs.path / name / "f").read_bytes() == name.encode() * 10_000
            fs.drop_kernel()
        found = run("find", fs.path, "-samefile", fs.path / "a" / "f").split()
        assert found == [str(fs.path / "a" / "f")]
        assert sorted(run("find", fs.path, "-type", "f").split()) == [
            str(fs.path / name / "f") for name in "ab"
        ]
        with pytest.raises(OSError, match="Invalid cross-device link"):
            os.rename(fs.path / "a" / "f", fs.path / "b" / "g")
        shutil.move(fs.path / "a" / "f", fs.path / "b" / "g")
        assert (source / "b" / "g").read_bytes() == b"a" * 10_000


def test_one_broken_entry_does_not_hide_its_neighbours(source: Path, mount: Mounter) -> None:
    for name in ("inner", "broken", "good"):
        (source / name).mkdir()
    with mounted(source / "inner", source / "broken", "--attr-timeout", "0") as inner:
        inner.kill()
        assert {"broken", "good", "inner"} <= set(os.listdir(source))
        fs = mount()
        assert {"good", "inner"} <= set(os.listdir(fs.path))
        assert {"good", "inner"} <= {entry.name for entry in os.scandir(fs.path) if entry.is_dir()}
        with pytest.raises(OSError, match="not connected"):
            os.listdir(fs.path / "broken")


FEW_FDS = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (300, 300))"


def test_few_fds_are_enough_for_many_files(source: Path, mount: Mounter) -> None:
    for i in range(12):
        (source / f"d{i}").mkdir()
        for j in range(100):
            (source / f"d{i}" / f"f{j}").write_text(f"{i} {j}")
    fs = mount("--attr-timeout", "60", patch=FEW_FDS)
    fds = []
    try:
        for i in range(12):
            for j in range(100):
                fd = os.open(fs.path / f"d{i}" / f"f{j}", os.O_RDONLY)
                if j % 20 == 0:
                    fds.append((fd, f"{i} {j}"))
                else:
                    os.close(fd)
        assert len(fds) == 60
        assert len([file for _, _, files in os.walk(fs.path) for file in files]) == 1200
        for fd, text in fds:
            assert os.read(fd, 100).decode() == text
        for i in range(11, -1, -1):
            for j in range(100):
                assert (fs.path / f"d{i}" / f"f{j}").read_text() == f"{i} {j}"
        stats = fs.stats()
        assert stats["inodes_parked_total"] > 1000
        assert len(os.listdir(f"/proc/{fs.process.pid}/fd")) < 300
        assert stats["inodes"] > 1000, "many more inodes than fds"
    finally:
        for fd, _ in fds:
            os.close(fd)


def test_a_parked_file_is_found_after_a_move(source: Path, mount: Mounter) -> None:
    for name in ("a", "b"):
        (source / name).mkdir()
    for i in range(600):
        (source / "a" / f"f{i}").write_text(str(i))
    fs = mount("--attr-timeout", "60", patch=FEW_FDS)
    for i in range(600):
        os.stat(fs.path / "a" / f"f{i}")
    for i in range(0, 600, 2):
        (fs.path / "a" / f"f{i}").rename(fs.path / "b" / f"g{i}")
    (fs.path / "a").rename(fs.path / "c")
    for i in range(600):
        moved = fs.path / "b" / f"g{i}" if i % 2 == 0 else fs.path / "c" / f"f{i}"
        assert moved.read_text() == str(i)
        moved.chmod(0o600)
    assert sum(1 for _ in (source / "b").iterdir()) == 300
    assert fs.stats()["inodes_parked_total"] > 300


def test_the_inode_table_shrinks_after_a_large_listing(source: Path, mount: Mounter) -> None:
    for i in range(3000):
        (source / f"{i}").touch()
    fs = mount("--attr-timeout", "60", patch="mount.MAX_INODES = 2000")
    assert len(os.listdir(fs.path)) == 3000
    wait_until(lambda: fs.stats()["inodes"] <= 2000, 30)
    assert (fs.path / "1").stat().st_size == 0
