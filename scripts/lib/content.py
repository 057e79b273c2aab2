"""Write files that compress well, and files that do not compress."""

import os
import sysconfig
from pathlib import Path


def write_compressible(path: Path, size: int) -> None:
    """Write Python source, over and over, from a different byte on each time."""
    stdlib = Path(sysconfig.get_path("stdlib"))
    text = b"".join(file.read_bytes() for file in sorted(stdlib.glob("*.py")))
    with path.open("wb") as file:
        shift = 0
        while file.tell() < size:
            file.write(text[shift : shift + size - file.tell()])
            shift = (shift + 61) % 4096


def write_random(path: Path, size: int) -> None:
    """Write bytes that no compressor makes smaller."""
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(os.urandom(min(1 << 24, size - file.tell())))
