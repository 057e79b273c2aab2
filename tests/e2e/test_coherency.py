"""Test that an open sees the source's bytes after changes through the mount and behind its back."""

import os
import subprocess
from pathlib import Path

import pytest

from tests.e2e.conftest import Mounter
from tests.harness.mounting import mounted
from tests.harness.source_calls import held
from tests.harness.source_content import QUICK, SIZE, cached, expire, noise, same, shell

IN_PLACE = {
    "append": "echo x >> f",
    "cut": "truncate -s 5 f",
    "cut to a page": "truncate -s 8192 f",
    "empty": ": > f",
    "grow": "truncate -s +10000 f",
    "cut and grow": "truncate -s 5 f; truncate -s 2000123 f",
    "middle": "printf 0123456789 | dd of=f conv=notrunc bs=1 seek=1000000",
    "first byte": "printf '\\001\\002' | dd of=f conv=notrunc bs=1",
    "last byte": "printf 'z' | dd of=f conv=notrunc bs=1 seek=2000122",
    "rewrite": "head -c 2000123 /dev/zero > f",
    "punch a hole": "fallocate -p -o 500000 -l 100000 f",
    "link, change by the link": "ln f g; echo x >> g; rm g",
}


@pytest.mark.parametrize("where", ["mount", "source"])
@pytest.mark.parametrize("change", IN_PLACE)
def test_a_change_in_place_is_seen_by_the_next_open(share: Mounter, change: str, where: str) -> None:
    fs = share("--attr-timeout", "60")  # so that no timeout can help
    cached(fs, "f", noise())
    flushes = fs.stats()["flushes"]
    shell(fs.path if where == "mount" else fs.source, IN_PLACE[change])
    same(fs, "f")
    assert fs.stats()["flushes"] > flushes
    fs.drop_kernel()
    same(fs, "f")


