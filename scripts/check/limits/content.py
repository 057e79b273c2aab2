"""Make mixed data: text, noise and zeros, in files from a few bytes to many MiB."""

import os
import random
import zlib
from pathlib import Path

CHUNK = 1 << 20


def text(choose: random.Random, size: int) -> bytes:
    """Make lines of words: they compress as programs' source does."""
    words = [
        b"%s%d" % (stem, choose.randrange(1000)) for stem in (b"read", b"page_", b"self.", b"    ")
    ]
    lines = [
        b" ".join(choose.choices(words, k=9)) + b" %x\n" % choose.getrandbits(48) for _ in range(400)
    ]
    body = b"".join(lines)
    return (body * (size // len(body) + 1))[:size]


def write_mixed(path: Path, size: int, choose: random.Random) -> int:
    """Fill a file with runs of the three kinds, in turn. Returns its checksum (CRC-32)."""
    kinds = ("text", "noise", "zeros")
    crc = 0
    with path.open("wb", buffering=0) as file:
        at = 0
        while at < size:
            length = min(choose.choice((4096, 65536, CHUNK, 3 * CHUNK)), size - at)
            kind = kinds[choose.randrange(3)]
            if kind == "zeros":
                data = bytes(length)
                file.seek(length, os.SEEK_CUR)
            else:
                data = text(choose, length) if kind == "text" else choose.randbytes(length)
                file.write(data)
            crc = zlib.crc32(data, crc)
            at += length
        file.truncate(size)
    return crc


def make_set(directory: Path, total: int, seed: int = 1) -> dict[Path, tuple[int, int]]:
    """Make files of so many bytes in all. Returns relative name -> size and checksum."""
    choose = random.Random(seed)
    made: dict[Path, tuple[int, int]] = {}
    left = total
    while left > 0:
        size = min(choose.choice((3000, 20_000, 300_000, 5 << 20, 40 << 20, 90 << 20)), left)
        name = Path(f"f{len(made)}")
        made[name] = (size, write_mixed(directory / name, size, choose))
        left -= size
    return made


def read_and_drop(path: Path, size: int, crc: int, chunk: int = CHUNK) -> None:
    """Read a file, hold it against its checksum, have the kernel drop its pages. Raises ValueError."""
    fd = os.open(path, os.O_RDONLY)
    try:
        found, got = 0, 0
        while data := os.read(fd, chunk):
            found = zlib.crc32(data, found)
            got += len(data)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    if (got, found) != (size, crc):
        raise ValueError(f"{path}: read {got} bytes with checksum {found}, not {size} with {crc}")
