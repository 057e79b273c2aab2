"""Test that every way to copy a control file copies all of it."""

import json
import mmap
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cleanfs.sizes import parse_size
from tests.e2e.conftest import SMALL_CACHES, Mounter
from tests.harness.control_files import fill, refused
from tests.harness.mounting import MountedFs, mounted


def by_sendfile(path: Path, to: Path) -> None:
    with path.open("rb") as source, to.open("wb") as target:
        while os.sendfile(target.fileno(), source.fileno(), None, 1 << 20):
            pass


def by_splice(path: Path, to: Path) -> None:
    reader, writer = os.pipe()
    with path.open("rb") as source, to.open("wb") as target:
        while count := os.splice(source.fileno(), writer, 4096):
            os.splice(reader, target.fileno(), count)
    os.close(reader)
    os.close(writer)


def by_copy_file_range(path: Path, to: Path) -> None:
    with path.open("rb") as source, to.open("wb") as target:
        while os.copy_file_range(source.fileno(), target.fileno(), 1 << 20):
            pass


def by_private_mapping(path: Path, to: Path) -> None:
    with path.open("rb") as source, mmap.mmap(source.fileno(), 0, mmap.MAP_PRIVATE) as mapping:
        to.write_bytes(mapping)


def by_pread_from_the_end(path: Path, to: Path) -> None:
    with path.open("rb") as source:
        end = os.lseek(source.fileno(), 0, os.SEEK_END)
        second = os.pread(source.fileno(), end, end // 2)
        to.write_bytes(os.pread(source.fileno(), end // 2, 0) + second)


def by(command: str) -> Callable[[Path, Path], None]:
    def copy(path: Path, to: Path) -> None:
        if shutil.which(command.split()[0]) is None:
            pytest.skip(f"no {command.split()[0]}")
        subprocess.run(["sh", "-ec", command.format(path=path, to=to)], check=True, timeout=20)

    return copy


WAYS: dict[str, Callable[[Path, Path], object]] = {
    "shutil.copyfile": shutil.copyfile,
    "shutil.copy2": shutil.copy2,
    "sendfile": by_sendfile,
    "splice": by_splice,
    "private mapping": by_private_mapping,
    "pread from the end": by_pread_from_the_end,
    "cp": by("cp {path} {to}"),
    "cp, sparse": by("cp --sparse=always --reflink=auto {path} {to}"),
    "cat": by("cat {path} > {to}"),
    "head": by("head -c 1M {path} > {to}"),
    "tail": by("tail -n +1 {path} > {to}"),
    "tail of all lines": by("tail -n 100000 {path} > {to}"),
    "dd": by("dd if={path} of={to} bs=64K status=none"),
    "tar": by("tar cf - {path} 2> /dev/null | tar xOf - > {to}"),
    "curl": by("curl -s file://{path} > {to}"),
    "rsync": by("rsync {path} {to}"),
}  # fmt: skip


@pytest.fixture(scope="module")
def filled_fs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MountedFs]:
    """Provide one mount with pages in its caches, for all ways to copy."""
    top = tmp_path_factory.mktemp("filled")
    for name in ("source", "mnt"):
        (top / name).mkdir()
    with mounted(top / "source", top / "mnt", *SMALL_CACHES) as fs:
        fill(fs)
        yield fs


@pytest.mark.parametrize("way", WAYS)
def test_every_way_to_copy_a_file_copies_all_of_it(
    filled_fs: MountedFs, tmp_path: Path, way: str
) -> None:
    fs, to = filled_fs, tmp_path / "copy"
    with fs.control("stats.json").open() as others:  # it has another size and stays open
        json.load(others)
        for text in ("2M", "123456K", "1234567K", "8M"):
            assert refused(fs, "pool_limit", text) == ""
            WAYS[way](fs.control("stats.json"), to)
            assert json.loads(to.read_text())["pool_limit"] == parse_size(text)
            WAYS[way](fs.control("pool_limit"), to)
            assert to.read_text() == f"{parse_size(text)}\n"
        others.seek(0)
        assert json.load(others)["pool_limit"] == 8 << 20


def test_a_copy_within_the_mount_is_whole(mount: Mounter) -> None:
    fs = mount()
    for copy in (by_copy_file_range, shutil.copyfile, WAYS["cp"]):
        copy(fs.control("stats.json"), fs.path / "copy")
        assert json.loads((fs.path / "copy").read_text())["source"] == str(fs.source)


def test_concurrent_copies_are_complete(mount: Mounter, tmp_path: Path) -> None:
    fs = mount()
    names = ("stats.json", "pool_limit")

    def copies(number: int) -> None:
        for turn in range(30):
            if number == 0:
                assert refused(fs, "pool_limit", ("2M", "1234567K")[turn % 2]) == ""
                continue
            for name in names:
                shutil.copyfile(fs.control(name), tmp_path / f"{number}")
                text = (tmp_path / f"{number}").read_text()
                limit = json.loads(text)["pool_limit"] if name == "stats.json" else int(text)
                assert limit in (2 << 20, 64 << 20, 1234567 << 10)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(copies, number) for number in range(4)]:
            done.result(60)
    inodes = set()
    for _ in range(2):
        st = fs.control("stats.json").stat()
        inodes.add(st.st_ino)
    assert len(inodes) == 1  # cp and rsync compare it with that of the file they open
