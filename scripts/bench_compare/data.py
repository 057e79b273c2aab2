"""Data sets: text that compresses like source code, random bytes, the kernel's source tree."""

import os
import sysconfig
from pathlib import Path

from .machine import Skipped, call, need

SMALL_TREE = ("drivers/*.[chS]", "sound/*.[ch]", "Documentation/*.rst", "Documentation/*.txt",
              "tools/*.[ch]", "fs/*.[ch]", "net/*.[ch]", "arch/*.dts", "arch/*.dtsi", "drivers/*.json",
              "tools/*.json")  # fmt: skip
"""Left out for --quick: a fifth remains, and it can still be configured."""


def write_text(path: Path, size: int) -> None:
    """Python source, over and over, from a different byte on each time: no two pages are equal."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = b"".join(file.read_bytes() for file in sorted(stdlib.glob("*.py")))
    with path.open("wb") as file:
        shift = 0
        while file.tell() < size:
            file.write(text[shift : shift + size - file.tell()])
            shift = (shift + 61) % 4096


def write_random(path: Path, size: int) -> None:
    """What no compressor gets smaller."""
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(os.urandom(min(1 << 24, size - file.tell())))


def tarball() -> Path:
    """The kernel's source as Debian packs it."""
    found = sorted(Path("/usr/src").glob("linux-source-*.tar.xz"))
    if not found:
        raise Skipped("no kernel source (Debian package linux-source)")
    return found[-1]


def unpack_tree(target: Path, small: bool) -> Path:
    """Unpack the kernel's source, or a part of it."""
    need("tar", "xz")
    target.mkdir(parents=True)
    without = [f"--exclude=*/{pattern}" for pattern in SMALL_TREE] if small else []
    call("tar", "xf", tarball(), "--strip-components=1", "-C", target, *without)
    return target


def count_files(tree: Path) -> tuple[int, int]:
    """Regular files below, and their bytes."""
    count = size = 0
    for top, _, names in os.walk(tree):
        for name in names:
            status = os.lstat(Path(top) / name)
            count += 1
            size += status.st_size
    return count, size
