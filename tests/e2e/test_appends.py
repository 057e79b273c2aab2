"""Test that an append goes to the end of the file in the source."""

import fcntl
import mmap
import os
from pathlib import Path

from tests.e2e.conftest import Mounter
from tests.harness.source_calls import held
from tests.harness.source_content import QUICK, SIZE, cached, noise, same, shell


def test_an_append_goes_to_the_end_in_the_source(mount: Mounter) -> None:
    fs = mount("--attr-timeout", "60")
    cached(fs, "f", noise())
    for i in range(3):
        shell(fs.source, f"echo source {i} >> f")
        shell(fs.path, f"echo mount {i} >> f")
        same(fs, "f")
    assert (fs.path / "f").read_bytes()[SIZE:].decode().splitlines() == [
        f"{side} {i}" for i in range(3) for side in ("source", "mount")
    ]


def test_an_append_by_an_open_fd_goes_to_the_end_in_the_source(mount: Mounter) -> None:
    fs = mount(*QUICK)
    (fs.source / "f").write_bytes(b"start\n")
    with held(fs.path / "f", os.O_WRONLY | os.O_APPEND) as fd:
        for i in range(3):
            os.write(fd, b"mount\n")
            shell(fs.source, f"echo source {i} >> f")
            same(fs, "f")
        os.write(fd, b"mount\n")
        same(fs, "f")
    assert (
        fs.source / "f"
    ).read_bytes() == b"start\nmount\nsource 0\nmount\nsource 1\nmount\nsource 2\nmount\n"


def test_a_write_is_appended_while_its_file_has_o_append(source: Path, mount: Mounter) -> None:
    """The program sets and clears it after the open. The kernel sees the file's end at 3."""
    file = source / "f"
    file.write_bytes(b"old")
    fs = mount("--coherency", "open", "--attr-timeout", "60")
    fd = os.open(fs.path / "f", os.O_RDWR)
    try:
        assert os.pread(fd, 9, 0) == b"old"
        with file.open("ab") as theirs:
            theirs.write(b"theirs")
        fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
        os.write(fd, b"ours")
        assert file.read_bytes() == b"oldtheirsours"
        fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        os.pwrite(fd, b"new", 3)
        assert file.read_bytes() == b"oldnewirsours"
    finally:
        os.close(fd)


def test_pages_of_a_mapping_of_an_o_append_file_are_not_appended(source: Path, mount: Mounter) -> None:
    file = source / "f"
    file.write_bytes(b"old")
    fs = mount("--coherency", "open", "--attr-timeout", "60")
    fd = os.open(fs.path / "f", os.O_RDWR | os.O_APPEND)
    try:
        with mmap.mmap(fd, 3) as area:
            area[0] = ord("O")
            with file.open("ab") as theirs:
                theirs.write(b"theirs")
            area.flush()
        assert file.read_bytes() == b"Oldtheirs"
    finally:
        os.close(fd)
