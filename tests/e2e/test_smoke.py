"""Test the shortest path through all parts."""

import os
from pathlib import Path

from tests.e2e.conftest import Mounter


def test_pages_come_back_from_cleancache_without_the_source(source: Path, mount: Mounter) -> None:
    text = b"".join(b"%07d\n" % i for i in range(1 << 20))
    (source / "f").write_bytes(text)
    fs = mount()
    assert (fs.path / "f").read_bytes() == text
    assert fs.stats()["puts"] > 1500
    fs.drop_kernel()
    before = fs.stats()["source_read_bytes"]
    assert (fs.path / "f").read_bytes() == text
    after = fs.stats()
    assert after["source_read_bytes"] == before
    assert after["succ_gets"] > 1500


def test_a_write_goes_through_and_flushes(source: Path, mount: Mounter) -> None:
    (source / "f").write_bytes(b"a" * 100_000)
    fs = mount()
    assert (fs.path / "f").read_bytes() == b"a" * 100_000
    fd = os.open(fs.path / "f", os.O_WRONLY)
    os.pwrite(fd, b"B" * 5000, 50_000)
    os.close(fd)
    expected = b"a" * 50_000 + b"B" * 5000 + b"a" * 45_000
    assert (source / "f").read_bytes() == expected
    fs.drop_kernel()
    assert (fs.path / "f").read_bytes() == expected
    assert fs.stats()["flushes"] > 0
