"""Use names of any bytes up to 255, paths up to 4,095 bytes, and deeper by chdir."""

import errno
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

from .lab import Lab

CONTROL = b".cleancache"
BYTES = [bytes([value]) for value in range(1, 256) if value != ord("/")]


def run(lab: Lab) -> None:
    """See the module."""
    source = lab.directory("source")
    with lab.mount(source, "--attr-timeout", "0") as fs:
        (source / ".cleancache").mkdir()  # a source that has one already is refused
        (source / ".cleancache" / "inside").touch()
        (fs.path / "any").mkdir()
        _any_bytes(lab, os.fsencode(fs.path / "any"), os.fsencode(source / "any"))
        _control_names(lab, fs.path)
        _long_paths(lab, fs.path)
        _deep(lab, fs.path, source, lab.pick(200, 40))
        _links(lab, os.fsencode(fs.path))
    lab.same("hidden in the source, and still there", os.listdir(source / ".cleancache"), ["inside"])


def _any_bytes(lab: Lab, top: bytes, source: bytes) -> None:
    choose = random.Random(1)
    names = {byte for byte in BYTES if byte != b"."}
    names |= {byte * 255 for byte in BYTES}
    allowed = b"".join(BYTES)
    while len(names) < lab.pick(5000, 1000):
        names.add(bytes(choose.choices(allowed, k=255)))
    names |= {b"-rf" + b"x" * 252, b"\xff\xfe" * 127, b"\n" * 255, b" ", b"...", CONTROL}
    for name in names:
        fd = os.open(top + b"/" + name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        os.write(fd, name)
        os.close(fd)
    lab.same(f"of {len(names):,} names, in the source", set(os.listdir(source)) == names, True)
    lab.same("listed", set(os.listdir(top)) == names, True)
    wrong = sum(Path(os.fsdecode(top + b"/" + name)).read_bytes() != name for name in names)
    lab.same("files with another content", wrong, 0)
    for name in names:
        os.rename(top + b"/" + name, top + b"/" + name[:254] + b"!")
        os.unlink(top + b"/" + name[:254] + b"!")
    lab.same("left after rename and unlink", os.listdir(source), [])
    too_long = top + b"/" + b"x" * 256
    for what, call in {
        "create": lambda: os.open(too_long, os.O_CREAT | os.O_WRONLY),
        "stat": lambda: os.stat(too_long),
        "mkdir": lambda: os.mkdir(too_long),
        "symlink": lambda: os.symlink(b"x", too_long),
        "unlink": lambda: os.unlink(too_long),
    }.items():
        lab.same(f"{what} of a name of 256 bytes", _error(call), "ENAMETOOLONG")
    os.mkdir(top + b"/a")
    lab.same(
        "rename to a name of 256 bytes",
        _error(lambda: os.rename(top + b"/a", too_long)),
        "ENAMETOOLONG",
    )
    os.rmdir(top + b"/a")


def _control_names(lab: Lab, top: Path) -> None:
    (top / "sub").mkdir()
    inside = top / "sub" / ".cleancache"
    inside.mkdir()
    (inside / "stats").write_text("mine")
    lab.same(".cleancache in a subdirectory is a plain one", (inside / "stats").read_text(), "mine")
    lab.same("and listed", os.listdir(top / "sub"), [".cleancache"])
    lab.same("in the root it is not listed", ".cleancache" in os.listdir(top), False)
    moved = top / "moved"
    inside.rename(moved)
    lab.same("nor can it be replaced", _error(lambda: moved.rename(top / ".cleancache")), "EPERM")
    lab.same("nor made", _error((top / ".cleancache").mkdir), "EEXIST")
    lab.same("nor removed", _error(lambda: os.rmdir(top / ".cleancache")), "EPERM")


def _long_paths(lab: Lab, top: Path) -> None:
    path = str(top)
    while len(path) < 4095 - 256:
        path += "/" + "p" * 254
        Path(path).mkdir()
    path += "/" + "q" * (4095 - len(path) - 1)
    Path(path).write_text("far")
    lab.same("a path of 4,095 bytes", Path(path).read_text(), "far")
    lab.same("of 4,096", _error(lambda: os.stat(path + "q")), "ENAMETOOLONG")


def _deep(lab: Lab, top: Path, source: Path, depth: int) -> None:
    """Make directories below each other, each by a name of 255 bytes, and find them by chdir."""
    fd = os.open(top, os.O_RDONLY)
    for _ in range(depth):
        os.mkdir(b"d" * 255, dir_fd=fd)
        below = os.open(b"d" * 255, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    file = os.open("f", os.O_CREAT | os.O_RDWR, dir_fd=fd)
    os.write(file, b"deep")
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    lab.same(f"read below {depth * 256:,} bytes of path", os.pread(file, 10, 0), b"deep")
    os.close(file)
    os.close(fd)
    found = subprocess.run(
        ["find", source, "-name", "f"], capture_output=True, check=True, cwd="/"
    ).stdout.count(b"\n")
    lab.same("in the source", found, 1)
    subprocess.run(["rm", "-rf", top / ("d" * 255)], check=True)
    lab.same("left by rm -rf", (source / ("d" * 255)).exists(), False)


def _links(lab: Lab, top: bytes) -> None:
    target = b"t/" * 2047 + b"t"
    os.symlink(target, top + b"/link")
    lab.same("a symbolic link's target of 4,095 bytes", os.readlink(top + b"/link") == target, True)
    lab.same("of 4,096", _error(lambda: os.symlink(target + b"t", top + b"/more")), "ENAMETOOLONG")


def _error(call: Callable[[], object]) -> str:
    try:
        call()
    except OSError as exc:
        return errno.errorcode[exc.errno or 0]
    return "none"