def test_a_change_that_restores_size_and_mtime_is_found(mount: Mounter) -> None:
    fs = mount("--attr-timeout", "60")
    cached(fs, "f", noise())
    before = (fs.source / "f").stat()
    with held(fs.source / "f", os.O_WRONLY) as fd:
        os.pwrite(fd, b"changed", 1_000_000)
    os.utime(fs.source / "f", ns=(before.st_atime_ns, before.st_mtime_ns))
    after = (fs.source / "f").stat()
    assert (after.st_size, after.st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    found = fs.stats()["changes_found"]
    same(fs, "f")
    assert fs.stats()["changes_found"] > found


@pytest.mark.parametrize("kind", ["disk", "tmpfs"])
def test_changes_within_one_tick_of_the_clock_are_seen(source: Path, mount: Mounter, kind: str) -> None:
    if kind == "tmpfs":
        subprocess.run(["mount", "-t", "tmpfs", "none", source], check=True, timeout=10)
    try:
        fs = mount("--attr-timeout", "60")
        with held(source, os.O_RDONLY):
            for i in range(300):
                with held(source / "f", os.O_WRONLY | os.O_CREAT) as fd:
                    os.pwrite(fd, b"%06d" % i, 5000)
                assert (fs.path / "f").read_bytes()[5000:] == b"%06d" % i
    finally:
        if kind == "tmpfs":
            subprocess.run(["umount", "-l", source], check=True, timeout=10)


def test_changes_by_turns_within_one_tick_are_seen(mount: Mounter) -> None:
    fs = mount("--attr-timeout", "60")
    (fs.source / "f").write_bytes(bytes(10_000))
    model = bytearray(10_000)
    for i in range(200):
        for side in (fs.source, fs.path):
            with held(side / "f", os.O_RDWR) as fd:
                assert os.pread(fd, 20_000, 0) == model
                model[i * 40 : i * 40 + 5] = b"%05d" % (i * 2 + (side == fs.path))
                os.pwrite(fd, model[i * 40 : i * 40 + 5], i * 40)
                assert os.pread(fd, 20_000, 0) == model
    assert (fs.source / "f").read_bytes() == (fs.path / "f").read_bytes() == model


def test_stat_shows_the_change_after_the_timeout(mount: Mounter) -> None:
    fs = mount(*QUICK)
    cached(fs, "f", noise())
    with held(fs.path / "f") as fd:
        shell(fs.source, "truncate -s 7777 f; chmod 600 f")
        expire()
        assert os.fstat(fd).st_size == (fs.path / "f").stat().st_size == 7777
        assert os.fstat(fd).st_ctime_ns == (fs.source / "f").stat().st_ctime_ns
        assert os.pread(fd, SIZE, 0) == noise()[:7777]


def test_a_listing_with_attributes_also_finds_a_change(mount: Mounter) -> None:
    fs = mount(*QUICK)
    cached(fs, "f", noise())
    found = fs.stats()["changes_found"]
    shell(fs.source, "echo x >> f")
    expire()
    with os.scandir(fs.path) as entries:
        assert [entry.stat().st_size for entry in entries] == [SIZE + 2]
    assert fs.stats()["changes_found"] == found + 1


def test_an_unchanged_file_is_not_read_from_the_source_again(mount: Mounter) -> None:
    fs = mount(*QUICK)
    cached(fs, "f", bytes(range(256)) * 8000)
    before = fs.stats()
    for _ in range(3):
        expire()
        fs.drop_kernel()
        assert len((fs.path / "f").read_bytes()) == 2_048_000
    after = fs.stats()
    for name in ("source_read_bytes", "flushes", "changes_found", "doubtful_flushes"):
        assert after[name] == before[name], name
    assert after["succ_gets"] > before["succ_gets"]


def test_own_metadata_changes_flush_at_most_once(mount: Mounter) -> None:
    fs = mount(*QUICK)
    cached(fs, "f", noise())
    shell(fs.path, "chmod 600 f; chown 1:1 f; ln f g; mv f h; rm g; setfattr -n user.x -v y h; touch h")
    expire()
    assert (fs.path / "h").read_bytes() == noise()  # the racy stamps of the changes cost one flush
    before = fs.stats()
    fs.drop_kernel()
    assert (fs.path / "h").read_bytes() == noise()
    after = fs.stats()
    for name in ("source_read_bytes", "changes_found", "doubtful_flushes"):
        assert after[name] == before[name], name


def test_own_changes_do_not_count_as_changes_found(mount: Mounter) -> None:
    fs = mount(*QUICK)
    for number in range(20):
        path = fs.path / str(number)
        path.write_bytes(noise())
        assert path.read_bytes() == noise()
        shell(
            fs.path,
            f"echo x >> {number}; ln {number} l; mv {number} m; rm l; mv m {number}; touch {number}",
        )
        assert path.read_bytes() == noise() + b"x\n"
        path.write_bytes(b"short")  # truncates first
        assert path.read_bytes() == b"short"
    stats = fs.stats()
    assert stats["changes_found"] == 0
    assert stats["doubtful_flushes"] > 0, "the stamps of a recent change prove nothing"


def test_with_coherency_none_the_source_is_not_checked(mount: Mounter) -> None:
    fs = mount("--coherency", "none", *QUICK)
    cached(fs, "f", b"A" * SIZE)
    with held(fs.source / "f", os.O_WRONLY) as fd:
        os.pwrite(fd, b"B" * SIZE, 0)
    expire()
    fs.drop_kernel()
    before = fs.stats()
    assert (fs.path / "f").read_bytes() == b"A" * SIZE
    after = fs.stats()
    assert after["changes_found"] == after["doubtful_flushes"] == 0
    assert after["source_read_bytes"] == before["source_read_bytes"]
    fs.drop()
    assert (fs.path / "f").read_bytes() == b"B" * SIZE


@pytest.mark.parametrize("change", ["append", "cut", "middle", "rewrite"])
def test_with_coherency_none_changes_through_the_mount_are_seen(mount: Mounter, change: str) -> None:
    fs = mount("--coherency", "none", "--attr-timeout", "60")
    cached(fs, "f", noise())
    shell(fs.path, IN_PLACE[change])
    same(fs, "f")


def test_two_mounts_of_one_source_see_changes_of_each_other(
    source: Path, mount: Mounter, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    one = mount("--attr-timeout", "60")
    with mounted(source, tmp_path / "second", "--attr-timeout", "60") as two:
        (source / "f").write_bytes(bytes(SIZE))
        for i, (writer, reader) in enumerate([(one, two), (two, one)] * 10):
            with held(writer.path / "f", os.O_WRONLY) as fd:
                os.pwrite(fd, b"%d" % i * 300, i * 1000)
            same(reader, "f")
