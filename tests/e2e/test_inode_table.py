"""Test that a mount knows many files with few descriptors and little memory."""

import os
from pathlib import Path

from tests.e2e.conftest import Mounter
from tests.harness.mounting import wait_until

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
