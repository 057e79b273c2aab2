"""Test birth times, lsattr and chattr, and the flags of setxattr on a real mount."""

import errno
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.conftest import Place
from tests.harness.mounting import as_user

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may set these flags")


def run(*words: str | Path) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    assert not done.returncode, done.stderr
    return done.stdout


def flags(path: Path) -> str:
    return run("lsattr", "-d", path).split()[0]


@contextmanager
def flag(path: Path, name: str) -> Iterator[None]:
    run("chattr", f"+{name}", path)
    try:
        yield
    finally:
        run("chattr", f"-{name}", path)


def test_birth_times_are_the_sources(place: Place) -> None:
    (place.source / "f").write_bytes(b"1")
    (place.source / "d").mkdir()
    for name in ("f", "d", "."):
        made = run("stat", "-c", "%W %w", place.source / name)
        assert made == run("stat", "-c", "%W %w", place.path / name)
        assert not made.startswith("0 "), "the source has none"
    os.utime(place.path / "f", ns=(-1_500_000_001, -2_500_000_001))
    formats = "%a %u %g %s %b %h %x %y"
    assert run("stat", "-c", formats, place.path / "f") == run(
        "stat", "-c", formats, place.source / "f"
    )


@needs_root
def test_flags_are_the_sources(place: Place) -> None:
    (place.source / "f").write_bytes(b"1")
    for name in ("f", "."):
        assert flags(place.path / name) == flags(place.source / name)
        with flag(place.path / name, "d"):
            assert "d" in flags(place.source / name)
            assert "d" in flags(place.path / name)
        assert "d" not in flags(place.source / name)


@needs_root
def test_what_is_immutable_cannot_be_changed(place: Place) -> None:
    path = place.path / "f"
    path.write_bytes(b"1")
    with flag(path, "i"):
        assert "i" in flags(place.source / "f")
        for call in (path.unlink, path.touch, lambda: path.write_bytes(b"2")):
            with pytest.raises(PermissionError):
                call()
    path.write_bytes(b"2")
    with flag(path, "a"):
        with pytest.raises(PermissionError):
            path.write_bytes(b"3")
        with path.open("ab") as file:
            file.write(b"4")
    assert path.read_bytes() == b"24"


@needs_root
def test_users_may_change_what_the_source_lets_them(place: Place) -> None:
    """The daemon is root, and must not lend its rights."""
    code = (
        "import fcntl\nfd = os.open('f', os.O_RDONLY)\n"
        "old = fcntl.ioctl(fd, 0x80086601, bytes(8))\n"
        "new = (int.from_bytes(old, sys.byteorder) ^ {bit}).to_bytes(8, sys.byteorder)\n"
        "fcntl.ioctl(fd, 0x40086602, new); print('set')"
    )
    no_dump, immutable, append_only, journal_data = 0x40, 0x10, 0x20, 0x4000
    for top in (place.source, place.plain):
        top.chmod(0o777)
        (top / "f").write_bytes(b"1")
        os.chown(top / "f", 12345, 23456)
    for bit in (no_dump, immutable, append_only, journal_data):
        on_mount, on_plain = (
            as_user(top, "import sys\n" + code.format(bit=bit)) for top in (place.path, place.plain)
        )
        assert on_mount == on_plain, hex(bit)
        others = as_user(place.path, "import sys\n" + code.format(bit=bit), uid=54321)
        assert others == errno.errorcode[errno.EPERM]
    assert flags(place.source / "f") == flags(place.plain / "f")


def test_other_ioctls_are_refused(place: Place) -> None:
    (place.path / "f").write_bytes(b"1")
    assert not os.isatty(os.open(place.path / "f", os.O_RDONLY))
    assert run("lsattr", place.path / "f")  # and do not make the kernel refuse these, too


def test_xattrs_are_created_or_replaced_only(place: Place) -> None:
    for top in (place.path, place.plain):
        (top / "f").write_bytes(b"1")

    def outcome(top: Path, name: str, flag: int) -> int:
        try:
            os.setxattr(top / "f", name, b"value", flag)
        except OSError as exc:
            return exc.errno or 0
        return 0

    create, replace = os.XATTR_CREATE, os.XATTR_REPLACE
    for flag in (replace, create | replace, create, create, replace, create | replace, 0):
        assert outcome(place.path, "user.a", flag) == outcome(place.plain, "user.a", flag)
    assert os.getxattr(place.source / "f", "user.a") == b"value"
