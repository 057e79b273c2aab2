"""Make data sets: text that compresses like source code, random bytes, the kernel's source tree."""

import os
from pathlib import Path

from .machine import SkippedError, call, need

_DRIVERS = [
    "acpi", "ata", "char", "clk", "crypto", "firmware", "gpio", "hwmon", "i2c", "iio",
    "infiniband", "input", "md", "media", "mfd", "misc", "mmc", "mtd", "nvme", "phy", "pinctrl",
    "platform", "power", "regulator", "s390", "scsi", "soc", "spi", "staging", "target",
    "thermal", "tty", "usb", "video",
]  # fmt: skip
_ARCHITECTURES = [
    "alpha", "arc", "arm", "csky", "hexagon", "ia64", "loongarch", "m68k", "microblaze", "mips",
    "nios2", "openrisc", "parisc", "powerpc", "riscv", "s390", "sh", "sparc", "um", "xtensa",
]  # fmt: skip
TREES: dict[str, tuple[str, ...]] = {
    "whole": (),
    "small": (),
    "part": (
        "Documentation/*.rst", "Documentation/*.txt", "Documentation/*.yaml", "sound/*.[ch]",
        "tools/perf/*", "tools/testing/*", "arch/*.dts", "arch/*.dtsi",
        *(f"drivers/{name}/*.[chS]" for name in _DRIVERS),
        *(f"arch/{name}/*.[chS]" for name in _ARCHITECTURES),
    ),
}  # fmt: skip
"""What is left out of the kernel's source. A part of it can still be configured and compiled."""
SMALL_TREE = ("drivers/gpu/drm/amd", "include/linux", "kernel", "mm")
"""What the small tree has: large files above all, few enough for --quick."""


def tarball() -> Path:
    """Find the kernel's source as Debian packs it."""
    found = sorted(Path("/usr/src").glob("linux-source-*.tar.xz"))
    if not found:
        raise SkippedError("no kernel source (Debian package linux-source)")
    return found[-1]


def unpack_tree(target: Path, which: str) -> Path:
    """Unpack the kernel's source, or a part of it: one of TREES."""
    need("tar", "xz")
    target.mkdir(parents=True)
    without = [f"--exclude=*/{pattern}" for pattern in TREES[which]]
    only = (
        ["--wildcards", *(f"linux-source-*/{name}" for name in SMALL_TREE)] if which == "small" else []
    )
    call("tar", "xf", tarball(), "--strip-components=1", "-C", target, *without, *only)
    return target


def count_files(tree: Path) -> tuple[int, int]:
    """Count the regular files below, and their bytes."""
    count = size = 0
    for top, _, names in os.walk(tree):
        for name in names:
            status = os.lstat(Path(top) / name)
            count += 1
            size += status.st_size
    return count, size
